"""What a dataset has and does not train is named; names and texts as other systems write them."""

import json
import os
import re
import tarfile
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from data_helpers import color, encoded, keep_caches_in, lines, shard, square, table, write
from PIL import Image

from data.sources.base import BadData, Source
from data.sources.captions import Captions
from data.sources.folders import Folder, Pairs
from data.sources.tables import HuggingFace
from data.sources.webdataset import WebDataset

NFC, NFD = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
OUTPUT_NAMES = {"a.jfif": "JPEG", "b.jpe": "JPEG", "c.ppm": "PPM", "d.tga": "TGA", "e.jp2": "JPEG2000", "f.apng": "PNG"}


def file_names(samples: Source) -> list[str]:
    return [os.path.basename(sample.name) for sample in samples]


@pytest.fixture(autouse=True)
def _table_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    keep_caches_in(tmp_path_factory.mktemp("datasets"), monkeypatch)


def warnings_of(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(record.getMessage() for record in caplog.records if record.levelname == "WARNING")


# --- endings


def test_every_ending_that_is_opened_is_found_and_none_by_content(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, kind in OUTPUT_NAMES.items():
        write(tmp_path, {name: encoded(Image.new("RGB", (16, 16), "red"), kind), f"{name[0]}.txt": name})
    write(tmp_path, {"g": square(), "g.txt": "g", "Makefile": "all:"})
    assert file_names(Folder(tmp_path)) == [*OUTPUT_NAMES, "g"]
    assert warnings_of(caplog) == ""


@pytest.mark.parametrize("ending", ["cr2", "dng", "heic", "psd", "mp4", "svg"])
def test_what_cannot_be_opened_is_an_error_and_not_left_out(tmp_path: Path, ending: str) -> None:
    content = encoded(Image.new("RGB", (16, 16)), "TIFF")  # as a raw photograph begins with its thumbnail
    write(tmp_path, {"target/a.png": square(), "target/a.txt": "x", f"source/a.{ending}": content})
    with pytest.raises(BadData, match=rf"source/a\.{ending}\b"):
        Pairs(tmp_path, incomplete=True)


def test_captions_without_an_image_are_listed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, {"a.png": square(), "a.txt": "a", "lost.txt": "x", "v1.5.txt": "x"})
    assert len(Folder(tmp_path)) == 1
    assert "captions without an image" in warnings_of(caplog)
    assert "lost.txt" in warnings_of(caplog)
    caplog.clear()
    write(tmp_path, {"target/b.png": square(), "target/b.txt": "b", "target/gone.txt": "x", "source/b.png": square()})
    assert len(Pairs(tmp_path)) == 1
    assert "gone.txt" in warnings_of(caplog)


def test_captions_that_the_prompt_replaces_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = {f"{folder}{name}.png": square() for folder in ("", "target/", "source/") for name in "abc"}
    texts = {f"{folder}{name}.txt": name for folder in ("", "target/") for name in "ab"}
    write(tmp_path, files | texts)
    write(tmp_path / "named", {"a.png": square(), "metadata.jsonl": lines({"file_name": "a.png", "text": "x"})})
    sources: dict[str, Callable[[str | None], Source]] = {
        r"\(2\): \S+a\.txt, \S+b\.txt": lambda prompt: Folder(tmp_path, prompt=prompt),
        r"\(2\): \S+target/a\.txt, \S+target/b\.txt": lambda prompt: Pairs(tmp_path, prompt=prompt),
        r"\(1\): \S+jsonl line 1": lambda prompt: Folder(tmp_path / "named", prompt=prompt),
        r"column caption of 3 rows": lambda prompt: HuggingFace(table(tmp_path / "t.parquet"), prompt=prompt),
        r"\(1\): \S+t\.tar/a\.txt": lambda prompt: WebDataset(
            shard(tmp_path / "t.tar", {"a.png": square(), "a.txt": "x"}), prompt=prompt
        ),
    }
    for names, source in sources.items():
        caplog.clear()
        source("one for all")
        assert re.search(rf"not used: captions\b.*dataset\.prompt.*{names}", warnings_of(caplog)), names
    for kind in (Folder, Pairs):
        with pytest.raises(BadData, match=r"c\.png has no caption.*dataset\.prompt.* instead of all captions"):
            kind(tmp_path)


def test_masks_without_an_image_are_listed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for folder in (tmp_path, tmp_path / "target"):
        write(folder, {"a.png": square(), "a.txt": "a", "deep/b.png": square(), "deep/b.txt": "b"})
    write(tmp_path, {f"m/{name}.png": square() for name in ("a", "deep/b", "lost")} | {"source/a.png": square()})
    write(tmp_path, {"source/deep/b.png": square()})
    Folder(tmp_path, mask="m", prompt="x")
    assert "m/lost.png" in warnings_of(caplog)
    caplog.clear()
    Pairs(tmp_path, mask="m")
    assert "(1): " in warnings_of(caplog)
    assert "m/lost.png" in warnings_of(caplog)


def test_a_folder_that_cannot_be_listed_is_no_reason_to_stop(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, {"a.png": square(), "a.txt": "a", "locked/b.png": square()})
    scandir = os.scandir

    def refuse(folder: Path) -> object:
        if str(folder).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    for files in ({}, {"metadata.jsonl": lines({"file_name": "a.png", "text": "x"})}):
        caplog.clear()
        assert len(Folder(write(tmp_path, files))) == 1
        assert "locked" in warnings_of(caplog)


def test_subfolders_with_images_are_listed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, {"a.png": square(), "a.txt": "a", "more/b.png": square(), "notes/x.txt": "x", "m/a.png": square()})
    Folder(tmp_path, mask="m")
    assert "more (1)" in warnings_of(caplog)
    assert "dataset.recursive" in warnings_of(caplog)
    assert "notes" not in warnings_of(caplog)
    assert "m (1)" not in warnings_of(caplog)


