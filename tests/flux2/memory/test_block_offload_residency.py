"""flux2.memory.block_offload: what is on the device and when, that nothing stale is read, and activations."""

import gc
import re
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import helpers
import pytest
import torch
from offload_helpers import LateCopier
from streaming_helpers import adapted, equal, gradients, predict, step
from torch import Tensor, nn
from torch._dynamo import lookup_backend
from torch.utils.checkpoint import checkpoint

from flux2 import adapters
from flux2.memory.activation_checkpointing import POLICIES, set_policy
from flux2.memory.activation_offload import IN_FLIGHT
from flux2.memory.block_offload import Offloader, StreamedBlock, offload
from flux2.memory.ring_buffer import Copier
from flux2.models.transformer import Transformer

pytest_plugins = ("offload_helpers",)


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


def after(call: Callable[..., Any], then: Callable[..., Any]) -> Callable[..., Any]:
    def both(*args: Any) -> None:
        call(*args)
        then(*args)

    return both


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


@pytest.mark.parametrize("policy", ["full", "selective"])
def test_what_goes_away_is_freed_and_so_is_what_came_back(policy: str) -> None:
    model = adapted()
    set_policy(model, policy)
    offloader = _made(offload(model, 0, activations=True))
    memory: list[weakref.ref[Any]] = []

    def remember(block: nn.Module, args: Any) -> None:
        memory.extend(weakref.ref(arg.untyped_storage()) for arg in args if isinstance(arg, Tensor))

    for name in model.config.block_names:
        model.get_submodule(name).register_forward_pre_hook(remember)
    loss = predict(model).square().mean()
    inputs = len(memory)
    assert inputs == 3 + 2 * 2
    assert [i for i, storage in enumerate(memory) if storage() is not None] == [inputs - 2, inputs - 1], (
        "those that are still being copied"
    )
    fetched: list[weakref.ref[Any]] = []
    start = offloader.activation_pool.start

    def watch(source: Tensor, target: Tensor) -> Any:
        fetched.append(weakref.ref(target.untyped_storage()))
        return start(source, target)

    offloader.activation_pool.start = watch
    most = 0

    def count(*_: Any) -> None:
        nonlocal most
        most = max(most, sum(storage() is not None for storage in fetched))

    offloader.begin_backward = after(offloader.begin_backward, count)
    loss.backward()
    assert len(fetched) == inputs
    assert most <= 4, "the inputs of the block that is differentiated and of the one before it"
    assert not offloader.activation_pool.in_flight
    assert not any(storage() is not None for storage in fetched)


@pytest.mark.parametrize(("blocks", "activations"), [(1.0, False), (0, True)])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_forward_that_no_backward_follows_leaves_nothing(policy: str, blocks: float, activations: bool) -> None:
    """As where a later block runs out of memory."""
    model = adapted()
    set_policy(model, policy, budget_gb=1e-4 if policy == "budget" else None)
    offload(model, blocks, activations=activations)
    results: list[weakref.ref[Any]] = []

    def remember(block: nn.Module, args: Any, out: Any) -> None:
        parts = out if isinstance(out, tuple) else (out,)
        results.extend(weakref.ref(part.untyped_storage()) for part in parts)

    for name in model.config.block_names:
        for module in model.get_submodule(name).modules():
            module.register_forward_hook(remember)
    predict(model).square().mean()
    gc.collect()
    assert len(results) > 10
    left = {storage._cdata for storage in (reference() for reference in results) if storage is not None}
    assert len(left) <= (IN_FLIGHT if activations else 0), "inputs that are being copied"


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


def test_host_memory_that_runs_out_is_one_error_and_nothing_is_given_back() -> None:
    class FullCopier(Copier):
        def host(self, size: int) -> Tensor:
            raise MemoryError("host memory is full")

    model = adapted()
    offloader = _made(offload(model, 0, activations=True, copier=lambda _: FullCopier()))
    with pytest.raises(MemoryError, match="host memory is full"):  # pytest reports errors in finalizers too
        predict(model)
    assert not offloader.activation_pool.free
