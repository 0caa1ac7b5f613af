"""data.cache.image_digests: a file is read once, and again when anything says that it may have changed."""

import json
import os
import tarfile
import time
from pathlib import Path

import pytest
from PIL import Image

from data.cache import image_digests
from data.cache.image_digests import Digests
from data.sources import WebDataset
from data.sources.images import BadPicture, Picture, file_picture


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The pictures whose content is read, in order."""
    happened: list[str] = []
    digest = Picture.digest

    def watched(picture: Picture) -> str:
        happened.append(picture.name)
        return digest(picture)

    monkeypatch.setattr(Picture, "digest", watched)
    return happened


def drawn(path: Path, color: str, size: tuple[int, int] = (20, 10), age: float = 100.0) -> Picture:
    """A picture in a file that seems to have been written some seconds ago."""
    Image.new("RGB", size, color).save(path)
    then = time.time() - age
    os.utime(path, (then, then))
    return file_picture(path)


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock of the index is ahead of the files': their inodes were changed just now."""
    now = time.time
    monkeypatch.setattr(image_digests.time, "time", lambda: now() + 100)


@pytest.mark.usefixtures("later")
def test_what_was_seen_at_an_earlier_start_is_not_read_again(tmp_path: Path, reads: list[str]) -> None:
    picture = drawn(tmp_path / "a.png", "red")
    first = Digests(tmp_path / "index.json")
    found = first.look(picture)
    assert found[:2] == (Picture.digest(picture), (20, 10))
    assert found.pixels == picture.pixel_digest("")
    first.save()
    reads.clear()
    assert Digests(tmp_path / "index.json").look(picture) == found
    assert reads == []


