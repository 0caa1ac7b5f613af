"""Triton's kernels, interpreted on CPU tensors, against PyTorch's operations; and when they are used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from helpers import relative_error
from kernel_helpers import interpreted_kernels, needs_triton
from torch import Tensor

from flux2 import adapters
from flux2.layers import fused_elementwise
from flux2.layers.fused_elementwise import ROW_BLOCK, project_heads, quantize_rows
from flux2.memory.activation_checkpointing import set_policy
from flux2.memory.kernels import use_kernels
from flux2.models.transformer import (
    ModulatedNorm,
    QKNorm,
    SwiGLU,
    Transformer,
    apply_rope,
    rotary_angles,
)
from flux2.models.variants import TransformerConfig
from flux2.quantization import float8, int8
from flux2.quantization.eight_bit import LARGEST, SMALLEST_SCALE, EightBitLinear, round_to, row_maxima
from flux2.quantization.float8 import Float8Linear
from flux2.quantization.int8 import Int8Linear

pytestmark = needs_triton
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SMALL = TransformerConfig(
    3, 1, 1, text_width=16, guidance=False, head_dim=16, mlp_ratio=1.5, rope_axes=(4, 4, 4, 4), channels=8
)


@pytest.fixture(autouse=True)
def launches() -> Iterator[Counter[str]]:
    """Kernels run in Triton's interpreter, and launches are counted."""
    with interpreted_kernels() as counts:
        yield counts


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers, with each seventh column a hundred times as large and each third row small."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    x[..., ::7] *= 100
    if len(shape) > 1:
        x[..., ::3, :] *= 1e-3
    return x.to(dtype)


def assert_within_one_rounding(ours: Tensor, theirs: Tensor) -> None:
    """Raise AssertionError unless float32 differs by 1e-6 of the tensor, and few of the others by their last bit."""
    assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
    if ours.dtype == torch.float32:
        assert relative_error(ours, theirs) < 1e-6
        return
    step = torch.finfo(ours.dtype).eps * theirs.float().abs() + torch.finfo(ours.dtype).smallest_normal
    assert ((ours.float() - theirs.float()).abs() <= step).all()
    assert (ours == theirs).float().mean() > 0.98, "what PyTorch rounds between two operations is rounded"


def assert_same_gradients(ours: list[Tensor], theirs: list[Tensor]) -> None:
    """Raise AssertionError unless gradients agree, as whole tensors: sums of rounded numbers may cancel."""
    for our, their in zip(ours, theirs, strict=True):
        assert (our.dtype, our.shape) == (their.dtype, their.shape)
        assert relative_error(our, their) < {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[our.dtype]


# ------------------------------------------------------------------ (1 + scale) * norm(x) + shift


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [16, 44])
def test_modulated_norm_and_its_gradient(dtype: torch.dtype, width: int, launches: Counter[str]) -> None:
    norm = ModulatedNorm(width, 1e-2)  # an eps that counts in the small rows
    whole = random(2, 6, width, dtype=dtype).requires_grad_()
    x = whole[:, 1:5]  # tokens of an image are not adjacent to those of the next
    shift, scale, _ = random(2, 1, 3 * width, seed=1, dtype=dtype).chunk(3, dim=-1)
    dy = random(2, width, 4, seed=2, dtype=dtype).transpose(1, 2)
    expected = norm(x, shift, scale)
    # float64 for the gradient: PyTorch's CPU kernel rounds the statistics of a row in 16 bits, its GPU kernel does not
    exact = [tensor.detach().double() for tensor in (x, shift, scale)]
    exact[0].requires_grad_()
    (gradient,) = torch.autograd.grad(norm(*exact), exact[0], dy.double())
    norm.kernels = True
    y = norm(x, shift, scale)
    assert_within_one_rounding(y, expected)
    (ours,) = torch.autograd.grad(y, whole, dy)
    assert_same_gradients([ours[:, 1:5]], [gradient.to(dtype)])
    assert not ours[:, [0, 5]].any()
    assert launches == {"modulated_norm": 1, "modulated_norm_gradient": 1}


def test_one_modulation_serves_all_images() -> None:
    norm, x = ModulatedNorm(16, 1e-6), random(3, 2, 16)
    shift, scale = random(2, 1, 1, 16, seed=1)
    expected = norm(x, shift, scale)
    norm.kernels = True
    assert_within_one_rounding(norm(x, shift, scale), expected)


