"""One step ahead, in a thread."""

import threading

import pytest

from train.utils.prefetch import Prefetcher


@pytest.fixture
def made():
    """The steps that were made, in order; step 3 fails."""
    return []


@pytest.fixture
def ahead(made):
    def make(step):
        made.append(step)
        if step == 3:
            raise ValueError("cache entry gone")
        return step, threading.current_thread()

    ahead = Prefetcher(make)
    yield ahead
    ahead.close()


def test_a_step_is_made_when_it_is_begun_and_once(ahead, made):
    ahead.begin(1)
    ahead._pending[1].result()
    assert made == [1]
    step, thread = ahead.get(1)
    assert step == 1
    assert thread is not threading.current_thread()
    assert made == [1]


def test_a_step_that_was_not_begun_is_made_when_it_is_asked_for(ahead, made):
    assert ahead.get(0)[0] == 0
    ahead.begin(1)
    assert ahead.get(5)[0] == 5
    assert made == [0, 1, 5]


def test_all_are_made_in_one_thread(ahead):
    ahead.begin(1)
    assert len({ahead.get(step)[1] for step in (1, 2, 4)}) == 1


def test_an_error_reaches_the_caller_of_that_step_and_again_if_it_is_asked_for_again(ahead, made):
    ahead.begin(3)
    for _ in range(2):
        with pytest.raises(ValueError, match="cache entry gone"):
            ahead.get(3)
    assert made == [3, 3]
    assert ahead.get(4)[0] == 4


def test_what_was_begun_is_not_waited_for_longer_than_it_takes_to_end(ahead, made):
    ahead.begin(1)
    ahead.close()
    assert made in ([], [1])
    with pytest.raises(RuntimeError):
        ahead.begin(2)
