"""flux2.memory.block_offload: streaming changes no bit of any result, and every byte that is used came through the
buffers.
"""

import itertools
import re
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import cache
from typing import Any

import helpers
import pytest
import torch
from offload_helpers import LateCopier
from torch import Tensor, nn
from torch._dynamo import lookup_backend
from torch.utils.checkpoint import checkpoint

import flux2
from flux2 import adapters
from flux2.layers.fused_lora import fuse_lora
from flux2.memory.activation_checkpointing import POLICIES, set_policy
from flux2.memory.block_offload import Offloader, StreamedBlock, offload, offloaded_blocks
from flux2.models.transformer import Transformer
from flux2.models.variants import VARIANTS
from flux2.quantization.precision import Precision, convert

pytest_plugins = ("offload_helpers",)

PRECISIONS = {
    "fp32": Precision(),
    "bf16": Precision(torch.bfloat16),
    "fp8": Precision(storage="fp8", matmul="fp8"),
    "fp8 stored": Precision(torch.bfloat16, storage="fp8", rowwise=True, matmul="dequantized"),
    "fp8 twice": Precision(torch.bfloat16, storage="fp8", matmul="fp8", cache_transposed_weights=True),
    "nf4": Precision(storage="nf4"),
}


@cache
def converted(precision: str) -> Transformer:
    """A small random model, made once in a process: not to be changed."""
    model = helpers.transformer("dev").to(PRECISIONS[precision].dtype)
    convert(model, PRECISIONS[precision])
    return model


def adapted(precision: str = "fp32", policy: str = "full", dropout: float = 0.0, **options: Any) -> Transformer:
    """A small random model with a LoRA that does something, as a run trains it."""
    model = deepcopy(converted(precision))
    adapters.attach(model, rank=2, dropout=dropout, **options)
    generator = torch.Generator().manual_seed(0)
    for parameter in adapters.adapter_parameters(model):
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    # enough for two of five blocks
    set_policy(model, policy, budget_gb=3e-4 if policy == "budget" else None)
    fuse_lora(model)
    return model.train()


def predict(model: Transformer, **inputs: Any) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=model.img_in.weight.dtype == torch.bfloat16):
        return model(**helpers.transformer_inputs(model.config, **inputs)).float()


def gradients(model: Transformer) -> list[Tensor]:
    """Of the adapter; none is left behind."""
    parameters = adapters.adapter_parameters(model)
    found = [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]
    model.zero_grad()
    assert len(found) == len(parameters)
    return found


def step(model: Transformer) -> list[Tensor]:
    """Loss and gradients."""
    torch.manual_seed(0)
    loss = predict(model).square().mean()
    loss.backward()
    return [loss.detach(), *gradients(model)]


def preserving_step(model: Transformer) -> list[Tensor]:
    """Two passes that are both differentiated, and between them one of the base without a gradient."""
    torch.manual_seed(0)
    first = predict(model)
    with torch.no_grad(), adapters.adapters_disabled(model):
        base = predict(model, seed=2)
    second = predict(model, seed=2)
    loss = first.square().mean() + (second - base).square().mean()
    loss.backward()
    return [loss.detach(), *gradients(model)]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# ------------------------------------------------------------------ which blocks


@pytest.mark.parametrize(
    ("given", "chosen"),
    [
        (0, []),
        (0.0, []),
        (1, ["single_blocks.0"]),
        (2, ["double_blocks.1", "single_blocks.1"]),
        (0.5, ["double_blocks.0", "single_blocks.0", "single_blocks.2"]),
        (0.01, ["single_blocks.0"]),
        (5, [f"double_blocks.{i}" for i in range(2)] + [f"single_blocks.{i}" for i in range(3)]),
        (1.0, [f"double_blocks.{i}" for i in range(2)] + [f"single_blocks.{i}" for i in range(3)]),
    ],
)
def test_a_number_or_a_share_of_the_blocks_is_chosen(given: int | float, chosen: list[str]) -> None:
    assert offloaded_blocks(helpers.TRANSFORMERS["dev"], given) == chosen


def test_half_of_the_blocks_is_every_second_one_beginning_with_the_second() -> None:
    config = VARIANTS["dev"].transformer
    doubles = [f"double_blocks.{i}" for i in (1, 3, 5, 7)]
    assert offloaded_blocks(config, 0.5) == doubles + [f"single_blocks.{i}" for i in range(1, 48, 2)]


