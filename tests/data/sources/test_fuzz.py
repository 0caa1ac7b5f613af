"""Metadata of random rows: the samples are those of a plain reading, and everything else is one error with a name."""

import json
import os
import random
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
from data_helpers import shard, square, write

from data.sources.base import Source
from data.sources.captions import Captions
from data.sources.folders import Folder
from data.sources.webdataset import WebDataset

FILES = ("a.png", "b.png", "caf\u00e9.png")
CELLS = [
    *FILES, "cafe\u0301.png", "./a.png", "x/../b.png", "missing.png", "", "../a.png", "/etc/passwd", "a.png\0", "[",
    "[" * 5000, '["a.png"]', None, 1, 1.5, 10**400, True, [], ["a.png"], ["a.png", "b.png"], ["a.png", 1], {"x": 1},
    [[]], "\ud800", "x\u2028y", "sub\\b.png", ".", "..", "a.png/..", "x" * 5000, "\n", "\x1b[31m", float("nan"),
]  # fmt: skip
BROKEN = ["{", "[]", "1", "null", '{"a":' + "[" * 5000, "9" * 5000, '{"text": ' + "9" * 5000 + "}", "\0"]


def random_row(rng: random.Random) -> dict:
    row = {
        key: rng.choice(CELLS) for key in rng.sample(["file_name", "text", "references", "other"], rng.randint(0, 4))
    }
    if rng.random() < 0.7:
        row["file_name"] = rng.choice(CELLS[:6])
    if rng.random() < 0.7:
        row["text"] = rng.choice(["one", " two ", ["three", "four"]])
    return row


def plain_file(cell: object) -> str | None:
    """The file that a cell names, read plainly; None if it is none of ours."""
    if not isinstance(cell, str) or "\0" in cell:
        return None
    name = unicodedata.normalize("NFC", os.path.normpath(cell))
    return name if name in FILES else None


def plain_row(row: dict) -> tuple[str, tuple[str, ...], tuple[str, ...]] | None:
    """Image, captions and references of a row; None if it is no sample."""

    def names(cell: object) -> list:
        if isinstance(cell, str) and cell.startswith("[") and cell.endswith("]"):
            cell = json.loads(cell)
        return [] if cell in (None, "") else cell if isinstance(cell, list) else [cell]

    targets = [plain_file(name) for name in names(row.get("file_name"))]
    references = [plain_file(name) for name in names(row.get("references"))]
    texts = row.get("text") if isinstance(row.get("text"), list) else [row.get("text")]
    good = all(isinstance(text, str) and text.strip() and "\0" not in text and "\ud800" not in text for text in texts)
    if len(targets) != 1 or targets[0] in references or None in (*targets, *references) or not texts or not good:
        return None
    return targets[0], tuple(dict.fromkeys(text.strip() for text in texts)), tuple(references)  # type: ignore[return-value]


def read_or_name(place: Path, read: Callable[[], Source]) -> Source | None:
    """The dataset, or None if it is refused with an error that can be printed and names its place or a setting."""
    try:
        return read()
    except ValueError as error:
        message = str(error)
    assert str(place) in message or "dataset.mask" in message
    assert all(line.isprintable() for line in message.split("\n"))
    return None


def check_rows(folder: Path, rng: random.Random) -> int:
    """Compare one random file of metadata with its plain reading; return how many samples it has."""
    rows = [random_row(rng) for _ in range(rng.randint(0, 4))]
    texts = [json.dumps(row, ensure_ascii="\\ud800" in json.dumps(row) or rng.random() < 0.5) for row in rows]
    broken = rng.random() < 0.15
    if broken:
        texts.insert(rng.randint(0, len(texts)), rng.choice(BROKEN))
    write(folder, {"metadata.jsonl": "\n".join(texts)})
    expected = [plain_row(row) for row in rows]
    good = list(dict.fromkeys(row for row in expected if row is not None))
    has_columns = all(any(key in row for row in rows) for key in ("file_name", "text"))
    samples = read_or_name(folder, lambda: Folder(folder, max_bad=len(rows)))
    assert (samples is not None) == bool(good and has_columns and not broken)
    if samples is None:
        return 0
    found = [
        (plain_file(os.path.relpath(sample.name, folder)), sample.captions, tuple(
            plain_file(os.path.relpath(reference.name, folder)) for reference in sample.references
        ))
        for sample in samples
    ]  # fmt: skip
    assert found == good
    assert "".join(map(str, samples.bad)).isprintable()
    return len(found)


def check_shard(folder: Path, rng: random.Random) -> int:
    """A random shard is a dataset of decodable samples, or one error that names it."""
    endings = ["png", "txt", "txt", "json", "ref0.png", "control.png", "heic", "ref.png", "", "mask.png", "PNG"]
    contents = [square(), square(), b"a caption", b"", b"\xff", b"{", b'{"c": "x"}', b'{"c": ' + b"9" * 5000 + b"}"]
    files = {"1.png": square(), "1.txt": "a caption"} if rng.random() < 0.5 else {}
    files |= {
        f"{rng.choice(['1', '1', '2', 'x/1', 'cafe'])}.{rng.choice(endings)}": rng.choice(contents)
        for _ in range(rng.randint(0, 4))
    }
    path = shard(folder / "s.tar", files)
    settings = {"caption_column": rng.choice([None, "c"]), "mask": rng.choice([None, "alpha", "mask"])}
    settings |= {"captions": Captions(allow_empty=rng.random() < 0.5), "max_bad": rng.choice([0, 5])}
    samples = read_or_name(path, lambda: WebDataset(path, **settings)) or []
    for sample in samples:
        assert sample.target.load().mode == "RGB"
        assert all(reference.load() for reference in sample.references)
        assert sample.captions
    return len(samples)


@pytest.mark.parametrize("check", [check_rows, check_shard])
@pytest.mark.parametrize("count", [100, pytest.param(2000, marks=pytest.mark.slow)])
def test_random_datasets_are_read_plainly_or_refused(tmp_path: Path, check, count: int) -> None:
    write(tmp_path, {name: square(color) for name, color in zip(FILES, ("red", "lime", "blue"), strict=True)})
    rng = random.Random(0)
    assert sum(check(tmp_path, rng) for _ in range(count)) > count / 20
