import json
import re
import shutil
from pathlib import Path

import helpers
import pytest
import torch
from omegaconf import OmegaConf
from safetensors import SafetensorError
from safetensors.torch import save_file

from flux2 import adapters
from train import checkpoint
from train.folder import InUse, Lock
from train.resume import Place, find

CONFIG = {
    "name": "a",
    "steps": 10,
    "seed": 0,
    "batch_size": 4,
    "gradient_accumulation": 1,
    "model": {"name": "tiny", "path": None},
    "adapter": {"rank": 4, "targets": ["x", "y"]},
    "dataset": {"path": "data/demo"},
    "sample": {"prompts": []},
}
IMAGES = 4
ANEW = "resume=auto: nothing to resume, starting anew"


def changed(**groups):
    """CONFIG with some keys of groups (or run-level keys) set."""
    config = json.loads(json.dumps(CONFIG))
    for key, value in groups.items():
        config[key] = {**config[key], **value} if isinstance(value, dict) else value
    return config


def make_run(folder: Path, *steps: int, finished: bool = False, config=CONFIG, images: int = IMAGES) -> Path:
    """A run folder as training leaves it, without any tensors."""
    folder.mkdir(parents=True)
    OmegaConf.save(OmegaConf.create(config), folder / "config.yaml")
    for step in steps:
        place = folder / "checkpoints" / f"step_{step:06d}"
        place.mkdir(parents=True)
        torch.save({"state": {}, "param_groups": []}, place / "optimizer.pt")
        (place / "adapter").mkdir()
        save_file({}, place / "adapter" / adapters.PEFT_FILE)
        checkpoint.seal(place, {"step": step, "base": "tiny", "images_per_step": images})
    if finished:
        (folder / "adapter").mkdir()
        (folder / "adapter" / adapters.PEFT_FILE).touch()
    return folder


def look(resume, fresh, config=CONFIG, images=IMAGES, chosen=False, say=print):
    return find(resume, fresh, config, images, chosen=chosen, say=say)


# ------------------------------------------------------------------ where a run goes on


def test_a_new_run_starts_in_its_own_folder(tmp_path):
    assert look(None, tmp_path / "new") == Place(tmp_path / "new", None)
    assert Place(tmp_path / "new").step == 0


def test_a_new_run_into_the_folder_of_another_is_refused(tmp_path):
    make_run(tmp_path / "run")
    with pytest.raises(ValueError, match=r"output_dir=.*run' already holds a run.*resume=auto"):
        look(None, tmp_path / "run", chosen=True)


def test_a_run_folder_goes_on_from_its_newest_checkpoint(tmp_path):
    run = make_run(tmp_path / "run", 2, 10, 9)
    place = look(str(run), tmp_path / "new")
    assert place == Place(run, run / "checkpoints" / "step_000010")
    assert place.step == 10


def test_the_newest_checkpoint_can_be_given_itself(tmp_path):
    run = make_run(tmp_path / "run", 2, 4)
    newest = run / "checkpoints" / "step_000004"
    assert look(str(newest), tmp_path / "new") == Place(run, newest)


def test_an_older_checkpoint_needs_a_folder_of_its_own_to_branch_off_into(tmp_path):
    run = make_run(tmp_path / "run", 2, 4)
    older = run / "checkpoints" / "step_000002"
    with pytest.raises(ValueError, match=r"step_000004 of that run would be overwritten.*output_dir="):
        look(str(older), tmp_path / "new")
    branch = tmp_path / "branch"
    assert look(str(older), branch, chosen=True) == Place(branch, older)
    make_run(branch)
    with pytest.raises(ValueError, match=r"already holds a run.*for the branch"):
        look(str(older), branch, chosen=True)


def test_a_checkpoint_that_was_not_finished_is_no_checkpoint(tmp_path):
    run = make_run(tmp_path / "run", 2)
    (run / "checkpoints" / "step_000004").mkdir()  # without its state.json
    (run / "checkpoints" / ".step_000006.part").mkdir()
    (run / "checkpoints" / ".step_000006.part" / "state.json").write_text('{"step": 6}')
    assert look(str(run), tmp_path / "new").step == 2
    with pytest.raises(ValueError, match="neither a run folder nor a complete checkpoint"):
        look(str(run / "checkpoints" / "step_000004"), tmp_path / "new")


