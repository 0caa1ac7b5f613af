"""flux2.weights.prequantized: scales of FP8 weights that give no finite weights, or are zero."""

from pathlib import Path

import pytest
import torch
from prequantized_helpers import FP8, NF4, Load, check_stored, weights

from flux2.quantization.precision import Precision
from flux2.weights.sources import WeightsError

pytest_plugins = ("prequantized_helpers",)


@pytest.mark.parametrize("precision", [torch.float32, FP8, NF4], ids=["fp32", "fp8", "nf4"])
@pytest.mark.parametrize("shape", [(), (64, 1), (2, 4)], ids=["tensor", "rows", "blocks"])
def test_a_scale_that_is_none_is_named(shape: tuple[int, ...], precision: Precision | torch.dtype, load: Load) -> None:
    stored, name = weights(), "single_blocks.0.linear2"
    stored[f"{name}.weight"] = stored[f"{name}.weight"].to(torch.float8_e4m3fn)
    for value in (0.0, float("nan"), float("inf"), -1.0, 1e-60, 1e60):  # the last two are 0 and infinite in float32
        scale = torch.ones(shape, dtype=torch.float64)
        scale.view(-1)[-1] = value
        with pytest.raises(WeightsError, match=rf"{name}\.weight\b.*scale.*(zero|negative|finite).*bfloat16"):
            load(stored | {f"{name}.weight_scale": scale}, precision)
    scale.view(-1)[-1] = 1e37  # finite, but not its product with 448
    with pytest.raises(WeightsError, match=rf"{name}\.weight\b.*scale.*finite.*bfloat16"):
        load(stored | {f"{name}.weight_scale": scale}, precision)


@pytest.mark.parametrize("precision", [torch.float32, FP8, NF4], ids=["fp32", "fp8", "nf4"])
@pytest.mark.parametrize("shape", [(), (64, 1), (2, 4)], ids=["tensor", "rows", "blocks"])
def test_zeros_may_have_the_scale_zero(
    shape: tuple[int, ...], precision: Precision | torch.dtype, load: Load, tmp_path: Path
) -> None:
    stored, name = weights(), "single_blocks.0.linear2"
    values = torch.randn(64, 256).clamp(-1, 1)
    zeros = {(): (slice(None), slice(None)), (64, 1): (63, slice(None)), (2, 4): (slice(32, 64), slice(192, 256))}
    values[zeros[shape]] = -0.0
    scale = torch.full(shape, 2.0)
    scale.view(-1)[-1] = 0
    stored[f"{name}.weight"] = values.to(torch.float8_e4m3fn)
    wanted = 2 * stored[f"{name}.weight"].float()
    layer = load(stored | {f"{name}.weight_scale": scale}, precision, cache=tmp_path / "copies").get_submodule(name)
    again = load(stored | {f"{name}.weight_scale": scale}, precision, cache=tmp_path / "copies").get_submodule(name)
    if precision is NF4 or (precision is FP8 and shape == (2, 4)):
        check_stored(layer, wanted)
    else:
        assert torch.equal(layer.weight.float(), wanted)
    assert torch.equal(again.weight.float(), layer.weight.float())
    x = torch.randn(3, 256, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x).sum(), x)
    assert torch.isfinite(gradient).all()
    assert float((layer(x) - x @ layer.weight.float().t()).norm()) <= 0.1 * float((x @ wanted.t()).norm())
    values[zeros[shape]] = 1
    stored[f"{name}.weight"] = values.to(torch.float8_e4m3fn)
    with pytest.raises(WeightsError, match=rf"{name}\.weight\b.*scale is zero"):
        load(stored | {f"{name}.weight_scale": scale}, precision)
