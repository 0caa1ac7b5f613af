"""Rates that differ by parameter: which ones they are, that every optimizer applies them, and that runs resume."""

from pathlib import Path

import pytest
import torch
from adapter_helpers import attached, base
from message_helpers import holds
from torch import nn
from train_helpers import adapter, compose, lines, refusal, same_tensors, values

from flux2.adapters import adapter_parameters
from flux2.adapters.settings import values_by_layer
from train.config.run_config import RunConfig
from train.optim.optimizers import build_optimizer
from train.optim.parameter_groups import RateSettings
from train.optim.schedules import LearningRate
from train.stages.memory import load_config

pytest_plugins = ("train_helpers",)

GROUPS = ["optimizer.lora_plus_ratio=8", "optimizer.layer_rates={attention: 0.5}"]


def by_name(model, factors):
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return dict(zip(names, factors, strict=True))


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora", "pissa", "tlora"])
def test_the_rate_of_b_is_multiplied_and_no_other(kind):
    model = attached(kind, base())
    found = by_name(model, RateSettings(lora_plus_ratio=16).factors(model))
    assert len(found) == len(adapter_parameters(model)) > 0
    assert all(factor == (16 if ".lora_B." in name else 1) for name, factor in found.items())
    assert set(found.values()) == {1, 16}


@pytest.mark.parametrize("kind", ["lora", "dora", "loha", "lokr", "oft"])
def test_the_rate_of_a_layer_is_that_of_all_its_parameters(kind):
    model = attached(kind, base())
    rates = {"double_attention": 0.25, r"single_blocks\.0\.linear2": 4}
    found = by_name(model, RateSettings(layer_rates=rates).factors(model))
    layers = [name for name, module in model.get_base_model().named_modules() if hasattr(module, "base_layer")]
    expected = values_by_layer("layer_rates", rates, layers, lambda *_: None)
    assert set(expected.values()) == {0.25, 4}
    for name, factor in found.items():
        layer = max((one for one in layers if f".{one}." in name), key=len)
        assert factor == expected.get(layer, 1.0), name
    assert set(found.values()) == {0.25, 1.0, 4}


