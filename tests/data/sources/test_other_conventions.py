"""Files and names as other trainers and systems write them are read, left out or refused, and never without a word."""

import os
import re
from pathlib import Path

import pytest
from data_helpers import lines, shard, square, write

from data.sources.base import BadData, Source
from data.sources.folders import Folder, Pairs
from data.sources.webdataset import WebDataset


def file_names(samples: Source) -> list[str]:
    return [os.path.basename(sample.name) for sample in samples]


def warnings_of(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(record.getMessage() for record in caplog.records if record.levelname == "WARNING")


# --- names that say that an image belongs to another


@pytest.mark.parametrize("name", ["cat-masklabel.png", "cat-condlabel.png", "cat.depthmap.png", "cat_MaskLabel.jpg"])
def test_a_label_of_an_image_is_refused_also_with_one_prompt_for_all(tmp_path: Path, name: str) -> None:
    write(tmp_path, {"cat.png": square(), "cat.txt": "x", name: square()})
    for prompt in (None, "felix"):
        with pytest.raises(BadData, match=rf"{name}\b.*belongs to cat\.png.*masks are dataset\.mask"):
            Folder(tmp_path, prompt=prompt)
        assert file_names(Folder(tmp_path, prompt=prompt, max_bad=1)) == ["cat.png"]


@pytest.mark.parametrize("name", ["cat_mask.png", "cat_control.png", "cat_depthmap.png", "cat-normals.png"])
def test_an_image_that_may_belong_to_another_is_named_if_it_is_trained(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, {"cat.png": square(), name: square(), "deep_mask.png": square(), "bob_cat.png": square()})
    assert len(Folder(tmp_path, prompt="felix")) == 4
    (line,) = warnings_of(caplog).splitlines()
    assert line.startswith(f"{tmp_path}: trained, although by their names they belong to other images")
    assert line.endswith(f"(1): {tmp_path / name}")
    caplog.clear()
    write(tmp_path, {f"{Path(name).stem}.txt": "an image of its own"})
    Folder(tmp_path, prompt="felix")
    assert "trained, although" not in warnings_of(caplog)


# --- folders of systems


def test_folders_of_systems_hold_no_samples(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    others = ["@eaDir/a.png/SYNOFILE_THUMB_M.png", "__MACOSX/a.png", "deep/@eaDir/b.png/x.png", "#recycle/c.png"]
    write(tmp_path, dict.fromkeys(["a.png", "deep/b.png", ".ipynb_checkpoints/a-checkpoint.png", *others], square()))
    assert file_names(Folder(tmp_path, prompt="x", recursive=True)) == ["a.png", "b.png"]
    Folder(tmp_path, prompt="x")
    assert warnings_of(caplog).endswith("deep (1)")
    caplog.clear()
    Folder(write(tmp_path, {"metadata.jsonl": lines({"file_name": "a.png", "text": "x"})}))
    assert warnings_of(caplog).endswith(f"(1): {tmp_path / 'deep/b.png'}")
    files = {"a.png": square(), "__MACOSX/b.png": square(), "deep/@eaDir/c.png/x.png": square()}
    assert file_names(WebDataset(shard(tmp_path / "s.tar", files), prompt="x")) == ["a.png"]


def test_a_folder_of_a_system_is_read_if_it_is_given(tmp_path: Path) -> None:
    write(tmp_path, {"@eaDir/a.png": square()})
    assert file_names(Folder(tmp_path / "@eaDir", prompt="x")) == ["a.png"]


# --- files that may hold captions


@pytest.mark.parametrize("ending", ["TXT", "Txt"])
def test_the_ending_of_a_caption_may_have_capitals(tmp_path: Path, ending: str) -> None:
    files = {"cat.png": square(), f"cat.{ending}": "felix"}
    assert Folder(write(tmp_path, files))[0].captions == ("felix",)
    assert WebDataset(shard(tmp_path / "s.tar", files))[0].captions == ("felix",)
    pairs = write(tmp_path / "pairs", {"source/a.png": square(), "target/a.png": square(), f"target/a.{ending}": "x"})
    assert Pairs(pairs)[0].captions == ("x",)
    with pytest.raises(BadData, match=rf"cat\.png has several captions, .*cat\.{ending}.*remove all but one"):
        Folder(write(tmp_path, {"cat.txt": "another"}))


@pytest.mark.parametrize(
    "name",
    ["cat.caption", "cat.json", "Metadata.jsonl", "metadata.json", "captions.jsonl", "metadata.CSV", "train.parquet"],
)
def test_a_file_that_may_hold_captions_is_named_wherever_it_is(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    rows = lines({"file_name": "cat.png", "text": "x"})
    plain = write(tmp_path / "plain", {"cat.png": square(), name: rows})
    with pytest.raises(BadData, match=r"cat\.png has no caption"):
        Folder(plain)
    assert str(plain / name) in warnings_of(caplog)
    write(plain, {"cat.txt": "x"})
    write(tmp_path / "described", {"cat.png": square(), name: rows, "metadata.jsonl": rows})
    pairs = write(tmp_path / "pairs", {"source/a.png": square(), "target/a.png": square(), "target/a.txt": "x"})
    for folder in ("", "source", "target"):
        write(pairs / folder, {name: rows})
    for source, count in (
        (lambda: Folder(plain), 1),
        (lambda: Folder(plain, prompt="x"), 1),
        (lambda: Folder(tmp_path / "described"), 1),
        (lambda: Pairs(pairs), 3),
    ):
        caplog.clear()
        assert len(source()) == 1
        (line,) = [line for line in warnings_of(caplog).splitlines() if "may hold captions" in line]
        assert "not used: files that may hold captions" in line
        assert (len(re.findall(rf"/{name}(?=,|$)", line)), f"({count}): " in line) == (count, True)


def test_captions_and_metadata_that_pairs_do_not_read_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    row = lines({"file_name": "target/a.png", "text": "other"})
    write(tmp_path, {"source/a.png": square(), "target/a.png": square(), "target/a.txt": "x", "source/a.txt": "y"})
    write(tmp_path, {"metadata.jsonl": row, "target/metadata.csv": "file_name,text"})
    assert Pairs(tmp_path)[0].captions == ("x",)
    captions, metadata = warnings_of(caplog).splitlines()
    assert captions.endswith(f"captions of references: those in {tmp_path}/target count (1): {tmp_path}/source/a.txt")
    assert "dataset=folder reads" in metadata
    assert metadata.endswith(f"(2): {tmp_path}/metadata.jsonl, {tmp_path}/target/metadata.csv")


def test_files_of_a_shard_that_are_not_read_are_named_by_their_endings(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = {f"{i}.{part}": "{}" for i in (1, 2) for part in ("txt", "json", "cls")}
    path = shard(tmp_path / "s.tar", files | {"1.png": square(), "2.png": square("blue")})
    assert len(WebDataset(path)) == 2
    assert warnings_of(caplog).endswith(f"(2): {path}/*.json, {path}/*.cls")


# --- numbers in names of folders


def test_repeats_in_names_of_folders_are_named_as_not_applied(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folders = ["10_cat", "2_dog", "1_fox", "02_owl", "2024_trip", "deep/5_hen", "3_empty/more"]
    write(tmp_path, dict.fromkeys([f"{folder}/a.png" for folder in folders], square()))
    samples = Folder(tmp_path, prompt="x", recursive=True)
    assert {sample.weight for sample in samples} == {1.0}
    (line,) = warnings_of(caplog).splitlines()
    assert "kohya's scripts read as repeats" in line
    assert "dataset=mix" in line
    assert "dataset.repeats" in line
    assert line.endswith(f"(3): {tmp_path}/10_cat, {tmp_path}/2_dog, {tmp_path}/deep/5_hen")
    caplog.clear()
    Folder(tmp_path / "10_cat", prompt="x")  # as a source of a mix
    assert warnings_of(caplog) == ""
