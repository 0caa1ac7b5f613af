"""Damaged and incomplete checkpoints: the one before is taken, or an error names the file."""

import json
import shutil

import pytest
from checkpoint_helpers import ANEW, IMAGES, damage, look, make_run
from message_helpers import holds

from train.checkpoints import checkpoint
from train.checkpoints.resume import RunLocation


def test_a_damaged_configuration_is_named(tmp_path):
    run = make_run(tmp_path / "run", 2)
    (run / "config.yaml").write_text("a: [")
    with pytest.raises(ValueError, match=r"config\.yaml"):
        look(str(run), tmp_path / "new")
    said = []
    assert look("auto", tmp_path / "new", say=said.append) == RunLocation(tmp_path / "new")
    assert len(said) == 2
    assert holds(said[0], f"warning: ... {run / 'config.yaml'}")
    assert holds(said[1], ANEW)


@pytest.mark.parametrize("text", ["", "[1]", "just words", "a: 1", "steps: many"])
def test_a_configuration_that_is_none_is_named_and_not_compared(tmp_path, text):
    run = make_run(tmp_path / "run", 2)
    (run / "config.yaml").write_text(text)
    for resume, fresh, chosen in ((str(run), tmp_path / "new", False), ("auto", run, True)):
        with pytest.raises(ValueError, match=r"config\.yaml") as error:
            look(resume, fresh, chosen=chosen)
        assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    ("left", "said"),
    [("checkpoints", r"resume=auto.*config\.yaml"), ("metrics.jsonl", "cannot be resumed .*Move them")],
)
def test_a_run_without_its_configuration_is_not_written_over(tmp_path, left, said):
    run = make_run(tmp_path / "run", *([2] if left == "checkpoints" else []))
    (run / "config.yaml").unlink()
    if left == "metrics.jsonl":
        (run / left).touch()
    with pytest.raises(ValueError, match=rf"already holds a run .*{left}"):
        look(None, run, chosen=True)
    with pytest.raises(ValueError, match=said):
        look("auto", run, chosen=True)


DAMAGED_STATES = ["", "garbage", "{}", "[]", '{"step": "2", "images_per_step": 4}', '{"step": 2}', '{"step": -1}']


@pytest.mark.parametrize("text", DAMAGED_STATES)
def test_a_damaged_state_of_a_checkpoint_that_is_given_is_one_error_that_names_the_file(tmp_path, text):
    run = make_run(tmp_path / "run", 2, 4)
    (run / "checkpoints" / "step_000004" / "state.json").write_text(text)
    with pytest.raises(ValueError, match=r"step_000004/state\.json.*[Dd]elete .*step_000004"):
        look(str(run / "checkpoints" / "step_000004"), tmp_path / "new")


def test_a_state_in_which_a_number_changed_is_damaged(tmp_path):
    run = make_run(tmp_path / "run", 4)
    file = run / "checkpoints" / "step_000004" / "state.json"
    file.write_text(file.read_text().replace('"step": 4', '"step": 5'))
    with pytest.raises(ValueError, match=r"state\.json.*checksum"):
        checkpoint.read_state(file.parent)


def test_a_checkpoint_without_checksums_is_of_an_older_version(tmp_path):
    run = make_run(tmp_path / "run", 4)
    place = run / "checkpoints" / "step_000004"
    (place / "state.json").write_text(json.dumps({"step": 4, "base": "tiny", "images_per_step": IMAGES}))
    with pytest.raises(ValueError, match=r"state\.json.*no checksum.*adapter"):
        look(str(place), tmp_path / "new")


FILES = ["state.json", "optimizer.pt", "adapter/adapter_model.safetensors"]


@pytest.mark.parametrize("how", ["missing", "cut", "flipped"])
@pytest.mark.parametrize("file", FILES)
def test_a_run_folder_goes_on_from_the_checkpoint_before_a_damaged_one_and_says_so(tmp_path, file, how):
    run = make_run(tmp_path / "run", 2, 4)
    damage(run / "checkpoints" / "step_000004" / file, how)
    said = []
    assert look(str(run), tmp_path / "new", say=said.append).step == 2
    if (file, how) == ("state.json", "missing"):
        assert said == []  # it never was a checkpoint
        return
    assert len(said) == 1
    assert f"step_000004/{file}" in said[0]
    damage(run / "checkpoints" / "step_000002" / file, "cut")
    with pytest.raises(ValueError, match="no complete checkpoint"):
        look(str(run), tmp_path / "new", say=said.append)
    assert f"step_000002/{file}" in said[-1]