def test_chosen_blocks_are_as_far_apart_as_they_can_be() -> None:
    config = VARIANTS["dev"].transformer
    names = offloaded_blocks(config, 1.0)
    for count in range(1, 57):
        at = [names.index(name) for name in offloaded_blocks(config, count)]
        gaps = [b - a for a, b in zip(at, at[1:] + [at[0] + len(names)], strict=True)]
        assert len(set(at)) == count
        assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("given", [-1, 1.5, -0.1, True, "half", None, float("nan")])
def test_what_is_no_number_of_blocks_is_refused(given: Any) -> None:
    with pytest.raises(ValueError, match=r"offload_blocks="):
        offloaded_blocks(helpers.TRANSFORMERS["dev"], given)


def test_an_adapter_is_not_merged_into_what_streams() -> None:
    model = adapted()
    offload(model, 2)
    before = predict(model)
    with pytest.raises(adapters.AdapterError, match=r"merge.*offload_blocks=0\b"):
        adapters.merge(model)
    assert torch.equal(predict(model), before)
    resident = adapted()
    offload(resident, 0, activations=True)
    adapters.merge(resident)


def test_more_blocks_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match=r"memory\.offload_blocks=6\b.*\b5 blocks\b"):
        offloaded_blocks(helpers.TRANSFORMERS["dev"], 6, "memory.offload_blocks")


# ------------------------------------------------------------------ the same numbers


def same_as_without(plain: Transformer, streaming: Transformer) -> None:
    """Training twice, as the second time finds blocks on the device, sampling, and passes of several kinds at once."""
    expected = step(plain)
    for _ in range(2):
        assert equal(step(streaming), expected)
    with torch.no_grad():
        assert torch.equal(predict(streaming), predict(plain))
    assert equal(preserving_step(streaming), preserving_step(plain))


def cases(names: str, rows: Any, columns: Any, often: Any) -> pytest.MarkDecorator:
    """Parametrizes with every pair; those that are not `often` are slow tests."""
    pairs = itertools.product(rows, columns)
    return pytest.mark.parametrize(
        names, [pytest.param(*pair, marks=() if pair in often else pytest.mark.slow) for pair in pairs]
    )


@cases(
    "policy, precision",
    POLICIES,
    PRECISIONS,
    {
        *(("none", "bf16"), ("none", "nf4"), ("none", "fp8 twice"), ("full", "fp32"), ("full", "nf4"), ("full", "fp8")),
        *(("selective", "bf16"), ("selective", "fp8 stored"), ("budget", "fp8 twice"), ("budget", "nf4")),
    },
)
def test_loss_and_gradients_are_bit_for_bit_those_without_streaming(
    policy: str, precision: str, scrambled: list[Offloader]
) -> None:
    plain, streaming = adapted(precision, policy), adapted(precision, policy)
    offloader = offload(streaming, 1.0, activations=True)
    same_as_without(plain, streaming)
    assert scrambled == [offloader]


HALF, ONE, THREE = (0.5, 2), (1.0, 1), (1.0, 3)  # share of the blocks, buffers


@cases(
    "policy, blocks_and_ring",
    POLICIES,
    (HALF, ONE, THREE),
    {("none", ONE), ("none", HALF), ("full", ONE), ("full", THREE), ("selective", HALF), ("budget", THREE)},
)
def test_so_they_are_with_any_number_of_blocks_and_buffers(
    policy: str, blocks_and_ring: tuple[float, int], scrambled: list[Offloader]
) -> None:
    plain, streaming = adapted(policy=policy), adapted(policy=policy)
    blocks, ring = blocks_and_ring
    offload(streaming, blocks, ring=ring)
    same_as_without(plain, streaming)


@pytest.mark.parametrize("policy", POLICIES)
def test_dropout_and_layers_without_adapter_stream_too(policy: str, scrambled: list[Offloader]) -> None:
    """PEFT's own forward around a plain linear, of which autograd keeps the weight, and linears without PEFT."""
    options: dict[str, Any] = {"dropout": 0.3, "targets": [r"single_blocks\.[12]\.linear1"]}
    plain, streaming = adapted("fp32", policy, **options), adapted("fp32", policy, **options)
    offload(streaming, 1.0)
    assert equal(step(streaming), step(plain))
    assert equal(preserving_step(streaming), preserving_step(plain))


@pytest.mark.parametrize("policy", POLICIES)
def test_a_graph_that_is_kept_is_differentiated_twice(policy: str, scrambled: list[Offloader]) -> None:
    model = adapted(policy=policy)
    offload(model, 1.0, activations=True)
    loss = predict(model).square().mean()
    loss.backward(retain_graph=True)
    first = gradients(model)
    loss.backward()
    assert equal(gradients(model), first)


