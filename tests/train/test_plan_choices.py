"""Choices of the planner: what fits a card, what is fastest there, and what takes less."""

from itertools import pairwise

import pytest
from message_helpers import holds
from planner_helpers import H200, job

from train.config.memory import Choice
from train.planner import from_config as choosing
from train.planner import search
from train.planner.gpus import SIZES, gpu, usable
from train.planner.predictor import Planner
from train.planner.search import choose, step_down

pytest_plugins = ("planner_helpers",)


@pytest.mark.parametrize(
    "storage", ["fp8", *(pytest.param(name, marks=pytest.mark.slow) for name in (None, "int8", "nf4"))]
)
def test_a_choice_fits_and_a_larger_card_never_gets_a_slower_one(planner, storage):
    found = planner("dev", storage=storage)
    times = []
    for card in SIZES:
        chosen = choose(found, {}, usable(card), H200)
        if chosen is None:
            assert not times, "a larger card must fit what a smaller one does"
            continue
        assert chosen.training <= usable(card)
        times.append(chosen.seconds(H200))
    assert len(times) >= 6
    assert times == sorted(times, reverse=True)


@pytest.mark.slow
def test_the_same_question_gets_the_same_answer(planner):
    answers = {choose(planner("dev"), {}, usable(24), H200).choice for _ in range(3)}
    again = Planner(job("dev"))
    assert answers == {choose(again, {}, usable(24), H200).choice}


@pytest.mark.slow
def test_weights_are_kept_transposed_where_there_is_room(planner):
    found = planner("dev", storage="fp8", side=512)
    assert choose(found, {}, usable(141), H200).choice.cache_transposed_weights
    assert not choose(found, {}, usable(48), H200).choice.cache_transposed_weights
    assert not choose(found, {"cache_transposed_weights": False}, usable(141), H200).choice.cache_transposed_weights
    assert not choose(planner("dev", side=512), {}, usable(141), H200).choice.cache_transposed_weights
    one, both = (found.predict(Choice("full", cache_transposed_weights=kept)) for kept in (False, True))
    assert both.seconds(H200) < one.seconds(H200)
    assert both.total("step") > one.total("step") + 30e9


def test_more_recompute_and_more_streaming_never_take_more(planner):
    found = planner("dev")
    for between in ([Choice("budget", 20.0), Choice("budget", 5.0)], [Choice("selective")]):
        choices = [Choice("none"), *between, Choice("full")]
        totals = [found.predict(choice).total("step") for choice in choices]
        assert totals == sorted(set(totals), reverse=True)
    streamed = [found.predict(Choice("full", offload_blocks=number)).total("step") for number in range(3, 57)]
    assert streamed == sorted(streamed, reverse=True)
    assert found.predict(Choice("full", offload_activations=True)).total("step") < totals[-1]


def test_what_is_given_is_not_chosen(planner):
    found = planner("dev", storage="nf4")
    assert choose(found, {"offload_blocks": 10}, usable(80), H200).choice.offload_blocks == 10
    assert choose(found, {"checkpointing": "full"}, usable(141), H200).choice == Choice("full")
    only = {"checkpointing": "none", "offload_blocks": 0}
    assert choose(found, only, usable(24), H200) is None


def test_a_budget_that_is_given_streams_where_it_must(planner):
    found = planner("klein_base_4b")
    assert choose(found, {"checkpointing": "budget"}, usable(8), H200).choice.offload_blocks > 0
    given = {"checkpointing": "budget", "budget_gb": 0.3}
    chosen = choose(found, given, usable(8), H200).choice
    assert (chosen.budget_gb, chosen.offload_blocks > 0) == (0.3, True)


def test_an_advice_saves_something(planner):
    found = planner("klein_base_4b")
    now = Choice("none")
    small = found.predict(now).training * 0.001
    said = choosing.LEAST_STEP * found.predict(now).training
    assert said > small
    lighter = step_down(found, now, H200, said)
    assert found.predict(lighter).training <= found.predict(now).training - said


def test_of_a_lighter_precision_it_is_said_how_much_it_takes_less(planner):
    assert holds(search.lighter(planner("dev"), gpu("RTX 3090", 24)), "precision=int8 ... precision=nf4")
    said = search.lighter(planner("dev"), H200)
    assert holds(said, "31.41 GB ... precision=fp8 ... 46.61 GB ... precision=nf4")
    assert search.lighter(planner("dev", storage="nf4"), H200) == ""


def test_nothing_leaves_the_device_that_need_not(planner):
    assert choose(planner("klein_base_4b"), {}, usable(141), H200).choice == Choice("none")


def test_stepping_down_takes_less_each_time_and_comes_to_an_end(planner):
    found, now, sizes = planner("klein_base_4b"), Choice("none"), []
    while now is not None:
        sizes.append(found.predict(now).training)
        assert len(sizes) < 200
        now = step_down(found, now, H200, short=5e8)
    assert len(sizes) > 3
    assert all(after <= before - 5e8 for before, after in pairwise(sizes))
