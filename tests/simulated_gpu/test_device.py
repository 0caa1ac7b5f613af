"""The simulated device: what tests rely on, and that a fault of the kinds it is there for makes a check here fail."""

from __future__ import annotations

import pytest
import torch
from simulated_gpu.simulated import device, refusing_after, run

from flux2.quantization.float8 import fp8_product, quantize_rows
from flux2.quantization.int8 import integer_product

CUDA = torch.device("cuda")


def test_memory_is_counted_and_refused_as_on_a_gpu() -> None:
    torch.cuda.empty_cache()
    before, taken = torch.cuda.memory_allocated(), device().simulated_gpu_used(0)
    tensor = torch.empty(3 << 30, dtype=torch.uint8, device=CUDA)
    assert torch.cuda.memory_allocated() - before == 3 << 30
    assert 0 <= device().simulated_gpu_used(0) - taken - (3 << 30) < 20 << 20  # in whole pages
    del tensor
    torch.cuda.empty_cache()
    assert device().simulated_gpu_used(0) == taken
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(torch.cuda.get_device_properties(0).total_memory, dtype=torch.uint8, device=CUDA)
    with refusing_after(0), pytest.raises(torch.OutOfMemoryError):
        torch.empty(64 << 20, dtype=torch.uint8, device=CUDA)


def test_tensors_of_two_devices_do_not_mix() -> None:
    with pytest.raises(RuntimeError, match="same device"):
        torch.ones(4, 4, device=CUDA) @ torch.ones(4, 4)


def test_products_check_scales_and_layouts_as_on_a_gpu() -> None:
    x = torch.ones(32, 64, device=CUDA, dtype=torch.bfloat16)
    weight = torch.empty(48, 64, device=CUDA, dtype=torch.float8_e4m3fn).t()
    one = torch.ones(1, device=CUDA)
    assert fp8_product(x, weight, one, torch.bfloat16).shape == (32, 48)
    with pytest.raises(RuntimeError, match="column-major"):  # a CPU would take it
        fp8_product(x, weight.contiguous(), one, torch.bfloat16)
    values, scales = quantize_rows(x)
    with pytest.raises((RuntimeError, ValueError), match="scal"):
        torch._scaled_mm(values, weight, scales[:16], one.expand(1, 48).contiguous(), out_dtype=torch.bfloat16)


def test_integer_products_check_sizes_as_on_a_gpu() -> None:
    weight = torch.empty(48, 64, device=CUDA, dtype=torch.int8).t()
    for count in (1, 16, 17, 40):  # up to 16 rows are padded
        assert integer_product(torch.empty(count, 64, device=CUDA, dtype=torch.int8), weight).shape == (count, 48)
    with pytest.raises(RuntimeError, match="greater than 16"):
        torch._int_mm(torch.empty(16, 64, device=CUDA, dtype=torch.int8), weight)
    with pytest.raises(RuntimeError, match="multiple of 8"):
        integer_product(torch.empty(40, 60, device=CUDA, dtype=torch.int8), weight[:60])


@pytest.mark.parametrize("capability", [75, 80, 86, 89, 90, 100, 120])
def test_a_device_is_what_the_environment_says(capability: int) -> None:
    said = run("-m", "flux2.doctor", capability=capability, gb=12, count=2, name="Card")
    assert said.count(f"Card, compute capability {capability // 10}.{capability % 10}") == 2
    assert ("no FP8 products" in said) == (capability < 89)
    assert "no INT8 products" not in said