def test_both_multiply_and_without_settings_nothing_is_grouped():
    model = attached("lora", base())
    found = by_name(model, RateSettings(16, {"attention": 0.5}).factors(model))
    assert set(found.values()) == {0.5, 1, 8, 16}
    plain = RateSettings().factors(model)
    assert set(plain) == {1.0}
    make = load_config(compose("device=cpu")).make_optimizer
    (group,) = build_optimizer(make, adapter_parameters(model), plain).param_groups
    assert "rate_factor" not in group
    assert all(one is other for one, other in zip(group["params"], adapter_parameters(model), strict=True))


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "schedulefree", "adafactor", "lion", "muon"])
def test_an_optimizer_with_groups_updates_as_one_optimizer_for_each_rate(name):
    make = load_config(compose(f"optimizer={name}", "device=cpu")).make_optimizer
    rate = make.keywords["lr"]
    torch.manual_seed(0)
    together = [nn.Parameter(torch.randn(48, 96)) for _ in range(2)]
    apart = [nn.Parameter(parameter.detach().clone()) for parameter in together]
    grouped = build_optimizer(make, together, [1.0, 8.0])
    learning_rate = LearningRate(grouped, load_config(compose("device=cpu")).schedule, 3)
    singles = [build_optimizer(make, [apart[0]]), build_optimizer(make, [apart[1]])]
    singles[1].param_groups[0]["lr"] = 8 * rate
    for step in range(3):
        for one, other in zip(together, apart, strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        learning_rate.set(step)
        for optimizer in (grouped, *singles):
            optimizer.step()
    assert learning_rate.value == rate
    assert all(torch.equal(one, other) for one, other in zip(together, apart, strict=True))


def test_the_first_update_of_b_is_as_many_times_as_large_and_a_is_as_without(train):
    once = ["steps=1", "max_grad_norm=0", "optimizer.weight_decay=0"]
    plain, faster = adapter(train("plain", *once)), adapter(train("faster", "optimizer.lora_plus_ratio=4", *once))
    for name, tensor in plain.items():  # B starts at zero, so it is its first update
        torch.testing.assert_close(faster[name], 4 * tensor if "lora_B" in name else tensor, rtol=1e-6, atol=0)
    assert any("lora_B" in name and tensor.abs().max() > 0 for name, tensor in plain.items())


def test_a_ratio_of_one_is_the_run_without_and_another_is_not(train, reference):
    without, same = reference(), train("same", "optimizer.lora_plus_ratio=1")
    assert lines(same) == lines(without)
    assert same_tensors(adapter(same), adapter(without))
    assert values(train("other", "optimizer.layer_rates={attention: 0.5}")) != values(without)


@pytest.mark.parametrize("more", [["ema_decay=0.9"], ["optimizer=schedulefree"]], ids=["ema", "schedulefree"])
def test_a_run_with_groups_resumes_bit_for_bit_and_logs_the_rate_of_the_settings(train, more):
    own = [*GROUPS, *more, "checkpoint_every=2", "validate_every=2", "schedule.warmup_steps=1"]
    whole = train("whole", *own)
    assert values(whole, "lr") == pytest.approx([5e-3, 1e-2, 1e-2, 1e-2])
    place = Path("checkpoints") / "step_000004"
    again = train("again", *own, f"resume={whole / 'checkpoints' / 'step_000002'}")
    assert lines(again) == [line for line in lines(whole) if line["step"] > 2]
    assert same_tensors(adapter(again), adapter(whole))
    one, other = (torch.load(run / place / "optimizer.pt", weights_only=True) for run in (whole, again))
    assert one["param_groups"] == other["param_groups"]
    assert [group["lr"] for group in one["param_groups"]] == pytest.approx([5e-3, 4e-2, 1e-2, 8e-2])
    with pytest.raises(ValueError, match=r"optimizer\.lora_plus_ratio=8 there, 4 here"):
        train("never", *own, "optimizer.lora_plus_ratio=4", f"resume={whole}")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["optimizer.lora_plus_ratio=0"], "optimizer.lora_plus_ratio=0 must be ... 0.001 to 1000"),
        (["optimizer.lora_plus_ratio=fast"], "optimizer.lora_plus_ratio='fast' must be"),
        (["optimizer.layer_rates={attention: 0}"], "optimizer.layer_rates: 'attention'=0 must be ... 0.001 to 1000"),
        (["optimizer.layer_rates=2"], "optimizer.layer_rates=2 must be a mapping"),
        (["optimizer.layer_rates={atention: 2}"], "optimizer.layer_rates: 'atention' matches none of"),
        (["optimizer.layer_rates={attention: 2, single_blocks: 3}"], "optimizer.layer_rates: ... both match"),
        (["adapter=loha", "optimizer.lora_plus_ratio=4"], "optimizer.lora_plus_ratio=4 ... neither ... adapter=lora"),
        (["optimizer=prodigy", "optimizer.lora_plus_ratio=4"], "lora_plus_ratio ... prodigy ... one learning rate"),
        (["optimizer=prodigy", "optimizer.layer_rates={attention: 2}"], "layer_rates ... prodigy ... one learning"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_loaded(settings, said):
    assert holds(refusal("model=tiny", "device=cpu", *settings), said)


def test_a_rate_that_a_factor_makes_unusual_is_a_warning(capfd):
    load_config(compose("device=cpu", "optimizer.lr=1e-2", "optimizer.lora_plus_ratio=100"))
    assert holds(capfd.readouterr().err, "warning: optimizer.lr=0.01 times 100 (optimizer.lora_plus_ratio")
    load_config(compose("device=cpu", "optimizer.lr=1e-4", "optimizer.lora_plus_ratio=16"))
    assert "warning" not in capfd.readouterr().err


def test_a_run_folder_from_before_these_settings_is_read():
    old = RunConfig(compose("device=cpu")).composed
    old = old | {"optimizer": {key: old["optimizer"][key] for key in old["optimizer"] if "rate" not in key}}
    del old["optimizer"]["lora_plus_ratio"]
    assert RunConfig(old).rates == RateSettings()