def test_what_metadata_does_not_name_is_listed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [
        {"file_name": "0.png", "text": "zero", "edge_map": "edges/0.png"},
        {"file_name": "1.png", "text": "one", "edge_map": None},
    ]
    write(tmp_path, {f"{i}.png": square() for i in range(4)} | {"metadata.jsonl": lines(*rows)})
    write(tmp_path, {"0.txt": "corrected", "3.txt": "three", "edges/0.png": square(), "more/4.png": square()})
    write(tmp_path, {"more/metadata.jsonl": lines({"file_name": "4.png", "text": "four"})})
    for recursive in (False, True):
        caplog.clear()
        assert file_names(Folder(tmp_path, recursive=recursive)) == ["0.png", "1.png"]
        said = warnings_of(caplog)
        for name in ("2.png", "3.png", "4.png", "0.txt", "3.txt", "more/metadata.jsonl", "edge_map"):
            assert name in said
        assert "(3): " in said  # images
        assert "edges/0.png" not in said
    caplog.clear()
    Folder(write(tmp_path / "whole", {"0.png": square(), "metadata.jsonl": lines({"file_name": "0.png", "text": "x"})}))
    assert warnings_of(caplog) == ""


@pytest.mark.parametrize("name", ["0001.control.png", "0001_mask.png", "0001.ref0.png", "0001-Conditioning.png"])
def test_an_image_that_looks_like_a_part_of_another_is_called_that(tmp_path: Path, name: str) -> None:
    write(tmp_path, {"0001.png": square(), "0001.txt": "x", name: square()})
    for settings in [{}, {"prompt": "x"}] if name[4] == "." else [{}]:
        with pytest.raises(BadData, match=rf"{name}\b.*belongs to 0001\.png.*references") as caught:
            Folder(tmp_path, **settings)
        assert "1 of 2" in str(caught.value)


def test_a_name_with_a_dot_is_no_part_of_another(tmp_path: Path) -> None:
    write(tmp_path, {"cat.png": square(), "cat.txt": "x", "cat.v2.png": square(), "cat.v2.txt": "y"})
    write(tmp_path, {"cat.mask.png": square(), "cat.mask.txt": "a mask of a cat"})
    assert len(Folder(tmp_path)) == 3
    write(tmp_path, {"cat_source.png": square()})
    assert len(Folder(tmp_path, prompt="a cat")) == 4  # a word that a name may have anyway


def test_files_between_the_dots_of_a_shard_are_listed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files: dict = {"1.png": square(), "1.txt": "x", "1.control.png": square(), "1.ref0.png": square("blue")}
    (sample,) = WebDataset(shard(tmp_path / "s.tar", files))
    assert [color(reference) for reference in sample.references] == [(0, 0, 255)]
    assert "1.control.png" in warnings_of(caplog)
    assert "ref0" in warnings_of(caplog)
    assert "1.ref0.png" not in warnings_of(caplog)


