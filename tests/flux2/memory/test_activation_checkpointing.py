"""flux2.memory.activation_checkpointing: policies save memory and change no number."""

import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import helpers
import peft
import pytest
import torch
from compiler_helpers import Graphs, blocks_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from flux2 import adapters
from flux2.layers import recompute_context
from flux2.layers.attention import check_backends, chosen_backend, preferred_backends
from flux2.layers.selection import BLOCK_LINEARS
from flux2.memory.activation_checkpointing import POLICIES, blocks_within, kept_bytes, set_policy, tensors_in
from flux2.models.transformer import DoubleBlock, SingleBlock, Transformer
from flux2.models.variants import DEV, TransformerConfig
from flux2.quantization.float8 import Float8Linear
from flux2.quantization.nf4 import Nf4Linear


def train_once(policy: str, dropout: float = 0.0) -> tuple[Tensor, list[Tensor], dict[str, int]]:
    """Loss, gradients of a LoRA, and counts: forwards of blocks, numbers of floats saved for the backward."""
    model = helpers.transformer("dev")
    adapters.attach(model, rank=2, dropout=dropout)
    generator = torch.Generator().manual_seed(0)
    for parameter in adapters.adapter_parameters(model):
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    set_policy(model, policy, budget_gb=0.0002 if policy == "budget" else None)
    model.train()
    counts = {"forwards": 0, "saved": 0}

    def count(*_: Any) -> None:
        counts["forwards"] += 1

    for module in model.modules():
        if isinstance(module, DoubleBlock | SingleBlock):
            module.register_forward_pre_hook(count)

    def save(tensor: Tensor) -> Tensor:
        counts["saved"] += tensor.numel()
        return tensor

    torch.manual_seed(0)
    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        loss = model(**helpers.transformer_inputs(model.config)).square().mean()
    loss.backward()
    gradients = [parameter.grad for parameter in adapters.adapter_parameters(model)]
    assert all(gradient is not None for gradient in gradients)
    return loss.detach(), gradients, counts  # type: ignore[return-value]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("policy", list(POLICIES))
def test_loss_and_gradients_are_bit_for_bit_those_without_a_policy(policy: str, dropout: float) -> None:
    loss, gradients, _ = train_once("none", dropout)
    again, with_policy, _ = train_once(policy, dropout)
    assert torch.equal(loss, again)
    assert all(torch.equal(a, b) for a, b in zip(gradients, with_policy, strict=True))
    assert all(gradient.abs().sum() > 0 for gradient in gradients)


def test_full_runs_every_block_again_in_the_backward() -> None:
    config = helpers.TRANSFORMERS["dev"]
    blocks = config.double_blocks + config.single_blocks
    assert train_once("none")[2]["forwards"] == blocks
    assert train_once("full")[2]["forwards"] == 2 * blocks


def test_full_keeps_a_fraction_of_what_none_keeps() -> None:
    assert train_once("full")[2]["saved"] < 0.3 * train_once("none")[2]["saved"]


def test_sampling_recomputes_nothing() -> None:
    model = helpers.transformer("klein")
    set_policy(model, "full")
    inputs = helpers.transformer_inputs(model.config)
    with torch.no_grad():
        prediction = model(**inputs)
        set_policy(model, "none")
        assert torch.equal(prediction, model(**inputs))
    assert prediction.grad_fn is None


def test_an_unknown_policy_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"memory\.checkpointing='half'.*none, full, selective, budget"):
        set_policy(Transformer(helpers.TRANSFORMERS["klein"]), "half")


# ------------------------------------------------------------------ what a second run leaves out


def small_model(**options: Any) -> Transformer:
    """A model with an adapter whose weights are not zero."""
    return with_adapter(helpers.transformer("dev"), **options)


