"""A model that is divided over GPUs: which division is chosen, and what each GPU is predicted to need."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import combinations, pairwise

import pytest
import torch
from message_helpers import holds
from planner_helpers import H200, job
from train_helpers import compose, refusal

from train import plan
from train.config.memory import Choice
from train.planner.division import Part, divide, parts_of
from train.planner.from_config import advice, split_hint
from train.planner.gpus import gpu, usable
from train.planner.predictor import Planner
from train.planner.search import choices, choose
from train.stages.memory import load_config
from train.utils.memory import OutOfMemory

pytest_plugins = ("train_helpers", "planner_helpers")


def every(total: int, count: int) -> list[tuple[int, ...]]:
    cuts = [(0, *chosen, total) for chosen in combinations(range(1, total), count - 1)]
    return [tuple(stop - start for start, stop in pairwise(cut)) for cut in cuts]


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("first", [0.0, 3e9])
def test_the_largest_peak_is_as_small_as_any_division_makes_it(count: int, first: float) -> None:
    sizes = [1e9 * (1 + (7 * i) % 5) for i in range(11)]

    def peak(part: Part) -> float:
        return sum(sizes[part.start : part.stop]) + first * part.is_first + 0.5e9 * part.is_last

    def worst(split: tuple[int, ...]) -> float:
        return max(map(peak, parts_of(split)))

    found = divide(len(sizes), count, peak)
    assert len(found) == count
    assert sum(found) == len(sizes)
    assert worst(found) == min(map(worst, every(len(sizes), count)))


def test_each_part_has_a_block_or_there_is_an_error() -> None:
    assert divide(3, 3, lambda part: float(part.stop - part.start)) == (1, 1, 1)
    with pytest.raises(ValueError, match=r"^memory\.split divides 3 blocks over 4 GPUs"):
        divide(3, 4, lambda part: float(part.stop - part.start))


def test_a_first_gpu_with_more_to_hold_has_fewer_blocks() -> None:
    assert divide(10, 2, lambda part: 1e9 * (part.stop - part.start)) == (5, 5)
    assert divide(10, 2, lambda part: 1e9 * (part.stop - part.start + 4 * part.is_first)) == (3, 7)


@pytest.mark.parametrize("storage", [None, "nf4"])
def test_the_parts_hold_the_model_once(planner: Callable[..., Planner], storage: str | None) -> None:
    """What several GPUs hold together is what one holds, except libraries and buffers that each has."""
    one, two = planner(storage=storage), planner(storage=storage, num_gpus=2, split=(20, 36))
    whole, prediction = one.predict(Choice("full")), two.predict(Choice("full"))
    assert prediction.split == (20, 36)
    assert len(prediction.peaks) == 2
    for name in ("weights of blocks", "other weights", "adapter", "its gradients", "optimizer"):
        held = [phases["step"][name] for phases in (prediction.phases, *prediction.later_phases)]
        assert sum(held) == whole.phases["step"][name], name
        assert min(held) > 0, name
    weights = [phases["step"]["weights of blocks"] for phases in (prediction.phases, *prediction.later_phases)]
    assert weights == [sum(one.weights[:20]), sum(one.weights[20:])]
    kept = [phases["step"]["kept for backward"] for phases in (prediction.phases, *prediction.later_phases)]
    assert sum(kept) == pytest.approx(whole.phases["step"]["kept for backward"], rel=0.01)


def test_layers_outside_of_blocks_are_counted_where_they_are(planner: Callable[..., Planner]) -> None:
    planned = planner(num_gpus=2, split=(20, 36)).predict(Choice("full"))
    final = sum(parameter.nbytes for parameter in job().model.final_layer.parameters())
    assert planned.later_phases[0]["step"]["other weights"] == final


def test_a_division_adds_the_copies_of_the_tokens_to_a_step(planner: Callable[..., Planner]) -> None:
    one, two = planner().predict(Choice("full")), planner(num_gpus=2, split=(20, 36)).predict(Choice("full"))
    copied = 2 * 4608 * 6144 * 2  # to the second GPU, and the gradient back
    assert two.between == copied
    assert two.seconds(H200) - one.seconds(H200) == pytest.approx(copied / 50e9)
    assert two.work.flops == one.work.flops


def test_dev_in_fp8_fits_two_gpus_of_24_gb_and_not_one(planner: Callable[..., Planner]) -> None:
    limit, on = usable(24), gpu(None, 24)
    one, two = (choose(planner(storage="fp8", num_gpus=n), {"offload_blocks": 0}, limit, on) for n in (1, 2))
    assert one is None
    assert two is not None
    assert max(two.peaks) <= limit
    assert two.settings.endswith(f"memory.split=[{two.split[0]},{two.split[1]}]")


def test_at_few_tokens_a_division_is_faster_than_offload(planner: Callable[..., Planner]) -> None:
    """Copies from host memory take longer than the compute that hides them."""
    limit, on = usable(24), gpu(None, 24)
    one, two = (choose(planner(storage="fp8", side=512, num_gpus=n), {}, limit, on) for n in (1, 2))
    assert one is not None
    assert two is not None
    assert one.moved > 0
    assert two.seconds(on) < 0.9 * one.seconds(on)


def test_nothing_is_offloaded_with_a_division(planner: Callable[..., Planner]) -> None:
    found = list(choices(planner(storage="fp8", num_gpus=2), {"checkpointing": "full"}, float("inf")))
    assert found
    assert not any(p.choice.offload_blocks or p.choice.offload_activations or p.moved for p in found)


# ------------------------------------------------------------------ the command


def test_the_command_shows_each_gpu(run_command) -> None:
    words = ["+experiment=tarot", "precision=fp8", "memory=auto", "memory.split=auto", "batch_size=1"]
    code, out, err = run_command(*words, "sample.prompts=[]", "+card=24", "+cards=2", task=plan.main)
    assert (code, err) == (0, "")
    assert holds(" ".join(out.split()), "on GPU 1 of 2 ( ... on GPU 2 of 2 ( ... memory.split=[ ... 2 of a size")
    assert "For 2 x 24 GB memory=auto would choose memory.checkpointing=" in " ".join(out.split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["+cards=2"], "cards=2 divides the model over GPUs, which needs memory.split=auto."),
        (["+cards=2", "memory.split=[2,3]"], "memory.split=auto. Set it instead of [2, 3], or omit cards."),
        (["+cards=2", "device=cpu"], "cards=2 divides a model over GPUs, and this is device=cpu. Omit one of them."),
        (["+cards=99", "memory.split=auto"], "over 99 GPUs ... CUDA_VISIBLE_DEVICES), or give ... such as +cards=2."),
        (["+cards=1", "memory.split=auto"], "cards=1 must be an integer >= 2"),
        (["memory.split=auto", "device=cpu"], "memory.split=auto ... device=cpu"),
        (["memory.split=auto", "shard=true", "+processes=4"], "memory.split=auto ... shard=true"),
    ],
)
def test_a_wrong_plan_is_refused(words: list[str], message: str) -> None:
    assert holds(refusal(*words, task=plan.main), message)


def test_a_hint_is_given_where_several_gpus_are_faster(small, monkeypatch: pytest.MonkeyPatch) -> None:
    run, on, memory = load_config(compose(*small())), gpu(None, 24), {"gpu_memory_gb": 24}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    hint = partial(split_hint, run, memory, gpu_memory_gb=24, on=on)
    assert "memory.split=auto would divide the model over the 2 GPUs" in hint(None)
    assert hint(Planner(job("tiny")).predict(Choice("none"))) == "", "one GPU offloads nothing"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert hint(None) == ""


def test_advice_after_out_of_memory_keeps_the_division(small, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr("train.config.run_config.split_devices", lambda first, count=None, key="": [cpu] * (count or 2))
    run = load_config(compose(*small("memory.split=[2,3]", "memory.checkpointing=none")))
    said = advice(run, OutOfMemory("", "step", 0, 0))
    assert "memory.checkpointing=" in said
    assert "offload" not in said