def test_nothing_to_resume_is_said(tmp_path):
    with pytest.raises(ValueError, match=r"resume='/nowhere' is not a folder.*auto"):
        look("/nowhere", tmp_path / "new")
    with pytest.raises(ValueError, match="is neither a run folder nor a complete checkpoint"):
        look(str(tmp_path), tmp_path / "new")
    with pytest.raises(ValueError, match="holds no complete checkpoint"):
        look(str(make_run(tmp_path / "run")), tmp_path / "new")


def test_a_finished_run_needs_more_steps_to_go_on(tmp_path):
    run = make_run(tmp_path / "run", 10, finished=True)
    with pytest.raises(ValueError, match=r"has done 10 steps: to train it for longer, set steps=11 or more"):
        look(str(run), tmp_path / "new")
    assert look(str(run), tmp_path / "new", changed(steps=12)).step == 10
    with pytest.raises(ValueError, match="has done 10 steps"):
        look(str(run), tmp_path / "new", changed(steps=8))


def test_a_run_that_was_killed_before_its_adapter_was_written_is_finished_off(tmp_path):
    run = make_run(tmp_path / "run", 10)
    assert look(str(run), tmp_path / "new").step == 10
    assert look("auto", tmp_path / "new").step == 10


# ------------------------------------------------------------------ another configuration


def test_one_error_lists_all_keys_that_differ(tmp_path):
    run = make_run(tmp_path / "run", 2)
    config = changed(model={"name": "dev"}, adapter={"rank": 8}, dataset={"path": "other"}, seed=1)
    with pytest.raises(ValueError, match="another configuration") as error:
        look(str(run), tmp_path / "new", config)
    for difference in (
        "model.name='tiny' there, 'dev' here",
        "adapter.rank=4 there, 8 here",
        "dataset.path='data/demo' there, 'other' here",
        "seed=0 there, 1 here",
    ):
        assert difference in str(error.value)
    assert "adapter.targets" not in str(error.value)


def test_a_key_that_only_one_of_them_has_differs(tmp_path):
    run = make_run(tmp_path / "run", 2)
    with pytest.raises(ValueError, match=r"adapter\.alpha=None there, 2 here"):
        look(str(run), tmp_path / "new", changed(adapter={"alpha": 2}))


def test_keys_that_change_nothing_learned_may_differ(tmp_path):
    run = make_run(tmp_path / "run", 2)
    config = changed(steps=20, name="b", sample={"prompts": ["a"]}) | {"log_every": 3, "cache_dir": "/x"}
    assert look(str(run), tmp_path / "new", config).step == 2


def test_a_run_may_go_on_with_more_patience_for_its_text_encoder_but_not_with_another(tmp_path):
    there = CONFIG | {"text_encoder": {"url": "http://one", "timeout": 1.0, "in_flight": 4}}
    run = make_run(tmp_path / "run", 2, config=there)
    patient = CONFIG | {"text_encoder": {"url": "http://one", "timeout": 9.0, "in_flight": 1}}
    assert look(str(run), tmp_path / "new", patient).step == 2
    with pytest.raises(ValueError, match=r"text_encoder\.url='http://one' there, 'http://two' here"):
        look(
            str(run), tmp_path / "new", CONFIG | {"text_encoder": {"url": "http://two", "timeout": 1.0, "in_flight": 4}}
        )


def test_images_may_be_cut_into_batches_differently_but_not_be_more_a_step(tmp_path):
    run = make_run(tmp_path / "run", 2)
    assert look(str(run), tmp_path / "new", changed(batch_size=2, gradient_accumulation=2)).step == 2
    with pytest.raises(ValueError, match=r"batch_size \* gradient_accumulation \* processes=4 there, 8 here"):
        look(str(run), tmp_path / "new", images=8)
    assert look("auto", tmp_path / "new", images=8) == Place(tmp_path / "new")


def test_a_damaged_configuration_is_named(tmp_path):
    run = make_run(tmp_path / "run", 2)
    (run / "config.yaml").write_text("a: [")
    with pytest.raises(ValueError, match=r"config\.yaml cannot be read"):
        look(str(run), tmp_path / "new")
    said = []
    assert look("auto", tmp_path / "new", say=said.append) == Place(tmp_path / "new")
    assert len(said) == 2
    assert re.match(r"warning: skipping .*run: .*config\.yaml cannot be read", said[0])
    assert said[1] == ANEW