def test_under_autocast_the_norm_is_not_rounded_before_it_is_modulated() -> None:
    """As on a GPU, where autocast computes layer norms in float32; PyTorch's CPU kernel computes them in bfloat16."""
    norm, x = ModulatedNorm(40, 1e-6), random(1, 5, 40, dtype=torch.bfloat16).requires_grad_()
    shift, scale = random(2, 1, 1, 40, seed=1, dtype=torch.bfloat16)
    expected = norm(x.float(), shift, scale)
    (gradient,) = torch.autograd.grad(expected, x, torch.ones_like(expected))
    norm.kernels = True
    with torch.autocast("cpu", torch.bfloat16):
        y = norm(x, shift, scale)
    assert_within_one_rounding(y, expected.bfloat16())
    assert_same_gradients([*torch.autograd.grad(y, x, torch.ones_like(y))], [gradient])


# ------------------------------------------------------------------ SwiGLU


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [8, 1030])  # less and more than one program computes
def test_swiglu_and_its_gradient(dtype: torch.dtype, width: int, launches: Counter[str]) -> None:
    act = SwiGLU()
    whole = torch.randn(1, 3, 2 * width + 5, generator=torch.Generator().manual_seed(0)).mul(8).to(dtype)
    x = whole.requires_grad_()[..., 5:]
    dy = random(1, 3, width, seed=2, dtype=dtype)
    expected = act(x)
    theirs = torch.autograd.grad(expected, whole, dy)
    act.kernels = True
    y = act(x)
    assert_within_one_rounding(y, expected)
    assert_same_gradients([*torch.autograd.grad(y, whole, dy)], [*theirs])
    assert launches == {"swiglu": 1, "swiglu_gradient": 1}


def test_swiglu_keeps_its_input_alone() -> None:
    act, x = SwiGLU(), random(2, 16).requires_grad_()
    act.kernels = True
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        act(x)
    assert [tensor.data_ptr() for tensor in kept] == [x.data_ptr()]


# ------------------------------------------------------------------ heads


def make_norm(head_dim: int, seed: int, dtype: torch.dtype) -> QKNorm:
    norm = QKNorm(head_dim, 1e-3).requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for part in (norm.query_norm, norm.key_norm):
        part.scale.copy_(torch.randn(head_dim, generator=generator))
    return norm.to(dtype)


