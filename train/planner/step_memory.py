"""Count the memory and the operations of a training step from shapes, without weights, GPU or network.

Blocks run forward and backward on PyTorch's fake tensors, which have a shape and no memory, and every tensor (weights,
activations, gradients) is counted from its creation until it is freed. The counts therefore follow the real code:
adapter layers, checkpointing policy, precision. Where GPU kernels keep other tensors than CPU kernels (attention,
norms, autocast dtypes), `gpu_kernels` substitutes the GPU's behavior. A model is the sum of its blocks (`step`); the
tests compare this with whole models and with PyTorch's profiler.

The CUDA context and fragmentation are not counted; train/planner/gpus.py has the assumptions about them.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from flux2.adapters import adapter_parameters
from flux2.layers import fused_elementwise
from flux2.layers.isolated_references import isolation
from flux2.memory.activation_checkpointing import tensors_in
from flux2.models.autoencoder import Autoencoder
from flux2.models.transformer import DoubleBlock, RotaryAngles, Transformer
from flux2.models.variants import AutoencoderConfig
from flux2.quantization.nf4 import Nf4Linear

GRANULE = 512  # bytes; the CUDA allocator rounds sizes up to multiples of it
FLASH = torch.ops.aten._scaled_dot_product_flash_attention
FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_backward
KINDS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "bf16"}
KINDS |= {torch.float8_e4m3fn: "fp8", torch.int8: "int8"}
# the functions that count operations; PyTorch has none for products of integers
PRODUCTS = flop_registry | {torch.ops.aten._int_mm: flop_registry[torch.ops.aten.mm]}


@dataclass
class Work:
    """Floating-point operations by kind, and the bytes that all other operations read and write."""

    flops: dict[str, float] = field(default_factory=dict)
    bytes: float = 0.0

    def __add__(self, other: Work) -> Work:
        kinds = dict.fromkeys([*self.flops, *other.flops])
        flops = {kind: self.flops.get(kind, 0.0) + other.flops.get(kind, 0.0) for kind in kinds}
        return Work(flops, self.bytes + other.bytes)

    def __mul__(self, times: float) -> Work:
        return Work({kind: value * times for kind, value in self.flops.items()}, self.bytes * times)


def size(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of tensors."""
    return sum(tensor.nbytes for tensor in tensors)


