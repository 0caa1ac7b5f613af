"""flux2.adapters.attach: which layers get a LoRA, that it changes what it should, and its gradients."""

import re
from pathlib import Path
from typing import Any

import helpers
import peft
import pytest
import torch
import torch.nn.functional as F
from adapter_helpers import EVERY, fresh, merged, predict, trained
from peft.tuners.lora import LoraLayer
from torch import nn

from flux2 import adapters
from flux2.adapters.files import layer_pairs
from flux2.adapters.formats import AdapterError, LoraPair, to_diffusers
from flux2.weights.key_names import transformer_module

BLOCK = [*(f"{stream}_{layer}" for stream in ("img", "txt") for layer in ("attn.qkv", "attn.proj", "mlp.0", "mlp.2"))]


# ------------------------------------------------------------------ attaching


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["dev", "klein"])
def test_a_fresh_adapter_changes_nothing_bit_for_bit(kind: str, dtype: torch.dtype) -> None:
    model = fresh(kind).to(dtype)
    before = predict(model, kind)
    adapters.attach(model, targets=EVERY)
    assert (
        len(layer_pairs(model)) == len([name for name, _ in model.named_modules() if name.endswith(".base_layer")]) > 20
    )
    assert torch.equal(predict(model, kind), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_adapter_trains_and_it_is_float32_on_any_base(dtype: torch.dtype) -> None:
    model = fresh().to(dtype)
    model.requires_grad_(True)
    adapters.attach(model, rank=2)
    for name, parameter in model.named_parameters():
        is_adapter = ".lora_A." in name or ".lora_B." in name
        assert parameter.requires_grad == is_adapter, name
        assert parameter.dtype == (torch.float32 if is_adapter else dtype), name
    model(**helpers.transformer_inputs(model.config)).float().square().mean().backward()
    b = [parameter for name, parameter in model.named_parameters() if ".lora_B." in name]
    assert len(b) == 22
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in b)
    assert len(adapters.adapter_parameters(model)) == 44


def test_the_beginning_is_the_seeds_whatever_the_bases_precision() -> None:
    models = [fresh(), fresh().bfloat16(), fresh()]
    torch.manual_seed(1)
    wanted = torch.randn(2)
    torch.manual_seed(1)
    for model, seed in zip(models, (0, 0, 1), strict=True):
        adapters.attach(model, seed=seed)
    assert torch.equal(torch.randn(2), wanted), "the process's own generator has not moved"
    first, half, other = (layer_pairs(model) for model in models)
    assert all(torch.equal(first[layer].a, half[layer].a) for layer in first)
    assert not any(torch.equal(first[layer].a, other[layer].a) for layer in first)
    assert not any(pair.b.any() for pair in first.values())


def test_the_default_targets_are_the_block_linears() -> None:
    model = fresh()
    adapters.attach(model)
    wanted = [f"double_blocks.{i}.{layer}" for i in range(2) for layer in BLOCK]
    wanted += [f"single_blocks.{i}.linear{j}" for i in range(3) for j in (1, 2)]
    assert sorted(layer_pairs(model)) == sorted(wanted)


@pytest.mark.parametrize(
    "targets",
    [
        [r"single_blocks\.[02]\.linear1"],
        [r"(?!double_blocks\.1\.img_mlp\.2)(double|single)_blocks.*"],  # 21 layers: PEFT shortens such lists
        [r"time_in\.in_layer", r".*\.proj"],
    ],
)
def test_targets_name_whole_layers_in_every_way_of_attaching(targets: list[str], tmp_path: Path) -> None:
    wrapped, model = trained(targets=targets)
    linears = [name for name, module in fresh().named_modules() if isinstance(module, nn.Linear)]
    wanted = {name for name in linears if any(re.fullmatch(target, name) for target in targets)}
    assert set(layer_pairs(model)) == wanted
    adapters.save(wrapped, tmp_path, base="small_dev")
    loaded = fresh()
    adapters.load(loaded, tmp_path)
    by_peft = fresh()
    peft.PeftModel.from_pretrained(by_peft, str(tmp_path))
    assert set(layer_pairs(loaded)) == set(layer_pairs(by_peft)) == wanted


@pytest.mark.parametrize(("rslora", "scale"), [(False, 6 / 3), (True, 6 / 3**0.5)])
def test_the_update_is_b_a_times_alpha_over_rank(rslora: bool, scale: float) -> None:
    _, model = trained(rslora=rslora, targets=EVERY)
    for layer, pair in layer_pairs(model).items():
        module: Any = model.get_submodule(layer)
        torch.testing.assert_close(pair.b, scale * module.lora_B["default"].weight.data)
    wanted = predict(merged("dev", [layer_pairs(model)], [1.0]))
    assert helpers.relative_error(predict(model), wanted) <= 1e-5
    assert helpers.relative_error(predict(model), predict(fresh())) > 0.1


