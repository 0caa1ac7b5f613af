"""Find a model's files: in a Hugging Face repository, a folder in the published layout, or one safetensors file."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import huggingface_hub
from huggingface_hub import errors as hub_errors

from flux2.models.variants import Variant, get_variant
from flux2.utils.files import atomic_write, user_path
from flux2.utils.json_files import read_json

TINY_FOLDER = Path(__file__).parent.parent / "assets" / "tiny"
Part = Literal["transformer", "vae", "text_encoder", "tokenizer"]
log = logging.getLogger(__name__)


class WeightsError(ValueError):
    """A model's files are absent, unreadable, or those of another model."""


class Fingerprints:
    """Fingerprints of model parts in a file, by the location of the part in the configuration.

    They identify cached results of an encoder even if its files are gone: removed to make room, or never downloaded to
    the machine that trains. They are those of the files that were last there. With `file=None` nothing is remembered.
    """

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._kept: dict[str, str] = {}
        try:
            if file is not None and file.exists():
                self._kept = {str(name): str(value) for name, value in read_json(file).items()}
        except (OSError, ValueError, AttributeError) as error:
            log.warning("%s cannot be read (%s): fingerprints are computed from the model's files", file, error)
        self._found = dict(self._kept)

    def get(self, name: str) -> str | None:
        return self._found.get(name)

    def set(self, name: str, fingerprint: str) -> None:
        self._found[name] = fingerprint

    def save(self) -> None:
        """Write new fingerprints to the file. Raises OSError if that is not possible."""
        if self._file is None or self._found == self._kept:
            return
        with atomic_write(self._file) as unfinished:
            unfinished.write_text(json.dumps(self._found, indent=1, sort_keys=True), encoding="utf-8")
        self._kept = dict(self._found)


@dataclass(frozen=True)
class ModelSource:
    """The locations of a model's parts.

    `path` is a repository id, a folder in the published layout, or a safetensors file with the transformer. The
    autoencoder and the text encoder come from there too unless they have their own id, folder or (the autoencoder)
    file; if `path` is a file, they come from the variant's repository. `fingerprints` remembers those of parts whose
    files are gone.
    """

    variant: Variant
    path: str
    autoencoder: str | None = None
    text_encoder: str | None = None
    fingerprints: Fingerprints | None = field(default=None, compare=False, repr=False)

    def where(self, part: Part) -> str:
        setting = self.key(part).removeprefix("model.")
        if setting == "path" and part != "transformer" and self.path.endswith(".safetensors"):
            return self.variant.repo or str(TINY_FOLDER)
        return str(getattr(self, setting))

    def key(self, part: Part) -> str:
        """Return the setting that gives the location of a part, for errors."""
        setting = {"vae": "autoencoder", "transformer": "path"}.get(part, "text_encoder")
        return f"model.{setting}" if getattr(self, setting) else "model.path"

    def file(self, part: Part) -> Path | None:
        """Return a part's single file, None if its location is no file. Raises WeightsError if it does not exist."""
        where = self.where(part)
        if not where.endswith(".safetensors"):
            return None
        if part not in ("transformer", "vae"):
            raise WeightsError(f"{self.key(part)}={where!r} must be a repository id or a folder with {part}/ in it")
        if not user_path(where).is_file():
            raise WeightsError(f"{self.key(part)}={where!r} does not exist")
        return user_path(where)

    def folder(self, part: Part) -> Path:
        """Return the local folder of a part, downloaded if the location is a repository id."""
        where = self.where(part)
        if not looks_local(where):
            return Path(download(where, part)) / part
        root = user_path(where)
        if (root / part).is_dir():
            return root / part
        if root.is_dir():
            raise WeightsError(
                f"{self.key(part)}={where!r}: there is no folder {root / part}. Give a folder in the published layout "
                "(transformer/, vae/, text_encoder/, tokenizer/)"
            )
        what = "does not exist" if not root.exists() else "is neither a folder nor a .safetensors file"
        if root.suffix.lower() == ".gguf":
            what = "is GGUF, which is not read"
        raise WeightsError(f"{self.key(part)}={where!r} {what}. Give a repository id, a folder or a .safetensors file")


def model_source(
    name: str, path: str | None = None, autoencoder: str | None = None, text_encoder: str | None = None
) -> ModelSource:
    """Return the source of the model `name`: at `path`, by default the embedded model or the published repository."""
    chosen = get_variant(name)
    for key, value in {"path": path, "autoencoder": autoencoder, "text_encoder": text_encoder}.items():
        if value is not None and not isinstance(value, str):
            raise ValueError(f"model.{key}={value!r} must be a repository id, a folder or a file")
    return ModelSource(chosen, path or chosen.repo or str(TINY_FOLDER), autoencoder, text_encoder)