def with_adapter(
    model: Transformer, rank: int = 2, targets: Sequence[str] = BLOCK_LINEARS, **options: Any
) -> Transformer:
    adapters.attach(model, rank=rank, targets=targets, **options)
    generator = torch.Generator().manual_seed(0)
    for parameter in adapters.adapter_parameters(model):
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.train()


def gradients(model: Transformer, policy: str, budget_gb: float | None = None, **inputs: Any) -> list[Tensor]:
    set_policy(model, policy, budget_gb=budget_gb)
    model.zero_grad()
    model(**{**helpers.transformer_inputs(model.config), **inputs}).square().mean().backward()
    return [parameter.grad.clone() for parameter in adapters.adapter_parameters(model)]  # type: ignore[union-attr]


def assert_equal(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs) > 0
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("policy", ["full", "selective"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("targets", [BLOCK_LINEARS, [r"single_blocks\.\d+\.linear1"]], ids=["all", "one"])
def test_no_gradient_reads_what_is_not_computed_again(
    policy: str, dropout: float, targets: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_model(dropout=dropout, targets=targets)
    torch.manual_seed(0)
    expected = gradients(model, "none")
    shapes = []

    def poison(shape: tuple[int, ...], like: Tensor) -> Tensor:
        shapes.append(shape)
        return torch.full(shape, torch.nan, dtype=like.dtype)

    monkeypatch.setattr(recompute_context, "placeholder", poison)
    torch.manual_seed(0)
    assert_equal(gradients(model, policy), expected)
    hidden, config = model.config.hidden, model.config
    reached = config.single_blocks if len(targets) == 1 else 2 * config.double_blocks + config.single_blocks
    assert len(shapes) == reached  # what lies before the first adapter has no backward
    assert {shape[-1] for shape in shapes} == {hidden}


@pytest.mark.parametrize("policy", ["full", "selective"])
def test_gates_that_are_trained_get_the_gradient_of_without_a_policy(policy: str) -> None:
    targets = [*BLOCK_LINEARS, r".*_modulation(_img|_txt)?\.lin", r"time_in\.out_layer"]
    model = small_model(targets=targets)
    expected = gradients(model, "none")
    assert_equal(gradients(model, policy), expected)


def test_an_adapter_that_reads_the_output_of_its_base_gets_it() -> None:
    model = helpers.transformer("klein")
    config = peft.LoraConfig(r=2, target_modules=r".*(linear2|mlp\.2|proj)", use_dora=True, init_lora_weights=False)
    peft.get_peft_model(model, config)
    expected = gradients(model, "none")
    assert_equal(gradients(model, "full"), expected)


def test_under_autocast_the_second_run_computes_as_the_first() -> None:
    model = small_model(dropout=0.3).bfloat16()
    for parameter in adapters.adapter_parameters(model):
        parameter.data = parameter.data.float()
    outcomes = []
    for policy in ("none", "full", "selective"):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16):
            first = model(**helpers.transformer_inputs(model.config))
            set_policy(model, policy)
            outcomes.append(gradients(model, policy))  # the backward within autocast
        assert first.dtype == torch.bfloat16
    assert_equal(outcomes[1], outcomes[0])
    assert_equal(outcomes[2], outcomes[0])


def test_a_first_run_leaves_nothing_in_autocasts_cache_that_has_no_gradient() -> None:
    model = small_model(dropout=0.3)
    inputs = helpers.transformer_inputs(model.config)

    def twice(policies: tuple[str, str]) -> list[Tensor]:
        model.zero_grad()
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16):
            losses = []
            for policy in policies:
                set_policy(model, policy)
                losses.append(model(**inputs).square().mean())
        sum(losses).backward()  # type: ignore[attr-defined]
        return [parameter.grad.clone() for parameter in adapters.adapter_parameters(model)]  # type: ignore[union-attr]

    for ours, theirs in zip(twice(("full", "none")), twice(("none", "none")), strict=True):
        assert helpers.relative_error(ours, theirs) < 1e-2


@pytest.mark.parametrize("policy", ["full", "selective"])
def test_a_graph_can_be_run_backwards_twice(policy: str) -> None:
    model = small_model(dropout=0.3)
    set_policy(model, policy)
    loss = model(**helpers.transformer_inputs(model.config)).square().mean()
    parameters = adapters.adapter_parameters(model)
    assert_equal(
        list(torch.autograd.grad(loss, parameters, retain_graph=True)), list(torch.autograd.grad(loss, parameters))
    )


@pytest.mark.parametrize("policy", ["full", "selective"])
def test_inputs_get_their_gradients(policy: str) -> None:
    model = small_model()
    found = []
    for name in ("none", policy):
        text = helpers.transformer_inputs(model.config)["text"].requires_grad_()
        gradients(model, name, text=text)
        found.append(text.grad)
    assert torch.equal(*found)


def test_all_that_is_kept_is_given_back_when_the_backward_is_over() -> None:
    model = small_model()
    set_policy(model, "selective")
    made: list[Any] = []

    def note(*given: Any) -> None:
        run = recompute_context.current_replay()
        if run is not None and not run.is_second_run:
            made.append(weakref.ref(run))

    model.single_blocks[0].register_forward_pre_hook(note)
    loss = model(**helpers.transformer_inputs(model.config)).square().mean()
    assert made[0]() is not None
    attended = weakref.ref(made[0]().attention)
    loss.backward()
    assert not made[0]().saved, "the loss may be looked at for longer"
    del loss
    assert made[0]() is None, "without the garbage collector: no circle holds the memory"
    assert attended() is None


# ------------------------------------------------------------------ how much is computed again


class Counter:
    """Multiplications (FLOPs) and attentions in the forwards of a block: those of its first runs and of its second."""

    def __init__(self, model: Transformer) -> None:
        self.matmul = {"first": 0, "second": 0}
        self.attention = {"first": 0, "second": 0}
        self.again = False
        self.open: list[FlopCounterMode] = []
        for block in [*model.double_blocks, *model.single_blocks]:
            block.register_forward_pre_hook(self.start)
            block.register_forward_hook(self.stop)

    def start(self, *_: Any) -> None:
        self.open.append(FlopCounterMode(display=False))
        self.open[-1].__enter__()

    def stop(self, *_: Any) -> None:
        mode = self.open.pop()
        mode.__exit__(None, None, None)
        run = "second" if self.again else "first"
        for operation, flops in mode.get_flop_counts()["Global"].items():
            is_attention = "attention" in str(operation) or "bmm" in str(operation)  # on the meta device
            kind = self.attention if is_attention else self.matmul
            kind[run] += flops


def counted(config: TransformerConfig, policy: str, tokens: tuple[int, int], text: int, rank: int) -> Counter:
    """What one training step computes; tensors have shapes but no values."""
    with torch.device("meta"):
        model = Transformer(config)
    adapters.attach(model, rank=rank)
    set_policy(model, policy)
    counter = Counter(model)
    inputs = helpers.transformer_inputs(config, 1, tokens, text)
    loss = model(**{name: value.to("meta") for name, value in inputs.items()}).square().mean()
    counter.again = True
    loss.backward()
    return counter


def test_at_the_shapes_of_dev_a_second_run_has_at_most_seven_tenths_of_the_multiplications() -> None:
    config = replace(DEV, double_blocks=1, single_blocks=6)  # of 8 and 48
    counter = counted(config, "full", (64, 64), 512, rank=16)
    forward = 13 * config.hidden**2 * 2 * (64 * 64 + 512) * 7
    assert forward < counter.matmul["first"] < 1.01 * forward
    assert 0.69 < counter.matmul["second"] / counter.matmul["first"] <= 0.70
    assert counter.attention["second"] == counter.attention["first"] > 0


def test_selective_computes_no_attention_again() -> None:
    model = small_model()
    set_policy(model, "selective")
    counter = Counter(model)
    with AttentionCalls() as calls:
        loss = model(**helpers.transformer_inputs(model.config)).square().mean()
        assert calls.forward == 5
        counter.again = True
        loss.backward()
    assert calls.forward == 5
    assert calls.backward == 5
    assert counter.matmul["second"] <= 0.73 * counter.matmul["first"]  # a small model's adapter is not so small


class AttentionCalls(TorchDispatchMode):
    """Counts attention kernels."""

    forward = backward = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.__name__
        if name.startswith("_scaled_dot_product"):
            if "backward" in name:
                self.backward += 1
            else:
                self.forward += 1
        return function(*args, **(kwargs or {}))


def test_selective_keeps_the_attention_but_not_what_goes_into_it() -> None:
    config = helpers.TRANSFORMERS["dev"]
    extra = train_once("selective")[2]["saved"] - train_once("full")[2]["saved"]
    tokens, blocks = 2 * (3 * 4 + 5), config.double_blocks + config.single_blocks
    # the output, as it is read by the backward and as the block goes on with it, which are one memory; row sums
    assert extra == blocks * tokens * (2 * config.hidden + config.heads)


# ------------------------------------------------------------------ budget


def saved_in_blocks(policy: str, dtype: torch.dtype, size: tuple[int, int] = (8, 8)) -> dict[str, int]:
    """Bytes of distinct memory, weights apart, that autograd holds for the last block of each kind."""
    config = TransformerConfig(heads=4, double_blocks=2, single_blocks=2, text_width=64, guidance=False)
    torch.manual_seed(0)
    model = Transformer(config).to(dtype)
    adapters.attach(model, rank=4)
    set_policy(model, policy)
    weights = {tensor.untyped_storage().data_ptr() for tensor in model.parameters()}
    run, found = model.run_block, {}

    def counting(block: Any, *args: Any) -> Any:
        shared = {
            t.untyped_storage().data_ptr() for arg in args if not isinstance(arg, Tensor) for t in tensors_in(arg)
        }
        held: dict[int, tuple[int, Tensor]] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights | shared:
                held[storage.data_ptr()] = (storage.nbytes(), tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            outputs = run(block, *args)
        found["double" if isinstance(block, DoubleBlock) else "single"] = sum(size for size, _ in held.values())
        return outputs

    model.run_block = counting
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        model(**helpers.transformer_inputs(config, 1, size, text=32))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("policy", ["none", "full", "selective"])
def test_bytes_counted_from_shapes_are_those_that_autograd_holds(policy: str, dtype: torch.dtype) -> None:
    config = TransformerConfig(heads=4, double_blocks=2, single_blocks=2, text_width=64, guidance=False)
    for kind, size in saved_in_blocks(policy, dtype).items():
        assert kept_bytes(config, kind, policy, 8 * 8 + 32, dtype.itemsize) == pytest.approx(size, rel=0.04), kind


def test_a_budget_keeps_as_many_of_the_last_blocks_as_it_holds() -> None:
    config = TransformerConfig(heads=4, double_blocks=2, single_blocks=3, text_width=64, guidance=False)
    single, double = (
        (kept_bytes(config, kind, "none", 100, 4) - kept_bytes(config, kind, "full", 100, 4)) / 1e9
        for kind in ("single", "double")
    )
    for budget, blocks in (
        (0, 0),
        (0.99 * single, 0),
        (1.01 * single, 1),
        (2.99 * single, 2),
        (3.01 * single, 3),
        (3.01 * single + 0.9 * double, 3),
        (3.01 * single + double, 4),
        (1e3, 5),
    ):
        assert blocks_within(config, budget, 100, 4) == blocks
    assert blocks_within(config, 3.01 * single, 200, 4) == 1  # twice the tokens, twice the bytes
    assert blocks_within(config, 3.01 * single, 100, 2) >= 4


@pytest.mark.parametrize("kept", range(6))
def test_blocks_within_the_budget_run_once_and_the_others_twice(kept: int) -> None:
    model = small_model()
    expected = gradients(model, "none")
    config = model.config
    sizes = [kept_bytes(config, kind, "none", 34, 4) - kept_bytes(config, kind, "full", 34, 4) for kind in KINDS]
    blocks = [*model.double_blocks, *model.single_blocks]
    budget = (sum((3 * [sizes[1]] + 2 * [sizes[0]])[:kept]) + 1) / 1e9
    runs = dict.fromkeys(range(5), 0)
    for i, block in enumerate(blocks):

        def count(*_: Any, i: int = i) -> None:
            runs[i] += 1

        block.register_forward_pre_hook(count)
    assert_equal(gradients(model, "budget", budget_gb=budget), expected)
    assert list(runs.values()) == [2] * (5 - kept) + [1] * kept


KINDS = ("double", "single")


@pytest.mark.parametrize(
    ("policy", "budget", "said"),
    [
        ("budget", None, r"memory\.budget_gb=None.*memory\.checkpointing=budget"),
        ("budget", -1, r"memory\.budget_gb=-1\b"),
        ("budget", True, r"memory\.budget_gb=True\b"),
        ("full", 4, r"memory\.budget_gb=4.*memory\.checkpointing=budget.*full"),
    ],
)
def test_a_budget_is_a_number_where_it_is_read_and_nothing_elsewhere(policy: str, budget: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        set_policy(Transformer(helpers.TRANSFORMERS["klein"]), policy, budget_gb=budget)


# ------------------------------------------------------------------ attention


class Backends(TorchDispatchMode):
    """The attention kernels that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.__name__.startswith(("_scaled_dot_product", "_softmax", "_safe_softmax")):
            self.seen.append(function.__name__.partition(".")[0])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("policy", ["none", "full", "selective"])
@pytest.mark.parametrize(("order", "first"), [(["cudnn", "math"], "math"), (["cudnn", "flash", "math"], "flash")])
def test_attention_is_computed_by_the_first_backend_of_the_list_that_can(
    policy: str, order: list[str], first: str
) -> None:
    model = small_model()
    expected = gradients(model, "none")
    set_policy(model, policy, attention=order)
    model.zero_grad()
    with Backends() as kernels:
        model(**helpers.transformer_inputs(model.config)).square().mean().backward()
    assert ("_scaled_dot_product_flash_attention_for_cpu" in kernels.seen) == (first == "flash")
    assert ("_safe_softmax" in kernels.seen) == (first == "math")
    for parameter, theirs in zip(adapters.adapter_parameters(model), expected, strict=True):
        assert parameter.grad is not None
        assert helpers.relative_error(parameter.grad, theirs) < 1e-5
    assert chosen_backend(order, 2, 16, 8, torch.device("cpu"), torch.float32) == first


def test_a_list_of_backends_of_which_none_can_is_an_error_that_says_so() -> None:
    with pytest.raises(ValueError, match=r"memory\.attention=\['cudnn'\].*cpu"):
        chosen_backend(["cudnn"], 2, 16, 8, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("given", ["flash", [], ["flash", "flash"], ["fast"], 3])
def test_backends_are_a_list_of_known_names(given: Any) -> None:
    with pytest.raises(ValueError, match=r"attention=.*cudnn, flash, efficient, math"):
        check_backends(given)


def test_without_a_wish_the_order_is_pytorchs_but_on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    assert preferred_backends(None, torch.device("cpu")) is None
    assert preferred_backends(["math"], torch.device("cpu")) == ("math",)
    for capability, expected in (((8, 9), None), ((9, 0), ("cudnn", "flash", "efficient", "math"))):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, value=capability: value)
        assert preferred_backends(None, torch.device("cuda")) == expected


# ------------------------------------------------------------------ compiled


def compiled_gradients_are(model: Transformer, expected: list[Tensor]) -> None:
    model.zero_grad()
    model(**helpers.transformer_inputs(model.config)).square().mean().backward()
    for parameter, theirs in zip(adapters.adapter_parameters(model), expected, strict=True):
        assert parameter.grad is not None
        assert helpers.relative_error(parameter.grad, theirs) < 1e-5


@pytest.mark.parametrize(
    ("policy", "mm_of_a_single_block", "attention_again"),
    # backward: five products a LoRA layer; again: all three of linear1, and of linear2 only the adapter's A
    [("none", 10, 0), ("full", 10 + 4, 1), ("selective", 10 + 4, 0)],
)
def test_compiled_blocks_give_the_same_and_do_not_compute_their_last_linear_again(
    policy: str, mm_of_a_single_block: int, attention_again: int
) -> None:
    """With `full` blocks of both kinds, else single ones alone: a graph of a double block takes seconds to make."""
    doubles = int(policy == "full")
    model = with_adapter(helpers.transformer_of(doubles, 3), targets=blocks_of(doubles))
    expected = gradients(model, "none")
    graphs = Graphs()
    order = ["flash", "math"]
    set_policy(model, policy, compile=True, compiler=graphs.backend, attention=order if policy == "selective" else None)
    compiled_gradients_are(model, expected)
    # blocks of a kind share a graph, but for the very first, whose input needs no gradient
    first = 8 * 3 if doubles else 2 * 3
    assert sorted(graph["aten.mm.default"] for graph in graphs.forward) == [2 * 3, first]
    assert mm_of_a_single_block in [graph["aten.mm.default"] for graph in graphs.backward]
    attention = (
        "aten._scaled_dot_product_flash_attention_for_cpu.default",
        "run_with_rng_state",
    )  # which runs the other
    assert {sum(graph[name] for name in attention) for graph in graphs.backward} == {attention_again}


def test_compilation_goes_on_for_as_many_shapes_as_are_expected() -> None:
    model = with_adapter(helpers.transformer_of(0, 1), targets=blocks_of(0))
    graphs = Graphs()
    with torch._dynamo.config.patch(recompile_limit=1, accumulated_recompile_limit=1):
        set_policy(model, "full", compile=True, compiler=graphs.backend, shapes=3)
        limit = torch._dynamo.config.recompile_limit
        for count, width in ((1, 2), (2, 3)):
            model(**helpers.transformer_inputs(model.config, size=(2, width)))
            assert len(graphs.forward) == count
        with torch.no_grad():
            model(**helpers.transformer_inputs(model.config, size=(2, 2)))
        assert len(graphs.forward) == 3
    assert limit >= 3 * 2 * 2, "for each shape: two kinds of blocks, with gradients and without"


@pytest.mark.parametrize(
    ("kind", "operation", "forward", "backward"),
    # backward: again, and for the gradient of its input; a weight is unpacked once for both
    [(Float8Linear, "aten._scaled_mm.default", 1, 2), (Nf4Linear, "flux2.nf4_unpack.default", 1, 1)],
)
def test_a_block_with_a_quantized_layer_compiles(kind: Any, operation: str, forward: int, backward: int) -> None:
    model = with_adapter(helpers.transformer_of(0, 1), targets=blocks_of(0))
    model.txt_in.requires_grad_(True)  # so that the block's input has a gradient, as that of all blocks but the first
    base = model.single_blocks[0].linear1.base_layer
    layer = kind(base.in_features, base.out_features)
    layer.store(base.weight)
    model.single_blocks[0].linear1.base_layer = layer
    expected, graphs = gradients(model, "full"), Graphs()
    set_policy(model, "full", compile=True, compiler=graphs.backend)
    compiled_gradients_are(model, expected)
    assert [graph[operation] for graph in graphs.forward] == [forward]
    assert [graph[operation] for graph in graphs.backward] == [backward]
