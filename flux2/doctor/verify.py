"""Compare the files of a model with the hashes that the Hub gave for them: `python -m flux2.doctor --verify MODEL`.

huggingface_hub names each file in its cache after its hash, and keeps the hash of a file that it downloads to another
folder in `.cache/huggingface`. It is the SHA-256 of large files, and what git computes (SHA-1) of small ones. So the
comparison needs no network.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import LocalEntryNotFoundError

from flux2.models.variants import VARIANTS
from flux2.utils.files import user_path
from flux2.weights.modelspec import data_hash, header_hash
from flux2.weights.safetensors_files import read_header
from flux2.weights.sources import WeightsError, looks_local

HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


@dataclass(frozen=True)
class Comparison:
    """Result for a file. `passed` is None if no hash is known."""

    file: str
    passed: bool | None
    detail: str


def location(model: str) -> tuple[Path, str]:
    """Return the file or folder of a variant, a repository or a path, and its repository if it is in the cache.

    Raises ValueError if it does not exist, or has no hashes because it came with the code.
    """
    if model in VARIANTS and not VARIANTS[model].repo:
        raise ValueError(f"--verify {model}: it is embedded, so git has its hashes. Run `git status` on its folder")
    where = VARIANTS[model].repo if model in VARIANTS else model
    if looks_local(where):
        place = user_path(where)
        if not place.exists():
            raise ValueError(f"--verify {model}: must be a model ({', '.join(VARIANTS)}), a repository id or a path")
        return place, ""
    try:
        return Path(huggingface_hub.snapshot_download(where, local_files_only=True)), where
    except LocalEntryNotFoundError as error:
        raise ValueError(f"--verify {model}: {where} is not downloaded. Run `hf download {where}`") from error


def known_hash(file: Path) -> str | None:
    """Return the hash that the Hub gave for a file, from the cache or next to a download to another folder.

    A file that the Hub does not know, such as an export, may have the hash of its tensors in its header.
    """
    blob = file.resolve()
    if blob.parent.name == "blobs" and HASH.fullmatch(blob.name):
        return blob.name
    file = file.absolute()
    for folder in file.parents:
        about = folder / ".cache" / "huggingface" / "download" / f"{file.relative_to(folder)}.metadata"
        if about.is_file():
            lines = about.read_text(errors="replace", encoding="utf-8").splitlines()
            return lines[1] if len(lines) > 1 and HASH.fullmatch(lines[1]) else None
    return header_hash(read_header(file)[1]) if file.suffix == ".safetensors" else None


def hash_like(file: Path, known: str) -> str:
    """Return the hash of a file of the kind of `known`."""
    if known.startswith("0x"):
        return data_hash(file)
    digest = hashlib.sha256()
    if len(known) == hashlib.sha1(usedforsecurity=False).digest_size * 2:
        digest = hashlib.sha1(f"blob {file.stat().st_size}\0".encode(), usedforsecurity=False)
    with file.open("rb") as handle:
        hashlib.file_digest(handle, lambda: digest)
    return digest.hexdigest()


def compare_files(model: str) -> Iterator[Comparison]:
    """Yield the result for each file of a model as soon as it is known. Raises ValueError as `location` does."""
    place, repo = location(model)
    again = f"hf download {repo}" if repo else "what wrote it"
    files = [place] if place.is_file() else sorted(file for file in place.rglob("*") if not file.is_dir())
    for file in files:
        name = file.name if place.is_file() else file.relative_to(place).as_posix()
        if name.startswith(".cache/"):
            continue
        try:
            known = known_hash(file)
            is_equal = None if known is None else hash_like(file, known) == known
        except (OSError, WeightsError) as error:
            reason = getattr(error, "strerror", None) or error
            yield Comparison(name, False, f"cannot be read ({reason}): run {again} again")
            continue
        remedy = f"differs from its hash {known}: delete {file.resolve()} and run {again} again"
        yield Comparison(
            name, is_equal, {True: "as it was published", False: remedy, None: "no hash is known"}[is_equal]
        )