def looks_local(where: str) -> bool:
    """Return whether `where` is a path and not a repository: it exists, or is not of the form `owner/name`."""
    return user_path(where).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", where) or where.startswith(".")


def download(repo: str, part: Part) -> str:
    """Return the snapshot folder of one part of a repository, downloaded. Raises WeightsError with a remedy."""
    try:
        snapshot = huggingface_hub.snapshot_download(repo, allow_patterns=[f"{part}/*"])
    except hub_errors.GatedRepoError as error:
        raise WeightsError(
            f"{repo} is gated, and you are not logged in or have not accepted its license. Open "
            f"https://huggingface.co/{repo}, accept the license (non-commercial for FLUX.2-dev and the 9B models), "
            "run `hf auth login` and start again."
        ) from error
    except hub_errors.RepositoryNotFoundError as error:
        raise WeightsError(
            f"{repo} was not found on the Hugging Face Hub, or you are not logged in and it is gated. Check the name; "
            f"then run `hf auth login` and accept the license on https://huggingface.co/{repo}."
        ) from error
    except (hub_errors.HfHubHTTPError, OSError, ValueError) as error:
        raise WeightsError(
            f"{repo} could not be reached and its {part}/ is not in the local cache ({type(error).__name__}). Go "
            "online once to download it, or give a local folder or file: model.path=/path/to/FLUX.2."
        ) from error
    if not (Path(snapshot) / part).is_dir():  # the repository lacks it, or an incomplete cache was used offline
        raise WeightsError(
            f"{repo} has no {part}/, or it is not in the local cache and the network could not be reached. Give a "
            "repository in the published layout, or a local folder: model.path=/path/to/FLUX.2."
        )
    return snapshot


def is_available(source: ModelSource, part: Part) -> bool:
    """Return whether a part's files can be read without a download."""
    where = source.where(part)
    if looks_local(where):
        return True  # or loading raises an error that names the problem
    try:
        snapshot = huggingface_hub.snapshot_download(where, allow_patterns=[f"{part}/*"], local_files_only=True)
    except hub_errors.LocalEntryNotFoundError:
        return False
    return (Path(snapshot) / part).is_dir()


FULL_HASH_LIMIT = 1 << 29  # bytes up to which a file is hashed completely for its fingerprint
SAMPLES = 33  # samples of 1 MiB that are hashed of a larger file


def fingerprint(source: ModelSource, part: Part) -> str:
    """Return a digest of a part's files, which identifies what is cached of its results.

    Of each file it covers name, size and content; above 512 MiB the safetensors header (names, shapes, offsets) and 33
    samples of the data, because hashing 48 GB would take longer than reading a cache saves. If the files do not exist,
    or are not downloaded, and `source.fingerprints` knows the part, that is returned, after a warning.
    """
    name = f"{part} of {source.where(part)}"
    known = source.fingerprints.get(name) if source.fingerprints else None
    try:
        if known is not None and not is_available(source, part):
            raise WeightsError(f"{source.where(part)} is not downloaded")
        current = digest_of_files(source, part)
    except WeightsError as error:
        if known is None:
            raise
        log.warning("using the cached results of the last known %s (%s)", name, error)
        return known
    if source.fingerprints:
        source.fingerprints.set(name, current)
    return current


def digest_of_files(source: ModelSource, part: Part) -> str:
    """Return a digest of the part's files. Raises WeightsError if there are none."""
    single = source.file(part)
    files = [single] if single else sorted(file for file in source.folder(part).glob("[!.]*.*") if file.is_file())
    if not any(file.suffix == ".safetensors" for file in files) and part != "tokenizer":
        raise WeightsError(f"{source.folder(part)} holds no .safetensors file")
    if not files:
        raise WeightsError(f"{source.folder(part)} is empty")
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as handle:
            if file.suffix == ".safetensors":
                header = handle.read(min(size, int.from_bytes(handle.read(8), "little"), FULL_HASH_LIMIT))
                if b".weight_scale_inv" in header:  # what was cached before these scales were read is wrong
                    digest.update(b"scaled")
                handle.seek(0)
            if file.suffix != ".safetensors" or size <= FULL_HASH_LIMIT:
                hashlib.file_digest(handle, lambda: digest)
                continue
            digest.update(handle.read(8 + int.from_bytes(handle.read(8), "little")))
            for i in range(SAMPLES):
                handle.seek(i * (size - (1 << 20)) // (SAMPLES - 1))
                digest.update(handle.read(1 << 20))
    return digest.hexdigest()[:16]
