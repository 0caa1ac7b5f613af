"""FP8, INT8 and NF4 on a GPU: its own kernels, against the same layers on the CPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from flux2 import adapters
from flux2.models.positions import image_positions, text_positions
from flux2.models.transformer import Transformer
from flux2.models.variants import KLEIN_4B
from flux2.quantization import int8
from flux2.quantization.float8 import Float8Linear, quantize_rows
from flux2.quantization.int8 import Int8Linear
from flux2.quantization.nf4 import Nf4Linear, Workspace
from flux2.quantization.precision import CAPABILITY, Precision, convert

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU, and PyTorch sees none"),
]

IN, OUT, TOKENS = 768, 1536, 300


def needs_fp8() -> None:
    if torch.cuda.get_device_capability() < CAPABILITY["fp8"]:
        pytest.skip("this GPU has no FP8 products: compute capability 8.9 is needed")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def close(ours: Tensor, reference: Tensor) -> float:
    ours, reference = ours.detach().double().cpu(), reference.detach().double().cpu()
    return float((ours - reference).norm() / reference.norm())


def rounded(x: Tensor) -> Tensor:
    values, scale = quantize_rows(x)
    return values.double() * scale.double()


@pytest.mark.gpu_values
@pytest.mark.parametrize("options", [{}, {"rowwise": True}, {"cache_transposed_weights": True}], ids=str)
def test_fp8_products_on_a_gpu_are_those_of_rows_rounded_to_e4m3(options: dict[str, Any]) -> None:
    needs_fp8()
    weight, x, dy = random(OUT, IN), random(TOKENS, IN, seed=1), random(TOKENS, OUT, seed=2)
    linear = Float8Linear(IN, OUT, dtype=torch.bfloat16, **options)
    linear.store(weight)
    stored = linear.dequantize(torch.float64)
    folded = dy * linear.scales() if linear.rowwise else dy
    values = linear.values().double() if linear.rowwise else stored
    expected = rounded(x) @ stored.t(), rounded(folded) @ values
    linear.cuda()
    again = Float8Linear(IN, OUT, device="cuda", **options)
    again.store(weight.cuda())
    assert torch.equal(again.qweight, linear.qweight)
    assert close(linear.product(x.cuda()), expected[0]) < 5e-3
    assert close(linear.input_gradient(dy.cuda()), expected[1]) < 5e-3


@pytest.mark.gpu_values
@pytest.mark.parametrize("count", [5, TOKENS])
@pytest.mark.parametrize("options", [{}, {"rotate": True}, {"cache_transposed_weights": True}], ids=str)
def test_int8_products_on_a_gpu_are_those_of_the_same_integers(options: dict[str, Any], count: int) -> None:
    weight, x, dy = random(OUT, IN), random(count, IN, seed=1), random(count, OUT, seed=2)
    linear = Int8Linear(IN, OUT, dtype=torch.bfloat16, **options)
    linear.store(weight)
    values = linear.values().double()
    tokens, scale = int8.quantize_rows(linear.rotate(x))
    product = (tokens.double() @ values.t()) * linear.scales() * scale
    tokens, scale = int8.quantize_rows((dy * linear.scales()).bfloat16())
    gradient = linear.rotate((tokens.double() @ values) * scale)
    linear.cuda()
    assert close(linear.product(x.cuda()), product) < 5e-3
    assert close(linear.input_gradient(dy.cuda()), gradient) < 5e-3


@pytest.mark.gpu_values
def test_nf4_layers_on_a_gpu_share_one_buffer_and_multiply_with_the_weight_that_is_stored() -> None:
    space = Workspace()
    layers = []
    for seed, out in enumerate((OUT, IN)):
        linear = Nf4Linear(IN, out, dtype=torch.bfloat16, device="cuda", workspace=space)
        linear.store(random(out, IN, seed=seed).cuda())
        layers.append(linear)
    x = random(TOKENS, IN, seed=3).cuda()
    results = [linear.product(x) for linear in layers]
    gradients = [linear.input_gradient(result) for linear, result in zip(layers, results, strict=True)]
    (buffer,) = space._buffers.values()
    assert (buffer.numel(), buffer.dtype) == (IN * OUT, torch.bfloat16)
    for linear, result, gradient in zip(layers, results, gradients, strict=True):
        weight = linear.dequantize(torch.float32)
        assert close(result, x.float() @ weight.t()) < 5e-3
        assert close(gradient, result.float() @ weight) < 5e-3
        moved = Nf4Linear(linear.in_features, linear.out_features, device="meta")
        moved.adopt({key: tensor.cpu() for key, tensor in linear.storage().items()})
        assert close(moved.dequantize(torch.float32), weight) < 1e-5


@pytest.mark.gpu_values
@pytest.mark.parametrize("storage", ["fp8", "int8", "nf4"])
def test_a_step_on_a_gpu_has_the_gradients_of_float32(storage: Any) -> None:
    config = replace(KLEIN_4B, heads=4, double_blocks=1, single_blocks=2, text_width=768)
    torch.manual_seed(0)
    base = Transformer(config)
    state = {name: tensor.bfloat16().float() for name, tensor in base.state_dict().items()}

    def gradients(precision: Precision) -> Tensor:
        model = Transformer(config)
        model.load_state_dict(state)
        model = model.to("cuda", precision.dtype)
        convert(model, precision, "cuda")
        adapters.attach(model, rank=8)
        with torch.autocast("cuda", torch.bfloat16, enabled=precision.dtype == torch.bfloat16):
            predicted = model(
                random(1, 256, config.channels).cuda().float(),
                image_positions(16, 16, device=torch.device("cuda")),
                random(1, 64, config.text_width, seed=1).cuda().float(),
                text_positions(64, torch.device("cuda")),
                torch.tensor([0.5], device="cuda"),
            )
        (predicted.float() - random(*predicted.shape, seed=2).cuda()).square().mean().backward()
        found = [parameter.grad for parameter in adapters.adapter_parameters(model)]
        return torch.cat([gradient.flatten().double() for gradient in found if gradient is not None])

    exact = gradients(Precision())
    ours = gradients(Precision(torch.bfloat16, storage))
    assert torch.cosine_similarity(ours, exact, dim=0) > (0.97 if storage == "nf4" else 0.995)