@pytest.mark.parametrize("chosen", [False, True])
@pytest.mark.parametrize("file", FILES)
def test_auto_goes_on_from_the_checkpoint_before_a_damaged_one_and_says_so(tmp_path, file, chosen):
    run = make_run(tmp_path / "run", 2, 4)
    (run / "checkpoints" / "step_000004" / file).write_text("garbage")
    said = []
    place = look("auto", run if chosen else tmp_path / "new", chosen=chosen, say=said.append)
    assert place == RunLocation(run, run / "checkpoints" / "step_000002")
    assert len(said) == 1
    assert said[0].startswith("warning: ")
    assert f"step_000004/{file}" in said[0]


def test_auto_skips_a_damaged_run_and_takes_the_one_before(tmp_path):
    older = make_run(tmp_path / "1", 2)
    newer = make_run(tmp_path / "2", 4)
    (newer / "checkpoints" / "step_000004" / "state.json").write_text("{}")
    assert look("auto", tmp_path / "3") == RunLocation(older, older / "checkpoints" / "step_000002")


def test_auto_does_not_start_anew_over_checkpoints_that_cannot_be_read(tmp_path):
    run = make_run(tmp_path / "1", 2)
    (run / "checkpoints" / "step_000002" / "state.json").write_text("{}")
    with pytest.raises(ValueError, match=r"no checkpoint of .*1\b"):
        look("auto", run, chosen=True)


def test_only_folders_named_after_a_step_are_checkpoints(tmp_path):
    run = make_run(tmp_path / "run", 2)
    shutil.copytree(run / "checkpoints" / "step_000002", run / "checkpoints" / "step_000002 (copy)")
    shutil.copytree(run / "checkpoints" / "step_000002", run / "checkpoints" / "step_best")
    assert [path.name for path in checkpoint.checkpoints(run)] == ["step_000002"]
    assert look("auto", tmp_path / "new").step == 2


def test_a_checkpoint_that_was_renamed_is_not_taken_for_that_of_another_step(tmp_path):
    run = make_run(tmp_path / "run", 2, 4)
    (run / "checkpoints" / "step_000004").rename(run / "checkpoints" / "step_000009")
    said = []
    place = look(str(run), tmp_path / "new", say=said.append)
    assert place.checkpoint == run / "checkpoints" / "step_000002"
    assert holds(said[0], "step_000009 ... state.json ... step_000004 ... delete")


def test_a_checkpoint_that_was_taken_out_of_its_run_may_have_any_name(tmp_path):
    run = make_run(tmp_path / "run", 2)
    place = (run / "checkpoints" / "step_000002").rename(tmp_path / "best")
    assert checkpoint.read_state(place)["step"] == 2


@pytest.mark.parametrize("files", [None, ["optimizer.pt"], {"optimizer.pt": None}, {"optimizer.pt": {"size": 3}}])
def test_a_state_whose_files_are_no_listing_is_skipped(tmp_path, files):
    run = make_run(tmp_path / "run", 2, 4)
    file = run / "checkpoints" / "step_000004" / "state.json"
    about = {**json.loads(file.read_text()), "files": files}
    about.pop("checksum")
    file.write_text(json.dumps({**about, "checksum": checkpoint.checksum_of(about)}))
    said = []
    assert look(str(run), tmp_path / "new", say=said.append).step == 2
    assert holds(said[0], "step_000004 ... size ... checksum")


def test_a_state_that_nests_too_deep_is_one_that_cannot_be_read(tmp_path):
    run = make_run(tmp_path / "run", 2, 4)
    (run / "checkpoints" / "step_000004" / "state.json").write_text("[" * 100_000)
    assert look(str(run), tmp_path / "new", say=lambda text: None).step == 2


def test_a_configuration_that_cannot_be_read_has_copies(tmp_path):
    run = make_run(tmp_path / "run", 2)
    (run / "config.yaml").write_text("steps: [")
    with pytest.raises(ValueError, match=r"checkpoints/step_\*/config\.yaml"):
        look(str(run), tmp_path / "new")