def angles(tokens: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    positions = torch.arange(4 * tokens).view(tokens, 4) * 7
    return rotary_angles(positions, (head_dim // 4,) * 4, 50)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "head_dim"), [(3, 16), (9, 8), (2, 128)])
def test_heads_of_two_streams_and_their_gradients(dtype: torch.dtype, heads: int, head_dim: int) -> None:
    streams = [random(2, tokens, 3 * heads * head_dim, seed=tokens, dtype=dtype) for tokens in (2, 3)]
    streams = [stream.requires_grad_() for stream in streams]
    norms = [make_norm(head_dim, seed, dtype) for seed in (5, 6)]
    rope = angles(5, head_dim)
    # gradients in a layout in which attention may return them, and in another one
    gradients = [random(2, 5, heads, head_dim, seed=seed, dtype=dtype).transpose(1, 2) for seed in (7, 8)]
    gradients.append(random(2, heads, head_dim, 5, seed=9, dtype=dtype).transpose(2, 3))
    q, k, v = (torch.cat(p, dim=2) for p in zip(*map(QKNorm.__call__, norms, streams), strict=True))
    expected = apply_rope(q, rope), apply_rope(k, rope), v
    theirs = torch.autograd.grad(expected, streams, gradients)
    fused = [(stream, *norm.weights) for stream, norm in zip(streams, norms, strict=True)]
    results = project_heads(norms[0].eps, *rope[:2], fused)
    for one, other in zip(results, expected, strict=True):
        assert_within_one_rounding(one, other)
    assert_same_gradients([*torch.autograd.grad(results, streams, gradients)], [*theirs])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_projection_of_heads_and_mlp_has_one_gradient(dtype: torch.dtype, launches: Counter[str]) -> None:
    norm, act, sizes = make_norm(SMALL.head_dim, 5, dtype), SwiGLU(), [3 * SMALL.hidden, 2 * SMALL.mlp_width]
    projected = random(2, 3, sum(sizes), seed=1, dtype=dtype).requires_grad_()
    rope = angles(3, SMALL.head_dim)
    qkv, h = projected.split(sizes, dim=-1)
    q, k, v = norm(qkv)
    expected = apply_rope(q, rope), apply_rope(k, rope), v, act(h)
    gradients = [random(*part.shape, seed=seed, dtype=dtype) for seed, part in enumerate(expected)]
    theirs = torch.autograd.grad(expected, projected, gradients)
    results = project_heads(norm.eps, *rope[:2], [(projected, *norm.weights)], mlp=sizes[1])
    for one, other in zip(results, expected, strict=True):
        assert_within_one_rounding(one, other)
    assert results[2].untyped_storage().data_ptr() == projected.untyped_storage().data_ptr(), "v is not copied"
    assert_same_gradients([*torch.autograd.grad(results, projected, gradients)], [*theirs])
    assert launches == {"heads": 1, "swiglu": 1, "heads_gradient": 1, "swiglu_gradient": 1}


# ------------------------------------------------------------------ rows in 8 bits


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("has_before", [False, True])
@pytest.mark.parametrize("width", [24, ROW_BLOCK + 100])
def test_rows_in_e4m3_are_those_of_the_quantizer(dtype: torch.dtype, has_before: bool, width: int) -> None:
    x = random(5, width, dtype=dtype)
    x[1] = 0
    before = random(width, seed=1).abs() if has_before else None
    scaled = x if before is None else x * before
    values, scales = quantize_rows(x, before, torch.float8_e4m3fn, SMALLEST_SCALE)
    # a GPU divides by a number by multiplying with its inverse
    inverse = torch.ones(()) / LARGEST[torch.float8_e4m3fn]
    assert torch.equal(scales, (row_maxima(scaled) * inverse).clamp(min=SMALLEST_SCALE))
    assert torch.equal(values.float(), round_to(scaled / scales, torch.float8_e4m3fn).float())
    assert relative_error(scales, float8.quantize_rows(scaled)[1]) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("has_before", [False, True])
@pytest.mark.parametrize("width", [24, ROW_BLOCK + 100])
def test_rows_in_int8_are_those_of_the_quantizer(dtype: torch.dtype, has_before: bool, width: int) -> None:
    x = random(5, width, dtype=dtype)
    x[1] = 0
    before = random(width, seed=1).abs() if has_before else None
    scaled = x if before is None else torch.mul(x, before, out=torch.empty_like(x))
    values, scales = quantize_rows(x, before, torch.int8, SMALLEST_SCALE)
    inverse = torch.ones(()) / LARGEST[torch.int8]
    assert torch.equal(scales, (row_maxima(scaled) * inverse).clamp(min=SMALLEST_SCALE))
    expected, theirs = int8.quantize_rows(scaled)
    same = scales == theirs  # elsewhere the last bit of a scale may move a number across the middle of two integers
    assert torch.equal(values[same[:, 0]], expected[same[:, 0]])
    assert (values.int() - expected).abs().max() <= 1
    assert same.sum() >= 3


@pytest.mark.parametrize("kind", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_a_row_that_is_not_finite_stays_so(kind: torch.dtype) -> None:
    x = random(3, 40, dtype=torch.bfloat16)
    x[0, 3], x[1, 39] = float("nan"), float("-inf")
    _, scales = quantize_rows(x, None, kind, SMALLEST_SCALE)
    assert scales[0].isnan()
    assert scales[1].isinf()
    assert scales[2].isfinite()


@pytest.mark.parametrize("kind", ["fp8", "fp8 by row", "int8", "int8 rotated"])
def test_products_of_layers_are_those_of_pytorch(kind: str, launches: Counter[str]) -> None:
    linear: EightBitLinear
    if kind.startswith("fp8"):
        linear = Float8Linear(64, 48, rowwise="row" in kind)
    else:
        linear = Int8Linear(64, 48, rotate="rotated" in kind)
    linear.store(random(48, 64))
    x, dy = random(2, 9, 64, seed=1), random(2, 9, 48, seed=2)
    expected = linear.product(x), linear.input_gradient(dy)
    linear.kernels = True
    for one, other in zip((linear.product(x), linear.input_gradient(dy)), expected, strict=True):
        assert relative_error(one, other) < 2e-3  # the last bit of scales moves numbers at the middle of two values
    assert launches == {"quantized_rows": 2}


# ------------------------------------------------------------------ shapes


def test_empty_tensors_have_empty_results() -> None:
    norm, act, empty = ModulatedNorm(16, 1e-6), SwiGLU(), torch.zeros(2, 0, 16, requires_grad=True)
    norm.kernels = act.kernels = True
    shift, scale = torch.zeros(2, 2, 1, 16)
    for y in (norm(empty, shift, scale), act(empty)):
        (gradient,) = torch.autograd.grad(y.sum(), empty)
        assert gradient.shape == empty.shape
    values, scales = quantize_rows(torch.zeros(0, 16), None, torch.int8, SMALLEST_SCALE)
    assert (values.shape, scales.shape) == ((0, 16), (0, 1))


def test_rows_may_be_further_apart_than_32_bits_count() -> None:
    """The pages between the rows are never touched, so they take no memory."""
    stride = 1_500_000_000
    whole = torch.empty(2 * stride + 16, dtype=torch.bfloat16)
    x = whole.as_strided((3, 16), (stride, 1))
    x.copy_(random(3, 16, dtype=torch.bfloat16))
    expected, y = fused_elementwise.swiglu(x.contiguous()), fused_elementwise.swiglu(x)
    assert torch.equal(y, expected)
    values, _ = quantize_rows(x, None, torch.int8, SMALLEST_SCALE)
    assert torch.equal(values, quantize_rows(x.contiguous(), None, torch.int8, SMALLEST_SCALE)[0])
    shift, scale = torch.zeros(2, 1, 1, 16, dtype=torch.bfloat16)
    images = x[:, None]
    assert torch.equal(
        fused_elementwise.modulated_norm(images, shift, scale, 1e-6),
        fused_elementwise.modulated_norm(images.contiguous(), shift, scale, 1e-6),
    )


# ------------------------------------------------------------------ whole steps


def make_model() -> Transformer:
    torch.manual_seed(0)
    model = Transformer(SMALL)
    adapters.attach(model, rank=2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def step(model: Transformer) -> list[Tensor]:
    """The prediction, and the gradients of the adapter."""
    generator = torch.Generator().manual_seed(1)
    tokens, text = torch.randn(1, 3, 8, generator=generator), torch.randn(1, 2, 16, generator=generator)
    positions = torch.arange(20).view(5, 4)
    prediction = model(tokens, positions[2:], text, positions[:2], torch.tensor([0.5]))
    model.zero_grad()
    prediction.square().sum().backward()
    gradients = [parameter.grad for parameter in adapters.adapter_parameters(model) if parameter.grad is not None]
    assert len(gradients) == len(adapters.adapter_parameters(model))
    return [prediction.detach(), *gradients]


def test_steps_of_every_policy_are_those_of_pytorch(launches: Counter[str]) -> None:
    model = make_model()
    expected = step(model)
    assert not launches
    use_kernels(model, True)
    results = []
    for policy in ("none", "full", "selective"):
        set_policy(model, policy)
        results.append(step(model))
        for one, other in zip(results[-1], expected, strict=True):
            assert relative_error(one, other) < 1e-5
    assert all(torch.equal(one, other) for result in results[1:] for one, other in zip(result, results[0], strict=True))
    # the heads of three streams, three swiglu, and six norms of which the last is not recomputed
    assert launches["heads"] == 3 * (1 + 2 + 2)
    assert launches["heads_gradient"] == 3 * 3
    assert launches["swiglu"] == 3 * (1 + 2 + 2)
    assert launches["modulated_norm"] == 5 * (1 + 2 + 2) + 3


def test_what_is_trained_in_the_way_of_a_kernel_has_its_gradient(launches: Counter[str]) -> None:
    model = make_model()
    block = model.single_blocks[0]
    block.norm.query_norm.scale.requires_grad_()
    model.double_stream_modulation_img.lin.weight.requires_grad_()
    expected = step(model)
    trained = block.norm.query_norm.scale, model.double_stream_modulation_img.lin.weight
    theirs = [parameter.grad.clone() for parameter in trained if parameter.grad is not None]
    use_kernels(model, True)
    for one, other in zip(step(model), expected, strict=True):
        assert relative_error(one, other) < 1e-5
    ours = [parameter.grad for parameter in trained if parameter.grad is not None]
    assert len(ours) == len(theirs) == 2
    assert max(map(relative_error, ours, theirs)) < 1e-5
    assert launches["heads"] == 2, "those of the double block"
    assert launches["modulated_norm"] == 4, "those of text, the single block and the last layer"


def test_compiled_blocks_use_no_kernel(launches: Counter[str]) -> None:
    model = make_model()
    expected = step(model)
    use_kernels(model, True)
    model.final_layer.norm.kernels = False  # the last layer is not compiled
    set_policy(model, "none", compile=True, compiler="eager")
    for one, other in zip(step(model), expected, strict=True):
        assert relative_error(one, other) < 1e-5
    assert not launches
