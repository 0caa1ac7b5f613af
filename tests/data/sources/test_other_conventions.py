"""Files and names as other trainers and systems write them are read, left out or refused, and never without a word."""

import os
from pathlib import Path

import pytest
from data_helpers import lines, shard, square, write

from data.sources.base import BadData, Source
from data.sources.folders import Folder
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