@pytest.mark.parametrize("text", ["", "[1]", "just words", "a: 1", "steps: many"])
def test_a_configuration_that_is_none_is_named_and_not_compared(tmp_path, text):
    run = make_run(tmp_path / "run", 2)
    (run / "config.yaml").write_text(text)
    for resume, fresh, chosen in ((str(run), tmp_path / "new", False), ("auto", run, True)):
        with pytest.raises(ValueError, match=r"config\.yaml is not the configuration of a run") as error:
            look(resume, fresh, chosen=chosen)
        assert len(str(error.value)) < 400


@pytest.mark.parametrize("left", ["checkpoints", "metrics.jsonl"])
def test_a_run_without_its_configuration_is_not_written_over(tmp_path, left):
    run = make_run(tmp_path / "run", *([2] if left == "checkpoints" else []))
    (run / "config.yaml").unlink()
    if left == "metrics.jsonl":
        (run / left).touch()
    with pytest.raises(ValueError, match="already holds a run"):
        look(None, run, chosen=True)
    with pytest.raises(ValueError, match=r"resume=auto: .*config\.yaml cannot be read"):
        look("auto", run, chosen=True)


# ------------------------------------------------------------------ damaged states


DAMAGED_STATES = ["", "garbage", "{}", "[]", '{"step": "2", "images_per_step": 4}', '{"step": 2}', '{"step": -1}']


@pytest.mark.parametrize("text", DAMAGED_STATES)
def test_a_damaged_state_of_a_checkpoint_that_is_given_is_one_error_that_names_the_file(tmp_path, text):
    run = make_run(tmp_path / "run", 2, 4)
    (run / "checkpoints" / "step_000004" / "state.json").write_text(text)
    with pytest.raises(ValueError, match=r"step_000004/state\.json .*delete .*step_000004 to go on from the one bef"):
        look(str(run / "checkpoints" / "step_000004"), tmp_path / "new")


def test_a_state_in_which_a_number_changed_is_damaged(tmp_path):
    run = make_run(tmp_path / "run", 4)
    file = run / "checkpoints" / "step_000004" / "state.json"
    file.write_text(file.read_text().replace('"step": 4', '"step": 5'))
    with pytest.raises(ValueError, match=r"state\.json is damaged \(its checksum differs\)"):
        checkpoint.state(file.parent)


def test_a_checkpoint_without_checksums_is_of_an_older_version(tmp_path):
    run = make_run(tmp_path / "run", 4)
    place = run / "checkpoints" / "step_000004"
    (place / "state.json").write_text(json.dumps({"step": 4, "base": "tiny", "images_per_step": IMAGES}))
    with pytest.raises(ValueError, match=r"state\.json has no checksums: .* older version\. Its adapter can be used"):
        look(str(place), tmp_path / "new")


FILES = ["state.json", "optimizer.pt", "adapter/adapter_model.safetensors"]


def damage(file, how):
    if how == "missing":
        file.unlink()
    elif how == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    else:  # of the same length, which only the checksum sees
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)


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
    with pytest.raises(ValueError, match="holds no complete checkpoint whose files are whole: they are named above"):
        look(str(run), tmp_path / "new", say=said.append)
    assert f"step_000002/{file}" in said[-1]


@pytest.mark.parametrize("chosen", [False, True])
@pytest.mark.parametrize("file", ["state.json", "optimizer.pt", "adapter/adapter_model.safetensors"])
def test_auto_goes_on_from_the_checkpoint_before_a_damaged_one_and_says_so(tmp_path, file, chosen):
    run = make_run(tmp_path / "run", 2, 4)
    (run / "checkpoints" / "step_000004" / file).write_text("garbage")
    said = []
    place = look("auto", run if chosen else tmp_path / "new", chosen=chosen, say=said.append)
    assert place == Place(run, run / "checkpoints" / "step_000002")
    assert len(said) == 1
    assert said[0].startswith("warning: skipping a damaged checkpoint: ")
    assert f"step_000004/{file}" in said[0]


def test_auto_skips_a_damaged_run_and_takes_the_one_before(tmp_path):
    older = make_run(tmp_path / "1", 2)
    newer = make_run(tmp_path / "2", 4)
    (newer / "checkpoints" / "step_000004" / "state.json").write_text("{}")
    assert look("auto", tmp_path / "3") == Place(older, older / "checkpoints" / "step_000002")


