"""flux2.adapters.tuners: every type of adapter on every precision, from its beginning to its end."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import helpers
import peft
import pytest
import torch
import torch.nn.functional as F
from adapter_helpers import PRECISIONS, TYPES, attached, base, stirred
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flux2 import adapters
from flux2.adapters.files import DIFFUSERS_FILE, PEFT_FILE, PISSA_FILE, format_notes, layer_pairs
from flux2.adapters.formats import AdapterError, to_comfyui, to_kohya
from flux2.adapters.tuners import (
    adapter_layers,
    attach,
    detach,
)
from flux2.layers.fused_lora import FusedLora
from flux2.memory.activation_checkpointing import set_policy
from flux2.memory.block_offload import offload
from flux2.models.transformer import Transformer
from flux2.quantization.base import QuantizedLinear
from flux2.quantization.precision import Precision, convert

NAMES = {"lora": "LoRA", "dora": "DoRA", "oft": "OFT", "loha": "LoHa", "lokr": "LoKr"}  # as messages call them
SUPPORTED = {(kind, precision) for kind in TYPES for precision in PRECISIONS}  # all; docs/adapters.md has the table
DOCS = Path(__file__).resolve().parents[3] / "docs" / "adapters.md"
EACH_TYPE = pytest.mark.parametrize("kind", TYPES)


def each_pair(*precisions: str) -> pytest.MarkDecorator:
    """Parametrizes by type, on each of `precisions`; `make test` runs some pairs of each type and precision."""
    often = {(kind, "nf4") for kind in TYPES} | {("lora", name) for name in PRECISIONS}
    often |= {("dora", "bf16"), ("oft", "fp8"), ("lokr", "bf16"), ("loha", "fp8"), ("pissa", "fp32")}
    pairs = [(kind, precision) for kind in TYPES for precision in precisions or PRECISIONS]
    cases = [pytest.param(*pair, marks=() if pair in often else pytest.mark.slow) for pair in pairs]
    return pytest.mark.parametrize(("kind", "precision"), cases)


@torch.no_grad()
def predict(model: nn.Module, autocast: bool = False) -> Tensor:
    model = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        return model(**helpers.transformer_inputs(model.config))


# ------------------------------------------------------------------ beginning and end


@each_pair()
def test_a_fresh_adapter_changes_nothing_bit_for_bit(kind: str, precision: str) -> None:
    model, autocast = base(precision, "dev"), precision != "fp32"
    before, without = predict(model, autocast), predict(model)
    beginning = torch.get_rng_state()
    wrapped = attached(kind, model, targets="all_linear").train()
    assert {parameter.dtype for parameter in adapters.adapter_parameters(wrapped)} == {torch.float32}
    assert torch.equal(predict(model, autocast), before)
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


def dequantized(model: Transformer) -> Transformer:
    """The same weights in plain float32 layers."""
    for name, module in [*model.named_modules()]:
        if isinstance(module, QuantizedLinear):
            plain = nn.Linear(module.in_features, module.out_features, bias=False)
            plain.weight = nn.Parameter(module.dequantize(torch.float32), requires_grad=False)
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, plain)
    return model.float()


@pytest.mark.parametrize("storage", ["fp8", "nf4"])
@EACH_TYPE
def test_gradients_on_a_quantized_base_are_those_on_the_dequantized(kind: str, storage: Any) -> None:
    """All in float32 but the storage of the weights."""
    found = []
    for change in (lambda model: model, dequantized):
        model = helpers.transformer("klein")
        convert(model, Precision(storage=storage))
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


# ------------------------------------------------------------------ files


@EACH_TYPE
def test_pefts_own_loader_reads_what_is_saved(kind: str, tmp_path: Path) -> None:
    wrapped = stirred(attached(kind, base(model="dev"), targets="all_linear"))
    adapters.save(wrapped, tmp_path, base="small")
    by_peft = peft.PeftModel.from_pretrained(base(model="dev"), str(tmp_path))
    assert helpers.relative_error(predict(by_peft), predict(wrapped)) <= 1e-6


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora", "pissa"])
def test_diffusers_reads_every_type_that_is_written_for_it(kind: str, tmp_path: Path) -> None:
    wrapped = stirred(attached(kind, base(model="dev"), targets="all_linear", rank_pattern={"image_stream": 2}))
    adapters.save(wrapped, tmp_path, base="small")
    reference = helpers.transformers("dev")[1]
    reference.load_lora_adapter(load_file(tmp_path / DIFFUSERS_FILE))
    ours = predict(wrapped)
    with torch.no_grad():
        theirs = helpers.reference_forward(reference, helpers.transformer_inputs(helpers.TRANSFORMERS["dev"]))
    assert helpers.relative_error(theirs, ours) <= 1e-5
    assert helpers.relative_error(predict(base(model="dev")), ours) > 0.05


@pytest.mark.parametrize("kind", ["loha", "lokr", "oft"])
def test_no_file_is_written_that_others_would_read_wrongly_and_none_of_an_earlier_adapter_stays(
    kind: str, tmp_path: Path
) -> None:
    adapters.save(attached("pissa", base()), tmp_path, base="small")
    assert {DIFFUSERS_FILE, PISSA_FILE} <= {file.name for file in tmp_path.iterdir()}
    assert format_notes(tmp_path) == ""
    wrapped = attached(kind, base())
    adapters.save(wrapped, tmp_path, base="small")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["README.md", "adapter_config.json", PEFT_FILE]
    assert re.search(r"flux2\.generate.*python -m flux2\.export", format_notes(tmp_path))
    assert "diffusers" not in (tmp_path / "README.md").read_text()
    with pytest.raises(AdapterError, match=rf"(double|single)_blocks.*{NAMES[kind]}"):
        layer_pairs(wrapped.get_base_model())


def test_a_dora_is_no_pair_for_comfyui_and_kohya_and_its_diffusers_file_loads_here(tmp_path: Path) -> None:
    wrapped = stirred(attached("dora", base(), targets="all_linear"))
    for form in (to_comfyui, to_kohya):
        with pytest.raises(AdapterError, match=r"img_in\b.*DoRA"):
            form(layer_pairs(wrapped.get_base_model()))
    adapters.save(wrapped, tmp_path, base="small")
    model = base()
    assert adapters.load(model, tmp_path / DIFFUSERS_FILE).kind == "DoRA"
    assert helpers.relative_error(predict(model), predict(wrapped)) <= 1e-6
    assert re.search(r"diffusers.*python -m flux2\.export", format_notes(tmp_path))


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora", "pissa", "loha", "lokr"])
def test_ranks_and_alphas_of_layers_are_kept_in_every_form(kind: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "rank_pattern": {r"single_blocks\.1\.linear1": 2, "double_attention": 7},
        "alpha_pattern": {r"single_blocks\.[12]\..*": 3.0},
    }
    wrapped = stirred(attached(kind, base(model="dev"), **options))
    layers: dict[str, Any] = dict(wrapped.get_base_model().named_modules())
    power = 0.5 if kind == "rslora" else 1
    for name, rank, alpha in (
        ("single_blocks.1.linear1", 2, 3),
        ("single_blocks.1.linear2", 4, 3),
        ("single_blocks.0.linear1", 4, 8),
        ("double_blocks.1.txt_attn.proj", 7, 8),
        ("double_blocks.1.txt_mlp.0", 4, 8),
    ):
        assert (layers[name].r["default"], layers[name].scaling["default"]) == (
            rank,
            pytest.approx(alpha / rank**power),
        )
    adapters.save(wrapped, tmp_path, base="small")
    places = [tmp_path]
    if kind in ("lora", "rslora", "pissa"):
        save_file(to_comfyui(layer_pairs(wrapped.get_base_model())), tmp_path / "comfyui.safetensors")
        places += [tmp_path / DIFFUSERS_FILE, tmp_path / "comfyui.safetensors"]
    wanted = predict(wrapped)
    for place in places:
        model = base(model="dev")
        report = adapters.load(model, place)
        assert helpers.relative_error(predict(model), wanted) <= 1e-6, place
        assert (min(report.ranks), max(report.ranks)) == ((4, 14) if kind == "pissa" else (2, 7))


def test_an_alpha_that_is_not_given_is_the_rank_of_each_layer() -> None:
    wrapped = attach(base(), rank=4, rank_pattern={"double_mlp": 9})
    found = {module.scaling["default"] for module in wrapped.modules() if isinstance(module, FusedLora)}
    assert found == {1.0}


# ------------------------------------------------------------------ several, scales, merging


@pytest.mark.parametrize("kind", ["lora", "pissa", "loha", "lokr"])
def test_several_of_a_type_add_up_each_at_its_scale(kind: str, tmp_path: Path) -> None:
    for i in (1, 2):
        adapters.save(stirred(attached(kind, base(), seed=i), seed=i), tmp_path / str(i), base="small")
    model = base()
    adapters.load(model, tmp_path / "1", name="one", scale=0.5)
    adapters.load(model, tmp_path / "2", name="two", scale=-0.25)
    both = base()
    weights = {name: tensor.clone() for name, tensor in both.state_dict().items()}
    for i, scale in ((1, 0.5), (2, -0.25)):
        alone = base()
        adapters.load(alone, tmp_path / str(i))
        adapters.merge(alone)
        for name, tensor in alone.state_dict().items():
            both.state_dict()[name].add_(tensor - weights[name], alpha=scale)
    assert helpers.relative_error(predict(model), predict(both)) <= 1e-5
    with adapters.adapters_disabled(model):
        assert torch.equal(predict(model), predict(base()))
    adapters.merge(model)
    assert helpers.relative_error(predict(model), predict(both)) <= 1e-5


@pytest.mark.parametrize("scale", [0.0, 0.4, 1.0])
def test_a_dora_at_a_scale_is_that_part_of_its_whole_change(scale: float, tmp_path: Path) -> None:
    adapters.save(stirred(attached("dora", base())), tmp_path, base="small")
    model, whole, part = base(), base(), base()
    adapters.load(model, tmp_path, scale=scale)
    adapters.load(whole, tmp_path)
    adapters.merge(whole)
    for name, tensor in whole.state_dict().items():
        part.state_dict()[name].lerp_(tensor, scale)
    assert helpers.relative_error(predict(model), predict(part)) <= 1e-5
    adapters.merge(model)
    assert helpers.relative_error(predict(model), predict(part)) <= 1e-5


@pytest.mark.parametrize(("first", "second"), [("lora", "dora"), ("dora", "dora"), ("oft", "oft"), ("loha", "lora")])
def test_types_that_do_not_add_up_are_refused_and_the_first_stays(first: str, second: str, tmp_path: Path) -> None:
    adapters.save(stirred(attached(first, base())), tmp_path / "first", base="small")
    adapters.save(stirred(attached(second, base())), tmp_path / "second", base="small")
    model = base()
    adapters.load(model, tmp_path / "first", name="one")
    before = predict(model)
    with pytest.raises(AdapterError, match=rf"second: .*{NAMES[second]}.*{NAMES[first]}"):
        adapters.load(model, tmp_path / "second", name="two")
    assert torch.equal(predict(model), before)


def test_an_oft_has_no_scale(tmp_path: Path) -> None:
    adapters.save(stirred(attached("oft", base())), tmp_path, base="small")
    model = base()
    with pytest.raises(AdapterError, match=r"scale=0\.5.*OFT"):
        adapters.load(model, tmp_path, scale=0.5)
    assert torch.equal(predict(model), predict(base()))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@EACH_TYPE
def test_a_merged_adapter_is_the_same_model_in_plain_layers(kind: str, precision: str) -> None:
    wrapped = stirred(attached(kind, base(precision)))
    wanted = predict(wrapped)
    adapters.merge(wrapped)
    model = wrapped.get_base_model()
    assert model.state_dict().keys() == base().state_dict().keys()
    # in bfloat16 the weights are rounded, once: 0.2 % each
    assert helpers.relative_error(predict(model), wanted) <= (1e-6 if precision == "fp32" else 0.01)


@pytest.mark.parametrize("precision", ["fp8", "nf4"])
@EACH_TYPE
def test_merging_into_a_quantized_base_is_refused(kind: str, precision: str) -> None:
    wrapped = stirred(attached(kind, base(precision)))
    before = predict(wrapped)
    with pytest.raises(AdapterError, match=r"double_blocks.*precision=bf16"):
        adapters.merge(wrapped)
    assert torch.equal(predict(wrapped), before)


# ------------------------------------------------------------------ what is refused


def rewritten(folder: Path, config: dict[str, Any], state: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    save_file(state(load_file(folder / PEFT_FILE)), folder / PEFT_FILE)


def unchanged(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return state


def without_last(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: state[key] for key in sorted(state)[:-1]}


def with_nan(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: torch.full_like(tensor, torch.nan) for key, tensor in state.items()}


def of_another_layer(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.replace("single_blocks.2", "single_blocks.9"): tensor for key, tensor in state.items()}


@pytest.mark.parametrize(
    ("kind", "config", "state", "message"),
    [
        (
            "loha",
            {},
            without_last,
            r"LoHa.*missing single_blocks\.2\.linear2\.hada_w2_b$",
        ),
        ("dora", {}, without_last, r"DoRA.*missing single_blocks\.2\.linear2\.lora_magnitude_vector$"),
        ("loha", {"r": 5}, unchanged, r"hada_w1_a.*\(\d+, 4\).*\(\d+, 5\).*adapter_config\.json"),
        ("oft", {"oft_block_size": 8}, unchanged, r"oft_R.*\(\d+, 120\).*\(\d+, 28\).*adapter_config\.json"),
        ("oft", {"oft_block_size": 25}, unchanged, r"OFT.*adapter_config\.json.*\(Invalid"),
        (
            "lokr",
            {"decompose_factor": 4},
            unchanged,
            r"LoKr.*missing .*lokr_w2_a.*unknown .*lokr_w2",
        ),
        ("lokr", {"r": 5}, unchanged, r"lokr_w2_a.*\(.*\(.*adapter_config\.json"),
        ("lokr", {}, with_nan, "NaN"),
        (
            "loha",
            {},
            of_another_layer,
            r"single_blocks\.9\.linear1, single_blocks\.9\.linear2",
        ),
        ("loha", {"modules_to_save": ["img_in"]}, unchanged, r"modules_to_save=\['img_in'\]"),
        ("loha", {"alpha": None}, unchanged, r"adapter_config\.json.*alpha=None"),
        (
            "loha",
            {"peft_type": "VERA"},
            unchanged,
            r"VERA.*LoRA, LoHa",
        ),
        ("lora", {"use_bdlora": {"target_modules_bd_a": ["x"], "nblocks": 2}}, unchanged, "use_bdlora"),
    ],
)
@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments")
def test_files_of_other_types_that_do_not_fit_are_refused_by_name(
    kind: str, config: dict[str, Any], state: Any, message: str, tmp_path: Path
) -> None:
    adapters.save(stirred(attached(kind, base(model="dev"))), tmp_path, base="small")
    rewritten(tmp_path, config, state)
    model = base(model="dev")
    with pytest.raises(AdapterError, match=message) as error:
        adapters.load(model, tmp_path)
    assert str(tmp_path) in str(error.value)
    assert torch.equal(predict(model), predict(base(model="dev")))
    assert not any(isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer) for module in model.modules())


@pytest.mark.parametrize("saved", ["lora", "pissa", "loha"])
def test_going_on_with_an_adapter_of_another_type_is_an_error_that_changes_nothing(saved: str, tmp_path: Path) -> None:
    adapters.save(stirred(attached(saved, base())), tmp_path, base="small")
    for kind in {"lora", "pissa", "lokr"} - {saved}:
        wrapped = attached(kind, base())
        before = predict(wrapped)
        with pytest.raises(AdapterError, match=r"adapter\.targets|pissa\.safetensors|adapter\.rank"):
            adapters.restore(wrapped, tmp_path)
        assert torch.equal(predict(wrapped), before)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("dora", {"rank": 0}, r"adapter\.rank=0\b"),
        ("dora", {"dropout": 1}, r"adapter\.dropout=1\b.*\[0, 1\)"),
        ("lora", {"rslora": "yes"}, r"adapter\.rslora='yes'"),
        ("pissa", {"iterations": 0}, r"adapter\.iterations=0\b"),
        (
            "pissa",
            {"rank": 49},
            r"adapter\.rank=49.*double_blocks\.0\.img_attn\.qkv.*48.*adapter\.rank_pattern",
        ),
        ("pissa", {"rank_pattern": {"mlp": 60}}, r"adapter\.rank=60.*double_blocks\.0\.img_mlp\.0"),
        ("lora", {"rank": 100_000}, r"adapter\.rank=100000.*144 x 48.*21 other layers"),
        ("dora", {"rank": 49}, r"adapter\.rank=49.*double_blocks\.0\.img_attn\.qkv"),
        ("loha", {"rank": 49}, r"adapter\.rank=49.*double_blocks\.0\.img_attn\.qkv"),
        ("loha", {"alpha": 0}, r"adapter\.alpha=0\b.*1e-06.*1e\+06.*null"),
        ("lora", {"alpha": 1e300}, r"adapter\.alpha=1e\+300.*1e-06.*1e\+06"),
        ("lora", {"alpha": 1e-300}, r"adapter\.alpha=1e-300\b"),
        ("lokr", {"alpha": math.nan}, r"adapter\.alpha=nan\b"),
        ("lora", {"alpha": math.inf}, r"adapter\.alpha=inf\b"),
        ("lora", {"alpha": True}, r"adapter\.alpha=True\b"),
        ("lora", {"dropout": math.nan}, r"adapter\.dropout=nan\b.*\[0, 1\)"),
        ("lora", {"dropout": -0.1}, r"adapter\.dropout=-0\.1\b.*\[0, 1\)"),
        ("lora", {"rank_pattern": 0}, r"adapter\.rank_pattern=0\b"),
        ("lora", {"rank_pattern": False}, r"adapter\.rank_pattern=False\b"),
        ("lora", {"rank_pattern": ""}, r"adapter\.rank_pattern=''"),
        ("lokr", {"alpha_pattern": []}, r"adapter\.alpha_pattern=\[\]"),
        ("lokr", {"decompose_factor": 1}, r"adapter\.decompose_factor=1\b"),
        ("lokr", {"decompose_both": 1}, r"adapter\.decompose_both=1\b"),
        ("oft", {"block_size": 32}, r"adapter\.block_size=32\b.*48.*double_blocks\.0.*adapter\.targets"),
        ("oft", {"block_size": 1}, r"adapter\.block_size=1\b"),
        ("oft", {"exact": 1}, r"adapter\.exact=1\b"),
        ("lora", {"rank_pattern": {"single_blocks": 0}}, r"adapter\.rank_pattern.*'single_blocks'=0\b"),
        ("lora", {"alpha_pattern": {"mlp": "x"}}, r"adapter\.alpha_pattern.*'mlp'='x'"),
        ("lora", {"rank_pattern": {"linear1": 2}}, r"adapter\.rank_pattern.*'linear1'.*22 layers.*adapter\.targets"),
        ("lora", {"rank_pattern": {"modulation": 2}}, r"adapter\.rank_pattern.*'modulation'.*22 layers"),
        ("lora", {"rank_pattern": {"(": 2}}, r"adapter\.rank_pattern.*'\('.*regular expression"),
        ("lora", {"rank_pattern": [2]}, r"adapter\.rank_pattern=\[2\]"),
        (
            "lora",
            {"rank_pattern": {"attention": 2, r"single_blocks\.0\..*": 3}},
            r"adapter\.rank_pattern.*'attention'.*'single_blocks.*'.*single_blocks\.0\.linear1",
        ),
    ],
)
def test_settings_that_cannot_be_are_errors_that_name_them(kind: str, options: dict[str, Any], message: str) -> None:
    model = base(model="dev")
    with pytest.raises(AdapterError, match=message):
        attached(kind, model, **options)
    assert not any(isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer) for module in model.modules())


def test_a_rank_above_that_of_a_layer_is_lowered_for_it_alone_and_lets_a_lokr_train_whole_matrices() -> None:
    wrapped = attached("lora", base(), rank=60, targets=["attention"], rank_pattern={"attention": 8})
    assert {module.r["default"] for module in adapter_layers(wrapped.get_base_model()).values()} == {8}
    whole = attached("lokr", base(), rank=100_000, targets=["attention"])
    assert not any("w2_a" in name for name, tensor in whole.named_parameters() if tensor.requires_grad)


def test_settings_of_a_type_are_pefts() -> None:
    """Of each that changes the layers, what it changes."""
    name = "single_blocks.0.linear2"  # 192 to 48

    def layer(kind: str, **options: Any) -> Any:
        return attached(kind, base(model="dev"), **options).get_base_model().get_submodule(name)

    assert layer("lokr").lokr_w1["default"].shape == (6, 12)
    assert layer("lokr", decompose_factor=4).lokr_w1["default"].shape == (4, 4)
    assert layer("lokr", rank=2, decompose_both=True).lokr_w1_a["default"].shape == (6, 2)
    assert layer("oft").oft_R["default"].weight.shape == (12, 16 * 15 // 2)
    assert layer("oft", block_share=True).oft_R["default"].weight.shape == (1, 16 * 15 // 2)
    turned = stirred(attached("oft", base(model="dev"), exact=True), by=0.3).get_base_model().get_submodule(name)
    rotation = turned.oft_R["default"].get_weight()
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(192), rtol=0, atol=1e-5)
    assert layer("dora", dropout=0.25).lora_dropout["default"].p == 0.25
    few, many = (layer("pissa", iterations=count) for count in (1, 30))
    assert not torch.equal(few.lora_A["default"].weight, many.lora_A["default"].weight)


# ------------------------------------------------------------------ the documentation


def test_the_table_of_types_and_precisions_is_what_is_tested() -> None:
    rows = re.findall(r"^\| (\w+) \|((?: (?:yes|no) \|){4})$", DOCS.read_text(), re.M)
    assert [kind for kind, _ in rows] == ["LoRA", "rsLoRA", "DoRA", "PiSSA", "LoHa", "LoKr", "OFT"]
    found = {(kind.lower(), name) for kind, cells in rows for name, cell in
             zip(PRECISIONS, re.findall(r"yes|no", cells), strict=True) if cell == "yes"}  # fmt: skip
    assert found == SUPPORTED
