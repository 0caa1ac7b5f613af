"""flux2.memory.block_offload: streaming changes no bit of any result, and every byte that is used came through the
buffers.
"""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import helpers
import pytest
import torch
from adapter_helpers import write_adapter
from streaming_helpers import PRECISIONS, adapted, equal, gradients, predict, preserving_step, step

import flux2
from flux2 import adapters
from flux2.memory.activation_checkpointing import POLICIES
from flux2.memory.block_offload import Offloader, offload, offloaded_blocks
from flux2.models.transformer import Transformer
from flux2.models.variants import VARIANTS

pytest_plugins = ("offload_helpers",)


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
        *(
            ("selective", "bf16"),
            ("selective", "fp8 stored"),
            ("budget", "fp8 twice"),
            ("budget", "nf4"),
            ("none", "int8"),
        ),
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
    write_adapter(tmp_path)
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