def test_passes_of_every_kind_follow_each_other(scrambled: list[Offloader]) -> None:
    plain, streaming = adapted(), adapted()
    offload(streaming, 1.0)
    for _ in range(2):
        assert equal(step(streaming), step(plain))
        for _ in range(2):
            with torch.no_grad():
                assert torch.equal(predict(streaming), predict(plain))
            with torch.inference_mode():
                assert torch.equal(predict(streaming), predict(plain))
        first, second = predict(streaming), predict(streaming, seed=3)  # accumulated in the other order
        (second.square().mean() + first.square().mean()).backward()
        other_first, other_second = predict(plain), predict(plain, seed=3)
        (other_second.square().mean() + other_first.square().mean()).backward()
        assert equal(gradients(streaming), gradients(plain))


def test_after_a_backward_that_failed_everything_goes_on(scrambled: list[Offloader]) -> None:
    plain, streaming = adapted(), adapted()
    offload(streaming, 1.0)
    failing = True

    def fail(*_: Any) -> None:
        if failing:
            raise MemoryError("as if the device were full")

    streaming.single_blocks[1].linear1.register_full_backward_pre_hook(fail)
    with pytest.raises(MemoryError):
        step(streaming)
    failing = False
    streaming.zero_grad()
    assert equal(step(streaming), step(plain))


def test_pictures_are_the_same(model_folders: Callable[[str], Any], scrambled: list[Offloader], tmp_path: Any) -> None:
    adapters.save(_random_adapter(), tmp_path, base="small_dev")
    made = []
    for offload_blocks in (0, 0.5, 5):
        pipeline = flux2.load("tiny", offload_blocks=offload_blocks)
        pipeline.source = replace(pipeline.source, variant=helpers.VARIANTS["dev"], path=str(model_folders("dev")))
        pipeline.prompts.source = pipeline.source
        pipeline.streamed = offloaded_blocks(pipeline.variant.transformer, offload_blocks)
        base = pipeline.generate("a small red fox", steps=2)
        pipeline.load_adapter(tmp_path)
        made.append([image.tobytes() for image in base + pipeline.generate(["a red fox", "a cup"], steps=2)])
    assert made[1] == made[0]
    assert made[2] == made[0]
    assert made[0][0] != made[0][1]
    assert [len(offloader.blocks) for offloader in scrambled] == [3, 5]


def _random_adapter() -> Any:
    model = helpers.transformer("dev")
    wrapped = adapters.attach(model, rank=2)
    torch.manual_seed(0)
    for parameter in adapters.adapter_parameters(model):
        parameter.data = 0.2 * torch.randn(parameter.shape)
    return wrapped


# ------------------------------------------------------------------ what is where


def test_frozen_weights_are_in_host_memory_but_while_the_block_runs_and_trained_ones_never() -> None:
    model = adapted()
    offloader = _made(offload(model, 1.0))
    block = model.double_blocks[1]
    host = offloader.blocks[1].host
    seen = []

    def look(*_: Any) -> None:
        buffers = {slot.buffer.untyped_storage().data_ptr() for slot in offloader.ring.slots}
        for name, parameter in block.named_parameters():
            assert (parameter.untyped_storage().data_ptr() in buffers) == ("lora_" not in name), name
        seen.append(offloader.ring.current)

    block.img_mlp[1].register_forward_hook(look)
    step(model)
    assert seen == [1, 1], "in its forward and in its recompute"
    for name, parameter in block.named_parameters():
        assert (parameter.untyped_storage().data_ptr() == host.untyped_storage().data_ptr()) == ("lora_" not in name)
    assert model.state_dict().keys() == adapted().state_dict().keys()
    assert equal(list(model.state_dict().values()), list(adapted().state_dict().values()))


