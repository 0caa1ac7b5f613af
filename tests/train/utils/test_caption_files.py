"""Captions in files: only what was read is replaced, and all else in a file stays as it is."""

import json
import os
import threading
from pathlib import Path

import pytest
from PIL import Image

from data.sources import Folder
from data.sources.base import CAPTION_PLACES, BadData, CaptionPlace
from train.utils.caption_files import Change, change_captions, state_of


def places_of(folder: Path, **settings) -> list[CaptionPlace]:
    found: list[CaptionPlace] = []
    token = CAPTION_PLACES.set(found)
    try:
        Folder(folder, **settings)
    except BadData:
        pass
    finally:
        CAPTION_PLACES.reset(token)
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a", "b", "c"):
        Image.new("RGB", (32, 32)).save(tmp_path / f"{name}.png")
    return tmp_path


def test_places_tell_where_each_caption_is_and_why_a_sample_is_bad(folder):
    (folder / "a.txt").write_text("one\n")
    (folder / "b.txt").write_text("")
    found = {place.sample.name: place for place in places_of(folder)}
    a, b, c = (found[str(folder / f"{name}.png")] for name in "abc")
    assert (a.file, a.written, a.sample.captions, a.reason) == (folder / "a.txt", ("one\n",), ("one",), "")
    assert (b.file, b.written) == (folder / "b.txt", ("",))
    assert b.reason.startswith("has an empty caption")
    assert (c.file, c.written, c.reason) == (folder / "c.txt", (), "")
    assert len({state_of(place) for place in found.values()}) == 3


def test_a_text_file_is_replaced_only_as_it_was_read(folder):
    (folder / "a.txt").write_text("one")
    os.chmod(folder / "a.txt", 0o640)
    place, new = places_of(folder)[:2]
    change_captions([Change(place, ("two",))])
    assert (folder / "a.txt").read_text() == "two\n"
    assert (folder / "a.txt").stat().st_mode & 0o777 == 0o640
    with pytest.raises(ValueError, match=r"a\.txt was changed meanwhile, and is kept"):
        change_captions([Change(place, ("three",))])
    assert (folder / "a.txt").read_text() == "two\n"
    change_captions([Change(new, ("new",))])
    assert (folder / "b.txt").read_text() == "new\n"
    with pytest.raises(ValueError, match=r"b\.txt was written meanwhile, and is kept"):
        change_captions([Change(new, ("other",))])
    assert (folder / "b.txt").read_text() == "new\n"


def test_a_link_is_followed_and_stays(folder):
    (folder / "texts").mkdir()
    (folder / "texts/a").write_text("one")
    (folder / "a.txt").symlink_to(folder / "texts/a")
    change_captions([Change(places_of(folder)[0], ("two",))])
    assert (folder / "a.txt").is_symlink()
    assert (folder / "texts/a").read_text() == "two\n"


def test_lines_of_metadata_keep_all_else(folder):
    lines = [
        '\ufeff{"file_name": "a.png",  "text": "one", "n": 1.50, "odd": "\\ud800"}',
        "",
        '{"file_name": "b.png", "text": ["x", "y"]}',
        '{"file_name": "c.png", "other":  [1]}',
    ]
    file = folder / "metadata.jsonl"
    file.write_bytes("\r\n".join(lines).encode())
    a, b, c = places_of(folder)
    assert [place.line for place in (a, b, c)] == [1, 3, 4]
    change_captions([Change(a, ("ä",)), Change(b, ("z",)), Change(c, ("new",))])
    text = file.read_bytes().decode()
    assert text.startswith("\ufeff{")
    found = text.removeprefix("\ufeff").split("\r\n")
    assert found[1] == ""
    assert not text.endswith("\n")
    assert [json.loads(line) for line in (found[0], found[2], found[3])] == [
        {"file_name": "a.png", "text": "ä", "n": 1.5, "odd": "\ud800"},
        {"file_name": "b.png", "text": ["z"]},
        {"file_name": "c.png", "other": [1], "text": "new"},
    ]


def test_a_line_that_moved_or_changed_keeps_the_whole_file(folder):
    file = folder / "metadata.jsonl"
    rows = [json.dumps({"file_name": f"{name}.png", "text": name}) for name in "abc"]
    file.write_text("\n".join(rows))
    a, b, _ = places_of(folder)
    for other in (["{}", *rows], [rows[0]], [rows[0], rows[1].replace('"b"', '"other"'), rows[2]]):
        file.write_text("\n".join(other))
        with pytest.raises(ValueError, match="line 2 was changed meanwhile, and is kept"):
            change_captions([Change(a, ("new",)), Change(b, ("new",))][(other[0] == "{}") :])
        assert file.read_text() == "\n".join(other)


def test_of_two_writers_one_wins_and_the_other_is_told(folder):
    (folder / "a.txt").write_text("one")
    place, refused = places_of(folder)[0], list[str]()

    def write(text: str) -> None:
        try:
            change_captions([Change(place, (text,))])
        except ValueError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=write, args=(f"text {i}",)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 7
    assert (folder / "a.txt").read_text() in {f"text {i}\n" for i in range(8)}