def test_alpha_is_the_rank_unless_given() -> None:
    model = fresh()
    adapters.attach(model, rank=5)
    assert {module.scaling["default"] for module in model.modules() if isinstance(module, LoraLayer)} == {1.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_disabled_is_the_base_bit_for_bit_and_ends(dtype: torch.dtype) -> None:
    base = predict(fresh().to(dtype))
    _, model = trained()
    model.to(dtype)
    changed = predict(model)
    with adapters.adapters_disabled(model):
        assert torch.equal(predict(model), base)
    assert torch.equal(predict(model), changed)
    assert not torch.equal(changed, base)
    with pytest.raises(InterruptedError), adapters.adapters_disabled(model):
        raise InterruptedError
    assert torch.equal(predict(model), changed), "an exception must not leave it off"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"targets": [r".*linear1", "to_q"]},
            r"adapter\.targets.*'to_q'.*single_blocks\.N\.linear1",
        ),
        ({"targets": ["("]}, r"adapter\.targets.*'\('.*regular expression"),
        ({"targets": []}, r"adapter\.targets"),
        ({"targets": "linear1"}, r"adapter\.targets.*'linear1'.*single_blocks"),
        ({"targets": 3}, r"adapter\.targets=3\b"),
        ({"targets": [3]}, r"adapter\.targets=\[3\]"),
        ({"rank": 0}, r"adapter\.rank=0\b"),
        ({"rank": 2.0}, r"adapter\.rank=2\.0\b"),
        ({"alpha": -1}, r"adapter\.alpha=-1\b"),
        ({"dropout": 0.96}, r"adapter\.dropout=0\.96\b.*0 to 0\.95"),
    ],
)
def test_settings_that_cannot_be_are_errors_that_name_them(options: dict[str, Any], message: str) -> None:
    model = fresh()
    with pytest.raises(AdapterError, match=message):
        adapters.attach(model, **options)
    assert not layer_pairs(model)


def test_targets_are_whole_names_and_not_parts() -> None:
    with pytest.raises(AdapterError, match=r"adapter\.targets.*'linear1'"):
        adapters.attach(fresh(), targets=["linear1"])


# ------------------------------------------------------------------ gradients


@pytest.mark.parametrize("kind", ["dev", "klein"])
def test_gradients_are_those_of_diffusers_with_peft(kind: str) -> None:
    """Same weights, batch, noise and times. A fused qkv adapter is q, k and v adapters that share one A."""
    _, model = trained(kind, targets=EVERY)
    _, reference = helpers.transformers(kind)
    inputs = helpers.transformer_inputs(model.config)
    flow = torch.randn(2, 12, 128, generator=torch.Generator().manual_seed(9))
    loss = F.mse_loss(model(**inputs), flow)
    loss.backward()

    layers: dict[str, Any] = {layer: model.get_submodule(layer) for layer in layer_pairs(model)}
    raw = {
        layer: LoraPair(m.lora_A["default"].weight.data, m.lora_B["default"].weight.data) for layer, m in layers.items()
    }
    state = to_diffusers(raw)
    names = sorted({key.removeprefix("transformer.").rsplit(".lora_", 1)[0] for key in state})
    peft.inject_adapter_in_model(peft.LoraConfig(r=3, lora_alpha=6, target_modules=names), reference)
    theirs: dict[str, Any] = {name: reference.get_submodule(name) for name in names}
    for name, module in theirs.items():
        module.lora_A["default"].weight.data = state[f"transformer.{name}.lora_A.weight"].clone()
        module.lora_B["default"].weight.data = state[f"transformer.{name}.lora_B.weight"].clone()
    theirs_loss = F.mse_loss(helpers.reference_forward(reference, inputs), flow)
    theirs_loss.backward()

    assert loss.item() == pytest.approx(theirs_loss.item(), rel=1e-5)
    assert len(layers) == len([m for m in fresh(kind).modules() if isinstance(m, nn.Linear)])
    for layer, module in layers.items():
        parts = transformer_module(layer)
        a = sum(theirs[name].lora_A["default"].weight.grad for name in parts.names)
        b = parts.join([theirs[name].lora_B["default"].weight.grad for name in parts.names])
        for ours, wanted in ((module.lora_A["default"].weight.grad, a), (module.lora_B["default"].weight.grad, b)):
            assert F.cosine_similarity(ours.flatten().double(), wanted.flatten().double(), dim=0) >= 0.99999, layer
            torch.testing.assert_close(ours.norm(), wanted.norm(), rtol=1e-4, atol=0)
