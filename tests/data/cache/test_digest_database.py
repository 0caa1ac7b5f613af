"""data.cache.image_digests: a database that is damaged, locked, of another version or killed stops nothing."""

import json
import os
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

import pytest
from data_helpers import shard, square
from digest_helpers import drawn

from data.cache import image_digests
from data.cache.image_digests import Digests
from data.sources import Sample, WebDataset, webdataset
from data.sources.images import Picture, file_picture

pytest_plugins = ("digest_helpers",)


@pytest.mark.parametrize(
    ("column", "value"),
    [
        *(("digests", None), ("digests", "x" * 64), ("digests", b"x" * 63), ("stamp", None)),
        *(("width", None), ("width", 0), ("height", -1)),
    ],
)
@pytest.mark.usefixtures("later")
def test_a_damaged_row_is_read_again(tmp_path: Path, column: str, value: object, reads: list[str]) -> None:
    a = drawn(tmp_path / "a.png", "red")
    index = Digests(tmp_path / "index.sqlite")
    known = index.look(a)
    index.save()
    with closing(sqlite3.connect(tmp_path / "index.sqlite")) as database, database:
        database.execute(f"UPDATE pictures SET {column} = ?", (value,))
    reads.clear()
    assert Digests(tmp_path / "index.sqlite").look(file_picture(a.name)) == known
    assert reads == [a.name]


# ------------------------------------------------------------------ a database that cannot be used


@pytest.mark.usefixtures("later")
@pytest.mark.parametrize("damage", ["no database", "torn", "another version", "no table", "no column"])
def test_a_damaged_database_is_replaced(
    tmp_path: Path, damage: str, reads: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "index.sqlite"
    a = drawn(tmp_path / "a.png", "red")
    index = Digests(file)
    index.look(a)
    index.save()
    if damage == "no database":
        file.write_bytes(b"x" * 10_000)
    elif damage == "torn":
        content = file.read_bytes()
        file.write_bytes(content[:4096] + b"\xff" * (len(content) - 4096))
    else:
        changes = {
            "another version": "PRAGMA user_version = 99",
            "no table": "DROP TABLE pictures",
            "no column": "ALTER TABLE pictures DROP COLUMN transparent",
        }
        with closing(sqlite3.connect(file)) as database:
            database.execute(changes[damage])
    reads.clear()
    index = Digests(file)
    index.look(file_picture(a.name))
    index.look(file_picture(a.name))
    assert reads == [a.name] * 2
    assert [record.getMessage().count(str(file)) for record in caplog.records] == [1] * (damage != "another version")
    index.save()
    Digests(file).look(file_picture(a.name))
    assert reads == [a.name] * 2


@pytest.mark.usefixtures("later")
def test_a_locked_database_stops_nothing_and_is_told_once(
    tmp_path: Path, reads: list[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_digests, "PATIENCE", 0.05)
    file = tmp_path / "index.sqlite"
    a, b = drawn(tmp_path / "a.png", "red"), drawn(tmp_path / "b.png", "blue")
    index = Digests(file)
    index.look(a)
    index.save()
    reads.clear()
    with closing(sqlite3.connect(file, isolation_level=None)) as database:
        database.execute("BEGIN EXCLUSIVE")
        index = Digests(file)
        for name in (a.name, b.name, a.name):
            index.look(file_picture(name))
        assert reads == [a.name, b.name, a.name]
        assert len(caplog.records) == 1
        index.save()
        index.look(file_picture(b.name))
        index.save()
        assert len(caplog.records) == 2
    reads.clear()
    Digests(file).look(file_picture(a.name))
    assert reads == []


@pytest.mark.usefixtures("later")
def test_a_reader_does_not_keep_others_from_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_digests, "PATIENCE", 0.05)
    file = tmp_path / "index.sqlite"
    a, b = drawn(tmp_path / "a.png", "red"), drawn(tmp_path / "b.png", "blue")
    first = Digests(file)
    first.look(a)
    first.save()
    reader, writer = Digests(file, writes=False), Digests(file)
    reader.look(file_picture(a.name))
    reader.save()
    writer.look(b)
    writer.save()
    with closing(sqlite3.connect(file)) as database:
        assert database.execute("SELECT count(*) FROM pictures").fetchone() == (2,)


@pytest.mark.usefixtures("later")
def test_a_writer_killed_in_a_transaction_leaves_what_was_there(tmp_path: Path, reads: list[str]) -> None:
    file = tmp_path / "index.sqlite"
    a = drawn(tmp_path / "a.png", "red")
    index = Digests(file)
    index.look(a)
    index.save()
    child = os.fork()
    if child == 0:
        database = sqlite3.connect(file, isolation_level=None)
        database.execute("PRAGMA cache_size = 1")  # so that pages are written before the end
        database.execute("BEGIN")
        database.execute("DELETE FROM pictures")
        database.executemany("INSERT INTO listings VALUES (?, '', ?)", ((str(i), "x" * 3000) for i in range(99)))
        os._exit(9)
    os.waitpid(child, 0)
    assert Path(f"{file}-journal").exists()
    reads.clear()
    Digests(file).look(file_picture(a.name))
    assert reads == []


@pytest.mark.usefixtures("later")
def test_a_process_that_does_not_write_makes_no_file(tmp_path: Path) -> None:
    index = Digests(tmp_path / "index.sqlite", writes=False)
    index.look(drawn(tmp_path / "a.png", "red"))
    index.save()
    assert not (tmp_path / "index.sqlite").exists()


@pytest.mark.usefixtures("later")
def test_rows_are_written_while_images_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_digests, "BATCH", 2)
    index = Digests(tmp_path / "cache" / "index.sqlite")
    for number in range(3):
        index.look(drawn(tmp_path / f"{number}.png", "red"))
    with closing(sqlite3.connect(tmp_path / "cache" / "index.sqlite")) as database:
        assert database.execute("SELECT count(*) FROM pictures").fetchone() == (2,)


