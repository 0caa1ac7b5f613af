"""flux2.quantization.blockwise_int8: weights in 8 bits are near the float ones, of any shape, on a CPU."""

import pytest
import torch
from torch import nn

from flux2.quantization.blockwise_int8 import BLOCK, BlockwiseInt8Linear


def stored(weight: torch.Tensor) -> BlockwiseInt8Linear:
    layer = BlockwiseInt8Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype, device="meta")
    layer.store(weight)
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (8, 64), (7, 130)])
def test_an_element_is_off_by_at_most_half_a_step_of_its_block(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    layer = stored(weight)
    difference = (layer.dequantize(torch.float32) - weight.float()).abs().reshape(-1)
    for off, block in zip(difference.split(BLOCK), weight.float().abs().reshape(-1).split(BLOCK), strict=True):
        assert off.max() <= block.max() * (0.501 / 127)
    assert layer.weight.dtype == layer.dequantize(dtype).dtype == dtype


def test_a_block_of_zeros_stays_zero() -> None:
    weight = torch.randn(4, BLOCK, generator=torch.Generator().manual_seed(1))
    weight[2] = 0
    assert stored(weight).dequantize(torch.float32)[2].abs().max() < 1e-6


def test_products_and_the_input_gradient_are_those_of_the_dequantized_weight() -> None:
    generator = torch.Generator().manual_seed(2)
    layer = stored(torch.randn(6, 10, generator=generator))
    plain = nn.Linear(10, 6, bias=False)
    plain.weight.data = layer.dequantize(torch.float32)
    x = torch.randn(2, 3, 10, generator=generator, requires_grad=True)
    y = torch.randn(2, 3, 10, generator=generator).copy_(x.detach()).requires_grad_()
    layer(x).square().sum().backward()
    plain(y).square().sum().backward()
    torch.testing.assert_close(layer(x), plain(y))
    torch.testing.assert_close(x.grad, y.grad)


def test_eight_bits_and_the_scales_are_all_that_is_kept() -> None:
    layer = stored(torch.randn(32, 64))
    assert sum(parameter.nbytes for parameter in layer.parameters()) == 32 * 64 + 4 * 32
    assert {parameter.dtype for parameter in layer.to(torch.bfloat16).parameters()} == {torch.uint8}


def test_a_weight_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(5, 4\).*BlockwiseInt8Linear"):
        BlockwiseInt8Linear(5, 4, device="meta").store(torch.zeros(5, 4))


def test_writing_the_weight_is_refused() -> None:
    layer = stored(torch.randn(4, 4))
    with pytest.raises(ValueError, match=r"\bint8\b"):
        layer.weight.zero_()
