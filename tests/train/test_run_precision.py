"""Runs on a base in few bits: losses near those of float32, and a base that stays as it is."""

import re

import pytest
import torch
from train_helpers import adapter, compose, lines, reread, run_training, same_tensors, values

from flux2.quantization.base import QuantizedLinear
from flux2.weights.loading import load_transformer
from train.stages.memory import load_config

pytest_plugins = ("train_helpers",)

PRECISIONS = {
    "fp8": ["precision=fp8"],
    "fp8_matmul": ["precision=fp8", "precision.matmul=fp8"],
    "int8": ["precision=int8"],
    "int8_rotated": ["precision=int8", "precision.rotate=true"],
    "nf4": ["precision=nf4"],
}


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("dev", "fp8"),
        ("klein", "fp8_matmul"),
        ("dev", "int8"),
        ("dev", "nf4"),
        pytest.param("klein", "int8_rotated", marks=pytest.mark.slow),
        pytest.param("klein", "fp8", marks=pytest.mark.slow),
        pytest.param("dev", "fp8_matmul", marks=pytest.mark.slow),
        pytest.param("klein", "nf4", marks=pytest.mark.slow),
    ],
)
def test_a_base_in_few_bits_trains_a_float32_adapter_and_stays_as_it_is(train, reference, captured, capsys, name, kind):
    exact = reference(kind=kind)
    captured.clear()
    run = train("run", *PRECISIONS[name], kind=kind)
    assert values(run)[0] == pytest.approx(values(exact)[0], rel=0.05)
    assert values(run) != values(exact)
    model = captured[0].peft_model.get_base_model()
    storage = PRECISIONS[name][0].removeprefix("precision=")
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    assert {layer.kind for layer in layers} == {storage}
    assert f"{len(layers)} of " in capsys.readouterr().out
    kinds = {parameter.dtype for key, parameter in model.named_parameters() if "lora_" in key}
    assert kinds == {torch.float32}
    assert adapter(run).keys() == adapter(exact).keys()
    precision = load_config(compose(*PRECISIONS[name], "device=cpu")).precision
    loaded = load_transformer(load_config(compose(*reread(run))).source, "cpu", precision)
    stored = {key: value for key, value in loaded.named_parameters() if "qweight" in key}
    now = {key.replace(".base_layer", ""): value for key, value in model.named_parameters() if "qweight" in key}
    assert len(stored) == len(layers)
    assert same_tensors(stored, now)


def test_recomputing_activations_changes_no_loss_in_few_bits(train):
    for storage in ("fp8", "int8", "nf4"):
        runs = [
            train(f"{storage}_{policy}", f"precision={storage}", f"memory.checkpointing={policy}", "steps=2")
            for policy in ("none", "full")
        ]
        assert lines(runs[0]) == lines(runs[1])


def test_bfloat16_with_a_base_in_few_bits_autocasts_as_plain_bfloat16_does(train, reference):
    near, ours = reference("precision=bf16"), train("ours", "precision=nf4", "precision.dtype=bf16")
    assert values(ours)[0] == pytest.approx(values(near)[0], rel=0.05)
    assert all(tensor.dtype == torch.float32 for tensor in adapter(ours).values())


def test_a_run_keeps_a_quantized_copy_that_the_next_one_reads(train, tmp_path, monkeypatch, capsys):
    train("none", "precision=nf4", "quantized_cache_dir=null", "steps=1")
    assert "copy" not in capsys.readouterr().out
    monkeypatch.setenv("FLUX2_CACHE", str(tmp_path / "copies"))
    first = train("first", "precision=nf4", "steps=2")
    (copy,) = (tmp_path / "copies").glob("*.safetensors")
    assert re.search(r"writing .*copy", capsys.readouterr().out)
    second = train("second", "precision=nf4", "steps=2")
    assert re.search(rf"read .*copy {re.escape(str(copy))}", capsys.readouterr().out)
    assert lines(first) == lines(second)


def test_a_warning_names_the_layers_for_which_int8_is_inexact(train, monkeypatch, capsys):
    train("exact", "precision=int8", "steps=1")
    assert "inexact" not in capsys.readouterr().err
    monkeypatch.setattr("flux2.quantization.int8.COARSE", 60)  # the median of this model's integers is near 20
    train("inexact", "precision=int8", "steps=1")
    assert re.search(r"int8 is inexact for double_blocks.*\. Set precision\.rotate=true", capsys.readouterr().err)


@pytest.mark.slow
def test_the_first_steps_of_the_demo_have_the_losses_of_float32(tmp_path):
    """To 1 % in 8 bits (0.5 % was measured) and 3 % in NF4 (1.6 %)."""
    losses = {}
    for name, overrides in {"fp32": ["precision=fp32"], **PRECISIONS}.items():
        run = load_config(
            compose(
                "+experiment=demo",
                *overrides,
                "device=cpu",
                "steps=2",
                "log_every=1",
                "checkpoint_every=0",
                "sample_every=0",
                "validate_every=0",
                f"cache_dir={tmp_path / 'cache'}",
                f"output_dir={tmp_path / name}",
            )
        )
        losses[name] = values(run_training(run).parent)
    exact = losses.pop("fp32")
    for name, ours in losses.items():
        assert ours == pytest.approx(exact, rel=0.03 if name == "nf4" else 0.01)
        assert ours != exact
    assert losses["fp8"] != losses["fp8_matmul"]
