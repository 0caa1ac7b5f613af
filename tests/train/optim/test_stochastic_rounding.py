"""An adapter in bfloat16: rounding is right on average, small updates add up, and runs resume to the bit."""

from pathlib import Path

import pytest
import torch
from adapter_helpers import attached, base
from message_helpers import holds
from torch import nn
from train_helpers import adapter, compose, lines, refusal, same_tensors, slow_but, values

from flux2 import adapters
from flux2.adapters import adapter_parameters
from train.config.memory import choice_of
from train.loop import Trainer
from train.optim.optimizers import build_optimizer
from train.optim.stochastic_rounding import build_rounded_optimizer, round_stochastically, to_bfloat16
from train.planner.from_config import workload_of
from train.planner.optimizer_memory import update_bytes
from train.planner.predictor import Planner
from train.stages.memory import load_config

pytest_plugins = ("train_helpers",)

BF16 = ["adapter.dtype=bf16"]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_a_number_is_rounded_to_a_neighbor_with_the_probability_of_the_remainder():
    below, above = torch.tensor(1.0), torch.tensor(1.0 + 2**-7)
    for share in (0.0, 0.25, 0.9):
        for sign in (1, -1):
            value = sign * (below + share * (above - below))
            rounded = round_stochastically(value.expand(40_000), generator()).float() * sign
            assert set(rounded.tolist()) <= {below.item(), above.item()}
            assert (rounded == above).float().mean().item() == pytest.approx(share, abs=0.01)
    exact = torch.randn(1000, generator=generator()).bfloat16()
    assert torch.equal(round_stochastically(exact.float(), generator()), exact)  # so a skipped update changes nothing
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan])
    assert torch.equal(round_stochastically(special, generator()).float().nan_to_num(7), special.nan_to_num(7))


def test_updates_too_small_for_bfloat16_add_up_as_in_float32():
    start = torch.rand(64, 64, generator=generator()) + 1
    make, steps = load_config(compose("device=cpu", "optimizer.lr=1e-4", "optimizer.weight_decay=0")).make_optimizer, 50
    exact, rounded, nearest = (
        nn.Parameter(start.bfloat16().to(dtype)) for dtype in (torch.float32, *[torch.bfloat16] * 2)
    )
    optimizers = [build_optimizer(make, [exact]), build_rounded_optimizer(make, [rounded], [1.0], seed=0)]
    optimizers.append(build_optimizer(make, [nearest]))
    for _ in range(steps):
        for parameter, optimizer in zip((exact, rounded, nearest), optimizers, strict=True):
            parameter.grad = torch.ones_like(parameter)
            optimizer.step()
            parameter.grad = None
    moved = [
        (parameter.detach().float() - start.bfloat16().float()).mean().item() for parameter in (exact, rounded, nearest)
    ]
    assert moved[0] == pytest.approx(-steps * 1e-4, rel=1e-3)
    assert moved[1] == pytest.approx(moved[0], rel=0.05)
    assert moved[2] == 0.0  # rounded to the nearest, every update is lost


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "lion", "adafactor", "muon", "prodigy"])
def test_an_update_is_that_of_the_optimizer_in_float32_up_to_the_last_bit_and_takes_no_memory_after_it(name):
    make = load_config(compose(f"optimizer={name}", "device=cpu")).make_optimizer
    torch.manual_seed(0)
    whole = [nn.Parameter(torch.randn(48, 96).bfloat16().float()) for _ in range(2)]
    rounded = [nn.Parameter(parameter.detach().bfloat16()) for parameter in whole]
    factors = [1.0, 1.0] if name == "prodigy" else [1.0, 4.0]
    one, other = build_optimizer(make, whole, factors), build_rounded_optimizer(make, rounded, factors, seed=0)
    for a, b in zip(whole, rounded, strict=True):
        b.grad = torch.randn_like(b)
        a.grad = b.grad.float()
    one.step()
    other.step()
    for a, b in zip(whole, rounded, strict=True):
        assert b.dtype == torch.bfloat16
        assert b.grad is None
        assert ((a - b.float()).abs() <= 2**-7 * a.abs()).all()
    for group in other.param_groups:
        assert all(copied.untyped_storage().nbytes() == 4 and copied.grad is None for copied in group["params"])
    for a, b in zip(one.state.values(), other.state.values(), strict=True):
        for key, value in a.items():
            assert not isinstance(value, torch.Tensor) or torch.equal(value, b[key]), key
            assert not isinstance(value, torch.Tensor) or value.dtype == b[key].dtype != torch.bfloat16


