import io
import re

import pytest

from train.utils.progress import SECONDS, ItemProgress, Progress


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock():
    return Clock()


def steps(progress, clock, count, seconds, **values):
    for _ in range(count):
        clock.now += seconds
        progress.update()
        if values:
            progress.log(values)


def test_a_line_has_the_loss_the_speed_what_is_left_and_the_memory(clock):
    stream = io.StringIO()
    progress = Progress(10, stream=stream, clock=clock)
    steps(progress, clock, 4, 1.5, loss=0.25, peak_memory_gb=21.94)
    assert stream.getvalue().splitlines()[-1] == "4/10 [00:06, 1.50 s/step, 00:09 left, loss 0.2500, 21.9 GB]"


def test_the_memory_of_each_device_is_shown(clock):
    stream = io.StringIO()
    progress = Progress(10, stream=stream, clock=clock)
    steps(progress, clock, 4, 1.5, **{"loss": 0.25, "peak_memory_gb": 21.94, "peak_memory_gb/cuda:1": 20.0})
    assert stream.getvalue().splitlines()[-1].endswith("loss 0.2500, 21.9 + 20.0 GB]")


def test_where_nobody_watches_there_is_a_line_for_what_is_logged_and_no_other(clock):
    stream = io.StringIO()
    progress = Progress(10, stream=stream, clock=clock)
    steps(progress, clock, 4, 1.0)
    assert stream.getvalue() == ""
    progress.log({"loss": 0.5})
    progress.close()
    assert stream.getvalue().count("\n") == 1
    assert "\r" not in stream.getvalue()


def test_on_a_terminal_it_is_one_bar(clock):
    stream = Terminal()
    progress = Progress(10, done=4, stream=stream, clock=clock)
    steps(progress, clock, 6, 1.0, loss=0.5, peak_memory_gb=3)
    progress.close()
    shown = stream.getvalue()
    assert "training" in shown.split("\n")[0]
    assert shown.count("\n") == 2  # after the title and at the end
    last = shown.rstrip("\n").split("\r")[-1]
    assert "10/10" in last
    assert re.search(r"1\.00 s/step, 00:00 left, loss 0\.5000, 3\.0 GB\]", last)


def test_a_bar_says_what_is_done_between_steps_and_a_log_does_not(clock):
    terminal, log = Terminal(), io.StringIO()
    for stream in (terminal, log):
        progress = Progress(10, stream=stream, clock=clock)
        steps(progress, clock, 3, 1.0)
        progress.log({"loss": 0.5})
        before = stream.getvalue()
        progress.show("drawing a sample grid")
        shown = stream.getvalue()[len(before) :]
        assert ("drawing a sample grid]" in shown) == (stream is terminal)
        progress.close()
    assert "loss 0.5000]" in terminal.getvalue().rstrip("\n").split("\r")[-1]
    assert "drawing" not in log.getvalue()


def test_what_is_paused_for_counts_neither_for_the_speed_nor_for_what_is_left(clock):
    progress = Progress(10, shown=False, clock=clock)
    with progress.paused():
        clock.now += 60  # the grid before the first step
    for _ in range(4):
        clock.now += 2.0
        progress.update()
        with progress.paused():
            clock.now += 30  # validation
    assert progress.seconds == pytest.approx(2.0)
    assert "00:12 left" in progress.text()


def test_an_error_in_a_pause_ends_the_pause(clock):
    progress = Progress(10, shown=False, clock=clock)

    def fail():
        clock.now += 30
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), progress.paused():
        fail()
    steps(progress, clock, 1, 2.0)
    assert progress.seconds == pytest.approx(2.0)


def test_the_speed_is_that_of_the_last_steps(clock):
    progress = Progress(1000, shown=False, clock=clock)
    steps(progress, clock, 1, 500.0)  # compiling
    steps(progress, clock, 60, 2.0)
    assert progress.seconds == pytest.approx(2.0)


def test_the_speed_has_one_unit_however_short_a_step_is(clock):
    for seconds, said in (
        (0.02, "0.0200 s/step"),
        (0.0999, "0.0999 s/step"),
        (0.125, "0.12 s/step"),
        (90, "90.00 s/step"),
    ):
        progress = Progress(5, shown=False, clock=clock)
        steps(progress, clock, 5, seconds)
        assert progress.text() == f"{said}, 00:00 left"
    assert Progress(10, shown=False, clock=clock).text() == ""


def test_a_process_that_is_not_the_first_shows_nothing(clock):
    for stream in (io.StringIO(), Terminal()):
        progress = Progress(2, shown=False, stream=stream, clock=clock)
        steps(progress, clock, 2, 1.0, loss=0.5)
        progress.close()
        assert stream.getvalue() == ""


def test_what_is_computed_before_training_is_counted_in_a_line_every_so_often_where_nobody_watches(clock):
    stream = io.StringIO()
    count = ItemProgress("pictures encoded", stream=stream, clock=clock)
    for done in range(1, 8):
        clock.now += 0.45 * SECONDS
        count.update(done, 7, f"{done} MB")
    count.close()
    assert stream.getvalue().splitlines() == [
        "pictures encoded: 3/7 [00:27, 00:36 left, 3 MB]",
        "pictures encoded: 6/7 [00:54, 00:09 left, 6 MB]",
        "pictures encoded: 7/7 [01:03, 7 MB]",
    ]
    assert "\r" not in stream.getvalue()


def test_what_is_soon_done_is_not_counted_in_a_log(clock):
    stream = io.StringIO()
    count = ItemProgress("prompts encoded", stream=stream, clock=clock)
    for done in range(1, 4):
        clock.now += 1
        count.update(done, 3)
    count.close()
    assert stream.getvalue() == ""


def test_on_a_terminal_a_count_is_a_bar_that_goes(clock):
    stream = Terminal()
    count = ItemProgress("prompts encoded", stream=stream, clock=clock)
    count.update(3, 3, "1 MB")
    assert "0/3" in stream.getvalue()
    count.close()
    assert stream.getvalue().split("\r")[-1].strip() == ""
    assert "\n" not in stream.getvalue()