def test_auto_does_not_start_anew_over_checkpoints_that_cannot_be_read(tmp_path):
    run = make_run(tmp_path / "1", 2)
    (run / "checkpoints" / "step_000002" / "state.json").write_text("{}")
    with pytest.raises(ValueError, match=r"no checkpoint of .*1 can be read"):
        look("auto", run, chosen=True)


def test_only_folders_named_after_a_step_are_checkpoints(tmp_path):
    run = make_run(tmp_path / "run", 2)
    shutil.copytree(run / "checkpoints" / "step_000002", run / "checkpoints" / "step_000002 (copy)")
    shutil.copytree(run / "checkpoints" / "step_000002", run / "checkpoints" / "step_best")
    assert [path.name for path in checkpoint.checkpoints(run)] == ["step_000002"]
    assert look("auto", tmp_path / "new").step == 2


# ------------------------------------------------------------------ folders in use


def test_auto_skips_a_run_that_is_alive(tmp_path):
    run = make_run(tmp_path / "1", 2)
    lock = Lock(run)
    assert look("auto", tmp_path / "2") == Place(tmp_path / "2")
    lock.release()
    assert look("auto", tmp_path / "2").folder == run


@pytest.mark.parametrize("resume", [None, "auto"])
def test_a_folder_that_was_asked_for_and_is_in_use_is_named(tmp_path, resume):
    run = make_run(tmp_path / "1", 2)
    lock = Lock(run)
    with pytest.raises(InUse, match=r"/1 is in use: another run writes there now"):
        look(resume, run, chosen=True)
    lock.release()


# ------------------------------------------------------------------ auto


def test_auto_takes_the_newest_unfinished_run_beside_the_new_one(tmp_path):
    make_run(tmp_path / "2026-01-01", 2)
    newest = make_run(tmp_path / "2026-01-03", 4)
    make_run(tmp_path / "2026-01-02", 6)
    assert look("auto", tmp_path / "2026-02-01") == Place(newest, newest / "checkpoints" / "step_000004")


def test_auto_starts_anew_without_an_unfinished_run_of_this_configuration(tmp_path):
    fresh = tmp_path / "9-new"
    assert look("auto", fresh) == Place(fresh)
    make_run(tmp_path / "1-finished", 10, finished=True)
    make_run(tmp_path / "2-without-checkpoint")
    make_run(tmp_path / "3-other-rank", 2, config=changed(adapter={"rank": 8}))
    make_run(tmp_path / "4-beyond", 20, config=changed(steps=30))
    (tmp_path / "5-no-run").mkdir()
    (tmp_path / "6-file").touch()
    assert look("auto", fresh) == Place(fresh)


def test_a_finished_run_that_was_going_on_for_longer_is_unfinished_again(tmp_path):
    run = make_run(tmp_path / "1", 10, 12, finished=True, config=changed(steps=20))
    assert look("auto", tmp_path / "2", changed(steps=20)) == Place(run, run / "checkpoints" / "step_000012")


def test_auto_with_a_folder_that_was_asked_for_looks_there_alone(tmp_path):
    make_run(tmp_path / "beside", 4)
    fresh, said = tmp_path / "mine", []
    assert look("auto", fresh, chosen=True, say=said.append) == Place(fresh)
    assert said == [ANEW]
    make_run(fresh, 2)
    assert look("auto", fresh, chosen=True) == Place(fresh, fresh / "checkpoints" / "step_000002")


def test_auto_starts_again_in_its_folder_if_nothing_was_saved_there(tmp_path):
    fresh, said = make_run(tmp_path / "mine"), []
    assert look("auto", fresh, chosen=True, say=said.append) == Place(fresh)
    assert said == [ANEW]


def test_auto_does_not_write_into_a_folder_whose_run_is_finished_or_another(tmp_path):
    fresh = make_run(tmp_path / "mine", 10, finished=True)
    with pytest.raises(ValueError, match=r"has done its 10 steps: .*with steps=11 or more"):
        look("auto", fresh, chosen=True)
    with pytest.raises(ValueError, match=r"another configuration: adapter\.rank=4 there, 8 here"):
        look("auto", fresh, changed(adapter={"rank": 8}), chosen=True)


