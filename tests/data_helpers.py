"""Small pictures, folders, tables and shards, written for real: what the tests of data/ share."""

import io
import json
import tarfile
from io import BytesIO
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
from PIL import Image

COLORS = ("red", "lime", "blue")


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def square(color: str = "red", side: int = 16, mode: str = "RGB", kind: str = "PNG") -> bytes:
    return encoded(Image.new(mode, (side, side), color), kind)


def animation(kind: str = "GIF") -> bytes:
    """A red frame, then a blue one."""
    frames = [Image.new("RGB", (16, 16), color) for color in ("red", "blue")]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:])


def write(folder: Path, files: dict[str, str | bytes]) -> Path:
    """Files by their paths in `folder`."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def lines(*rows: dict) -> str:
    return "\n".join(json.dumps(row) for row in rows) + "\n"


def table(path: Path, **more: list) -> Path:
    """A parquet file of three squares with the columns image, caption, sources (lists of pictures) and number."""
    columns = {
        "image": [square(color) for color in COLORS],
        "caption": [f" a {color} square " for color in COLORS],
        "sources": [[{"bytes": square("white"), "path": None}, {"bytes": square("black"), "path": None}], [], None],
        "number": [1, 2, 3],
    }
    path.parent.mkdir(exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns | more), path)
    return path


def shard(path: Path, files: dict[str, str | bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:
        for name, content in files.items():
            data = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def color(picture: object) -> tuple:
    """Of the middle pixel."""
    image = picture.load()  # type: ignore[attr-defined]
    return image.getpixel((image.width // 2, image.height // 2))


def keep_caches_in(folder: Path, patch: object) -> None:
    """`datasets` writes there, and not where the developer's tables are."""
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)  # type: ignore[attr-defined]
