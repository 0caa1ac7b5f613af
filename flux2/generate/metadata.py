"""Record how an image was made in its PNG file, as text, and read it back to repeat the image.

The text is one JSON object under the keyword `flux2-lora`: the fields of `Record`. Files are recorded as they were
given, with the SHA-256 of their content, so that a repetition notices another adapter under the same name.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from PIL.PngImagePlugin import PngInfo

from flux2.adapters import find
from flux2.adapters.files import PEFT_FILE
from flux2.models.text_encoder import TextStorage, check_storage
from flux2.models.variants import VARIANTS
from flux2.utils import checks
from flux2.utils.images import describe_decoding_error, open_image

KEYWORD = "flux2-lora"
CONFIG_FILE = "adapter_config.json"  # of PEFT


def sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@dataclass(frozen=True)
class NamedFile:
    """A file as it was given, and the SHA-256 of its content.

    An adapter has a `scale` and `ranges` of it, and `config_sha256` if PEFT's configuration, which has the alpha, is in
    a file of its own.
    """

    path: str
    sha256: str
    scale: float = 1.0
    config_sha256: str | None = None
    ranges: str = ""

    @classmethod
    def from_path(cls, path: Path) -> Self:
        return cls(str(path), sha256(path))

    @classmethod
    def from_adapter(cls, path: str, scale: float, ranges: str) -> Self:
        """Return the files of the adapter at `path`. Raises AdapterError if there are none."""
        tensors, config = adapter_files(path)
        return cls(path, sha256(tensors), scale, None if config is None else sha256(config), ranges)

    def option(self) -> str:
        """Return what `--adapter` was given."""
        return f"{self.path}:{self.scale!r}{',' if self.ranges else ''}{self.ranges}"


def adapter_files(adapter: str) -> tuple[Path, Path | None]:
    """Return the file that holds an adapter's tensors, and the one of its configuration if there is one."""
    place = find(adapter)
    if not place.is_dir():
        return place, None
    config = place / CONFIG_FILE
    return place / PEFT_FILE, config if config.is_file() else None


@dataclass(frozen=True)
class Record:
    """One image. `path`, `autoencoder` and `text_encoder` are null for the published locations.

    `merged` records whether the adapters were merged into the weights, which rounds them as the weights are.
    `asked` is the original prompt if the text encoder rewrote it to `prompt`.
    """

    model: str
    prompt: str
    seed: int
    width: int
    height: int
    steps: int
    guidance: float
    precision: str
    path: str | None = None
    autoencoder: str | None = None
    text_encoder: str | None = None
    text_storage: TextStorage | None = None
    embeddings: NamedFile | None = None
    asked: str | None = None
    images: Sequence[NamedFile] = ()
    mask: NamedFile | None = None
    strength: float | None = None
    mask_crop: int | None = None
    adapters: Sequence[NamedFile] = ()
    merged: bool = False
    models: Mapping[str, str] = dataclasses.field(default_factory=dict)  # digests of the files of those used here

    def chunk(self) -> PngInfo:
        """Return the record for Pillow: `image.save(file, pnginfo=record.chunk())`."""
        info = PngInfo()
        info.add_itxt(KEYWORD, json.dumps(dataclasses.asdict(self), ensure_ascii=False))
        return info


def read(file: Path, what: str) -> Record:
    """Return the record in an image file. Raises ValueError, starting with `what`, if it is missing or invalid."""
    if not file.is_file():
        raise ValueError(f"{what} does not exist")
    try:
        with open_image(file) as image:
            image.load()  # text may come after the pixels
            text = image.info.get(KEYWORD)
    except Exception as error:  # decoders raise OSError, SyntaxError, EOFError, DecompressionBombError and more
        raise ValueError(f"{what} cannot be read as an image ({describe_decoding_error(error)})") from error
    if text is None:
        raise ValueError(
            f"{what} does not record how it was made: it is from another program, was written with --no-metadata or "
            "not as PNG, or has lost its text"
        )
    try:
        return parse_record(json.loads(text))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{what}: the record of how it was made is invalid ({error})") from error


