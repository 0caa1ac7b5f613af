"""How the loop ends before its time: requests to stop, errors, and what is left to go on from."""

import signal
from types import SimpleNamespace

import pytest
import torch
from message_helpers import holds
from train_helpers import adapter, ask_to_stop, lines, same_tensors, values

from flux2 import adapters
from train.checkpoints.checkpoint import checkpoints
from train.optim.update_guard import TrainingError
from train.tracking import NoTracker
from train.utils import signals
from train.utils.signals import SIGNALS, Interrupted, sample_requests, stop_requests, stopped_at_once
from train.validation.samples import Sampler

pytest_plugins = ("train_helpers",)


# ------------------------------------------------------------------ stopping


@pytest.mark.parametrize("number", SIGNALS)
def test_a_stop_request_saves_the_step_and_leaves_the_handlers_as_they_were(train, at_step, number, tmp_path):
    before = [signal.getsignal(name) for name in SIGNALS]
    at_step(1, ask_to_stop(number))
    with pytest.raises(Interrupted, match=f"{signal.Signals(number).name} .*step 2"):
        train("run")
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["step_000002"]
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2]
    assert not (tmp_path / "run" / "adapter").exists()
    assert [signal.getsignal(name) for name in SIGNALS] == before


def test_the_first_stop_request_is_answered_on_the_error_stream_by_the_first_process(capfd, monkeypatch):
    for rank, said in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        with stop_requests():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        assert capfd.readouterr().err.count("second signal") == said


def test_a_hang_up_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_requests() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop
    finally:
        signal.signal(signal.SIGHUP, before)


def test_stopped_at_once_the_last_checkpoint_is_named(train, at_step, tmp_path):
    def interrupt():
        raise KeyboardInterrupt

    at_step(3, interrupt)
    with pytest.raises(Interrupted, match=r"without saving.*step_000002.*resume=.*run$"):
        train("run", "checkpoint_every=2")
    at_step(0, interrupt)
    with pytest.raises(Interrupted, match=r"without saving.*no checkpoint"):
        train("other")


# ------------------------------------------------------------------ sampling


@pytest.mark.parametrize("way", ["file", "signal"])
def test_a_grid_that_is_asked_for_is_drawn_after_the_next_step_and_changes_no_loss(train, at_step, way, tmp_path):
    settings = ["sample_every=100", "sample.prompts=[a fox]", "sample.steps=1", "log_every=100"]
    plain = train("plain", *settings)
    file = tmp_path / "run" / "sample"
    at_step(1, file.touch if way == "file" else ask_to_stop(signal.SIGUSR2))
    run = train("run", *settings)
    assert [path.name for path in sorted((run / "samples").iterdir())] == [
        f"step_00000{step}.png" for step in (0, 3, 4)
    ]
    assert not file.exists()
    assert same_tensors(adapter(run), adapter(plain))


def test_a_grid_that_cannot_be_drawn_as_there_are_no_prompts_is_a_warning(train, at_step, capfd):
    at_step(1, ask_to_stop(signal.SIGUSR2))
    run = train("run")
    assert not (run / "samples").exists()
    assert holds(capfd.readouterr().err, "a sample grid was asked for ... sample.prompts")


def test_before_training_a_request_for_a_grid_has_no_effect_and_none_ends_a_run():
    before = signal.getsignal(signal.SIGUSR2)
    with stopped_at_once():
        signal.raise_signal(signal.SIGUSR2)
    assert signal.getsignal(signal.SIGUSR2) == before


def test_a_request_is_taken_once_and_the_file_by_the_first_process(tmp_path, monkeypatch):
    with sample_requests(tmp_path / "sample") as request:
        assert not request.take()
        request.file.touch()
        monkeypatch.setenv("RANK", "1")
        assert not request.take()
        signal.raise_signal(signal.SIGUSR2)
        assert request.take()
        assert not request.take()
        monkeypatch.setenv("RANK", "0")
        assert request.take()
        assert not request.take()
    (tmp_path / "sample").mkdir()
    assert not request.take()  # a folder asks for nothing, and stays


# ------------------------------------------------------------------ failing


def failing(error):
    def fail(*args, **kwargs):
        raise error

    return fail


@pytest.mark.parametrize("error", [ValueError("cache entry gone"), OSError("unplugged"), ZeroDivisionError("ours")])
def test_an_error_in_mid_training_saves_the_last_whole_step_and_says_where(train, at_step, tmp_path, error):
    plain = train("plain")
    at_step(3, failing(error))
    with pytest.raises(type(error), match=str(error)) as raised:
        train("run")
    note = f"step 3 ... {tmp_path / 'run' / 'checkpoints' / 'step_000003'} ... resume="
    assert holds(raised.value.__notes__[0], note)
    assert lines(train("run", "resume=auto")) == lines(plain)


