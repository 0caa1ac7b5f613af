"""Where a model's files are: a Hugging Face repository, a folder in the published layout, or one safetensors file."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import huggingface_hub
from huggingface_hub import errors as hub_errors

from flux2.models.variants import Variant, variant

TINY_FOLDER = Path(__file__).parent.parent / "assets" / "tiny"
Part = Literal["transformer", "vae", "text_encoder", "tokenizer"]
log = logging.getLogger(__name__)


class WeightsError(ValueError):
    """A model's files are absent, unreadable, or not those of the model asked for."""


class Fingerprints:
    """Fingerprints of model parts in a file, by where the configuration says that the parts are.

    With them, what was computed by an encoder is found again where its files are not: moved away to make room, or never
    downloaded to the machine that trains. They are those of the files that were last there. Without a file nothing is
    known.
    """

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._kept = {} if file is None else self._read(file)
        self._found = dict(self._kept)

    @staticmethod
    def _read(file: Path) -> dict[str, str]:
        try:
            return {str(name): str(value) for name, value in json.loads(file.read_text()).items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, AttributeError) as error:
            log.warning("%s cannot be read (%s): fingerprints are taken from the model's files", file, error)
            return {}

    def get(self, name: str) -> str | None:
        return self._found.get(name)

    def set(self, name: str, fingerprint: str) -> None:
        self._found[name] = fingerprint

    def save(self) -> None:
        """Writes what is new. Raises OSError if that is not possible."""
        if self._file is None or self._found == self._kept:
            return
        unfinished = self._file.with_name(f".{self._file.name}.{uuid.uuid4().hex}.tmp")
        try:
            unfinished.write_text(json.dumps(self._found, indent=1, sort_keys=True))
            unfinished.replace(self._file)
        finally:
            unfinished.unlink(missing_ok=True)
        self._kept = dict(self._found)


@dataclass(frozen=True)
class ModelSource:
    """Where the parts of a model come from.

    `path` is a repository id, a folder in the published layout, or a safetensors file with the transformer. The
    autoencoder and the text encoder come from there too unless they are given, likewise as id, folder or (the
    autoencoder) file; beside a single transformer file they come from the variant's repository. `fingerprints` are what
    is known of parts that are not there.
    """

    variant: Variant
    path: str
    autoencoder: str | None = None
    text_encoder: str | None = None
    fingerprints: Fingerprints | None = field(default=None, compare=False, repr=False)

    def where(self, part: Part) -> str:
        given = {"vae": self.autoencoder, "transformer": None}.get(part, self.text_encoder)
        if given:
            return given
        if part != "transformer" and self.path.endswith(".safetensors"):
            return self.variant.repo or str(TINY_FOLDER)
        return self.path

    def key(self, part: Part) -> str:
        """The setting that says where a part comes from, for errors."""
        given = {"vae": "autoencoder", "transformer": "path"}.get(part, "text_encoder")
        return f"model.{given}" if getattr(self, given) else "model.path"

    def file(self, part: Part) -> Path | None:
        """The single file of a part, if that is what was given. Raises WeightsError if it is not there."""
        where = self.where(part)
        if not where.endswith(".safetensors"):
            return None
        if part not in ("transformer", "vae"):
            raise WeightsError(f"{self.key(part)}={where!r} must be a repository id or a folder with {part}/ in it")
        if not Path(where).expanduser().is_file():
            raise WeightsError(f"{self.key(part)}={where!r} does not exist")
        return Path(where).expanduser()

    def folder(self, part: Part) -> Path:
        """The local folder of a part, downloaded if `path` is a repository id."""
        where = self.where(part)
        if not looks_local(where):
            return Path(download(where, part)) / part
        whole = Path(where).expanduser()
        if (whole / part).is_dir():
            return whole / part
        if whole.is_dir():
            raise WeightsError(
                f"{self.key(part)}={where!r}: there is no folder {whole / part}. It exists but is not in the published "
                "layout (transformer/, vae/, text_encoder/, tokenizer/)"
            )
        what = "does not exist" if not whole.exists() else "is neither a folder nor a .safetensors file"
        raise WeightsError(f"{self.key(part)}={where!r} {what}: give a repository id, a folder or a .safetensors file")