def parse_record(record: Any) -> Record:
    """Return a record from JSON. Raises ValueError, TypeError or KeyError for anything else."""
    if not isinstance(record, Mapping):
        raise ValueError(f"{record!r} is not an object")
    if unknown := sorted(set(record) - {entry.name for entry in dataclasses.fields(Record)}):
        raise ValueError(f"unknown: {', '.join(unknown)}")
    if record["model"] not in VARIANTS:
        raise ValueError(f"model={record['model']!r} must be one of {', '.join(VARIANTS)}")
    for key in ("path", "autoencoder", "text_encoder", "asked"):
        if not isinstance(record.get(key), str | None):
            raise TypeError(f"{key}={record[key]!r} must be a string or null")
    check_storage(record.get("text_storage"), "text_storage")
    if not isinstance(record["precision"], str):
        raise TypeError(f"precision={record['precision']!r} must be a string")
    if not isinstance(record.get("merged", False), bool):
        raise TypeError(f"merged={record['merged']!r} must be true or false")
    models = record.get("models", {})
    if not isinstance(models, Mapping) or not all(isinstance(digest, str) for digest in models.values()):
        raise TypeError(f"models={models!r} must be an object with strings")
    (prompt,) = checks.strings("prompt", record["prompt"])
    (seed,) = checks.seeds(record["seed"], 1)
    checks.size(record["width"], record["height"], 1)
    steps, guidance = checks.steps(record["steps"]), checks.guidance(record["guidance"])
    values = {**record, "prompt": prompt, "seed": seed, "steps": steps, "guidance": guidance}
    values |= {key: parse_named_file(record[key]) for key in ("embeddings", "mask") if record.get(key) is not None}
    files = {key: [parse_named_file(entry) for entry in record.get(key, [])] for key in ("images", "adapters")}
    checks.inpainting(
        len(files["images"]), values.get("mask") is not None, record.get("strength"), record.get("mask_crop")
    )
    return Record(**values | files)


def parse_named_file(entry: Any) -> NamedFile:
    if not isinstance(entry, Mapping) or not isinstance(entry["path"], str) or not isinstance(entry["sha256"], str):
        raise ValueError(f"{entry!r} is not a file with path and sha256")
    if not isinstance(config := entry.get("config_sha256"), str | None):
        raise TypeError(f"config_sha256={config!r} must be a string or null")
    if not isinstance(ranges := entry.get("ranges", ""), str):
        raise TypeError(f"ranges={ranges!r} must be a string")
    return NamedFile(entry["path"], entry["sha256"], checks.number("scale", entry.get("scale", 1.0)), config, ranges)


def check_unchanged(record: Record, what: str) -> None:
    """Raise ValueError, starting with `what`, if a file of `record` is missing or has changed."""
    embeddings, masks = ([] if one is None else [one] for one in (record.embeddings, record.mask))
    for kind, files, option in (
        ("reference", record.images, "--image"),
        ("mask", masks, "--mask"),
        ("embeddings file", embeddings, "--embeddings, or use --text-encoder"),
        ("adapter", record.adapters, "--adapter"),
    ):
        for named in files:
            file, config = adapter_files(named.path) if kind == "adapter" else (Path(named.path), None)
            if not file.is_file():
                raise ValueError(f"{what}: the {kind} {named.path} does not exist. Give it with {option}")
            digest = None if config is None else sha256(config)
            found = dataclasses.replace(named, sha256=sha256(file), config_sha256=digest)
            if named.config_sha256 is None:  # recorded by an older version
                found = dataclasses.replace(found, config_sha256=None)
            if found != named:
                part = " (adapter_config.json)" if found.sha256 == named.sha256 else ""
                raise ValueError(f"{what}: the {kind} {named.path} has changed{part}. Give the original with {option}")