class AllocationCounter(TorchDispatchMode):
    """Context manager that counts the bytes of new tensors while they live, and the work of all operations.

    `live` are the current bytes, `peak` is their maximum since the last `start`. `known` tensors, such as weights, are
    counted elsewhere.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.live = self.peak = 0
        self.work = Work()
        for tensor in known:
            self.hold(tensor, 0)

    def start(self) -> int:
        """Reset peak and work; return the live bytes."""
        self.peak, self.work = self.live, Work()
        return self.live

    def hold(self, tensor: Tensor, size: int | None = None) -> bool:
        """Count a tensor's storage until it is freed. Return False if it is already counted."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.sizes:
            return False
        self.sizes[key] = -(-storage.nbytes() // GRANULE) * GRANULE if size is None else size
        self.live += self.sizes[key]
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self.free, key)
        return True

    def free(self, key: int) -> None:
        self.live -= self.sizes.pop(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        outputs = tensors_in(out)
        is_new = [self.hold(tensor) for tensor in outputs]
        packet = func._overloadpacket
        if packet in PRODUCTS:
            self.multiply(packet, args, kwargs or {}, out)
        elif (any(is_new) or func._schema.is_mutable) and "empty" not in packet.__name__:
            given = {key: value for key, value in (kwargs or {}).items() if key != "out"}
            read = [] if packet.__name__ == "fill_" else tensors_in((args, given))
            self.work.bytes += size([*read, *outputs])
        return out

    def multiply(self, packet: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Count the operations of a matrix product, a convolution or attention."""
        first = args[0]
        attention = {FLASH: "attention", FLASH_BACKWARD: "attention_backward"}
        kind = attention.get(packet) or KINDS.get(first.dtype, "bf16")
        flops = PRODUCTS[packet](*args, **kwargs, out_val=out)
        self.work.flops[kind] = self.work.flops.get(kind, 0.0) + flops
        if packet is FLASH_BACKWARD and first.dtype != torch.float32:
            # the kernels accumulate the gradient of the queries in a float32 buffer
            self.peak = max(self.peak, self.live + 4 * first.numel())


@torch.library.custom_op("flux2::traffic", mutates_args=(), schema="(Tensor[] tensors) -> Tensor")
def traffic(tensors: Sequence[Tensor]) -> Tensor:
    """Stand for a Triton kernel: read and write these tensors, and return an empty one."""
    return tensors[0].new_empty(0)


traffic.register_fake(lambda tensors: tensors[0].new_empty(0))


class Rms(torch.autograd.Function):
    """`F.rms_norm` with the memory of the fused GPU kernel, which saves its input and one number per row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, x.new_empty(x.shape[:-1]))
        return torch.relu(x)  # any operation that reads one tensor and writes one

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        x, _ = ctx.saved_tensors
        return x * dy, None


@contextmanager
def gpu_kernels(float32_attention: bool = False) -> Iterator[None]:
    """Context manager that substitutes GPU behavior for operations whose CPU kernels keep other tensors.

    Attention is flash attention, or the efficient one in float32, which keeps as many tensors. A norm is one kernel,
    layer norm returns float32 under autocast, NF4 layers share one buffer, and modules that use Triton kernels
    (flux2/memory/kernels.py) read and write what those do. The functions are patched, because a dispatch mode would not
    reach the recompute in the backward.
    """
    layer_norm = F.layer_norm

    def attention(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: Any) -> Tensor:
        if float32_attention:
            with torch.autocast("cpu", enabled=False):
                return FLASH(q.float(), k.float(), v.float(), 0.0, False, False)[0].to(q.dtype)
        if torch.is_autocast_enabled("cpu"):
            q, k, v = (tensor.to(torch.get_autocast_dtype("cpu")) for tensor in (q, k, v))
        return FLASH(q, k, v, 0.0, False, False)[0]

    def float_norm(x: Tensor, *rest: Any, **options: Any) -> Tensor:
        return layer_norm(x.float() if torch.is_autocast_enabled("cpu") else x, *rest, **options)

    def rms_norm(x: Tensor, shape: Any, weight: Tensor, eps: float) -> Tensor:
        return Rms.apply(x, weight)

    def dequantize(layer: Nf4Linear, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        shape = (layer.out_features, layer.in_features)
        weight = torch.empty(shape, dtype=dtype) if out is None else out.view(shape)
        scales = layer.absmax.float()
        return weight.fill_(scales.numel())

    def launch(name: str, grid: Any, *args: Any, **options: Any) -> None:
        traffic(tensors_in(args))

    with ExitStack() as stack:
        for owner, name, value in (
            (F, "scaled_dot_product_attention", attention),
            (F, "layer_norm", float_norm),
            (F, "rms_norm", rms_norm),
            (fused_elementwise, "launch", launch),
            (fused_elementwise, "runs_on_gpu", lambda x: True),
            (Nf4Linear, "out_devices", ("cpu", "cuda")),
            (Nf4Linear, "dequantize", dequantize),
        ):
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)
        yield


def fake(module: nn.Module) -> None:
    """Replace the parameters and buffers of a module on the meta device by fake tensors; needs FakeTensorMode."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                part._parameters[name] = nn.Parameter(empty, parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


@dataclass(frozen=True)
class Cost:
    """Bytes and work of one block.

    The peak of the backward includes recompute and token gradients, but not the block's output, which is freed then.
    """

    kept: int  # bytes that its forward keeps for the backward, including its output
    forward: int  # peak of its forward above the bytes before it
    backward: int  # peak of its backward above the kept bytes
    work: Work


@dataclass(frozen=True)
class Shape:
    """The input of the transformer: `rows` images with `image` tokens, including references, and `text` tokens each."""

    rows: int
    image: int
    text: int
    predicted: int  # image tokens that are no reference tokens, and get a prediction
    float32_attention: bool = False  # as on GPUs below compute capability 8.0 (flux2/layers/attention.py)

    @property
    def tokens(self) -> int:
        return self.image + self.text


def arguments(model: Transformer, block: nn.Module, shape: Shape, dtype: torch.dtype) -> tuple[list[Tensor], list[Any]]:
    """Return the tokens that a block transforms, and its other arguments."""
    config = model.config
    each = (1, 1, shape.tokens, config.head_dim // 2)
    angles: RotaryAngles = (torch.empty(each), torch.empty(each), torch.empty(each, dtype=torch.complex64))
    references = shape.image - shape.predicted if config.isolated_references else 0
    of_image, rest = 2 if references else 1, [angles, *isolation(references, None)]

    def modulation(parts: int) -> tuple[Tensor, ...]:
        return tuple(torch.empty(shape.rows, parts, config.hidden, dtype=dtype) for _ in range(3))

    def tokens(count: int) -> Tensor:
        return torch.empty(shape.rows, count, config.hidden, dtype=dtype, requires_grad=True)

    if isinstance(block, DoubleBlock):
        streams = [[modulation(parts), modulation(parts)] for parts in (of_image, 1)]
        return [tokens(shape.image), tokens(shape.text)], [*streams, *rest]
    return [tokens(shape.tokens)], [modulation(of_image), *rest]


def fake_block(
    model: Transformer, block: nn.Module, shape: Shape, dtype: torch.dtype
) -> tuple[nn.Module, Any, AllocationCounter]:
    """Return a fake copy of a block, its arguments, and a counter that excludes them; needs FakeTensorMode."""
    with unset_fake_temporarily():  # buffers cannot be copied in FakeTensorMode
        block = copy.deepcopy(block).train()
    fake(block)
    for parameter in adapter_parameters(block):
        parameter.grad = torch.empty_like(parameter)  # exists already and is counted with the optimizer
    given = arguments(model, block, shape, dtype)
    grads = [parameter.grad for parameter in block.parameters() if parameter.grad is not None]
    return block, given, AllocationCounter([*block.parameters(), *block.buffers(), *grads, *tensors_in(given)])


def train_block(
    model: Transformer, block: nn.Module, run: Callable[..., Any], shape: Shape, dtype: torch.dtype, autocast: bool
) -> Cost:
    """Return the cost of training a block of `model` (on the meta device) with `run`, a `Transformer.run_block`."""
    with gpu_kernels(shape.float32_attention), FakeTensorMode(allow_non_fake_inputs=True):
        block, (tokens, rest), count = fake_block(model, block, shape, dtype)
        lives = [0]
        with count:
            out: Any = tuple(tokens)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                for _ in range(2):  # the second one adds what any further block adds
                    count.start()
                    out = run(block, *out, *rest)
                    out = out if isinstance(out, tuple) else (out,)
                    lives.append(count.live)
            forward, work = count.peak - lives[1], count.work
            gradients = tuple(torch.empty_like(part) for part in out)
            kept = count.start() - size(gradients)
            torch.autograd.backward(out, gradients)
            # a model frees a block's output after the backward of the next block
            backward = count.peak - kept - size(gradients)
            return Cost(lives[2] - lives[1], forward, backward, work + count.work * 0.5)


def infer_block(model: Transformer, block: nn.Module, shape: Shape, dtype: torch.dtype, autocast: bool) -> Cost:
    """Return the cost of a block without gradients, as in sampling and validation."""
    kernels = gpu_kernels(shape.float32_attention)
    with kernels, FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        block, (tokens, rest), count = fake_block(model, block, shape, dtype)
        with count, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = block(*tokens, *rest)
            del out
        return Cost(0, count.peak, 0, count.work)


def train_end(model: Transformer, shape: Shape, dtype: torch.dtype, autocast: bool) -> Cost:
    """Return the cost of the final layer and the loss."""
    with gpu_kernels(), FakeTensorMode(allow_non_fake_inputs=True):
        config = model.config
        layer = copy.deepcopy(model.final_layer)
        fake(layer)
        x = torch.empty(shape.rows, shape.predicted, config.hidden, dtype=dtype, requires_grad=True)
        time = torch.empty(shape.rows, config.hidden, dtype=dtype)
        target = torch.empty(shape.rows, shape.predicted, config.channels)
        count = AllocationCounter([*layer.parameters(), x, time, target])
        with count:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = F.mse_loss(layer(x, time).float(), target)
            loss.backward()
        return Cost(0, 0, count.peak, count.work)


def compiled_copy(model: Transformer, shape: Shape, dtype: torch.dtype) -> int:
    """Return the bytes that compiled blocks in INT8 take more than uncompiled ones: those of the widest output.

    Compilers keep it next to its integer sums; simulated (benchmarks/results/compilation_simulated.json).
    """
    widest = max(layer.out_features for layer in model.modules() if isinstance(layer, nn.Linear))
    return shape.rows * shape.tokens * widest * dtype.itemsize


def heaviest(blocks: Iterable[nn.Module]) -> nn.Module | None:
    """Return the block with the most trained parameters; blocks of a kind differ only in their adapter layers."""
    return max(blocks, key=lambda block: sum(p.numel() for p in adapter_parameters(block)), default=None)


def step(costs: Sequence[Cost], end: Cost) -> tuple[int, int]:
    """Return (kept bytes, working set) at the peak of one forward and backward through blocks in order."""
    kept = [0, *accumulate(cost.kept for cost in costs)]
    peaks = [(before, cost.forward) for before, cost in zip(kept[:-1], costs, strict=True)]
    peaks.append((kept[-1], end.backward))
    peaks += reversed([(after, cost.backward) for after, cost in zip(kept[1:], costs, strict=True)])
    return max(peaks, key=sum)


def autoencoder_peaks(config: AutoencoderConfig, width: int, height: int) -> tuple[int, int, int]:
    """Return the float32 autoencoder's bytes, and its peaks above them to encode and decode an image (in pixels)."""
    with torch.device("meta"):
        model = Autoencoder(config)
    with gpu_kernels(), FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        fake(model)
        known = [*model.parameters(), *model.buffers()]

        def peak(call: Callable[[Tensor], object], *shape: int) -> int:
            given = torch.empty(shape)
            with AllocationCounter([*known, given]) as count:
                call(given)
            return count.peak + given.nbytes

        encoding = peak(model.encode, 1, 3, height, width)
        return size(known), encoding, peak(model.decode, 1, 4 * config.latent_channels, height // 16, width // 16)