def test_auto_in_a_finished_runs_folder_goes_on_with_more_steps(tmp_path):
    run = make_run(tmp_path / "mine", 10, finished=True)
    assert look("auto", run, changed(steps=12), chosen=True) == Place(run, run / "checkpoints" / "step_000010")
    assert look("auto", tmp_path / "new", changed(steps=12)) == Place(tmp_path / "new")  # beside, finished is finished


def test_auto_does_not_write_over_a_finished_run_without_checkpoints(tmp_path):
    run = make_run(tmp_path / "mine", finished=True)
    with pytest.raises(ValueError, match="has done its 10 steps"):
        look("auto", run, changed(steps=12), chosen=True)


def test_auto_that_starts_anew_says_which_key_of_the_newest_run_differs(tmp_path):
    make_run(tmp_path / "1", 2, config=changed(seed=5))
    make_run(tmp_path / "2", 2, config=changed(adapter={"rank": 8}))
    said = []
    assert look("auto", tmp_path / "3", say=said.append) == Place(tmp_path / "3")
    assert said == [f"not going on with {tmp_path / '2'}: adapter.rank=8 there, 4 here", ANEW]
    make_run(tmp_path / "0", 2)
    said.clear()
    assert look("auto", tmp_path / "3", say=said.append).folder == tmp_path / "0"
    assert said == []


# ------------------------------------------------------------------ files


@pytest.fixture
def trained():
    """A small adapter and its optimizer after two steps of random gradients."""

    def make(seed=0, steps=2):
        wrapped = adapters.attach(helpers.transformers("klein")[0], rank=2, seed=seed)
        parameters = adapters.adapter_parameters(wrapped)
        optimizer = torch.optim.AdamW(parameters, lr=0.1)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()
        return wrapped, optimizer

    return make


def write(folder, step, trained, licence=""):
    wrapped, optimizer = trained
    parts = {"optimizer": optimizer}
    return checkpoint.save(folder, step, wrapped, parts, base="tiny", licence=licence, images_per_step=IMAGES)


def read(place, trained):
    wrapped, optimizer = trained
    return checkpoint.load(place, wrapped, {"optimizer": optimizer})


def reseal(place):
    """Make what is in a checkpoint now its own."""
    about = json.loads((place / "state.json").read_text())
    checkpoint.seal(place, {key: about[key] for key in about.keys() - {"files", "checksum"}})


def test_adapter_and_optimizer_come_back_bit_for_bit(tmp_path, trained):
    first = trained()
    place = write(tmp_path, 7, first)
    assert place == tmp_path / "checkpoints" / "step_000007"
    about = checkpoint.state(place)
    files = about.pop("files")
    assert about == {"step": 7, "base": "tiny", "images_per_step": IMAGES}
    assert files.keys() == {path.relative_to(place).as_posix() for path in place.rglob("*.*")} - {"state.json"}
    assert files["optimizer.pt"]["size"] == (place / "optimizer.pt").stat().st_size
    other = trained(seed=1, steps=1)
    assert read(place, other) == about | {"files": files}
    for one, two in zip(*(adapters.adapter_parameters(wrapped) for wrapped, _ in (first, other)), strict=True):
        assert torch.equal(one, two)
        for key in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(first[1].state[one][key], other[1].state[two][key])


def test_a_checkpoint_holds_an_adapter_as_it_is_used(tmp_path, trained):
    place = write(tmp_path, 7, trained(), licence="some licence")
    assert adapters.find(tmp_path) == place / "adapter"
    assert {file.name for file in (place / "adapter").iterdir()} >= {
        "adapter_model.safetensors",
        "adapter_config.json",
        "diffusers.safetensors",
    }
    assert "some licence" in (place / "adapter" / "README.md").read_text()


def test_saving_a_step_again_replaces_it_whole(tmp_path, trained):
    place = write(tmp_path, 7, trained())
    (place / "left over").touch()
    second = trained(seed=3)
    write(tmp_path, 7, second)
    assert not (place / "left over").exists()
    other = trained()
    read(place, other)
    one, two = (adapters.layer_pairs(wrapped.get_base_model()) for wrapped in (second[0], other[0]))
    assert all(torch.equal(one[layer].b, two[layer].b) for layer in one)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_000007"]


