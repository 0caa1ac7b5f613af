"""Each optimizer of conf/optimizer on the embedded model: it learns, what is saved is right, and it goes on exactly."""

from pathlib import Path

import bitsandbytes
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from torch import nn
from train_helpers import CONF, adapter, compose, lines, run_training, same_tensors, slow_but, values

from flux2 import adapters, load
from train.optim.optimizers import build_optimizer
from train.planner.optimizer_memory import optimizer_bytes
from train.stages.data import prepare_samples
from train.stages.memory import load_config
from train.validation.loss import FixedNoiseLoss, chosen_samples

pytest_plugins = ("train_helpers",)

# rates at which six steps show
RATES = {
    "adamw": ["optimizer.lr=4e-3"],
    "adamw_8bit": ["optimizer.lr=4e-3"],
    "prodigy": ["optimizer.d0=4e-3"],
    "schedulefree": ["optimizer.lr=1e-2"],
    "adafactor": ["optimizer.lr=4e-3"],
    "lion": ["optimizer.lr=2e-3"],
    "muon": ["optimizer.lr=8e-3"],
}


def test_every_optimizer_is_tried():
    assert set(RATES) == {file.stem for file in (CONF / "optimizer").glob("[!_]*.yaml")}


SETTINGS = ["model=tiny", "precision=fp32", "model.resolution=64", "validation.samples=3", "adapter.rank=4"]
SETTINGS += ["batch_size=4", "steps=6", "adapter.dropout=0.1", "memory.checkpointing=none"]
SETTINGS += ["checkpoint_every=3", "validate_every=3", "log_every=1"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """`trained(name)`: the folder of a run of six steps with that optimizer on the embedded model, made once;
    `trained(name, start)`: of one that goes on from a checkpoint of it."""
    place = tmp_path_factory.mktemp("optimizers")
    done: dict[str, Path] = {}

    def run(name: str, start: Path | None = None) -> Path:
        key = name if start is None else f"{name}_again"
        if key not in done:
            own = [f"optimizer={name}", *RATES[name], f"output_dir={place / key}", f"cache_dir={place / 'cache'}"]
            GlobalHydra.instance().clear()
            again = [] if start is None else [f"resume={start}"]
            done[key] = run_training(compose(*SETTINGS, *own, *again)).parent
        return done[key]

    return run


def same(one, other):
    """Whether two states are equal to the bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@pytest.mark.parametrize("name", slow_but(RATES, fast=("adamw_8bit", "schedulefree", "muon")))
def test_it_lowers_the_validation_loss_and_goes_on_to_the_bit(trained, name):
    folder = trained(name)
    before, between, after = values(folder, "validation_loss")
    assert after < between < before
    assert after < 0.97 * before
    again = trained(name, folder / "checkpoints" / "step_000003")
    assert lines(again) == [line for line in lines(folder) if line["step"] > 3]
    assert same_tensors(adapter(again), adapter(folder))
    step = Path("checkpoints") / "step_000006"
    for file in sorted(path.name for path in (folder / step).glob("*.pt")):
        one, other = (torch.load(run / step / file, weights_only=True) for run in (folder, again))
        assert same(one, other), file


def test_the_adapter_of_a_schedule_free_run_is_the_average_and_pictures_are_made_with_it(trained):
    folder = trained("schedulefree")
    place = folder / "checkpoints" / "step_000006"
    trained_now = torch.load(place / "trained.pt", weights_only=True)["trained"]
    state = torch.load(place / "optimizer.pt", weights_only=True)
    beta = state["param_groups"][0]["betas"][0]
    assert state["param_groups"][0]["lr"] == 1e-2
    # y = (1 - beta) z + beta x: trained at y, the average is x (Defazio et al. 2024)
    averages = [(y - (1 - beta) * state["state"][i]["z"]) / beta for i, y in enumerate(trained_now)]
    saved = sorted(adapter(place).values(), key=lambda tensor: tensor.abs().sum().item())
    expected = sorted(averages, key=lambda tensor: tensor.abs().sum().item())
    for one, other in zip(saved, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    gaps = [(one - other).abs().max() for one, other in zip(averages, trained_now, strict=True)]
    assert max(gaps) > 1e-3  # which is not what is trained
    assert same_tensors(adapter(place), adapter(folder))


def test_what_is_validated_of_a_schedule_free_run_is_what_is_saved(trained):
    """The pipeline with the adapter as it was saved has the loss that was measured."""
    folder = trained("schedulefree")
    run = load_config(compose(*SETTINGS, f"cache_dir={folder.parent / 'cache'}"))
    data = prepare_samples(run)
    dataset, prepared = data.samples, data.cached
    chosen = chosen_samples(dataset, prepared, run.validation.split(prepared.contents)[1])
    pipe = load("tiny", device="cpu")
    pipe.load_adapter(folder / "adapter")
    measured = FixedNoiseLoss(prepared, chosen, 0)(pipe.transformer, pipe.variant.training_guidance)
    assert measured.mean().item() == pytest.approx(values(folder, "validation_loss")[-1], rel=1e-5)


@pytest.mark.parametrize("name", RATES)
def test_the_bytes_of_its_state_are_those_that_the_planner_counts(name):
    run = load_config(compose(f"optimizer={name}", "device=cpu"))
    shapes = [(16, 384), (1152, 16), (16, 96), (300, 16)]
    parameters = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    optimizer = build_optimizer(run.make_optimizer, parameters)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    tensors = [
        value
        for parameter in parameters
        for key, value in optimizer.state[parameter].items()
        if isinstance(value, torch.Tensor) and value.numel() > 1 and not key.startswith("qmap")  # one for all
    ]
    held = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert optimizer_bytes(run.make_optimizer, parameters) == held > 0


def test_eight_bit_moments_are_kept_in_bytes_on_a_cpu_too(trained):
    state = torch.load(trained("adamw_8bit") / "checkpoints" / "step_000006" / "optimizer.pt", weights_only=True)
    moments = [one["__bnb_optimizer_quant_state__"] for one in state["state"].values()]
    kinds = {(one["state1"].dtype, one["state1"].numel() >= 4096) for one in moments}
    assert kinds <= {(torch.uint8, True), (torch.float32, False)}
    assert (torch.float32, False) in kinds
    large = nn.Parameter(torch.randn(64, 128))
    optimizer = bitsandbytes.optim.AdamW8bit([large], lr=1e-2)
    before = large.detach().clone()
    for _ in range(3):
        large.grad = large.detach().clone()
        optimizer.step()
    assert optimizer.state[large]["state1"].dtype == torch.uint8
    assert (large.abs() < before.abs()).float().mean() > 0.99  # it follows the gradient


def test_muon_and_an_adapter_that_is_not_of_matrices_is_refused_before_anything_is_loaded(small):
    def attach(model, **settings):
        wrapped = adapters.attach(model, rank=2, targets=[r"single_blocks\.\d+\.linear2"], seed=0)
        next(p for p in wrapped.parameters() if p.requires_grad).data = torch.zeros(3, device="meta")
        return wrapped

    run = load_config(compose(*small("optimizer=muon")))
    run.make_adapter = attach
    with pytest.raises(ValueError, match=r"optimizer=muon"):
        run.dry_run()


def test_a_schedule_free_optimizer_and_a_moving_average_exclude_each_other(small):
    with pytest.raises(ValueError, match=r"ema_decay=0\.9.*AdamWScheduleFree"):
        load_config(compose(*small("optimizer=schedulefree", "ema_decay=0.9")))
