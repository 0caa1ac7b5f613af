"""Streaming on a GPU: pinned memory, copies beside the compute, and how much memory the device needs."""

import statistics
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from flux2 import adapters
from flux2.memory.activation_checkpointing import POLICIES, set_policy
from flux2.memory.block_offload import Offloader, offload, offloaded_blocks
from flux2.models.positions import image_positions, text_positions
from flux2.models.transformer import Transformer
from flux2.models.variants import VARIANTS, TransformerConfig
from flux2.quantization.precision import convert, precision_from_name
from flux2.weights.loading import load_transformer
from flux2.weights.sources import ModelSource

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU, and PyTorch sees none"),
]

DEVICE = torch.device("cuda")
KLEIN = VARIANTS["klein_base_4b"].transformer
# 0.65 billion parameters, 1.3 GB in bfloat16: large enough for copies that take milliseconds
CONFIG = replace(KLEIN, heads=16, double_blocks=2, single_blocks=8)


def random_model(config: TransformerConfig = CONFIG, precision: str = "bf16", policy: str = "full") -> Transformer:
    torch.manual_seed(0)
    with DEVICE:
        model = Transformer(config).to(torch.bfloat16)
    convert(model, precision_from_name(precision, DEVICE), DEVICE)
    adapters.attach(model, rank=4)
    for parameter in adapters.adapter_parameters(model):
        parameter.data.normal_(std=0.02)
    set_policy(model, policy, budget_gb=0.5 if policy == "budget" else None)
    return model


def inputs(config: TransformerConfig = CONFIG, side: int = 32) -> tuple[Tensor, ...]:
    generator = torch.Generator(DEVICE).manual_seed(1)
    tokens = torch.randn(1, side * side, config.channels, device=DEVICE, generator=generator)
    text = torch.randn(1, 512, config.text_width, device=DEVICE, generator=generator)
    return (
        tokens,
        image_positions(side, side, device=DEVICE),
        text,
        text_positions(512, DEVICE),
        torch.tensor([0.5]).cuda(),
    )


