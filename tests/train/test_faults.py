"""What happens to a process that trains, and that its run goes on as if nothing had."""

import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import time
from functools import partial

import psutil
import pytest
from message_helpers import holds
from train_helpers import ROOT, adapter, environment, launch, lines, same_tensors, values
from train_processes import LIMIT, done, until

from train.checkpoints.checkpoint import checkpoints
from train.utils.signals import SIGNALS

pytest_plugins = ("train_helpers", "train_processes")

HELD = [
    "ema_decay=0.8",
    "reference_dropout=0.3",
    "gradient_accumulation=2",
    "schedule=cosine",
    "schedule.warmup_steps=2",
]


@pytest.fixture(scope="session")
def whole(server, tiny, tmp_path_factory):
    """A run of six steps to which nothing happens."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    server.run(*tiny, *HELD, "steps=6", f"output_dir={folder}")
    return folder


def parent(folder):
    """A folder of its own, in which nothing but the run is."""
    folder.mkdir()
    return folder


def command_in(said):
    """The command line that goes on with a run, as it was printed."""
    return [line for line in said.splitlines() if " resume=" in line][-1]


# ------------------------------------------------------------------ signals


@pytest.mark.parametrize("number", SIGNALS)
def test_each_signal_saves_the_step_says_how_to_go_on_and_ends_with_its_own_code(server, tiny, whole, tmp_path, number):
    cut = tmp_path / "cut"
    process = server.start(*tiny, *HELD, "steps=6", f"output_dir={cut}", HELD_AT="2")
    until(lambda: done(cut) == 2, "two steps")
    os.kill(process.id, number)
    process.go()
    assert process.wait() == 128 + number
    said = process.out.read_text()
    (place,) = checkpoints(cut)
    steps = len(values(cut))
    assert holds(said, f"{number.name} ... step {steps} ... {place}")
    assert "Traceback" not in said
    words = shlex.split(command_in(said))
    assert words[:2] == ["python", "train/run.py"]
    assert words[-1] == f"resume={cut}"
    if number != signal.SIGTERM:  # they differ in their names and codes alone
        return
    server.run(*words[2:])
    assert lines(cut) == lines(whole)
    assert same_tensors(adapter(cut), adapter(whole))


def test_a_second_signal_leaves_at_once(server, tiny, tmp_path):
    cut = tmp_path / "cut"
    slow = ["batch_size=8", "gradient_accumulation=400", "steps=9"]  # one step of minutes
    process = server.start(*tiny, *slow, f"output_dir={cut}")
    until(lambda: (cut / "metrics.jsonl").exists(), "training")
    time.sleep(0.5)
    os.kill(process.id, signal.SIGTERM)
    process.says("second signal")
    time.sleep(0.5)
    os.kill(process.id, signal.SIGTERM)
    began = time.monotonic()
    assert process.wait() == 128 + signal.SIGTERM
    assert time.monotonic() - began < LIMIT / 4
    assert holds(process.out.read_text(), "without saving ... no checkpoint")
    assert checkpoints(cut) == []


@pytest.mark.parametrize("when", ["to encode: ", "loading the transformer of"])
def test_a_signal_while_caching_or_loading_loses_nothing_and_leaves_no_folder(server, tiny, tmp_path, when):
    runs, cache = parent(tmp_path / "runs"), f"cache_dir={tmp_path / 'cache'}"
    process = server.start(*tiny, cache, "steps=1", f"output_dir={runs / 'one'}", HELD_AT=when)
    process.says(when)
    os.kill(process.id, signal.SIGUSR1)
    process.go()
    assert process.wait() == 128 + signal.SIGUSR1
    said = process.out.read_text()
    assert holds(said, "SIGUSR1 ... cache")
    assert "Traceback" not in said
    assert list(runs.iterdir()) == []
    kept = sum(path.is_file() for path in (tmp_path / "cache").rglob("*.safetensors"))
    again = server.run(*tiny, cache, "steps=1", f"output_dir={runs / 'one'}")
    missing = re.search(r"to encode: (\d+) prompts .* and (\d+) images", again)
    assert (missing is None) == (when != "to encode: ") or kept
    assert (runs / "one" / "adapter").exists()


# ------------------------------------------------------------------ killed


@pytest.mark.slow
def test_killed_20_times_at_random_moments_the_curve_is_that_of_a_run_left_alone(server, tiny, tmp_path):
    """Kills fall into loading, steps, saving and deleting; each start goes on by itself."""
    settings = [*tiny, "ema_decay=0.8", "steps=60", "checkpoint_every=2", "keep_last=2", "resume=auto"]
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    server.run(*settings, f"output_dir={alone}")

    def check():
        assert lines(killed) == lines(alone)
        assert [line["step"] for line in lines(killed)] == list(range(1, 61))
        assert same_tensors(adapter(killed), adapter(alone))
        assert [place.name for place in checkpoints(killed)] == ["step_000058", "step_000060"]

    draw = random.Random(0)
    kills = resumed = 0
    while kills < 20:
        process = server.start(*settings, f"output_dir={killed}")
        steps = draw.choice([None, 1, 2, 3])  # None: before any
        if steps is None:
            time.sleep(draw.uniform(0, 2))
        else:
            start = checkpoints(killed)[-1:]
            goal = min(60, steps + (int(start[0].name.removeprefix("step_")) if start else 0))
            until(partial(has_reached, process, goal), f"step {goal}")
            time.sleep(draw.uniform(0, 0.1))
        os.kill(process.id, signal.SIGKILL)
        if process.wait() == 0 or "steps=61" in process.out.read_text():  # it was faster than its kill
            check()  # and the kills go on in another folder
            killed = tmp_path / f"killed_{kills}"
            continue
        kills += 1
        resumed += str(killed / "checkpoints" / "step_") in process.out.read_text()
        assert len(checkpoints(killed)) <= 3
    assert resumed >= 5
    last = server.start(*settings, f"output_dir={killed}")
    assert last.wait() == 0 or "steps=61" in last.out.read_text(), last.out.read_text()
    check()
    assert sorted(path.name for path in (killed / "checkpoints").iterdir()) == ["step_000058", "step_000060"]


def has_reached(process, step):
    """Whether its progress bar has come so far, or it ended."""
    if psutil.Process(process.id).status() == psutil.STATUS_ZOMBIE:
        return True
    shown = re.findall(r"(\d+)/60 ", process.out.read_text(errors="replace"))
    return bool(shown) and int(shown[-1]) >= step


# ------------------------------------------------------------------ two processes


@pytest.mark.slow
def test_two_processes_go_on_to_the_bit_and_so_does_one_of_two_that_is_asked_to_stop(server, tiny, tmp_path):
    settings = [*tiny, "ema_decay=0.8", "reference_dropout=0.3", "schedule=cosine", "steps=5"]
    two, cut = tmp_path / "two", tmp_path / "cut"
    whole = server.start_two(*settings, f"output_dir={two}")
    assert [process.wait() for process in whole] == [0, 0], whole[0].out.read_text()
    assert "processes: 2" in whole[0].out.read_text()

    stopped = server.start_two(*settings, f"output_dir={cut}", HELD_AT="2")
    until(lambda: done(cut) == 2, "two steps")
    os.kill(stopped[1].id, signal.SIGTERM)  # which does not speak
    stopped[0].go()  # for which the other waits
    assert [process.wait() for process in stopped] == [128 + signal.SIGTERM] * 2
    said = [process.out.read_text() for process in stopped]
    (place,) = checkpoints(cut)
    assert holds(said[0], f"SIGTERM ... step {len(values(cut))} ... {place}")
    assert str(place) not in said[1]

    one = shutil.copytree(cut, tmp_path / "one")
    resumed = server.start_two(*settings, "resume=auto", f"output_dir={cut}")
    assert [process.wait() for process in resumed] == [0, 0]
    assert lines(cut) == lines(two)
    assert same_tensors(adapter(cut), adapter(two))

    server.run(*settings, f"resume={one}", "batch_size=2")  # the global batch stays
    assert values(one) == pytest.approx(values(two), rel=2e-4)  # each process draws its own dropout
    assert not same_tensors(adapter(one), adapter(place))  # it trained on


def start_launcher(words):
    """A launcher under way, whose output and errors are one."""
    return subprocess.Popen(
        words,
        cwd=ROOT,
        env=environment(ACCELERATE_USE_CPU="true"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_when_one_of_two_launched_processes_is_killed_the_other_ends_and_the_run_goes_on(server, tiny, tmp_path):
    settings = [*tiny, "adapter.dropout=0", "checkpoint_every=1", "steps=100000"]
    cut, alone = tmp_path / "cut", tmp_path / "alone"
    launcher = start_launcher([*launch("train/run.py", processes=2), *settings, f"output_dir={cut}"])
    until(lambda: done(cut) >= 3, "three steps")
    children = psutil.Process(launcher.pid).children()
    assert len(children) == 2
    children[1].kill()
    said, _ = launcher.communicate(timeout=LIMIT)
    assert launcher.returncode != 0
    assert "processes: 2" in said
    assert not any(child.is_running() for child in children)
    steps = int(checkpoints(cut)[-1].name.removeprefix("step_")) + 2
    server.run(*settings[:-1], f"steps={steps}", f"resume={cut}", "batch_size=2")
    server.run(*settings[:-1], f"steps={steps}", f"output_dir={alone}", "batch_size=2")
    assert values(cut) == pytest.approx(values(alone), rel=1e-5)


@pytest.mark.slow
def test_the_command_that_goes_on_is_the_launchers_too(tiny, tmp_path):
    cut = tmp_path / "cut"
    settings = [*tiny, "steps=100000", f"output_dir={cut}"]
    words = [*launch("train/run.py", processes=2), *settings]
    launcher = start_launcher(words)
    until(lambda: done(cut) >= 2, "two steps")
    launcher.send_signal(signal.SIGTERM)
    said, _ = launcher.communicate(timeout=LIMIT)
    assert launcher.returncode != 0
    assert shlex.split(command_in(said)) == ["ACCELERATE_USE_CPU=true", *words[:-1], f"resume={cut}"]
