"""Small weights in files, and models loaded from them: what the tests of quantized files share.

A test module says `pytest_plugins = ("prequantized_helpers",)` to get the fixture, and may import the rest before
that: PYTEST_DONT_REWRITE.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import helpers
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from flux2.models.transformer import Transformer
from flux2.models.variants import VARIANTS, Variant
from flux2.quantization.base import QuantizedLinear
from flux2.quantization.precision import Precision
from flux2.weights.key_names import transformer_tensor
from flux2.weights.loading import load_transformer
from flux2.weights.sources import ModelSource

CONFIG = replace(helpers.TRANSFORMERS["dev"], heads=4, double_blocks=1, single_blocks=1)
NF4, FP8 = Precision(storage="nf4"), Precision(storage="fp8")
Load = Callable[..., Transformer]


def of_size(heads: int) -> Variant:
    return replace(VARIANTS["dev"], name="small", repo="", transformer=replace(CONFIG, heads=heads))


def weights(heads: int = 4) -> dict[str, Tensor]:
    """Random weights under our names."""
    with torch.device("meta"):
        names = Transformer(of_size(heads).transformer).state_dict()
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(tensor.shape, generator=generator) for name, tensor in names.items()}


def published(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same under diffusers' names."""
    return {key: part for name, tensor in state.items() for key, part in transformer_tensor(name).split(tensor).items()}


def joined(state: dict[str, Tensor], like: dict[str, Tensor]) -> dict[str, Tensor]:
    """From diffusers' names back to ours."""
    entries = {name: transformer_tensor(name) for name in like}
    return {name: entry.join([state[key] for key in entry.names]) for name, entry in entries.items()}


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def function(
        state: dict[str, Tensor], precision: Precision | torch.dtype = torch.float32, heads: int = 4, **options: object
    ) -> Transformer:
        contiguous = {name: tensor.contiguous() for name, tensor in state.items()}
        save_file(contiguous, tmp_path / "flux.safetensors")
        source = ModelSource(of_size(heads), str(tmp_path / "flux.safetensors"))
        return load_transformer(source, "cpu", precision, **options)  # type: ignore[arg-type]

    return function


def check_stored(layer: QuantizedLinear, weight: Tensor) -> None:
    """A layer stores what it would store of the float weight."""
    fresh = type(layer)(layer.in_features, layer.out_features, device="meta")
    fresh.store(weight)
    ours, theirs = dict(layer.named_parameters()), dict(fresh.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def check_equal(model: Transformer, wanted: dict[str, Tensor]) -> None:
    for name, tensor in wanted.items():
        module, _, leaf = name.rpartition(".")
        assert torch.equal(getattr(model.get_submodule(module), leaf) + 0, tensor), name