def test_buffers_and_weights_of_any_form_stream() -> None:
    class Odd(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner
            self.codes = nn.Parameter(torch.arange(7, dtype=torch.uint8), requires_grad=False)
            self.turned = nn.Parameter(torch.arange(6.0).view(2, 3).t(), requires_grad=False)
            self.register_buffer("scale", torch.tensor(2.5, dtype=torch.float64))
            self.register_buffer("cast", torch.ones(3).to(torch.float8_e4m3fn), persistent=False)
            self.register_buffer("nothing", None)
            self.seen: list[tuple[Any, ...]] = []

        def forward(self, *args: Any) -> Any:
            self.seen.append((self.codes.tolist(), self.turned.stride(), float(self.scale), self.cast.float().sum()))
            return self.inner(*args)

    model = adapted()
    odd = model.single_blocks[1] = Odd(model.single_blocks[1])
    offloader = _made(offload(model, 1.0, copier=lambda device: LateCopier()))
    host = offloader.blocks[3].host.untyped_storage().data_ptr()
    for tensor in (odd.codes, odd.turned, odd.scale, odd.cast):
        assert tensor.untyped_storage().data_ptr() == host
        assert tensor.data_ptr() % 256 == offloader.blocks[3].host.data_ptr() % 256
    assert equal(step(model), step(adapted()))
    assert odd.seen == [([0, 1, 2, 3, 4, 5, 6], (1, 3), 2.5, 3.0)] * 2


def test_every_byte_is_counted() -> None:
    model = adapted()
    frozen = [sum(p.nbytes for n, p in block.named_parameters() if "lora_" not in n) for block in _blocks(model)]
    offloader = _made(offload(model, 1.0))
    padded = [block.host.nbytes for block in offloader.blocks]
    assert all(size <= have < size + 256 * 14 for size, have in zip(frozen, padded, strict=True))
    assert offloader.host_bytes == sum(padded)
    assert offloader.ring_bytes == 2 * max(padded)
    step(model)
    assert offloader.ring.copied == sum(padded) + sum(padded[:3])  # backward: all but the two that are there
    before = offloader.ring.copied
    step(model)
    assert offloader.ring.copied - before == sum(padded[2:]) + sum(padded[:3])
    assert re.search(rf"\b5 blocks\b.*{offloader.host_bytes / 1e9:.3g} GB", str(offloader))


def _blocks(model: Transformer) -> list[nn.Module]:
    return [*model.double_blocks, *model.single_blocks]


def test_nothing_is_done_where_nothing_is_asked() -> None:
    model = adapted()
    run_block = model.run_block
    assert offload(model, 0) is None
    assert offload(model, 0.0) is None
    assert model.run_block is run_block


# ------------------------------------------------------------------ never stale


def test_a_block_that_is_run_without_its_weights_says_so() -> None:
    model = adapted()
    offload(model, 1.0)
    message = r"double_blocks\.0\b.*host memory.*set_policy"
    set_policy(model, "full")
    with pytest.raises(RuntimeError, match=message):
        predict(model)
    with pytest.raises(RuntimeError, match=message):
        model.double_blocks[0](None, None, None, None, None)


def test_a_weight_that_autograd_kept_is_found_again_or_is_an_error(scrambled: list[Offloader]) -> None:
    model = adapted(policy="none", targets=[r"single_blocks\.1\.linear1"])
    offload(model, 1.0)
    seen: list[Tensor] = []
    model.single_blocks[2].linear2.register_forward_hook(lambda layer, args, output: seen.extend([*args, output]))
    loss = predict(model).square().mean()
    taken, given = seen
    with pytest.raises(RuntimeError, match=r"single_blocks\.2\b.*host memory"):
        torch.autograd.grad(given.sum(), taken, retain_graph=True)
    loss.backward()


def passes(model: Transformer, between: Callable[[], None] = lambda: None) -> list[Tensor]:
    """A step, and a pass without gradients amid it, after which blocks come into other buffers."""
    torch.manual_seed(0)
    loss = predict(model).square().mean()
    with torch.no_grad():
        predict(model)
    between()
    loss.backward()
    return [loss.detach(), *gradients(model)]


@pytest.mark.parametrize("broken", ["nothing", "begin", "point_to", "packer", "current"])
def test_the_tests_see_residency_that_is_broken(
    broken: str, monkeypatch: pytest.MonkeyPatch, scrambled: list[Offloader]
) -> None:
    """Each of the mechanisms is needed: without it, results are wrong or an error comes."""
    policy = "full" if broken == "point_to" else "none"  # autograd keeps places, and only a recompute asks the modules
    plain, streaming = adapted(policy=policy, dropout=0.3), adapted(policy=policy, dropout=0.3)
    offloader = _made(offload(streaming, 1.0))
    ring = _made(offloader.ring)
    if broken == "begin":  # the backward finds what the forward left
        monkeypatch.setattr(offloader, "begin_backward", lambda *_: None)
    elif broken == "point_to":  # modules keep pointing into buffers that others fill
        monkeypatch.setattr(StreamedBlock, "point_to", _once(StreamedBlock.point_to))
    elif broken == "packer":  # autograd keeps views of the buffers
        monkeypatch.setattr(offloader, "packer", lambda *_: lambda tensor: tensor)
    elif broken == "current":  # a buffer is filled while its block is in use
        use = ring.use

        def forget(index: int, order: Any) -> Tensor:
            buffer = use(index, order)
            ring.release()
            ring.copier.wait(ring.copier.asked)  # type: ignore[attr-defined]
            return buffer

        monkeypatch.setattr(ring, "use", forget)
    expected = passes(plain)
    try:
        right = equal(passes(streaming, ring.slots.reverse), expected)
    except RuntimeError:
        right = False
    assert right == (broken == "nothing")


def _made(thing: Any) -> Any:
    assert thing is not None
    return thing


def _once(point_to: Callable[..., None]) -> Callable[..., None]:
    pointed: set[int] = set()

    def only_first(self: Any, memory: Tensor) -> None:
        if memory is not self.host and id(self) not in pointed:
            pointed.add(id(self))
            point_to(self, memory)

    return only_first


def call(block: nn.Module, *args: Any) -> Any:
    return block(*args)


def recompute(block: nn.Module, *args: Any) -> Any:
    return checkpoint(block, *args, use_reentrant=False)


@pytest.mark.slow
@pytest.mark.parametrize("activations", [False, True])
@pytest.mark.parametrize("run", [call, recompute])
def test_compiled_blocks_stream_and_blocks_of_a_kind_share_a_graph(
    run: Callable[..., Any], activations: bool, scrambled: list[Offloader]
) -> None:
    graphs: list[Any] = []

    def compiler(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return lookup_backend("aot_eager")(graph, inputs)

    torch._dynamo.reset()
    plain, streaming = adapted(), adapted()
    plain.run_block = torch.compile(run, backend=compiler, dynamic=False)
    expected = passes(plain)
    without = len(graphs)
    torch._dynamo.reset()
    streaming.run_block = torch.compile(run, backend=compiler, dynamic=False)
    ring = _made(_made(offload(streaming, 1.0, activations=activations)).ring)
    for _ in range(3):
        assert equal(passes(streaming, ring.slots.reverse), expected)
    assert len(graphs) == 2 * without


# ------------------------------------------------------------------ activations


def test_only_the_blocks_inputs_go_away_and_all_of_them() -> None:
    model = adapted()
    offloader = _made(offload(model, 0, activations=True))
    assert not offloader.ring.slots
    config = model.config
    step(model)
    tokens = 2 * (3 * 4 + 5) * config.hidden * 4  # batch, image and text
    assert offloader.activation_pool.copied == offloader.activation_pool.most == 5 * tokens
    assert offloader.activation_pool.held == 0
    step(model)
    assert offloader.activation_pool.copied == 2 * 5 * tokens
    assert sum(len(free) * size for size, free in offloader.activation_pool.free.items()) == 5 * tokens, (
        "memory is used again"
    )


def test_what_is_kept_on_the_device_does_not_grow_with_the_depth() -> None:
    def kept(activations: bool, depth: int) -> int:
        """Bytes of distinct memory that autograd keeps on the device, but for what all blocks share."""
        torch.manual_seed(0)
        model = Transformer(replace(helpers.TRANSFORMERS["dev"], single_blocks=depth))
        adapters.attach(model, rank=2)
        set_policy(model, "full")
        offload(model, 0, activations=activations)
        found: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            predict(model).square().mean()
        return sum(found.values())

    grown = 4 * 2 * (3 * 4 + 5) * helpers.TRANSFORMERS["dev"].hidden * 4
    assert kept(True, 6) == kept(True, 2)
    assert kept(False, 6) - kept(False, 2) >= grown


def test_inputs_come_back_one_block_ahead() -> None:
    model = adapted()
    copiers: list[LateCopier] = []

    def copier(device: torch.device) -> LateCopier:
        copiers.append(LateCopier())
        return copiers[-1]

    offloader = _made(offload(model, 0, activations=True, copier=copier))
    away = copiers[1]
    asked: list[int] = []
    begin = offloader.begin_backward

    def count(*args: Any) -> None:
        begin(*args)
        asked.append(away.asked - sent)

    offloader.begin_backward = count
    loss = predict(model).square().mean()
    sent = away.asked
    assert sent == 3 + 2 * 2
    loss.backward()
    assert asked == [2, 3, 5, 7, 7]
