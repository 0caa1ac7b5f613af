"""flux2.adapters.tuners: every type of adapter on every precision, from its beginning to its end."""

import re
from pathlib import Path
from typing import Any

import helpers
import peft
import pytest
import torch
import torch.nn.functional as F
from adapter_helpers import EACH_TYPE, PRECISIONS, TYPES, attached, base, predict, stirred
from precision_helpers import dequantized
from torch import Tensor, nn

from flux2 import adapters
from flux2.adapters.tuners import detach
from flux2.layers.fused_lora import FusedLora
from flux2.memory.activation_checkpointing import set_policy
from flux2.memory.block_offload import offload
from flux2.quantization.precision import Precision, convert

SUPPORTED = {(kind, precision) for kind in TYPES for precision in PRECISIONS}  # all; docs/adapters.md has the table
DOCS = Path(__file__).resolve().parents[3] / "docs" / "adapters.md"


def each_pair(*precisions: str) -> pytest.MarkDecorator:
    """Parametrizes by type, on each of `precisions`; `make test` runs some pairs of each type and precision."""
    often = {(kind, "nf4") for kind in TYPES} | {("lora", name) for name in PRECISIONS}
    often |= {("dora", "bf16"), ("oft", "fp8"), ("lokr", "bf16"), ("loha", "fp8"), ("pissa", "fp32")}
    pairs = [(kind, precision) for kind in TYPES for precision in precisions or PRECISIONS]
    cases = [pytest.param(*pair, marks=() if pair in often else pytest.mark.slow) for pair in pairs]
    return pytest.mark.parametrize(("kind", "precision"), cases)


# ------------------------------------------------------------------ beginning and end


@each_pair()
def test_a_fresh_adapter_changes_nothing_bit_for_bit(kind: str, precision: str) -> None:
    model, autocast = base(precision, "dev"), precision != "fp32"
    before, without = predict(model, autocast=autocast), predict(model)
    beginning = torch.get_rng_state()
    wrapped = attached(kind, model, targets="all_linear").train()
    assert {parameter.dtype for parameter in adapters.adapter_parameters(wrapped)} == {torch.float32}
    assert torch.equal(predict(model, autocast=autocast), before)
    assert torch.equal(predict(model), without), "without autocast too"
    assert torch.equal(torch.get_rng_state(), beginning), "neither attaching nor a forward draws from the process"


@each_pair()
def test_detaching_gives_the_base_back_as_it_was(kind: str, precision: str) -> None:
    model = base(precision)
    model.img_in.requires_grad_(True)
    before, state = predict(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = {name: (module, type(module)) for name, module in model.named_modules()}
    wrapped = stirred(attached(kind, model))
    assert not torch.equal(predict(model), before)
    again = detach(wrapped)
    assert again is model
    assert {name: (module, type(module)) for name, module in again.named_modules()} == modules
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())
    assert [name for name, one in again.named_parameters() if one.requires_grad] == ["img_in.weight"]
    assert torch.equal(predict(again), before)
    other = attached("lora", again)
    assert any(isinstance(module, FusedLora) for module in other.modules()), "and takes another"


def test_a_base_that_an_adapter_was_merged_into_is_not_given_back() -> None:
    wrapped = stirred(attached("lora", base()))
    wrapped.merge_adapter()
    with pytest.raises(adapters.AdapterError, match=r"merged.*double_blocks"):
        detach(wrapped)


# ------------------------------------------------------------------ what is learnt


def loss_of(model: nn.Module, autocast: bool = False) -> Tensor:
    """Against a random flow, in training mode."""
    base_model = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    inputs = helpers.transformer_inputs(base_model.config)
    flow = torch.randn(inputs["tokens"].shape, generator=torch.Generator().manual_seed(4))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        prediction = base_model.train()(**inputs)
    return F.mse_loss(prediction.float(), flow)


def gradients(model: nn.Module, autocast: bool = False) -> list[Tensor]:
    parameters = adapters.adapter_parameters(model)
    loss_of(model, autocast).backward()
    found = [parameter.grad for parameter in parameters if parameter.grad is not None]
    assert len(found) == len(parameters)
    model.zero_grad()
    return found


@pytest.mark.parametrize("storage", ["fp8", "int8", "nf4"])
@EACH_TYPE
def test_gradients_on_a_quantized_base_are_those_on_the_dequantized(kind: str, storage: Any) -> None:
    """All in float32 but the storage of the weights."""
    matmul: Any = "auto" if storage == "nf4" else "dequantized"
    found = []
    for change in (lambda model: model, dequantized):
        model = helpers.transformer("klein")
        convert(model, Precision(storage=storage, matmul=matmul))
        found.append(gradients(stirred(attached(kind, change(model)))))
    for ours, wanted in zip(*found, strict=True):
        assert wanted.norm() > 0
        assert helpers.relative_error(ours, wanted) <= 1e-4


