"""data.cache.image_digests: a file is read once, and again when anything says that it may have changed."""

import os
import tarfile
import time
from pathlib import Path

import pytest
from digest_helpers import drawn
from PIL import Image

from data.cache import image_digests
from data.cache.image_digests import Digests
from data.sources import Sample, WebDataset
from data.sources.images import BadPicture, Picture, file_picture

pytest_plugins = ("digest_helpers",)


@pytest.mark.usefixtures("later")
def test_what_was_seen_at_an_earlier_start_is_not_read_again(
    tmp_path: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = drawn(tmp_path / "a.png", "red")
    first = Digests(tmp_path / "index.sqlite")
    found = first.look(picture)
    assert found[:2] == (Picture.digest(picture), (20, 10))
    assert found.pixels == picture.pixel_digest("")
    first.save()
    reads.clear()
    again = file_picture(picture.name)
    monkeypatch.setattr(Picture, "_read_header", None)  # an earlier start read that too
    assert Digests(tmp_path / "index.sqlite").look(again) == found
    assert again.header == picture.header
    assert reads == []


@pytest.mark.usefixtures("later")
def test_several_queries_find_many(tmp_path: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_digests, "QUERY", 2)
    pictures = [drawn(tmp_path / f"{color}.png", color) for color in ("red", "lime", "blue", "white", "black")]
    first = Digests(tmp_path / "index.sqlite")
    found = [first.look(picture).content for picture in pictures]
    first.save()
    reads.clear()
    again = [file_picture(picture.name) for picture in reversed(pictures)]
    Digests(tmp_path / "index.sqlite").recall([*again, file_picture(tmp_path / "none.png")])
    assert [image_digests.content_digest(picture) for picture in again] == found[::-1]
    assert reads == []


@pytest.mark.usefixtures("later")
@pytest.mark.parametrize("change", ["size", "mtime", "content behind the same size and time", "another file"])
def test_whatever_may_have_changed_is_read_again(tmp_path: Path, reads: list[str], change: str) -> None:
    path = tmp_path / "a.bmp"  # whose length does not depend on its content
    picture = drawn(path, "red")
    index = Digests(tmp_path / "index.sqlite")
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
    found = Digests(tmp_path / "index.sqlite").look(file_picture(path))
    assert reads == [str(path)]
    assert (found == before) is (change == "mtime")  # the content decides, and it is the same


@pytest.mark.usefixtures("later")
@pytest.mark.parametrize("name", ["a b%41?c#d", "ü", os.fsdecode(b"\xff"), "/"])
def test_a_folder_of_any_name_has_a_database(tmp_path: Path, reads: list[str], name: str) -> None:
    folder = Path(f"/{tmp_path}") if name == "/" else tmp_path / name  # two slashes are not a host
    folder.mkdir(exist_ok=True)
    picture = drawn(folder / "a.png", "red")
    for _ in range(2):
        index = Digests(folder / "index.sqlite")
        index.look(file_picture(picture.name))
        index.save()
    assert len(reads) == 1
    assert (folder / "index.sqlite").is_file()


def test_a_file_that_was_written_just_now_is_not_remembered(tmp_path: Path, reads: list[str]) -> None:
    picture = drawn(tmp_path / "a.png", "red", age=0)
    index = Digests(tmp_path / "index.sqlite")
    index.look(picture)
    index.save()
    assert not (tmp_path / "index.sqlite").exists()
    index.look(file_picture(tmp_path / "a.png"))
    assert len(reads) == 2


@pytest.mark.usefixtures("later")
def test_a_picture_and_its_transparency_are_two_things(tmp_path: Path) -> None:
    Image.new("RGBA", (20, 10), (255, 0, 0, 9)).save(tmp_path / "a.png")
    picture = file_picture(tmp_path / "a.png")
    index = Digests(tmp_path / "index.sqlite")
    found = {index.look(each)[0] for each in (picture, picture.transparency(), picture, picture.transparency())}
    assert found == {picture.digest(), picture.transparency().digest()}
    assert len(found) == 2


def test_what_has_no_place_is_read_each_time(tmp_path: Path, reads: list[str]) -> None:
    drawn(tmp_path / "a.png", "red")
    index = Digests(tmp_path / "index.sqlite")
    cells = [Picture("row 5", lambda: (tmp_path / "a.png").open("rb")) for _ in range(2)]
    assert index.look(cells[0]) == index.look(cells[1])
    assert reads == ["row 5", "row 5"]


@pytest.mark.usefixtures("later")
def test_the_pictures_of_one_shard_are_told_apart_and_remembered(tmp_path: Path, reads: list[str]) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as shard:
        for name in ("red", "blue", "lime"):
            drawn(tmp_path / f"{name}.png", name, (20, 16))
            shard.add(tmp_path / f"{name}.png", f"{name}.png")
            (tmp_path / f"{name}.txt").write_text(name)
            shard.add(tmp_path / f"{name}.txt", f"{name}.txt")

    def samples() -> list[Sample]:
        return list(WebDataset(tmp_path / "a.tar"))

    first = Digests(tmp_path / "index.sqlite")
    found = [first.look(sample.target) for sample in samples()]
    assert [known.content for known in found] == [
        file_picture(tmp_path / f"{sample.caption}.png").digest() for sample in samples()
    ]
    assert len({known.content for known in found}) == 3
    first.save()
    reads.clear()
    second = Digests(tmp_path / "index.sqlite")
    assert [second.look(sample.target) for sample in samples()] == found
    assert reads == []


def test_a_file_that_is_gone_is_a_bad_picture(tmp_path: Path) -> None:
    with pytest.raises(BadPicture, match=r"exist|found"):
        Digests(tmp_path / "index.sqlite").look(file_picture(tmp_path / "none.png"))


@pytest.mark.usefixtures("later")
def test_two_processes_remember_together_and_forgetting_keeps_what_was_looked_at(
    tmp_path: Path, reads: list[str]
) -> None:
    a, b = drawn(tmp_path / "a.png", "red"), drawn(tmp_path / "b.png", "blue")
    one, other = Digests(tmp_path / "index.sqlite"), Digests(tmp_path / "index.sqlite")
    one.look(a)
    other.look(b)
    one.save()
    other.save()
    reads.clear()

    def looked(*names: str) -> Digests:
        index = Digests(tmp_path / "index.sqlite")
        for name in names:
            index.look(file_picture(name))
        return index

    looked(a.name, b.name)
    assert reads == []
    looked(a.name).forget_others([a])
    looked(a.name, b.name)
    assert reads == [b.name]
