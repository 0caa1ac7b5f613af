"""flux2.quantization.int8: products that are exact but for the rounding of rows, and rotation against outliers."""

from __future__ import annotations

import helpers
import pytest
import torch
from quantized_helpers import IN, OUT, layer, random_weight, rows
from torch import Tensor

from flux2.quantization import int8
from flux2.quantization.int8 import Int8Linear, hadamard_signs, integer_product, quantize_rows, rotation_block
from flux2.quantization.precision import Precision, caution, convert


def cosine(ours: Tensor, reference: Tensor) -> float:
    return float(torch.cosine_similarity(ours.double().flatten(), reference.double().flatten(), dim=0))


# ------------------------------------------------------------------ values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_rounded_to_the_nearest_of_255_values(dtype: torch.dtype) -> None:
    x = rows(40).flatten(0, 1).to(dtype)
    values, scale = quantize_rows(x)
    assert (values.dtype, scale.dtype, scale.shape) == (torch.int8, torch.float32, (80, 1))
    torch.testing.assert_close(scale, x.float().abs().amax(1, keepdim=True) / 127)
    assert values.abs().max(dim=1).values.eq(127).all()
    off = values.double() - x.double() / scale.double()
    assert off.abs().max() <= 0.5 + 1e-3  # ties are decided in float32
    assert abs(off.mean()) < 0.01


def test_rows_of_zeros_and_of_the_smallest_gradients_keep_their_values() -> None:
    x = torch.stack([torch.zeros(IN), torch.randn(IN) * 1e-20, torch.full((IN,), -3.0)])
    values, scale = quantize_rows(x)
    found = values * scale
    assert torch.equal(found[0], x[0])
    assert helpers.relative_error(found[1], x[1]) < 0.01
    torch.testing.assert_close(found[2], x[2])


def test_products_are_those_of_integers_bit_for_bit() -> None:
    """In float64, in which sums of these products are exact."""
    generator = torch.Generator().manual_seed(0)
    for count, inner, outer in ((1, 8, 8), (5, 64, 160), (33, 1024, 24)):
        x, w = (torch.randint(-127, 128, size, generator=generator) for size in ((count, inner), (outer, inner)))
        found = integer_product(x.to(torch.int8), w.to(torch.int8).t())
        assert found.dtype == torch.int32
        assert torch.equal(found.double(), x.double() @ w.double().t())
    most = torch.full((2, 133_144), 127, dtype=torch.int8)
    assert integer_product(most, most.t()).unique().item() == 133_144 * 127**2 < 2**31


@pytest.mark.parametrize("kind", ["int8", "int8_rotated", "int8_both_layouts"])
def test_a_layer_computes_what_its_integers_and_scales_say(kind: str) -> None:
    linear = layer(kind)
    x, dy = rows().flatten(0, 1), rows(width=OUT, seed=2).flatten(0, 1)
    weight = linear.values().double()  # type: ignore[operator]
    values, scale = quantize_rows(linear.rotate(x))  # type: ignore[operator]
    sums = (values.double() @ weight.t()).float()
    assert torch.equal(linear.product(x), sums * linear.scales() * scale)  # type: ignore[operator]
    values, scale = quantize_rows(dy * linear.scales())  # type: ignore[operator]
    sums = (values.double() @ weight).float()
    assert torch.equal(linear.input_gradient(dy), linear.rotate(sums * scale))  # type: ignore[operator]
    exact = linear.weight + 0
    assert 1e-3 < helpers.relative_error(linear.product(x), x @ exact.t()) < 0.02
    assert 1e-3 < helpers.relative_error(linear.input_gradient(dy), dy @ exact) < 0.02