@EACH_TYPE
def test_gradients_in_bfloat16_point_where_those_of_the_same_weights_in_float32_do(kind: str) -> None:
    ours = gradients(stirred(attached(kind, base("bf16"))), autocast=True)
    wanted = gradients(stirred(attached(kind, base("bf16").float())))
    whole = [torch.cat([tensor.flatten() for tensor in tensors]) for tensors in (ours, wanted)]
    assert F.cosine_similarity(*whole, dim=0) >= 0.995
    assert {tensor.dtype for tensor in ours} == {torch.float32}


@each_pair()
def test_every_type_trains_on_every_precision_and_is_saved_loaded_and_gone_on_with(
    kind: str, precision: str, tmp_path: Path
) -> None:
    assert (kind, precision) in SUPPORTED
    autocast = precision != "fp32"
    wrapped = attached(kind, base(precision))
    optimizer = torch.optim.AdamW(adapters.adapter_parameters(wrapped), lr=0.02, weight_decay=0.0)
    losses = []
    for _ in range(6):
        loss = loss_of(wrapped, autocast)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < 0.95 * losses[0]
    learnt = predict(wrapped)
    with adapters.adapters_disabled(wrapped):
        assert torch.equal(predict(wrapped), predict(base(precision)))

    adapters.save(wrapped, tmp_path, base="small")
    loaded = base(precision)
    report = adapters.load(loaded, tmp_path)
    assert helpers.relative_error(predict(loaded), learnt) <= 1e-6
    assert not adapters.adapter_parameters(loaded)
    assert len(report.layers) == 8 + 2 * 2
    again = attached(kind, base(precision), seed=9)
    assert not torch.equal(predict(again), learnt)
    adapters.restore(again, tmp_path)
    assert torch.equal(predict(again), learnt)
    for ours, theirs in zip(*(adapters.adapter_parameters(one) for one in (again, wrapped)), strict=True):
        assert torch.equal(ours, theirs)


@each_pair("bf16", "nf4")
def test_recomputed_and_streamed_blocks_give_the_same_gradients_bit_for_bit(kind: str, precision: str) -> None:
    found = []
    for how in ("none", "full", "selective", "streamed"):
        model = base(precision)
        wrapped = stirred(attached(kind, model))
        set_policy(model, "full" if how == "streamed" else how)
        if how == "streamed":
            offloader = offload(model, 1.0)
            assert offloader is not None
            held = {id(tensor) for streamed in offloader.blocks for tensor, _, _ in streamed.places}
            outer = {id(parameter) for parameter in wrapped.parameters()} - held
            assert {id(parameter) for parameter in adapters.adapter_parameters(wrapped)} <= outer
        found.append(gradients(wrapped, autocast=True))
    for other in found[1:]:
        assert all(torch.equal(ours, wanted) for ours, wanted in zip(other, found[0], strict=True))


def test_a_pissa_starts_at_the_weights_largest_directions_and_has_pissas_gradients() -> None:
    """PEFT's own, which takes them off the base, is the reference."""
    name = "single_blocks.1.linear1"
    model = base()
    weight = model.get_submodule(name).weight.clone()
    attached("pissa", model, targets=re.escape(name), iterations=None)
    layer: Any = model.get_submodule(name)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    u, s, v = torch.linalg.svd(weight)
    torch.testing.assert_close(2 * b @ a, u[:, :4] @ torch.diag(s[:4]) @ v[:4], rtol=1e-4, atol=1e-5)

    reference = base()
    peft.inject_adapter_in_model(
        peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights="pissa", target_modules=[name]), reference
    )
    theirs: Any = reference.get_submodule(name)
    assert helpers.relative_error(theirs.base_layer.weight, weight) > 0.1
    for one in (layer, theirs):  # as after some training: both moved alike
        for side, seed in ((one.lora_A, 1), (one.lora_B, 2)):
            shape = side["default"].weight.shape
            side["default"].weight.data += 0.05 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    for one in (model, reference):
        loss_of(one).backward()
    for ours, wanted in ((layer.lora_A, theirs.lora_A), (layer.lora_B, theirs.lora_B)):
        assert helpers.relative_error(ours["default"].weight.grad, wanted["default"].weight.grad) <= 1e-3
    assert helpers.relative_error(predict(model), predict(reference)) <= 1e-5
    assert torch.equal(layer.base_layer.weight, weight)


# ------------------------------------------------------------------ the documentation


def test_the_table_of_types_and_precisions_is_what_is_tested() -> None:
    rows = re.findall(r"^\| ([\w-]+) \|((?: (?:yes|no) \|){5})$", DOCS.read_text(), re.M)
    assert [kind for kind, _ in rows] == ["LoRA", "rsLoRA", "DoRA", "PiSSA", "LoHa", "LoKr", "OFT", "T-LoRA"]
    found = {(kind.lower().replace("-", ""), name) for kind, cells in rows for name, cell in
             zip(PRECISIONS, re.findall(r"yes|no", cells), strict=True) if cell == "yes"}  # fmt: skip
    assert found == SUPPORTED
