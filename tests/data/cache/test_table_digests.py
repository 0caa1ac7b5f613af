"""data.sources.mapped_files: rows of tables are read once, and known only by the file and position of their bytes."""

import os
import time
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
from data_helpers import COLORS, keep_caches_in, square, table

from data.cache import image_digests
from data.cache.image_digests import Digests
from data.sources import HuggingFace, tables
from data.sources.images import Picture
from data.sources.mapped_files import MappedFiles

CELLS = [{"bytes": square(color), "path": None} for color in COLORS]


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` writes to the folder of the test, and the clock is ahead of the files, which were written just now."""
    keep_caches_in(tmp_path / "datasets", monkeypatch)
    now = time.time
    monkeypatch.setattr(image_digests.time, "time", lambda: now() + 100)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The pictures whose header or content is read, in order."""
    happened: list[str] = []
    for method in ("_read_header", "digest"):

        def watched(picture: Picture, original: object = getattr(Picture, method)) -> object:
            happened.append(picture.name)
            return original(picture)  # type: ignore[operator]

        monkeypatch.setattr(Picture, method, watched)
    return happened


def look(folder: Path, path: Path, **options: object) -> list[list[str]]:
    """The content digests of the images of each sample, as a start finds them."""
    digests = Digests(folder / "pictures.sqlite")
    with digests.in_use():
        samples = HuggingFace(path, **options)  # type: ignore[arg-type]
    found = [[digests.look(picture).content for picture in sample.pictures] for sample in samples]
    digests.save()
    digests.close()
    return found


def true(path: Path, **options: object) -> list[list[str]]:
    """The same, read from the images."""
    return [[one.digest() for one in sample.pictures] for sample in HuggingFace(path, **options)]  # type: ignore[arg-type]


@pytest.mark.parametrize("cells", ["bytes", "structs"])
def test_rows_are_read_at_the_first_start_only(tmp_path: Path, reads: list[str], cells: str) -> None:
    path = table(tmp_path / "a.parquet", **({"image": CELLS} if cells == "structs" else {}))
    options = {"reference_columns": ["sources"]}
    first = look(tmp_path, path, **options)
    assert len(reads) == 10  # three targets and two references, header and content
    reads.clear()
    assert look(tmp_path, path, **options) == first
    assert reads == []
    assert first == true(path, **options)
    assert len({digest for row in first for digest in row}) == 5


def test_a_table_with_other_content_is_read(tmp_path: Path, reads: list[str]) -> None:
    path = table(tmp_path / "a.parquet")
    first = look(tmp_path, path)
    table(path, image=[square(color) for color in reversed(COLORS)])
    os.utime(path, (1e9, 1e9))
    reads.clear()
    assert look(tmp_path, path) == first[::-1]
    assert len(reads) == 6


@pytest.mark.parametrize("split", ["train[1:]", "train[2:]+train[:1]"])
def test_a_slice_has_the_digests_of_its_rows(tmp_path: Path, reads: list[str], split: str) -> None:
    path = table(tmp_path / "a.parquet")
    look(tmp_path, path)
    reads.clear()
    found = look(tmp_path, path, split=split)
    assert reads == []
    assert found == true(path, split=split)


@pytest.mark.parametrize("change", ["shuffled", "filtered", "sorted", "mapped", "in memory", "flattened"])
def test_what_datasets_makes_of_a_table_has_the_digests_of_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: list[str], change: str
) -> None:
    path = table(tmp_path / "a.parquet")
    look(tmp_path, path)
    opened = tables.open_table(str(path), "train", None, None)
    assert isinstance(opened, datasets.Dataset)
    make = {
        "shuffled": lambda: opened.shuffle(seed=1),
        "filtered": lambda: opened.filter(lambda row: row["number"] != 1),
        "sorted": lambda: opened.sort("number", reverse=True),
        "mapped": lambda: opened.map(lambda row: {"image": square("white", 32)}),
        "in memory": lambda: datasets.Dataset.from_dict(opened[1:]),
        "flattened": lambda: opened.shuffle(seed=1).flatten_indices(),
    }
    changed = make[change]()
    monkeypatch.setattr(tables, "open_table", lambda *_: changed)
    expected = true(path)
    reads.clear()
    assert look(tmp_path, path) == expected
    assert bool(reads) is (change not in ("shuffled", "filtered", "sorted"))  # which are other orders of the same bytes
    assert look(tmp_path, path) == expected


def mapped(path: Path, *cells: bytes) -> pa.ChunkedArray:
    """A column in a new file at a path, mapped into memory."""
    column = pa.table({"image": list(cells)})
    other = path.with_suffix(".new")
    with pa.OSFile(str(other), "wb") as sink, pa.ipc.new_stream(sink, column.schema) as writer:
        writer.write_table(column)
    other.replace(path)
    return pa.ipc.open_stream(pa.memory_map(str(path))).read_all().column("image")


def test_a_place_is_the_position_in_the_file(tmp_path: Path) -> None:
    column = mapped(tmp_path / "a.arrow", b"first", b"", b"the third")
    path, part = MappedFiles([column]).place(column.chunk(0).slice(2, 1)) or ("", "")
    size, _, _, begin, *_, inode = part.split()
    assert (tmp_path / "a.arrow").read_bytes()[int(begin) :][: int(size)] == b"the third"
    assert (path, int(inode)) == (str(tmp_path / "a.arrow"), (tmp_path / "a.arrow").stat().st_ino)
    assert MappedFiles([column]).place(column.chunk(0).slice(1, 1)) is None  # no bytes
    assert MappedFiles([column]).place(pa.array([b"first"])) is None  # in no file
    assert MappedFiles([]).place(column.chunk(0).slice(0, 1)) is None
    other = mapped(tmp_path / "b.arrow", b"first")
    assert MappedFiles([column]).place(other.chunk(0)) is MappedFiles([other]).place(column.chunk(0)) is None


def test_a_file_that_got_the_path_of_a_mapped_one_is_another(tmp_path: Path) -> None:
    column = mapped(tmp_path / "a.arrow", b"first")
    before = MappedFiles([column])
    new = mapped(tmp_path / "a.arrow", b"other")
    assert MappedFiles([column]).place(column.chunk(0)) is None  # the path names no longer what is mapped
    assert before.place(column.chunk(0)) != MappedFiles([new]).place(new.chunk(0))