def test_an_error_in_the_middle_of_an_update_saves_nothing_that_is_half_done(train, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.optim.AdamW, "step", failing(RuntimeError("ours")))
    monkeypatch.setattr("train.config.run_config.try_out", lambda *arguments: None)
    with pytest.raises(RuntimeError) as raised:
        train("run")
    assert holds("".join(raised.value.__notes__), "no checkpoint")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_grid_that_fails_is_a_warning(train, monkeypatch, capfd):
    monkeypatch.setattr(Sampler, "write_grid", failing(OSError("disk full")))
    settings = ["sample_every=2", "sample.prompts=[a fox]", "sample.steps=1"]
    assert (train("run", *settings) / "adapter").exists()
    said = [line for line in capfd.readouterr().err.splitlines() if "warning" in line]
    assert len(said) == 3
    assert holds(said[1], "step 2 ... OSError: disk full")


def test_a_tracker_that_fails_is_one_warning(train, monkeypatch, capfd):
    monkeypatch.setattr(NoTracker, "log", failing(ConnectionError("no network")))
    assert len(values(train("run"))) == 4
    said = [line for line in capfd.readouterr().err.splitlines() if "warning" in line]
    assert len(said) == 1
    assert holds(said[0], "tracker ... ConnectionError: no network")


def test_a_checkpoint_that_cannot_be_written_is_a_warning_and_the_next_is_tried(train, monkeypatch, capfd):
    save = torch.save
    calls = []

    def once(*arguments):
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("no room")
        save(*arguments)

    monkeypatch.setattr(torch, "save", once)
    run = train("run", "checkpoint_every=1")
    assert [path.name for path in checkpoints(run)] == ["step_000002", "step_000003", "step_000004"]
    assert holds(capfd.readouterr().err, "step_000001 ... no room")
    assert not list((run / "checkpoints").glob(".*"))


def test_an_adapter_that_cannot_be_written_leaves_a_state_to_go_on_from(train, monkeypatch, tmp_path):
    save = adapters.save
    folder = tmp_path / "run" / "adapter"

    def full(wrapped, place, **about):
        if place == folder:
            raise OSError("disk full")
        save(wrapped, place, **about)

    monkeypatch.setattr(adapters, "save", full)
    for settings in ([], ["checkpoint_every=4", "resume=auto"]):
        with pytest.raises(TrainingError, match=r"4 steps.*disk full.*step_000004") as raised:
            train("run", *settings)
        assert f"resume={tmp_path / 'run'}" in str(raised.value)
    monkeypatch.undo()


def test_what_cannot_be_saved_says_what_is_still_there(train, monkeypatch, at_step, tmp_path):
    def full():
        monkeypatch.setattr(torch, "save", failing(OSError("disk full")))
        raise ValueError("cache entry gone")

    at_step(3, full)
    with pytest.raises(ValueError, match="cache entry gone") as raised:
        train("run", "checkpoint_every=2")
    (note,) = raised.value.__notes__
    assert holds(note, "step 3 ... step_000002")


def test_a_stop_request_at_the_last_step_lets_the_run_end(train, at_step):
    at_step(3, ask_to_stop())
    assert (train("run") / "adapter").exists()


def test_the_tracker_is_finished_however_a_run_ends(train, at_step, monkeypatch):
    finished = []
    monkeypatch.setattr(NoTracker, "finish", lambda self: finished.append("finished"))
    train("whole", "steps=1")
    at_step(0, ask_to_stop())
    with pytest.raises(Interrupted):
        train("stopped")
    with pytest.raises(TrainingError):
        train("failed", "optimizer.lr=1e30", "max_nonfinite_steps=1")
    assert finished == ["finished"] * 3


def test_a_second_request_at_once_is_part_of_the_first_and_a_later_one_kills(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(signals, "time", SimpleNamespace(monotonic=lambda: clock.now))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        with stop_requests() as stop:
            signal.raise_signal(signal.SIGINT)
            clock.now = 0.2
            signal.raise_signal(signal.SIGTERM)
            assert (stop.number, stop.time) == (signal.SIGINT, 0.0)
            clock.now = 0.4
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_two_ctrl_c_50_ms_apart_are_two_and_one_that_a_launcher_repeats_is_one(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(signals, "time", SimpleNamespace(monotonic=lambda: clock.now))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        monkeypatch.setenv("LOCAL_RANK", "0")
        with stop_requests():
            signal.raise_signal(signal.SIGINT)
            clock.now = 0.05
            signal.raise_signal(signal.SIGINT)
        monkeypatch.delenv("LOCAL_RANK")
        clock.now = 0.0
        with stop_requests():
            signal.raise_signal(signal.SIGINT)
            clock.now = 0.01  # `timeout -s INT` sends it twice
            signal.raise_signal(signal.SIGINT)
            clock.now = 0.05
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_rate_far_too_high_ends_in_that_error_and_not_in_a_ruined_adapter(train, tmp_path):
    with pytest.raises(TrainingError, match="not finite"):
        train("run", "optimizer.lr=1e30")
    assert checkpoints(tmp_path / "run") == []
    assert not (tmp_path / "run" / "adapter").exists()