def test_unused_columns_and_tables_are_listed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    paths = ["x/1.png", "x/2.png", "x/3.png"]
    more = {"conditioning_image": [square()] * 3, "canny": paths, "note": ["a.b"] * 3}
    table(tmp_path / "train_stations.parquet", **more)
    table(tmp_path / "dogs.parquet")
    write(tmp_path, {"rows.jsonl": lines({"caption": "x"})})
    assert len(HuggingFace(tmp_path)) == 3
    said = warnings_of(caplog)
    for name in ("conditioning_image", "canny", "sources", "dogs.parquet", "rows.jsonl"):
        assert name in said
    assert "note" not in said
    assert "train_stations" not in said
    caplog.clear()
    columns = ["conditioning_image", "sources"]
    assert len(HuggingFace(tmp_path / "dogs.parquet", reference_columns=columns[1:])) == 3
    assert warnings_of(caplog) == ""


# --- names


@pytest.mark.parametrize(("there", "written"), [(NFC, NFD), (NFD, NFC)])
def test_names_are_compared_in_one_unicode_form(tmp_path: Path, there: str, written: str) -> None:
    write(tmp_path / "sidecar", {f"{there}.png": square(), f"{written}.txt": "x"})
    assert len(Folder(tmp_path / "sidecar")) == 1
    row = lines({"file_name": f"{written}/{written}.png", "text": "x"})
    write(tmp_path / "rows", {f"{there}/{there}.png": square(), "metadata.jsonl": row})
    assert len(Folder(tmp_path / "rows")) == 1
    write(tmp_path / "pairs", {f"target/{there}.png": square(), f"target/{written}.txt": "x"})
    write(tmp_path / "pairs", {f"source/{written}.png": square("blue")})
    assert color(Pairs(tmp_path / "pairs")[0].references[0]) == (0, 0, 255)
    assert len(WebDataset(shard(tmp_path / "s.tar", {f"{there}.png": square(), f"{written}.txt": "x"}))) == 1
    write(
        tmp_path / "table", {f"{there}.png": square(), "rows.jsonl": lines({"image": f"{written}.png", "caption": "x"})}
    )
    assert len(HuggingFace(tmp_path / "table" / "rows.jsonl")) == 1


def test_two_names_that_look_the_same_are_told_apart(tmp_path: Path) -> None:
    write(tmp_path, {f"{NFC}.png": square(), f"{NFD}.png": square(), f"{NFC}.txt": "x"})
    with pytest.raises(BadData, match=r"caf\\xe9\.png.*\n?.*cafe\\u0301\.png|cafe\\u0301\.png.*\n?.*caf\\xe9\.png"):
        Folder(tmp_path)


def test_a_name_that_is_not_utf8_is_refused_and_printable(tmp_path: Path) -> None:
    write(tmp_path, {"good.png": square(), "good.txt": "x"})
    for ending, content in ((b".png", square()), (b".txt", b"x")):
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9" + ending)).write_bytes(content)
    with pytest.raises(BadData, match=r"caf\\udce9\.png\b.*not UTF-8.*rename"):
        Folder(tmp_path)
    samples = Folder(tmp_path, max_bad=1)
    assert len(samples) == 1
    assert str(samples.bad[0]).encode()


def test_control_characters_in_a_name_are_escaped(tmp_path: Path) -> None:
    write(tmp_path, {"a\x1b[31m.png": square()})
    with pytest.raises(BadData, match=r"a\\x1b\[31m\.png"):
        Folder(tmp_path)