@pytest.mark.usefixtures("later")
@pytest.mark.parametrize("change", ["size", "mtime", "content behind the same size and time", "another file"])
def test_whatever_may_have_changed_is_read_again(tmp_path: Path, reads: list[str], change: str) -> None:
    path = tmp_path / "a.bmp"  # whose length does not depend on its content
    picture = drawn(path, "red")
    index = Digests(tmp_path / "index.json")
    before = index.look(picture)
    index.save()
    status = path.stat()
    if change == "size":
        drawn(path, "red", (30, 10))
    elif change == "mtime":
        os.utime(path, (status.st_atime, status.st_mtime + 1))
    elif change == "content behind the same size and time":
        time.sleep(0.02)
        with path.open("r+b") as file:
            file.write(drawn(tmp_path / "b.bmp", "blue").open().read())
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert (path.stat().st_size, path.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    else:
        drawn(tmp_path / "b.bmp", "blue")
        os.utime(tmp_path / "b.bmp", ns=(status.st_atime_ns, status.st_mtime_ns))
        os.replace(tmp_path / "b.bmp", path)
    reads.clear()
    found = Digests(tmp_path / "index.json").look(file_picture(path))
    assert reads == [str(path)]
    assert (found == before) is (change == "mtime")  # the content decides, and it is the same


def test_a_file_that_was_written_just_now_is_not_remembered(tmp_path: Path, reads: list[str]) -> None:
    picture = drawn(tmp_path / "a.png", "red", age=0)
    index = Digests(tmp_path / "index.json")
    index.look(picture)
    index.save()
    assert not (tmp_path / "index.json").exists()
    index.look(picture)
    assert len(reads) == 2


@pytest.mark.usefixtures("later")
def test_a_picture_and_its_transparency_are_two_things(tmp_path: Path) -> None:
    Image.new("RGBA", (20, 10), (255, 0, 0, 9)).save(tmp_path / "a.png")
    picture = file_picture(tmp_path / "a.png")
    index = Digests(tmp_path / "index.json")
    found = {index.look(each)[0] for each in (picture, picture.transparency(), picture, picture.transparency())}
    assert found == {picture.digest(), picture.transparency().digest()}
    assert len(found) == 2


def test_what_has_no_place_is_read_each_time(tmp_path: Path, reads: list[str]) -> None:
    drawn(tmp_path / "a.png", "red")
    index = Digests(tmp_path / "index.json")
    cell = Picture("row 5", lambda: (tmp_path / "a.png").open("rb"))
    assert index.look(cell) == index.look(cell)
    assert reads == ["row 5", "row 5"]


@pytest.mark.usefixtures("later")
def test_the_pictures_of_one_shard_are_told_apart_and_remembered(tmp_path: Path, reads: list[str]) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as shard:
        for name in ("red", "blue", "lime"):
            drawn(tmp_path / f"{name}.png", name, (20, 16))
            shard.add(tmp_path / f"{name}.png", f"{name}.png")
            (tmp_path / f"{name}.txt").write_text(name)
            shard.add(tmp_path / f"{name}.txt", f"{name}.txt")
    samples = WebDataset(tmp_path / "a.tar")
    first = Digests(tmp_path / "index.json")
    found = [first.look(sample.target) for sample in samples]
    assert [known.content for known in found] == [
        file_picture(tmp_path / f"{sample.caption}.png").digest() for sample in samples
    ]
    assert len({known.content for known in found}) == 3
    first.save()
    reads.clear()
    second = Digests(tmp_path / "index.json")
    assert [second.look(sample.target) for sample in samples] == found
    assert reads == []


def test_a_file_that_is_gone_is_a_bad_picture(tmp_path: Path) -> None:
    with pytest.raises(BadPicture, match=r"exist|found"):
        Digests(tmp_path / "index.json").look(file_picture(tmp_path / "none.png"))


@pytest.mark.usefixtures("later")
def test_two_processes_remember_together_and_forgetting_keeps_what_was_looked_at(
    tmp_path: Path, reads: list[str]
) -> None:
    a, b = drawn(tmp_path / "a.png", "red"), drawn(tmp_path / "b.png", "blue")
    one, other = Digests(tmp_path / "index.json"), Digests(tmp_path / "index.json")
    one.look(a)
    other.look(b)
    one.save()
    other.save()
    reads.clear()
    third = Digests(tmp_path / "index.json")
    third.look(a)
    third.look(b)
    assert reads == []
    fourth = Digests(tmp_path / "index.json")
    fourth.look(a)
    assert fourth.forget_others() == 1
    fifth = Digests(tmp_path / "index.json")
    fifth.look(a)
    fifth.look(b)
    assert reads == [b.name]


@pytest.mark.parametrize(
    "entry",
    [
        *(None, [], ["x"], ["stamp", "f" * 64, 20, 10], ["stamp", "f" * 64, "f" * 63, 20, 10]),
        *(["stamp", "f" * 64, "f" * 64, "20", 10], ["stamp", "f" * 64, "f" * 64, 0, 10]),
    ],
)
@pytest.mark.usefixtures("later")
def test_a_damaged_entry_of_the_index_is_read_again(tmp_path: Path, entry: object, reads: list[str]) -> None:
    a = drawn(tmp_path / "a.png", "red")
    index = Digests(tmp_path / "index.json")
    known = index.look(a)
    index.save()
    content = json.loads((tmp_path / "index.json").read_text())
    ((name, (stamp, *_)),) = content["pictures"].items()
    content["pictures"] = {name: [stamp, *entry[1:]] if entry else entry}
    (tmp_path / "index.json").write_text(json.dumps(content))
    reads.clear()
    assert Digests(tmp_path / "index.json").look(a) == known
    assert reads == [a.name]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": 3}', '{"version": 3, "pictures": []}'])
def test_a_damaged_index_is_told_and_made_anew(tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "index.json").write_text(content)
    index = Digests(tmp_path / "index.json")
    assert str(tmp_path) in caplog.text
    assert index.look(drawn(tmp_path / "a.png", "red"))[1] == (20, 10)
