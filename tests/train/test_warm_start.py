"""Runs that start from a saved adapter: step 0 is its last, and a run that resumes does not need it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from message_helpers import holds
from omegaconf import OmegaConf
from train_helpers import adapter, compose, lines, refusal, reread, same_tensors, values

from flux2 import adapters
from flux2.weights.loading import load_transformer
from train.config.memory import choice_of
from train.planner.from_config import workload_of
from train.planner.predictor import Planner
from train.stages.data import prepare_samples
from train.stages.finish import words_to_generate
from train.stages.memory import load_config
from train.stages.saved_run import SavedRun
from train.validation.loss import FixedNoiseLoss, chosen_samples

pytest_plugins = ("train_helpers",)

VALIDATED = ["validate_every=2", "checkpoint_every=2", "validation.samples=3"]


def test_a_run_begins_with_the_loss_of_the_adapter_and_a_fresh_optimizer(train, tmp_path, capfd):
    first = train("first", *VALIDATED, "adapter.alpha=3")
    capfd.readouterr()
    second = train("second", *VALIDATED, f"adapter.init={first}", "adapter.rank=6", "seed=1")
    assert "the adapter starts from the one at" in capfd.readouterr().out
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


# ------------------------------------------------------------------ next to a frozen one


def test_a_run_next_to_a_frozen_adapter_saves_its_own_and_resumes_bit_for_bit(train, tmp_path, capfd):
    first = train("first", *VALIDATED)
    own = [*VALIDATED, f"adapter.init={first}", "adapter.init_mode=frozen", "adapter.alpha=3", "optimizer.lr=5e-2"]
    whole = train("whole", *own)
    assert "trains next to the frozen one" in capfd.readouterr().out
    assert values(whole, "validation_loss")[0] == pytest.approx(values(first, "validation_loss")[-1], rel=1e-5)
    assert adapter(whole).keys() == adapter(first).keys()
    run = load_config(compose(*_settings(whole)))
    both = load_transformer(run.source)
    adapters.load(both, first)
    adapters.load(both, whole, name="second")
    data = prepare_samples(run)
    chosen = chosen_samples(data.samples, data.cached, run.validation.split(data.cached.contents)[1])
    measured = FixedNoiseLoss(data.cached, chosen, 0)(both, run.guidance).mean().item()
    assert measured == pytest.approx(values(whole, "validation_loss")[-1], rel=1e-5)

    step = whole / "checkpoints" / "step_000002"
    again = train("again", *own, f"resume={step}")
    assert lines(again) == [line for line in lines(whole) if line["step"] > 2]
    assert same_tensors(adapter(again), adapter(whole))
    assert "used with | another adapter, `first`" in (whole / "adapter" / "README.md").read_text()
    config = load_config(compose(*_settings(whole), *own))
    words = words_to_generate(config, whole / "adapter", "a cup")
    assert [words[i + 1] for i, word in enumerate(words) if word == "--adapter"] == [str(first), str(whole / "adapter")]
    with pytest.raises(ValueError, match=r"trained an adapter next to a frozen one.*flux2\.generate"):
        SavedRun(whole, "cpu", {"prompts": ["a cup"]}, [0])

    shutil.copytree(train("third", "seed=3") / "adapter", first / "adapter", dirs_exist_ok=True)
    with pytest.raises(ValueError, match=r"adapter\.init='.*first' has other values than when the run began"):
        train("never", *own, f"resume={step}")


def _settings(run):
    """The overrides of a small run's model and data."""
    kept = OmegaConf.load(run / "config.yaml")
    own = [f"model.resolution={kept.model.resolution}", f"cache_dir={kept.cache_dir}", "validation.samples=3"]
    return [*reread(run), *own, "dataset=folder", f"dataset.path={kept.dataset.path}", "adapter.rank=4"]


def test_the_plan_counts_the_frozen_adapter(small, reference):
    own = small(f"adapter.init={reference()}")
    run, frozen = (load_config(compose(*own, f"adapter.init_mode={mode}")) for mode in ("continue", "frozen"))
    plain, more = (Planner(workload_of(one, on_gpu=False)) for one in (run, frozen))
    assert more.other_weights - plain.other_weights == sum(one.nbytes for one in adapter(reference()).values())
    assert more.adapter == plain.adapter
    assert (
        more.predict(choice_of(frozen.composed["memory"])).training
        > plain.predict(choice_of(run.composed["memory"])).training
    )


def test_what_a_frozen_adapter_cannot_do_is_said_before_anything_is_loaded(small, reference):
    folder = reference()
    own = [one for one in small() if not one.startswith("adapter.")]
    assert holds(refusal(*own, "adapter.init_mode=frozen"), "adapter.init_mode='frozen' ... Set adapter.init=PATH")
    assert holds(
        refusal(*own, f"adapter.init={folder}", "adapter.init_mode=ice"), "adapter.init_mode='ice' must be one"
    )
    frozen = [*own, f"adapter.init={folder}", "adapter.init_mode=frozen"]
    assert holds(refusal(*frozen, "adapter=dora"), "adapter.init= ... not a DoRA ... adapter=lora")
    every = reference("adapter.targets=all_linear")
    projected = ["embedding_storage=projected", f"adapter.init={every}", "adapter.init_mode=frozen"]
    assert holds(refusal(*own, *projected), "embedding_storage='projected' ... adapter.init changes that layer")