def step(model: Transformer, given: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Loss and all gradients in one row."""
    with torch.autocast("cuda", torch.bfloat16):
        loss = model(*given).float().square().mean()
    loss.backward()
    row = torch.cat([p.grad.flatten() for p in adapters.adapter_parameters(model) if p.grad is not None])
    model.zero_grad()
    return loss.detach(), row


def milliseconds(run: Callable[[], Any], times: int = 7) -> float:
    """The median time of `run`, after two runs that are not counted."""
    taken = []
    for _ in range(times + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        taken.append(start.elapsed_time(end))
    return statistics.median(taken[2:])


def streaming(model: Transformer, **options: Any) -> Offloader:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # memory that could not be pinned
        offloader = offload(model, options.pop("blocks", 1.0), **options)
    assert offloader is not None
    return offloader


@pytest.mark.parametrize("activations", [False, True])
@pytest.mark.parametrize("precision", ["bf16", "fp8", "int8", "nf4"])
@pytest.mark.parametrize("policy", POLICIES)
def test_streaming_changes_no_loss_and_no_gradient_beyond_rounding(
    policy: str, precision: str, activations: bool
) -> None:
    model, given = random_model(precision=precision, policy=policy), inputs()
    loss, gradient = step(model, given)
    streaming(model, activations=activations)
    for _ in range(3):
        again, other = step(model, given)
        assert torch.equal(again, loss)
        # the attention's backward adds in no fixed order
        assert (other - gradient).norm() < 1e-2 * gradient.norm()
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            assert torch.equal(model(*given).float().square().mean(), loss)


def test_weights_and_activations_wait_in_pinned_memory() -> None:
    model = random_model()
    offloader = streaming(model, activations=True)
    step(model, inputs())
    assert all(block.host.is_pinned() for block in offloader.blocks)
    assert offloader.activation_pool is not None
    waiting = [memory for free in offloader.activation_pool.free.values() for memory in free]
    assert waiting
    assert all(memory.is_pinned() for memory in waiting)
    offloader.release(offloader.block_in_use)  # the first block: its inputs need no gradient, so no signal ends its use
    for name, parameter in model.named_parameters():
        assert parameter.is_cuda == ("lora_" in name or "_blocks." not in name), name


@pytest.mark.gpu_values
def test_copies_run_beside_the_compute() -> None:
    model, given = random_model(), inputs(side=64)
    computing = milliseconds(lambda: step(model, given))
    offloader = streaming(model)
    assert offloader.ring is not None
    hosts, slot = offloader.ring.hosts, offloader.ring.slots[0].buffer

    def copy() -> None:
        for host in hosts:
            slot[: host.nbytes].copy_(host, non_blocking=True)

    before = offloader.ring.copied
    step(model, given)
    step(model, given)
    share = (offloader.ring.copied - before) / 2 / offloader.host_bytes
    copying = share * milliseconds(copy)
    together = milliseconds(lambda: step(model, given))
    print(f"compute {computing:.1f} ms, copies {copying:.1f} ms, streaming {together:.1f} ms")
    assert together < max(computing, copying) + 0.5 * min(computing, copying)


@pytest.mark.gpu_values
def test_copies_are_on_a_stream_of_their_own() -> None:
    model, given = random_model(), inputs()
    streaming(model)
    step(model, given)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step(model, given)
        torch.cuda.synchronize()
    events = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    copies = {
        event.device_resource_id for event in events if "HtoD" in event.name and event.self_device_time_total > 100
    }
    compute = {event.device_resource_id for event in events if "gemm" in event.name.lower()}
    assert copies
    assert compute
    assert not copies & compute


@pytest.mark.parametrize("precision", ["bf16", "fp8", "int8", "nf4"])
def test_the_device_holds_what_is_resident_and_the_ring_from_loading_on(precision: str, tmp_path: Path) -> None:
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Transformer(CONFIG).state_dict().items()}
    file = tmp_path / "model.safetensors"
    save_file({name: 0.02 * torch.randn(shape).to(torch.bfloat16) for name, shape in shapes.items()}, file)
    largest = max(shape.numel() for shape in shapes.values())
    source = ModelSource(replace(VARIANTS["klein_base_4b"], transformer=CONFIG), str(file))

    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    start = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model = load_transformer(source, DEVICE, precision_from_name(precision, DEVICE), host=offloaded_blocks(CONFIG, 1.0))
    offloader = streaming(model, device=DEVICE)
    held = torch.cuda.memory_allocated() - start
    resident = sum(p.nbytes for name, p in model.named_parameters() if "_blocks." not in name)
    assert held == pytest.approx(resident + offloader.ring_bytes, rel=0.02)
    # quantizing takes the float weight and float32 copies of a part of it
    room = 4 * largest if precision == "bf16" else 12 * largest
    assert torch.cuda.max_memory_allocated() - start < resident + offloader.ring_bytes + room
    assert offloader.host_bytes > 2.9 * offloader.ring_bytes  # the two largest of ten blocks


def test_activations_on_the_host_leave_the_depth_out_of_the_peak() -> None:
    def peak(activations: bool, depth: int) -> int:
        model = random_model(replace(CONFIG, single_blocks=depth))
        if activations:
            streaming(model, blocks=0, activations=True)
        given = inputs(side=64)
        step(model, given)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(model, given)
        return torch.cuda.max_memory_allocated() - before

    boundary = (64 * 64 + 512) * CONFIG.hidden * 2
    gradients = 8 * 4 * 4 * sum(4 * CONFIG.hidden + 9 * CONFIG.hidden for _ in range(1))
    assert peak(False, 16) - peak(False, 8) > 7 * boundary
    assert peak(True, 16) - peak(True, 8) < 2 * boundary + 4 * gradients
