"""flux2.quantization.precision: which layers are converted, and how; pictures of a converted model."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import helpers
import numpy as np
import pytest
import torch
from precision_helpers import EACH, FP8, INT8, NF4, PRECISIONS, converted, model_in
from torch import nn

import flux2
from flux2.layers.selection import BLOCK_LINEARS, linear_names
from flux2.models.transformer import Transformer
from flux2.models.variants import DEV
from flux2.quantization import precision
from flux2.quantization.eight_bit import EightBitLinear
from flux2.quantization.precision import (
    Precision,
    Storage,
    convert,
    describe,
    precision_from_name,
    set_transposed_cache,
)
from flux2.weights.loading import load_transformer
from flux2.weights.sources import model_source

CPU = torch.device("cpu")


# ------------------------------------------------------------------ which layers, and how


@pytest.mark.parametrize("storage", ["fp8", "int8", "nf4"])
def test_the_linears_of_the_blocks_are_converted_and_nothing_else(storage: Any) -> None:
    model = helpers.transformer("dev")
    plain = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    names = convert(model, Precision(storage=storage))
    assert names == converted(model) == linear_names(model, BLOCK_LINEARS, "")
    assert set(names) == {name for name in plain if re.match(r"(double|single)_blocks\.", name)}
    assert len(names) == 2 * 8 + 3 * 2
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters() if parameter.dtype != torch.uint8)


def test_other_layers_are_converted_if_asked_for_and_the_model_still_predicts() -> None:
    kind = replace(NF4, layers=(*BLOCK_LINEARS, r"img_in", r".*modulation.*\.lin", r"time_in\..*"))
    model, exact = model_in(kind), model_in(None)
    assert {"img_in", "single_stream_modulation.lin", "time_in.in_layer"} < set(converted(model))
    inputs = helpers.transformer_inputs(helpers.TRANSFORMERS["dev"])
    assert 0.02 < helpers.relative_error(model(**inputs), exact(**inputs)) < 0.3


def test_nothing_is_converted_without_a_storage() -> None:
    model = helpers.transformer("dev")
    assert convert(model, Precision(torch.bfloat16)) == converted(model) == []
    assert re.search(r"\bfloat32\b", describe(model, Precision()))
    assert "fp8" not in describe(model, Precision())


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        (
            (r"single_blocks\.\d+\.linear3",),
            r"precision\.layers.*'single_blocks\\\\.\\\\d\+\\\\.linear3'",
        ),
        ((*BLOCK_LINEARS, "norm"), r"precision\.layers.*'norm'"),
        (("(",), r"precision\.layers.*'\('.*regular expression"),
        ((), r"precision\.layers"),
    ],
)
def test_a_pattern_that_matches_nothing_is_an_error(layers: tuple[str, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        model_in(replace(FP8, layers=layers))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"storage": "int4"}, r"precision\.storage='int4'.*null, fp8, int8, nf4"),
        ({"backward": "fp32"}, r"precision\.backward='fp32'.*fp8, int8, bf16"),
        ({"matmul": True}, r"precision\.matmul=True\b.*auto, fp8, int8, dequantized"),
        ({"storage": "int8", "backward": "fp8"}, r"precision\.backward='fp8'.*int8, bf16 with precision\.storage=int8"),
        (
            {"storage": "fp8", "matmul": "int8"},
            r"precision\.matmul='int8'.*auto, fp8, dequantized with precision\.stor",
        ),
        ({"storage": "int8", "rowwise": True}, r"precision\.rowwise=true has no effect with .*storage=int8.*=fp8\b"),
        (
            {"storage": "fp8", "rotate": True},
            r"precision\.rotate=true has no effect with .*storage=fp8.*precision=int8",
        ),
        ({"rotate": True}, r"precision\.rotate=true has no effect with .*storage=null.*precision=int8"),
        ({"rotate": 1}, r"precision\.rotate=1 must be true or false"),
        ({"rowwise": "yes"}, r"precision\.rowwise='yes'"),
        ({"layers": "linear1"}, r"precision\.layers='linear1'.*list"),
    ],
)
def test_a_setting_that_cannot_be_is_named_with_its_value(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Precision(**settings)


def test_a_name_means_the_usual_dtype_of_the_device_with_its_storage() -> None:
    gpu = torch.device("cuda")
    assert (
        precision_from_name(None, gpu)
        == precision_from_name("auto", gpu)
        == precision_from_name("bf16", CPU)
        == Precision(torch.bfloat16)
    )
    assert (
        precision_from_name(None, CPU)
        == precision_from_name("auto", CPU)
        == precision_from_name("fp32", gpu)
        == Precision(torch.float32)
    )
    for storage in get_args(Storage):
        assert precision_from_name(storage, gpu) == Precision(torch.bfloat16, storage)
    assert precision_from_name("nf4", CPU) == NF4
    names = ["fp32", "bf16", "fp8", "int8", "nf4"]
    assert [precision_from_name(name, gpu).name for name in names] == names
    with pytest.raises(ValueError, match=r"precision='fp16'.*auto, fp32, bf16, fp8, int8, nf4"):
        precision_from_name("fp16", CPU)


def test_the_stored_bytes_depend_on_the_recipe() -> None:
    recipes = [FP8, replace(FP8, rowwise=True), INT8, replace(INT8, rotate=True), NF4, Precision(torch.bfloat16)]
    assert len({kind.recipe for kind in recipes}) == 6
    assert replace(FP8, matmul="auto", backward="bf16").recipe == FP8.recipe


@pytest.mark.parametrize(
    ("storage", "capability", "matmul", "in_8_bits", "said"),
    [
        ("fp8", (9, 0), "auto", True, r"FP8$"),
        ("fp8", (8, 9), "auto", True, r"FP8$"),
        ("fp8", (8, 6), "auto", False, r"bfloat16\b.*\b8\.6\b.*\b8\.9\b"),
        ("fp8", (9, 0), "dequantized", False, r"bfloat16\b.*precision\.matmul=dequantized"),
        ("fp8", None, "auto", False, r"bfloat16\b.*CPU"),
        ("fp8", None, "fp8", True, r"FP8$"),
        ("int8", (7, 5), "auto", True, r"one scale per row; products in INT8$"),
        ("int8", (7, 0), "dequantized", False, r"bfloat16\b.*precision\.matmul=dequantized"),
        ("int8", None, "auto", True, r"INT8$"),
        ("int8", None, "int8", True, r"INT8$"),
    ],
)
def test_products_are_in_8_bits_where_they_are_fast_or_asked_for(
    monkeypatch: pytest.MonkeyPatch,
    storage: Any,
    capability: tuple[int, int] | None,
    matmul: Any,
    in_8_bits: bool,
    said: str,
) -> None:
    monkeypatch.setattr(precision, "gpu_capability", lambda device: capability)
    device = "cpu" if capability is None else "cuda"
    kind = Precision(torch.bfloat16, storage, matmul=matmul)
    with torch.device("meta"):
        model = Transformer(helpers.TRANSFORMERS["dev"])
    convert(model, kind, device)
    layers = [module for module in model.modules() if isinstance(module, EightBitLinear)]
    assert {(layer.forward_8bit, layer.backward_8bit) for layer in layers} == {(in_8_bits, in_8_bits)}
    assert re.search(rf"\b22\b.*\b33\b.*\b{storage}\b.*{said}", describe(model, kind, device))


def test_unused_transposed_weights_are_reported() -> None:
    precision = replace(FP8, matmul="auto", cache_transposed_weights=True)
    unused = describe(model_in(precision), precision)
    assert unused != describe(model_in(replace(FP8, matmul="auto")), replace(FP8, matmul="auto"))
    assert "transposed" in unused
    used = replace(precision, matmul="fp8")
    assert "transposed" not in describe(model_in(used), used)


def test_fp8_products_that_a_gpu_does_not_have_are_refused_if_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "gpu_capability", lambda device: (8, 0))
    with pytest.raises(ValueError, match=r"precision\.matmul=fp8\b.*\b8\.0\b.*\b8\.9\b.*matmul=auto"):
        convert(model_in(None), FP8, "cuda")
    monkeypatch.setattr(precision, "gpu_capability", lambda device: (7, 0))
    for kind in (INT8, replace(INT8, matmul="int8")):
        with pytest.raises(ValueError, match=r"precision\.matmul=\w+: .*\b7\.0\b.*\b7\.5\b.*matmul=dequantized"):
            convert(model_in(None), kind, "cuda")


def test_a_backward_in_bf16_and_one_layout_are_what_they_say() -> None:
    layer = model_in(replace(FP8, backward="bf16", cache_transposed_weights=True)).single_blocks[0].linear1
    assert (layer.forward_8bit, layer.backward_8bit, layer.cache_transposed_weights) == (True, False, False)
    layer = model_in(replace(FP8, cache_transposed_weights=True)).single_blocks[0].linear1
    assert layer.cache_transposed_weights
    model = model_in("fp8_bf16_backward")
    assert set_transposed_cache(model, enabled=True) == 0
    assert not model.single_blocks[0].linear1.cache_transposed_weights
    assert "float32" in describe(model_in("fp8_bf16_backward"), PRECISIONS["fp8_bf16_backward"])


def test_the_second_layout_comes_and_goes() -> None:
    model = model_in(FP8)
    layer, names = model.single_blocks[0].linear1, set(model.state_dict())
    dy = torch.randn(5, layer.out_features)
    one = layer.input_gradient(dy)
    assert set_transposed_cache(model, enabled=True) == len(converted(model))
    assert torch.equal(layer.qweight_t, layer.qweight.t())
    assert torch.equal(layer.input_gradient(dy), one)
    layer.qweight_t.zero_()
    assert not layer.input_gradient(dy).any()
    set_transposed_cache(model, enabled=False)
    assert set(model.state_dict()) == names
    assert torch.equal(layer.input_gradient(dy), one)


def test_a_layer_that_cannot_be_rotated_is_refused_with_its_size() -> None:
    model = Transformer(replace(helpers.TRANSFORMERS["klein"], mlp_ratio=1.25))  # 40 wide
    with pytest.raises(ValueError, match=r"precision\.rotate=true: 40 input features.*16.*precision\.rotate=false"):
        convert(model, PRECISIONS["int8_rotated"])
    assert "one scale per row, rotated; products in INT8" in describe(
        model_in("int8_rotated"), PRECISIONS["int8_rotated"]
    )


def test_layers_whose_sides_are_no_multiples_of_16_are_stored_in_fp8_and_multiplied_in_the_other_dtype() -> None:
    config = replace(helpers.TRANSFORMERS["klein"], mlp_ratio=1.25)  # 40 wide
    model = Transformer(config)
    convert(model, FP8)
    odd = {name for name in converted(model) if not model.get_submodule(name).forward_8bit}
    assert odd == {name for name in converted(model) if re.search(r"mlp\.2$|linear2$", name)}
    assert re.search(rf"FP8\b.*float32\b.*\b{len(odd)} layers", describe(model, FP8))
    assert model(**helpers.transformer_inputs(config)).isfinite().all()


def test_the_whole_of_dev_takes_the_bytes_that_its_precision_says() -> None:
    """32.2e9 parameters, of which 31.4e9 in the converted layers: 8 or 4.127 bits each, and 16 for the rest."""
    sizes = {}
    for storage in ("fp8", "int8", "nf4"):
        with torch.device("meta"):
            model = Transformer(DEV).to(torch.bfloat16)
        plain = sum(parameter.numel() for parameter in model.parameters())
        inside = sum(model.get_submodule(name).weight.numel() for name in linear_names(model, BLOCK_LINEARS, ""))
        names = convert(model, Precision(torch.bfloat16, storage))  # type: ignore[arg-type]
        assert all(parameter.is_meta for parameter in model.parameters())
        sizes[storage] = sum(parameter.nbytes for parameter in model.parameters())
        bits = {"fp8": 8, "int8": 8, "nf4": 4 + 8 / 64 + 32 / 64 / 256}[storage]
        scales = sum(4 * model.get_submodule(name).out_features for name in names) if storage == "int8" else 0
        assert sizes[storage] - scales == pytest.approx(inside * bits / 8 + 2 * (plain - inside), rel=1e-5)
    assert sizes["fp8"] / 1e9 == pytest.approx(33.0, abs=0.2)
    assert sizes["nf4"] / 1e9 == pytest.approx(17.8, abs=0.2)


# ------------------------------------------------------------------ loading


@EACH
def test_a_model_is_quantized_while_it_is_loaded(name: str, model_folders: Callable[[str], Path]) -> None:
    source = replace(model_source("tiny", str(model_folders("dev"))), variant=helpers.VARIANTS["dev"])
    loaded, reference = load_transformer(source, "cpu", PRECISIONS[name]), model_in(name)
    ours, theirs = dict(loaded.named_parameters()), dict(reference.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert not any(parameter.requires_grad or parameter.is_meta for parameter in loaded.parameters())
    assert not loaded.training
    inputs = helpers.transformer_inputs(helpers.TRANSFORMERS["dev"])
    assert torch.equal(loaded(**inputs), reference(**inputs))


# ------------------------------------------------------------------ pictures


@pytest.mark.parametrize("name", ["fp8", "int8", "nf4"])
def test_a_pipeline_makes_nearly_the_same_pictures(name: str) -> None:
    exact, ours = flux2.load("tiny", device="cpu"), flux2.load("tiny", device="cpu", precision=name)
    assert ours.precision == precision_from_name(name, CPU)
    pictures = [pipe.generate("a small red cup on a blue background", steps=4)[0] for pipe in (exact, ours)]
    assert len(converted(ours.transformer)) == 24
    one, other = (np.asarray(picture, dtype=float) for picture in pictures)
    assert 0 < np.abs(one - other).mean() < 12