# ------------------------------------------------------------------ earlier versions


@pytest.mark.usefixtures("later")
@pytest.mark.parametrize("writes", [True, False])
def test_the_json_of_earlier_versions_is_imported(tmp_path: Path, reads: list[str], writes: bool) -> None:
    pictures = [drawn(tmp_path / f"{name}.png", name) for name in ("red", "blue")]
    known = {}
    for picture in pictures:
        status = os.stat(picture.name)
        stamp = f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino}"
        content = picture.digest()
        known[json.dumps([picture.name, "", False])] = [stamp, content, picture.pixel_digest(content), 20, 10]
    (tmp_path / "index.json").write_text(json.dumps({"version": 3, "pictures": known}))
    reads.clear()
    for _ in range(2):
        index = Digests(tmp_path / "index.sqlite", writes)
        assert index.look(file_picture(pictures[0].name)).content == known[json.dumps([pictures[0].name, "", False])][1]
        index.save()
        assert (tmp_path / "index.json").exists() is not writes
    Digests(tmp_path / "index.sqlite").look(file_picture(pictures[1].name))
    assert reads == []


@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": 3}', '{"version": 3, "pictures": []}'])
def test_damaged_json_is_told(tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "index.json").write_text(content)
    index = Digests(tmp_path / "index.sqlite")
    assert str(tmp_path) in caplog.text
    assert index.look(drawn(tmp_path / "a.png", "red"))[1] == (20, 10)


# ------------------------------------------------------------------ listings of shards


def opened(folder: Path, **settings: object) -> list[Sample]:
    index = Digests(folder / "index.sqlite")
    with index.in_use():
        samples = list(WebDataset(folder / "a.tar", **settings))  # type: ignore[arg-type]
    for sample in samples:
        index.look(sample.target)
    index.save()
    return samples


@pytest.mark.usefixtures("later")
def test_a_shard_that_is_known_is_not_listed_again_until_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: list[str]
) -> None:
    files = {"a.png": square("red"), "a.txt": "x", "b.png": square("blue"), "b.txt": "y"}
    shard(tmp_path / "a.tar", files)
    first = opened(tmp_path)
    listings: list[str] = []
    read = webdataset._entries
    monkeypatch.setattr(webdataset, "_entries", lambda path: (listings.append(path), read(path))[1])
    reads.clear()
    with monkeypatch.context() as patch:
        patch.setattr(Picture, "_read_header", None)
        assert opened(tmp_path) == first
    assert (listings, reads) == ([], [])
    shard(tmp_path / "a.tar", files | {"c.png": square("lime"), "c.txt": "z"})
    assert [sample.caption for sample in opened(tmp_path)] == ["x", "y", "z"]


@pytest.mark.usefixtures("later")
def test_a_damaged_shard_is_listed_each_time(tmp_path: Path) -> None:
    shard(tmp_path / "a.tar", {"a.png": square("red"), "a.txt": "x", "b.png": square("blue"), "b.txt": "y"})
    content = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(content[:2100])  # within the header of the third file
    for _ in range(2):
        assert [sample.caption for sample in opened(tmp_path, max_bad=2)] == ["x"]


@pytest.mark.usefixtures("later")
@pytest.mark.parametrize("state", ["index.look(file_picture(picture.name))", "index.close()", "pass"])
def test_the_end_of_a_process_is_silent(tmp_path: Path, state: str) -> None:
    picture = drawn(tmp_path / "a.png", "red")
    first = Digests(tmp_path / "index.sqlite")
    first.look(picture)
    first.save()
    code = f"""
from data.cache import image_digests
from data.cache.image_digests import Digests
from data.sources.images import file_picture
picture = file_picture({picture.name!r})
index = Digests(__import__("pathlib").Path({str(tmp_path / "index.sqlite")!r}))
{state}
image_digests.kept = index  # after what its methods use, so that this is gone before
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""


@pytest.mark.usefixtures("later")
def test_another_thread_may_collect_the_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ignored: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", ignored.append)
    picture = drawn(tmp_path / "a.png", "red")
    first = Digests(tmp_path / "index.sqlite")
    first.look(picture)
    first.save()
    held = [Digests(tmp_path / "index.sqlite")]
    held[0].look(file_picture(picture.name))
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()
    assert ignored == []
