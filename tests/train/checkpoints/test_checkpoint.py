"""Checkpoints: what is in one, how damage is found, which of them stay."""

import json
import re
import shutil
from pathlib import Path

import helpers
import pytest
import torch
from checkpoint_helpers import CONFIG, IMAGES, changed, damage, look, make_run
from safetensors import SafetensorError

from flux2 import adapters
from flux2.adapters import files as adapter_files
from train.checkpoints import checkpoint
from train.checkpoints.resume import RunLocation
from train.checkpoints.rotation import Rotation

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


def write(folder, step, trained, license=""):
    wrapped, optimizer = trained
    parts = {"optimizer": optimizer}
    return checkpoint.save(folder, step, wrapped, parts, base="tiny", license=license, images_per_step=IMAGES)


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
    about = checkpoint.read_state(place)
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
    place = write(tmp_path, 7, trained(), license="some license")
    assert adapters.find(tmp_path) == place / "adapter"
    assert {file.name for file in (place / "adapter").iterdir()} >= {
        "adapter_model.safetensors",
        "adapter_config.json",
        "diffusers.safetensors",
    }
    assert "some license" in (place / "adapter" / "README.md").read_text()


def test_saving_a_step_again_replaces_it_whole(tmp_path, trained):
    place = write(tmp_path, 7, trained())
    (place / "left over").touch()
    second = trained(seed=3)
    write(tmp_path, 7, second)
    assert not (place / "left over").exists()
    other = trained()
    read(place, other)
    one, two = (adapter_files.layer_pairs(wrapped.get_base_model()) for wrapped in (second[0], other[0]))
    assert all(torch.equal(one[layer].b, two[layer].b) for layer in one)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_000007"]


@pytest.mark.parametrize(
    ("where", "name", "kind"),
    [
        (torch, "save", RuntimeError),
        (adapter_files, "write_safetensors", SafetensorError),
        (Path, "write_text", OSError),
    ],
)
def test_a_checkpoint_appears_only_when_it_is_whole(tmp_path, trained, monkeypatch, where, name, kind):
    def fail(*args, **kwargs):
        raise kind("disk full")

    monkeypatch.setattr(where, name, fail)
    with pytest.raises(checkpoint.NotSaved, match=r"step_000007.*disk full"):
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
    with pytest.raises(ValueError, match=r"step_000007/.*[Dd]elete .*step_000007"):
        read(place, trained())


@pytest.mark.parametrize(
    "wrong", [[1], {"state": {}}, {"state": {}, "param_groups": []}, {"state": 1, "param_groups": 2}]
)
def test_a_file_that_holds_no_state_of_this_optimizer_is_the_same_error(tmp_path, trained, wrong):
    place = write(tmp_path, 7, trained())
    torch.save(wrong, place / "optimizer.pt")
    reseal(place)
    with pytest.raises(ValueError, match=r"step_000007/optimizer\.pt.*[Dd]elete .*step_000007"):
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
    place = checkpoint.save(tmp_path, 7, wrapped, kept, base="tiny", license="", images_per_step=IMAGES)
    assert (place / "other.pt").exists()
    new = Part(0.0)
    checkpoint.load(place, wrapped, {"optimizer": optimizer, "other": new})
    assert new.value == 3.0
    with pytest.raises(ValueError, match=r"step_000007.*other\.pt"):
        checkpoint.load(place, wrapped, {"optimizer": optimizer})
    with pytest.raises(ValueError, match=r"third\.pt"):
        checkpoint.load(place, wrapped, {**kept, "third": Part(1.0)})
    damage(place / "other.pt", "flipped")
    with pytest.raises(ValueError, match=r"step_000007/other\.pt"):
        checkpoint.load(place, wrapped, kept)