def test_a_loop_of_links_is_walked_once(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": square(), "a.txt": "a", "deep/b.png": square(), "deep/b.txt": "b"})
    (tmp_path / "deep" / "back").symlink_to(tmp_path)
    (tmp_path / "deep" / "self").symlink_to(tmp_path / "deep")
    assert file_names(Folder(tmp_path, recursive=True)) == ["a.png", "b.png"]
    write(tmp_path / "pairs", {"target/a.png": square(), "target/a.txt": "x", "source/a.png": square()})
    for name in ("target", "source"):
        (tmp_path / "pairs" / name / "back").symlink_to(tmp_path / "pairs" / name)
    assert len(Pairs(tmp_path / "pairs")) == 1


@pytest.mark.parametrize("name", ["a.png", "a.txt", "plain", "metadata.jsonl"])
def test_a_pipe_is_refused_and_does_not_wait(tmp_path: Path, name: str) -> None:
    write(tmp_path, {"a.png": square(), "a.txt": "x"})
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    if name == "plain":  # without an ending, it is not looked into
        assert len(Folder(tmp_path)) == 1
        return
    with pytest.raises(ValueError, match=r"(a\.png|metadata\.jsonl)\b.*not a regular file"):
        Folder(tmp_path)


def test_a_path_in_a_cell_is_shown_with_the_folder_that_lacks_it(tmp_path: Path) -> None:
    rows = lines({"image": "pics/a.png", "caption": "x"}, {"image": "pics\\b.png", "caption": "y"})
    write(tmp_path, {"list.jsonl": rows})
    with pytest.raises(BadData, match=rf"'pics/a\.png'.* {tmp_path}.*picture_folder.*\n.*pics\\\\b\.png.* / between"):
        HuggingFace(tmp_path / "list.jsonl")


def test_an_undecodable_cell_prints_no_object(tmp_path: Path) -> None:
    image = pyarrow.array([b"not an image"])
    pyarrow.parquet.write_table(pyarrow.table({"image": image, "caption": ["x"]}), tmp_path / "t.parquet")
    with pytest.raises(BadData, match=r"row 0 of .*formats PNG") as caught:
        HuggingFace(tmp_path / "t.parquet")
    assert "object at" not in str(caught.value)
    assert "BufferReader" not in str(caught.value)


def test_the_files_of_a_sample_may_be_anywhere_in_its_shard(tmp_path: Path) -> None:
    pictures = {f"{i}.png": square(("red", "lime")[i]) for i in range(2)}
    path = shard(tmp_path / "s.tar", {**pictures, "0.txt": "red", "1.txt": "lime"})
    samples = WebDataset(path)
    assert [(sample.caption, color(sample.target)) for sample in samples] == [
        ("red", (255, 0, 0)),
        ("lime", (0, 255, 0)),
    ]
    with tarfile.open(path, "a") as tar:
        tar.add(write(tmp_path, {"again": "other"}) / "again", "0.txt")
    with pytest.raises(BadData, match=r"s\.tar/0\b.*\.txt.*twice"):
        WebDataset(path)


# --- texts


def test_utf16_without_a_mark_is_refused_wherever_it_stands(tmp_path: Path) -> None:
    content = "a red square".encode("utf-16-le")
    write(tmp_path, {"a.png": square(), "a.txt": content})
    with pytest.raises(BadData, match=r"a\.png\b.*UTF-8.*UTF-16"):
        Folder(tmp_path)
    with pytest.raises(BadData, match=r"UTF-8.*UTF-16"):
        WebDataset(shard(tmp_path / "s.tar", {"a.png": square(), "a.txt": content}))
    row = json.dumps({"file_name": "a.png", "text": content.decode()})
    with pytest.raises(BadData, match=r"NUL.*UTF-8"):
        Folder(write(tmp_path, {"metadata.jsonl": row}))
    write(tmp_path, {"metadata.jsonl": lines({"file_name": "a.png", "text": "x"}).encode("utf-16-le")})
    with pytest.raises(ValueError, match=r"metadata\.jsonl.*UTF-16"):
        Folder(tmp_path)


@pytest.mark.parametrize("cell", [None, [], [None], ""])
def test_an_empty_cell_is_an_empty_caption_if_that_is_allowed(tmp_path: Path, cell: object) -> None:
    allowed = Captions(allow_empty=True)
    row = {"file_name": "a.png", "image": "a.png", "text": cell, "caption": cell}
    write(tmp_path, {"a.png": square(), "metadata.jsonl": lines(row)})
    assert Folder(tmp_path, captions=allowed)[0].captions == ("",)
    with pytest.raises(BadData, match="caption"):
        Folder(tmp_path)
    kind = pyarrow.list_(pyarrow.string()) if isinstance(cell, list) else pyarrow.string()
    columns = {"image": pyarrow.array([square()]), "caption": pyarrow.array([cell], kind)}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "t.parquet")
    assert HuggingFace(tmp_path / "t.parquet", captions=allowed)[0].captions == ("",)
    with pytest.raises(BadData, match="caption"):
        HuggingFace(tmp_path / "t.parquet")


def test_a_caption_has_a_bound_in_every_source(tmp_path: Path) -> None:
    for size, match in ((200_000, "200000 characters"), (20_000_000, "bytes|characters")):
        text = "x" * size
        with pytest.raises(BadData, match=match):
            Folder(write(tmp_path / "folder", {"a.png": square(), "a.txt": text}))
        row = lines({"file_name": "a.png", "text": text})
        with pytest.raises(BadData, match="characters"):
            Folder(write(tmp_path / "rows", {"a.png": square(), "metadata.jsonl": row}))
        with pytest.raises(BadData, match=match):
            WebDataset(shard(tmp_path / "s.tar", {"a.png": square(), "a.txt": text}))
        with pytest.raises(BadData, match="characters"):
            Folder(tmp_path / "folder", prompt=text)
