"""flux2.adapters.tuners: files that do not fit and settings that cannot be are refused by name."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapter_helpers import attached, base, predict, stirred
from safetensors.torch import load_file, save_file
from torch import Tensor

from flux2 import adapters
from flux2.adapters import files
from flux2.adapters.files import PEFT_FILE
from flux2.adapters.formats import AdapterError
from flux2.adapters.tuners import adapter_layers


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
        ("dora", {"dropout": 1}, r"adapter\.dropout=1\b.*0 to 0\.95"),
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
        ("lora", {"dropout": math.nan}, r"adapter\.dropout=nan\b.*0 to 0\.95"),
        ("lora", {"dropout": -0.1}, r"adapter\.dropout=-0\.1\b.*0 to 0\.95"),
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


@pytest.mark.parametrize("kind", ["lora", "dora", "loha", "lokr"])
def test_an_adapter_that_overflows_is_not_merged(kind: str) -> None:
    model = base()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    stirred(attached(kind, model))
    layer, module = list(adapter_layers(model).items())[-1]
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data.mul_(1e30)
    with pytest.raises(AdapterError, match=rf"{layer}\b.*infinite.*smaller scale"):
        adapters.merge(model)
    assert len(adapter_layers(model)) > 1
    for name, module in adapter_layers(model).items():
        assert torch.equal(module.get_base_layer().weight, before[f"{name}.weight"])


@pytest.mark.parametrize(
    ("weight", "factors", "scale", "is_finite"),
    [
        (1.0, 1.0, 1.0, True),
        (-3e38, 1e18, 1.0, True),  # the sum is 2.99e38, near the largest number
        (3e38, 1e19, 1.0, False),
        (-3e38, 1e19, -1.0, False),
        (float("nan"), 1.0, 1.0, False),
        (float("-inf"), 1.0, 1.0, False),
        (1.0, float("nan"), 1.0, False),
        (1.0, 1.0, float("nan"), False),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merge_that_is_certain_to_be_finite_computes_each_sum_once(
    weight: float, factors: float, scale: float, is_finite: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = base(model="dev").to(dtype)
    stirred(attached("lora", model))
    layers = adapter_layers(model)
    name, last = list(layers.items())[-1]
    last.get_base_layer().weight.data[3, 5] = weight
    last.lora_A["default"].weight.data.zero_()[0, 5] = factors
    last.lora_B["default"].weight.data.zero_()[3, 0] = factors
    last.scaling["default"] = scale
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    computed: list[object] = []
    merged_weight = files.merged_weight
    monkeypatch.setattr(files, "merged_weight", lambda layer: computed.append(layer) or merged_weight(layer))
    if not is_finite:
        with pytest.raises(AdapterError, match=rf"{name}\b.*infinite"):
            adapters.merge(model)
        assert all(
            torch.equal(tensor.nan_to_num(), before[key].nan_to_num()) for key, tensor in model.state_dict().items()
        )
        return
    adapters.merge(model)
    found = model.get_submodule(name).weight.double()
    wanted = before[f"{name}.base_layer.weight"].double()
    wanted[3, 5] += scale * factors**2
    assert float((found - wanted).abs().max()) <= torch.finfo(dtype).eps * float(wanted.abs().max())
    assert len(computed) == len(layers) + (weight != 1)
