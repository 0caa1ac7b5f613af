"""flux2.memory.activation_checkpointing: how much is kept and computed again, within a budget too."""

from dataclasses import replace
from typing import Any

import helpers
import pytest
import torch
from checkpointing_helpers import assert_equal, gradients, small_model, train_once
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from flux2 import adapters
from flux2.memory.activation_checkpointing import blocks_within, kept_bytes, set_policy, tensors_in
from flux2.models.transformer import DoubleBlock, Transformer
from flux2.models.variants import DEV, TransformerConfig


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


FOUR_BLOCKS = TransformerConfig(heads=4, double_blocks=2, single_blocks=2, text_width=64, guidance=False)


def saved_in_blocks(
    policy: str, dtype: torch.dtype, size: tuple[int, int] = (8, 8), config: TransformerConfig = FOUR_BLOCKS
) -> dict[str, int]:
    """Bytes of distinct memory, weights apart, that autograd holds for the last block of each kind."""
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
        model(**helpers.transformer_inputs(config, 1, size, text=32), keep=size[0] * size[1] // 2)
    return found


@pytest.mark.parametrize("isolated", [False, True], ids=["", "isolated references"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("policy", ["none", "full", "selective"])
def test_bytes_counted_from_shapes_are_those_that_autograd_holds(
    policy: str, dtype: torch.dtype, isolated: bool
) -> None:
    config = replace(FOUR_BLOCKS, isolated_references=isolated)
    for kind, size in saved_in_blocks(policy, dtype, config=config).items():
        if policy == "selective" and isolated:  # which computes the references' attention again
            size += 32 * config.hidden * dtype.itemsize
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
