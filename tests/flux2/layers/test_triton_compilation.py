"""Triton's kernels, compiled ahead for GPUs of compute capability 8.0, 9.0 and 12.0, without one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_helpers import Launch, needs_triton, record_launches

from flux2.layers.fused_elementwise import quantize_rows
from flux2.memory.kernels import use_kernels
from flux2.models.transformer import DoubleBlock, SingleBlock
from flux2.models.variants import DEV
from flux2.quantization.eight_bit import SMALLEST_SCALE

pytestmark = needs_triton
KERNELS = "heads heads_gradient modulated_norm modulated_norm_gradient quantized_rows swiglu swiglu_gradient".split()
POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int8: "*i8",
    torch.float8_e4m3fn: "*fp8e4nv",
}


def launches_of_a_step(has_fp8: bool, patch: pytest.MonkeyPatch) -> list[Launch]:
    """The different launches of a step of blocks with dev's widths in bfloat16, and of the quantizers."""
    launches = record_launches(patch)
    with torch.device("meta"):
        double, single = (kind(DEV).bfloat16().requires_grad_(False) for kind in (DoubleBlock, SingleBlock))
        x, text = torch.zeros(2, 1, 4, DEV.hidden, dtype=torch.bfloat16).unbind()
        modulation = tuple(torch.zeros(3, 1, 1, DEV.hidden, dtype=torch.bfloat16).unbind())
        angles = tuple(torch.zeros(3, 1, 1, 8, DEV.head_dim // 2).unbind())
        rows, before = torch.zeros(4, 55296, dtype=torch.bfloat16), torch.zeros(55296)
    for block in (double, single):
        use_kernels(block, True)
    for dtype in (torch.bfloat16, None):  # with and without autocast, whose state the meta device does not have
        patch.setattr(torch, "is_autocast_enabled", lambda kind, on=dtype: on is not None)
        patch.setattr(torch, "get_autocast_dtype", lambda kind: torch.bfloat16)
        image, words = double(x.requires_grad_(), text, [modulation] * 2, [modulation] * 2, angles)
        out = single(torch.cat([words, image], dim=1), modulation, angles)
        out.backward(torch.zeros_like(out))
    for kind in (torch.int8, torch.float8_e4m3fn)[: 1 + has_fp8]:
        for factors in (None, before):
            quantize_rows(rows, factors, kind, SMALLEST_SCALE)
    return list({describe(launch): launch for launch in launches}.values())


def describe(launch: Launch) -> str:
    types = [POINTERS[one.dtype] if isinstance(one, torch.Tensor) else type(one).__name__ for one in launch.arguments]
    return f"{launch.name} {types} {launch.options}"


def compile_ahead(launch: Launch, capability: int) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from flux2.layers import triton_kernels

    kernel = getattr(triton_kernels, launch.name)
    constants = {name: value for name, value in launch.options.items() if name != "num_warps"}
    numbers = {int: "i64", float: "fp32"}
    types = [POINTERS[a.dtype] if isinstance(a, torch.Tensor) else numbers[type(a)] for a in launch.arguments]
    signature = dict(zip(kernel.arg_names, [*types, *("constexpr" for _ in constants)], strict=True))
    options = {"num_warps": launch.options.get("num_warps", 4)}
    return triton.compile(ASTSource(kernel, signature, constants), GPUTarget("cuda", capability, 32), options)


@pytest.mark.parametrize(
    "capability", [pytest.param(80, marks=pytest.mark.slow), 90, pytest.param(120, marks=pytest.mark.slow)]
)
def test_every_kernel_compiles(capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    launches = launches_of_a_step(capability >= 89, monkeypatch)  # below 8.9 there is no FP8, and it is not used
    assert sorted({launch.name for launch in launches}) == KERNELS
    for launch in launches:
        compiled = compile_ahead(launch, capability)
        assert compiled.asm["cubin"], launch.name
        conversions = set(re.findall(r"cvt\.rn\.satfinite\.\w+", compiled.asm["ptx"]))
        # the GPU rounds to e4m3 as PyTorch does, to the nearest even
        is_fp8 = any(isinstance(a, torch.Tensor) and a.dtype == torch.float8_e4m3fn for a in launch.arguments)
        assert conversions == ({"cvt.rn.satfinite.e4m3x2"} if is_fp8 else set())


def test_the_kernels_of_the_list_are_all_that_are_launched() -> None:
    text = Path(__file__).parents[3].joinpath("flux2/layers/fused_elementwise.py").read_text()
    assert sorted(set(re.findall(r'launch\("(\w+)"', text))) == KERNELS