@pytest.mark.parametrize(
    ("where", "name", "kind"),
    [(torch, "save", RuntimeError), (adapters, "save_file", SafetensorError), (Path, "write_text", OSError)],
)
def test_a_checkpoint_appears_only_when_it_is_whole(tmp_path, trained, monkeypatch, where, name, kind):
    def fail(*args, **kwargs):
        raise kind("disk full")

    monkeypatch.setattr(where, name, fail)
    with pytest.raises(checkpoint.NotSaved, match=r"step_000007 could not be written \(disk full\)"):
        write(tmp_path, 7, trained())
    assert list((tmp_path / "checkpoints").iterdir()) == []
    monkeypatch.undo()
    write(tmp_path, 7, trained())
    assert len(checkpoint.checkpoints(tmp_path)) == 1


@pytest.mark.parametrize("damaged", ["optimizer.pt", "adapter/adapter_model.safetensors"])
@pytest.mark.parametrize("how", ["cut", "garbage", "missing"])
def test_a_damaged_checkpoint_is_one_error_that_names_it(tmp_path, trained, damaged, how):
    place = write(tmp_path, 7, trained())
    file = place / damaged
    if how == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:100] if how == "cut" else b"\x05" * 200)
    with pytest.raises(ValueError, match=r"step_000007/.* (cannot be read|is damaged) .*delete .*step_000007 to go"):
        read(place, trained())


@pytest.mark.parametrize(
    "wrong", [[1], {"state": {}}, {"state": {}, "param_groups": []}, {"state": 1, "param_groups": 2}]
)
def test_a_file_that_holds_no_state_of_this_optimizer_is_the_same_error(tmp_path, trained, wrong):
    place = write(tmp_path, 7, trained())
    torch.save(wrong, place / "optimizer.pt")
    reseal(place)
    with pytest.raises(ValueError, match=r"step_000007/optimizer\.pt .*delete .*step_000007 to go on"):
        read(place, trained())


class Part:
    """Something else that is kept."""

    def __init__(self, value):
        self.value = torch.tensor(value)

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"]


def test_every_part_is_a_file_and_one_too_few_or_too_many_is_named(tmp_path, trained):
    wrapped, optimizer = trained()
    kept = {"optimizer": optimizer, "other": Part(3.0)}
    place = checkpoint.save(tmp_path, 7, wrapped, kept, base="tiny", licence="", images_per_step=IMAGES)
    assert (place / "other.pt").exists()
    new = Part(0.0)
    checkpoint.load(place, wrapped, {"optimizer": optimizer, "other": new})
    assert new.value == 3.0
    with pytest.raises(ValueError, match=r"step_000007 is of another kind of run: nothing here reads its other\.pt"):
        checkpoint.load(place, wrapped, {"optimizer": optimizer})
    with pytest.raises(ValueError, match=r"another kind of run: it has no third\.pt"):
        checkpoint.load(place, wrapped, {**kept, "third": Part(1.0)})
    damage(place / "other.pt", "flipped")
    with pytest.raises(ValueError, match=r"step_000007/other\.pt is damaged"):
        checkpoint.load(place, wrapped, kept)


def test_a_checkpoint_moved_away_from_its_run_starts_a_branch_with_its_own_copy_of_the_configuration(tmp_path, trained):
    run = make_run(tmp_path / "run")
    moved = write(run, 7, trained()).rename(tmp_path / "moved")
    shutil.rmtree(run)
    assert look(str(moved), tmp_path / "new", chosen=True) == Place(tmp_path / "new", moved)
    for config, chosen, said in (
        (CONFIG, False, "is a checkpoint without its run: give a new folder, output_dir="),
        (changed(seed=1), True, "is of another configuration: seed=0 there, 1 here"),
        (changed(steps=6), True, "has done more than steps=6"),
    ):
        with pytest.raises(ValueError, match=said):
            look(str(moved), tmp_path / "new", config, chosen=chosen)


# ------------------------------------------------------------------ which of them stay


def rotated(run, rotation):
    """The steps that stay, rotation having its turn after each checkpoint."""
    said = []
    rotation.turn(checkpoint.checkpoints(run)[-1], said.append)
    return [checkpoint.number(path) for path in checkpoint.checkpoints(run)], said


