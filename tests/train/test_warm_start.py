"""Runs that start from a saved adapter: step 0 is its last, and a run that resumes does not need it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from message_helpers import holds
from train_helpers import adapter, compose, lines, refusal, same_tensors, values

from train.stages.memory import load_config

pytest_plugins = ("train_helpers",)

VALIDATED = ["validate_every=2", "checkpoint_every=2", "validation.samples=3"]


def test_a_run_begins_with_the_loss_of_the_adapter_and_a_fresh_optimizer(train, tmp_path, capfd):
    first = train("first", *VALIDATED, "adapter.alpha=3")
    capfd.readouterr()
    second = train("second", *VALIDATED, f"adapter.init={first}", "adapter.rank=6", "seed=1")
    assert "the adapter starts from" in capfd.readouterr().out
    assert values(second, "validation_loss")[0] == pytest.approx(values(first, "validation_loss")[-1], rel=1e-5)
    assert values(second, "validation_loss")[0] != values(first, "validation_loss")[0]
    assert [line["step"] for line in lines(second)] == [0, 1, 2, 3, 4]
    state = torch.load(second / "checkpoints" / "step_000002" / "optimizer.pt", weights_only=True)
    assert {float(one["step"]) for one in state["state"].values()} == {2.0}
    recorded = json.loads((second / "adapter_start.json").read_text())["adapter_start"]
    assert recorded == json.loads((second / "checkpoints" / "step_000002" / "state.json").read_text())["adapter_start"]
    assert recorded["path"] == str(first.resolve())
    assert len(recorded["digest"]) == 32
    card = (second / "adapter" / "README.md").read_text()
    assert "another adapter, `first`" in card
    assert str(tmp_path) not in card
    assert not (first / "adapter_start.json").exists()


@pytest.mark.parametrize("more", [[], ["ema_decay=0.5"]], ids=["plain", "ema"])
def test_a_resumed_run_neither_needs_nor_reads_the_adapter_again(train, reference, tmp_path, more):
    start = tmp_path / "start"
    shutil.copytree(reference() / "adapter", start)
    whole = train("whole", *VALIDATED, f"adapter.init={start}", *more)
    shutil.rmtree(start)
    again = train("again", *VALIDATED, f"adapter.init={start}", *more, f"resume={whole / 'checkpoints/step_000002'}")
    assert lines(again) == [line for line in lines(whole) if line["step"] > 2]
    assert same_tensors(adapter(again), adapter(whole))
    assert (again / "adapter_start.json").read_bytes() == (whole / "adapter_start.json").read_bytes()
    with pytest.raises(ValueError, match=r"adapter\.init='.*start' there, null here"):
        train("never", *VALIDATED, *more, f"resume={whole}")


def test_what_does_not_fit_is_said_before_anything_is_loaded(small, reference, monkeypatch):
    folder = reference()
    monkeypatch.setattr("train.stages.model.load_transformer", lambda *_, **__: pytest.fail("a model was loaded"))
    own = [one for one in small() if not one.startswith("adapter.")]
    assert holds(refusal(*own, f"adapter.init={folder}", "adapter.rank=2"), "adapter.init= ... adapter.rank=4")
    assert holds(refusal(*own, f"adapter.init={folder}", "adapter=loha"), "adapter.init= ... LoRA ... adapter=lora")
    assert holds(refusal(*own, "adapter.init=/nowhere"), "adapter.init='/nowhere': does not exist")
    assert holds(refusal(*own, "adapter.init=''"), "adapter.init='' must not be empty")
    assert holds(refusal(*own, "adapter.init=3"), "adapter.init=3 must be a string")
    load_config(compose(*own, "adapter.init=/nowhere", f"resume={folder}"))  # its checkpoint has the adapter


def test_the_choices_of_the_adapter_all_have_the_setting():
    folder = Path(__file__).parents[2] / "conf" / "adapter"
    for file in folder.glob("[!_]*.yaml"):
        assert compose(f"adapter={file.stem}").adapter.init is None