def test_gradients_far_below_one_lose_no_more_than_others() -> None:
    linear, dy = layer("int8", random_weight() * 1e-4), rows(width=OUT, seed=2)
    large, small = linear.input_gradient(dy), linear.input_gradient(dy * 1e-12) * 1e12
    assert helpers.relative_error(small, large) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_computing_some_rows_at_a_time_changes_no_bit(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    linear, x, dy = layer("int8"), rows(23).to(dtype), rows(23, width=OUT).to(dtype)
    whole = linear.product(x), linear.input_gradient(dy)
    counts: list[int] = []
    monkeypatch.setattr(int8, "integer_product", lambda x, weight: counts.append(len(x)) or integer_product(x, weight))
    monkeypatch.setattr(int8, "WORKSPACE", 10 * OUT)
    assert torch.equal(linear.product(x), whole[0])
    assert counts == [10] * 4 + [6]
    assert torch.equal(linear.input_gradient(dy), whole[1])


def test_a_weight_is_off_by_at_most_half_a_scale_of_its_row() -> None:
    weight = random_weight()
    linear = layer("int8", weight)
    assert torch.equal(linear.scales(), weight.abs().amax(1) / 127)  # type: ignore[operator]
    assert ((linear.weight - weight).abs() <= linear.scales()[:, None] * 0.5001).all()  # type: ignore[operator]


# ------------------------------------------------------------------ rotation


@pytest.mark.parametrize("size", [16, 64, 128, 256])
def test_the_rotation_is_orthonormal_and_its_own_inverse(size: int) -> None:
    matrix = hadamard_signs(size).float() * size**-0.5
    torch.testing.assert_close(matrix @ matrix.t(), torch.eye(size))
    assert torch.equal(matrix, matrix.t())
    linear = Int8Linear(3 * size, 8, rotate=True)
    x = torch.randn(4, 3 * size)
    assert linear.block == min(size * (2 if size == 1 else 1), 256)
    rotated = linear.rotate(x)
    assert helpers.relative_error(rotated, x) > 0.5
    torch.testing.assert_close(rotated.norm(dim=1), x.norm(dim=1))
    torch.testing.assert_close(linear.rotate(rotated), x)
    assert torch.equal(rotated[:, size : 2 * size], linear.rotate(x.roll(size, 1))[:, 2 * size :])  # by blocks


def test_a_block_is_the_largest_that_divides_and_too_small_ones_are_refused() -> None:
    assert [rotation_block(size) for size in (3072, 192, 48, 16)] == [256, 64, 16, 16]
    for size in (40, 8, 7):
        with pytest.raises(ValueError, match=rf"precision\.rotate=true: {size} input features.*rotate=false"):
            Int8Linear(size, 16, rotate=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weight_that_is_read_is_not_rotated(dtype: torch.dtype) -> None:
    weight, limit = random_weight(), 0.006 if dtype == torch.float32 else 0.01
    linear = layer("int8_rotated", weight)
    assert helpers.relative_error(linear.dequantize(dtype), weight) < limit
    stored = (linear.values() * linear.scales()[:, None])[:, :IN]  # type: ignore[operator]
    assert helpers.relative_error(stored, weight) > 0.5
    assert helpers.relative_error(linear.rotate(stored), weight) < limit  # type: ignore[operator]


def test_a_rotated_weight_is_only_adopted_by_a_layer_that_rotates_alike() -> None:
    plain, rotated = layer("int8"), layer("int8_rotated")
    assert rotated.storage()["weight_rotation"].item() == 64
    for taker, giver, said in (
        (plain, rotated, "blocks of 64 was given.*precision.rotate=true"),
        (rotated, plain, "blocks of 0 was given.*precision.rotate=false"),
        (rotated, layer("int8_rotated", random_weight(columns=32)), "blocks of 32"),
    ):
        before = taker.weight + 0
        with pytest.raises(ValueError, match=said):
            taker.adopt(giver.storage())
        assert torch.equal(taker.weight + 0, before)


@pytest.mark.parametrize("size", [(3072, 3072), (9216, 3072)], ids=["klein 4B attention", "klein 4B MLP"])
def test_rotation_keeps_products_and_gradients_where_some_columns_are_large(size: tuple[int, int]) -> None:
    """Every 200th column of the input, and of the weight for the gradient, is 30 times as large as the others.

    Measured as cosines, rotated and not: 0.9999 and 0.997 to 0.998 for the product; for the part of the input gradient
    outside the large columns 0.9997 and 0.986 to 0.990.
    """
    columns, count = size
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(count, columns, generator=generator) * columns**-0.5
    large = torch.zeros(columns, dtype=torch.bool)
    large[torch.randperm(columns, generator=generator)[: columns // 200]] = True
    x, dy = torch.randn(64, columns, generator=generator), torch.randn(64, count, generator=generator)
    x[:, large] *= 30
    spiked = weight * torch.where(large, 30.0, 1.0)
    found = {}
    for rotate in (True, False):
        linear = Int8Linear(columns, count, rotate=rotate)
        linear.store(weight)
        forward = cosine(linear.product(x), x @ weight.t())
        assert cosine(linear.input_gradient(dy), dy @ weight) > 0.9999
        linear.store(spiked)
        found[rotate] = forward, cosine(linear.input_gradient(dy)[:, ~large], (dy @ spiked)[:, ~large])
        assert linear.is_coarse() == (not rotate)
    assert min(found[True]) >= 0.9995
    assert 0.996 < found[False][0] < 0.999
    assert 0.98 < found[False][1] < 0.992


def test_a_layer_with_less_than_the_gates_gradient_is_named_and_no_other() -> None:
    """A gradient's cosine below 0.995, for columns that are ever larger; zeros and a missing weight are not inexact."""
    generator = torch.Generator().manual_seed(0)
    weight, dy = torch.randn(128, 512, generator=generator), torch.randn(64, 128, generator=generator)
    model = torch.nn.ModuleDict({name: torch.nn.Linear(512, 128, bias=False) for name in "abcd"})
    convert(model, Precision(storage="int8", layers=tuple("abcd")))
    found = []
    for factor in (1, 4, 8, 12, 16, 20, 30, 100):
        spiked = weight.clone()
        spiked[:, ::200] *= factor
        model["b"].store(spiked)  # type: ignore[operator]
        exact = cosine(model["b"].input_gradient(dy)[:, 1:200], (dy @ spiked)[:, 1:200])  # type: ignore[operator]
        found.append((exact, caution(model)))
    assert all(said for exact, said in found if exact < 0.995)
    assert not any(said for exact, said in found if exact > 0.998)
    assert found[-1][1].startswith("int8 is inexact for b: a few columns")
    model["b"].store(torch.cat([weight[:9], torch.zeros(119, 512)]))  # type: ignore[operator]
    model["c"].store(torch.zeros(128, 512))  # type: ignore[operator]
    assert caution(model) == caution(torch.nn.ModuleDict({"d": Int8Linear(512, 128, device="meta")})) == ""


# ------------------------------------------------------------------ models


def test_layers_whose_sides_are_multiples_of_8_multiply_in_int8() -> None:
    model = torch.nn.Module()
    model.fits, model.odd = torch.nn.Linear(24, 40, bias=False), torch.nn.Linear(20, 40, bias=False)
    weight = model.odd.weight.detach()
    convert(model, Precision(storage="int8", layers=("fits", "odd")))
    assert (model.fits.forward_8bit, model.odd.forward_8bit) == (True, False)
    x = torch.randn(3, 20)
    torch.testing.assert_close(model.odd(x), x @ model.odd.dequantize(torch.float32).t())
    assert helpers.relative_error(model.odd(x), x @ weight.t()) < 0.02