def test_a_checkpoint_moved_away_from_its_run_starts_a_branch_with_its_own_copy_of_the_configuration(tmp_path, trained):
    run = make_run(tmp_path / "run")
    moved = write(run, 7, trained()).rename(tmp_path / "moved")
    shutil.rmtree(run)
    place = look(str(moved), tmp_path / "new", chosen=True)
    assert place == RunLocation(tmp_path / "new", moved)
    assert place.resumed_config == CONFIG
    for config, chosen, said in (
        (CONFIG, False, "output_dir="),
        (changed(seed=1), True, r"configuration.*seed=0.*\b1\b"),
        (changed(steps=6), True, "steps=6"),
    ):
        with pytest.raises(ValueError, match=said):
            look(str(moved), tmp_path / "new", config, chosen=chosen)


# ------------------------------------------------------------------ which of them stay


def rotated(run, rotation):
    """The steps that stay, rotation having its turn after each checkpoint."""
    said = []
    rotation.prune(checkpoint.checkpoints(run)[-1], said.append)
    return [checkpoint.step_of(path) for path in checkpoint.checkpoints(run)], said


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
    assert rotated(run, Rotation(**settings)) == (stay, [])
    assert len(list((run / "checkpoints").iterdir())) == len(stay)


def test_what_is_named_after_later_steps_does_not_push_out_the_checkpoint_that_is_whole(tmp_path):
    run = make_run(tmp_path / "run", 4, 5, 6)
    (run / "checkpoints" / "step_000006" / "optimizer.pt").unlink()
    Rotation(last=1).prune(run / "checkpoints" / "step_000005", print)
    assert [checkpoint.step_of(path) for path in checkpoint.checkpoints(run)] == [5, 6]
    assert look(str(run), tmp_path / "new", say=lambda text: None).step == 5


def test_a_checkpoint_that_cannot_be_deleted_is_a_warning(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", 1, 2, 3)

    def refuse(source, target):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(checkpoint, "move", refuse)
    stay, said = rotated(run, Rotation(last=1))
    assert stay == [1, 2, 3]
    assert [re.search(r"step_00000\d .*Permission denied", text) is not None for text in said] == [
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
        rotated(run, Rotation(last=1))
    monkeypatch.undo()
    assert [checkpoint.step_of(path) for path in checkpoint.checkpoints(run)] == [2]
    assert len(list((run / "checkpoints").iterdir())) == 2
    checkpoint.remove_incomplete(run)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_000002"]


@pytest.mark.parametrize(
    ("settings", "intervals", "said"),
    [
        ({"last": 0}, (250, 50), "keep_last=0"),
        ({"last": 1, "best": -1}, (250, 50), "keep_best=-1"),
        ({"best": 2}, (250, 50), "keep_best=2.*keep_last=null"),
        ({"every": 500}, (250, 50), "keep_every=500.*keep_last=null"),
        ({"last": 1, "best": 2}, (250, 0), "keep_best=2.*validate_every=0"),
        ({"last": 1, "best": 2}, (250, 100), "validate_every=100.*checkpoint_every=250"),
        ({"last": 1, "every": 300}, (250, 50), "keep_every=300.*checkpoint_every=250"),
    ],
)
def test_a_rotation_that_cannot_be_is_named(settings, intervals, said):
    with pytest.raises(ValueError, match=said):
        Rotation(**settings).check(*intervals)


@pytest.mark.parametrize("written", range(4))
def test_while_an_adapter_is_half_written_the_file_that_says_it_is_whole_is_absent(
    tmp_path, trained, monkeypatch, written
):
    wrapped, _ = trained()
    adapters.save(wrapped, tmp_path, base="tiny")  # an earlier one, of which nothing may seem to be the new one's
    move, calls = adapter_files.move, []

    def cut(source, target):
        calls.append(target)
        if sum(path.parent == tmp_path for path in calls) > written:
            raise OSError("killed")
        move(source, target)

    monkeypatch.setattr(adapter_files, "move", cut)
    with pytest.raises(OSError, match="killed"):
        adapters.save(wrapped, tmp_path, base="tiny")
    assert not (tmp_path / adapter_files.PEFT_FILE).exists()