@pytest.mark.parametrize(
    "more", slow_but([("adamw",), ("adamw_8bit",), ("lion",), ("muon",)], fast=[("adamw",), ("adamw_8bit",)])
)
def test_a_run_learns_as_in_float32_saves_half_and_resumes_bit_for_bit(train, reference, more):
    own = [*BF16, f"optimizer={more}", "optimizer.lr=1e-2" if more != "lion" else "optimizer.lr=2e-3"]
    own += ["checkpoint_every=2", "validate_every=2", "adapter.dropout=0.1", "ema_decay=0.5"]
    whole = train("whole", *own)
    before, between, after = values(whole, "validation_loss")
    assert after < between < before
    assert values(whole) == pytest.approx(values(train("exact", *own, "adapter.dtype=fp32")), rel=0.02)
    assert {tensor.dtype for tensor in adapter(whole).values()} == {torch.bfloat16}
    assert adapter(whole).keys() == adapter(reference()).keys()
    again = train("again", *own, f"resume={whole / 'checkpoints' / 'step_000002'}")
    assert lines(again) == [line for line in lines(whole) if line["step"] > 2]
    assert same_tensors(adapter(again), adapter(whole))
    place = Path("checkpoints") / "step_000004"
    one, other = (torch.load(run / place / "optimizer.pt", weights_only=True) for run in (whole, again))
    assert one["param_groups"] == other["param_groups"]
    assert one["param_groups"][0]["rounded_updates"] == 4
    dtypes = {v.dtype for state in one["state"].values() for v in state.values() if isinstance(v, torch.Tensor)}
    assert torch.bfloat16 not in dtypes


def test_a_step_that_is_skipped_changes_nothing_and_leaves_no_gradient(train, captured, at_step, monkeypatch):
    seen = []
    accumulate = Trainer.accumulate_gradients

    def spoil(self, model, step):
        losses = accumulate(self, model, step)
        seen.extend(parameter.detach().clone() for parameter in adapter_parameters(model))
        adapter_parameters(model)[0].grad.fill_(torch.nan)
        return losses

    at_step(1, lambda: monkeypatch.setattr(Trainer, "accumulate_gradients", spoil))  # from the step after it on
    train("skipped", *BF16, "steps=3", "max_nonfinite_steps=9")
    (trainer,) = captured
    after = adapter_parameters(trainer.peft_model)
    assert all(torch.equal(one, other) for one, other in zip(seen, after, strict=True))
    assert all(parameter.grad is None for parameter in after)


def test_it_goes_together_with_a_saved_adapter_and_a_frozen_one(train, reference):
    for mode in ("continue", "frozen"):
        run = train(mode, *BF16, f"adapter.init={reference()}", f"adapter.init_mode={mode}", "validate_every=2")
        assert {tensor.dtype for tensor in adapter(run).values()} == {torch.bfloat16}
        assert values(run, "validation_loss")[-1] < values(run, "validation_loss")[0]


def test_the_plan_counts_half_for_weights_and_gradients_and_the_copies_of_an_update(small):
    own = small("adapter.rank=16")
    runs = [load_config(compose(*own, *more)) for more in ([], BF16)]
    whole, half = (Planner(workload_of(run, on_gpu=False)) for run in runs)
    for part in ("adapter", "its gradients"):
        assert half.adapter[part] * 2 == whole.adapter[part] > 0
    assert half.adapter["optimizer"] == whole.adapter["optimizer"]
    phases = [
        planner.predict(choice_of(run.composed["memory"])).phases
        for planner, run in ((whole, runs[0]), (half, runs[1]))
    ]
    numbers = whole.job.trained_parameters
    assert phases[0]["update"]["working set"] == 4 * numbers
    assert (
        phases[1]["update"]["working set"]
        == 10 * numbers
        == update_bytes([nn.Parameter(torch.zeros(numbers).bfloat16())])
    )


@pytest.mark.parametrize("kind", ["dora", "pissa", "loha", "lokr", "oft"])
def test_other_types_are_refused(kind):
    with pytest.raises(adapters.AdapterError, match=r"adapter\.dtype=bf16: a .* Use adapter=lora"):
        to_bfloat16(attached(kind, base()).get_base_model())


def test_what_cannot_be_is_said_before_anything_is_loaded():
    tiny = ["model=tiny", "device=cpu"]
    assert holds(refusal(*tiny, "adapter.dtype=int8"), "adapter.dtype='int8' must be one of fp32, bf16")
    assert holds(refusal(*tiny, *BF16, "adapter=oft"), "adapter.dtype=bf16: a OFT ... Use adapter=lora")
    assert holds(refusal(*tiny, *BF16, "optimizer=schedulefree"), "adapter.dtype=bf16 ... AdamWScheduleFree ... fp32")