@pytest.mark.parametrize(
    ("settings", "stay"),
    [
        ({}, [1, 2, 3, 4, 5, 6]),
        ({"last": 1}, [6]),
        ({"last": 2}, [5, 6]),
        ({"last": 9}, [1, 2, 3, 4, 5, 6]),
        ({"last": 1, "best": 2}, [2, 3, 6]),
        ({"last": 1, "every": 2}, [2, 4, 6]),
        ({"last": 2, "best": 1, "every": 4}, [2, 4, 5, 6]),
    ],
)
def test_the_last_the_best_and_every_so_many_stay(tmp_path, settings, stay):
    run = make_run(tmp_path / "run", 1, 2, 3, 4, 5, 6)
    losses = {1: 0.9, 2: 0.1, 3: 0.4, 4: 0.5, 5: float("nan")}  # of 6 none was measured
    for step, loss in losses.items():
        place = run / "checkpoints" / f"step_{step:06d}"
        (place / "state.json").unlink()
        checkpoint.seal(place, {"step": step, "images_per_step": IMAGES, "validation_loss": loss})
    assert rotated(run, checkpoint.Rotation(**settings)) == (stay, [])
    assert len(list((run / "checkpoints").iterdir())) == len(stay)


def test_what_is_named_after_later_steps_does_not_push_out_the_checkpoint_that_is_whole(tmp_path):
    run = make_run(tmp_path / "run", 4, 5, 6)
    (run / "checkpoints" / "step_000006" / "optimizer.pt").unlink()
    checkpoint.Rotation(last=1).turn(run / "checkpoints" / "step_000005", print)
    assert [checkpoint.number(path) for path in checkpoint.checkpoints(run)] == [5, 6]
    assert look(str(run), tmp_path / "new", say=lambda text: None).step == 5


def test_a_checkpoint_that_cannot_be_deleted_is_a_warning(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", 1, 2, 3)

    def refuse(self, target):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "rename", refuse)
    stay, said = rotated(run, checkpoint.Rotation(last=1))
    assert stay == [1, 2, 3]
    assert [
        re.search(r"step_00000\d could not be deleted \(.*Permission denied", text) is not None for text in said
    ] == [
        True,
        True,
    ]


def test_a_kill_in_the_middle_of_deleting_leaves_nothing_that_looks_whole(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", 1, 2)

    def killed(path, **options):
        if Path(path).exists():
            raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        rotated(run, checkpoint.Rotation(last=1))
    monkeypatch.undo()
    assert [checkpoint.number(path) for path in checkpoint.checkpoints(run)] == [2]
    assert len(list((run / "checkpoints").iterdir())) == 2
    checkpoint.tidy(run)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_000002"]


@pytest.mark.parametrize(
    ("settings", "intervals", "said"),
    [
        ({"last": 0}, (250, 50), "keep_last=0 must be a whole number from 1"),
        ({"last": 1, "best": -1}, (250, 50), "keep_best=-1 must be"),
        ({"best": 2}, (250, 50), "keep_best=2 does nothing with keep_last=null"),
        ({"every": 500}, (250, 50), "keep_every=500 does nothing with keep_last=null"),
        ({"last": 1, "best": 2}, (250, 0), "keep_best=2 goes by the validation loss .* validate_every=0 does not"),
        ({"last": 1, "best": 2}, (250, 100), "validate_every=100 does not measure with checkpoint_every=250"),
        ({"last": 1, "every": 300}, (250, 50), "keep_every=300 must be a multiple of checkpoint_every=250"),
    ],
)
def test_a_rotation_that_cannot_be_is_named(settings, intervals, said):
    with pytest.raises(ValueError, match=said):
        checkpoint.Rotation(**settings).check(*intervals)


@pytest.mark.parametrize("written", range(4))
def test_while_an_adapter_is_half_written_the_file_that_says_it_is_whole_is_absent(
    tmp_path, trained, monkeypatch, written
):
    wrapped, _ = trained()
    adapters.save(wrapped, tmp_path, base="tiny")  # an earlier one, of which nothing may seem to be the new one's
    replace, calls = Path.replace, []

    def cut(self, target):
        calls.append(target)
        if len(calls) > written:
            raise OSError("killed")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", cut)
    with pytest.raises(OSError, match="killed"):
        adapters.save(wrapped, tmp_path, base="tiny")
    assert not (tmp_path / adapters.PEFT_FILE).exists()