def model_source(
    name: str, path: str | None = None, autoencoder: str | None = None, text_encoder: str | None = None
) -> ModelSource:
    """The source of the model called `name`: at `path`, else the embedded one or the published repository."""
    found = variant(name)
    for key, value in {"path": path, "autoencoder": autoencoder, "text_encoder": text_encoder}.items():
        if value is not None and not isinstance(value, str):
            raise ValueError(f"model.{key}={value!r} must be a repository id, a folder or a file")
    return ModelSource(found, path or found.repo or str(TINY_FOLDER), autoencoder, text_encoder)


def looks_local(where: str) -> bool:
    """Whether `where` names a place on disk and not a repository: it exists, or does not read as `owner/name`."""
    return Path(where).expanduser().exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", where) or where.startswith(".")


def download(repo: str, part: Part) -> str:
    """The snapshot folder of one part of a repository. Raises WeightsError with what to do."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise WeightsError(f"{repo!r} is neither a file, a folder nor a repository id (owner/name)")
    try:
        snapshot = huggingface_hub.snapshot_download(repo, allow_patterns=[f"{part}/*"])
    except hub_errors.GatedRepoError as error:
        raise WeightsError(
            f"{repo} is gated, and you are not logged in or have not accepted its license. Open "
            f"https://huggingface.co/{repo}, accept the license (non-commercial for FLUX.2-dev and the 9B models), "
            "then run `hf auth login` and start again."
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
    if not (Path(snapshot) / part).is_dir():  # the repository has none, or an incomplete cache was used offline
        raise WeightsError(
            f"{repo} has no {part}/, or it is not in the local cache and the network could not be reached. Give a "
            "repository in the published layout, or a local folder: model.path=/path/to/FLUX.2."
        )
    return snapshot


def is_available(source: ModelSource, part: Part) -> bool:
    """Whether a part's files can be read without downloading them."""
    where = source.where(part)
    if looks_local(where):
        return True  # or there is an error that says what is wrong
    try:
        snapshot = huggingface_hub.snapshot_download(where, allow_patterns=[f"{part}/*"], local_files_only=True)
    except hub_errors.LocalEntryNotFoundError:
        return False
    return (Path(snapshot) / part).is_dir()


WHOLE = 1 << 29  # bytes of a file that is read whole for its fingerprint
SAMPLES = 33  # of 1 MiB each, of a larger one


def fingerprint(source: ModelSource, part: Part) -> str:
    """What a cached result of this part depends on: a digest of its files.

    Of each file: name and size, and the content; of one above half a GB the safetensors header (names, shapes, offsets)
    and 33 samples of the data. Hashing 48 GB whole would take longer than reading a cache saves. If the files are not
    there, or not downloaded, and `source.fingerprints` knows the part, it is what that says, after a warning.
    """
    name = f"{part} of {source.where(part)}"
    known = source.fingerprints.get(name) if source.fingerprints is not None else None
    try:
        if known is not None and not is_available(source, part):
            raise WeightsError(f"{source.where(part)} is not downloaded")
        found = digest_of_files(source, part)
    except WeightsError as error:
        if known is None:
            raise
        log.warning("using what is cached of the %s that was last there (%s)", name, error)
        return known
    if source.fingerprints is not None:
        source.fingerprints.set(name, found)
    return found


def digest_of_files(source: ModelSource, part: Part) -> str:
    """Raises WeightsError if there are none."""
    single = source.file(part)
    files = [single] if single else sorted(file for file in source.folder(part).glob("*.*") if file.is_file())
    if not any(file.suffix == ".safetensors" for file in files) and part != "tokenizer":
        raise WeightsError(f"{source.folder(part)} holds no .safetensors file")
    if not files:
        raise WeightsError(f"{source.folder(part)} is empty")
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as handle:
            if file.suffix != ".safetensors":
                digest.update(handle.read())
                continue
            if size <= WHOLE:
                while block := handle.read(1 << 20):
                    digest.update(block)
                continue
            digest.update(handle.read(8 + int.from_bytes(handle.read(8), "little")))
            for i in range(SAMPLES):
                handle.seek(i * (size - (1 << 20)) // (SAMPLES - 1))
                digest.update(handle.read(1 << 20))
    return digest.hexdigest()[:16]
