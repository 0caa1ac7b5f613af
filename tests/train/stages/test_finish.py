"""The end of a run: what it owes is finished by the next start, and what could not be saved is said last."""

import os
import re
import shutil
import signal
import uuid
from itertools import pairwise
from types import SimpleNamespace

import pytest
from hydra.types import RunMode
from message_helpers import holds
from train_helpers import adapter, compose, lines, same_tensors, slow_but

from flux2.adapters.files import UNFINISHED_FILE
from flux2.utils.files import temporary_path
from train.checkpoints.checkpoint import checkpoints
from train.config.run_config import RunConfig
from train.evaluation.recommend import Recommendation
from train.objective.objective import Objective
from train.publishing import model_card
from train.publishing.hub import HubSettings
from train.reports import run_report
from train.stages import finish
from train.stages.memory import load_config
from train.tracking import NoTracker
from train.utils.signals import SIGNALS
from train.validation.loss import FixedNoiseLoss
from train.validation.samples import Sampler

pytest_plugins = ("train_helpers",)


class Killed(BaseException):
    """Takes the place of SIGKILL: nothing handles it."""


def killed(*_, **__):
    raise Killed


# ------------------------------------------------------------------ killed at the end


@pytest.mark.parametrize("every", slow_but([2, 0], fast=[2]))
def test_killed_between_the_adapter_and_the_report_auto_finishes_the_run(train, monkeypatch, tmp_path, every):
    run, settings = tmp_path / "run", [f"checkpoint_every={every}", "validate_every=2"]
    with monkeypatch.context() as patch:
        patch.setattr("train.run.write_card_and_report", killed)
        with pytest.raises(Killed):
            train("run", *settings)
    before, numbers = adapter(run), lines(run)
    assert not (run / "report.html").exists()
    assert train("run", *settings, "resume=auto") == run
    assert (run / "report.html").is_file()
    assert "| steps | 4 of 2 images |" in (run / "adapter" / "README.md").read_text()
    assert same_tensors(adapter(run), before)
    assert lines(run) == numbers
    assert not (run / UNFINISHED_FILE).exists()
    with pytest.raises(ValueError, match=r"has done its 4 steps"):
        train("run", *settings, "resume=auto")


def test_killed_before_its_new_adapter_a_run_that_trains_longer_does_not_keep_the_old_one(train, monkeypatch, tmp_path):
    whole = train("whole", "steps=6", "checkpoint_every=2")
    run = train("run", "checkpoint_every=2")
    with monkeypatch.context() as patch:
        patch.setattr("train.checkpoints.checkpointer.Checkpointer.finish", killed)
        with pytest.raises(Killed):
            train("run", "steps=6", "checkpoint_every=2", "resume=auto")
    assert [place.name for place in checkpoints(run)][-1] == "step_000006"
    train("run", "steps=6", "checkpoint_every=2", "resume=auto")
    assert same_tensors(adapter(run), adapter(whole))


@pytest.mark.parametrize("number", slow_but([signal.SIGTERM, signal.SIGINT], fast=[signal.SIGTERM]))
def test_a_stop_request_while_the_report_is_written_lets_the_run_end(train, monkeypatch, number):
    write, before = model_card.write, [signal.getsignal(name) for name in SIGNALS]
    monkeypatch.setattr(model_card, "write", lambda *given: (os.kill(os.getpid(), number), write(*given)))
    run = train("run")
    assert (run / "report.html").is_file()
    assert not (run / UNFINISHED_FILE).exists()
    assert [signal.getsignal(name) for name in SIGNALS] == before


def test_a_stop_request_while_the_tracker_finishes_lets_the_run_end(train, monkeypatch):
    monkeypatch.setattr(NoTracker, "finish", lambda self: os.kill(os.getpid(), signal.SIGTERM))
    assert (train("run") / "report.html").is_file()


def test_killed_while_the_adapter_is_pushed_auto_pushes_it(run_command, small, monkeypatch, tmp_path):
    run, pushed = tmp_path / "run", []
    settings = small(f"output_dir={run}", "checkpoint_every=2", "hub.push=true", "hub.repo_id=me/cats")
    monkeypatch.setattr(HubSettings, "check", lambda self, **_: None)
    with monkeypatch.context() as patch:
        patch.setattr("train.stages.finish.push_or_warn", killed)
        with pytest.raises(Killed):
            run_command(*settings)
    monkeypatch.setattr("train.stages.finish.push_or_warn", lambda folder, settings: pushed.append(folder))
    assert run_command(*settings, "resume=auto")[0] == 0
    assert len(pushed) == 1
    assert run_command(*settings, "resume=auto")[0] == 2
    assert len(pushed) == 1


def test_the_next_start_removes_what_a_kill_left_and_nothing_else(train, monkeypatch):
    run = train("run", "steps=2", "checkpoint_every=1", "sample_every=2", "sample.prompts=[a fox]", "sample.steps=1")
    name, part = uuid.uuid4().hex, temporary_path(run / "adapter" / "samples.png")
    left = [
        run / f".metrics.jsonl.{name}.tmp",
        run / ".probe-123",
        run / "samples" / f".step_000002.png.{name}.tmp",
        run / "adapter" / f".README.md.{name}.tmp",
        part,
        run / "adapter" / ".saving-ab_3x" / "adapter_model.safetensors",
        run / "checkpoints" / ".step_000003.part" / "adapter" / ".saving-1" / "x",
        run / "checkpoints" / ".step_000001.old" / "state.json",
    ]
    kept = [run / "notes.tmp", run / ".notes.tmp", run / "samples" / ".saving", run / "adapter" / "mine.part"]
    for file in [*left, *kept]:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("x")
    train("run", "steps=3", "checkpoint_every=1", "resume=auto")
    assert not [file for file in left if file.exists()]
    assert all(file.exists() for file in kept)
    assert not [path for path in run.rglob(".*") if path not in kept]


# ------------------------------------------------------------------ what is recommended


@pytest.mark.parametrize(
    ("checkpoint", "unfit", "command"),
    [
        (None, "", "use it    .* --adapter {}/adapter "),
        (None, "it rose", "try it    .* --adapter {}/adapter "),
        ("checkpoints/step_000002", "it rose", "use it    .* --adapter {}/checkpoints/step_000002/adapter "),
        ("checkpoints/step_000002", "", "use it    .* --adapter {}/checkpoints/step_000002/adapter "),
        ("checkpoints/step_000300", "", "use it    .* --adapter {}/adapter "),  # that of the last step
    ],
)
def test_the_last_line_never_recommends_an_adapter_that_is_worse_than_the_base(
    monkeypatch, tmp_path, checkpoint, unfit, command
):
    config, said = load_config(compose("model=tiny", "device=cpu")), []
    found = Recommendation(checkpoint and tmp_path / checkpoint, [], [], unfit, "step 2 (-6.9 %)")
    monkeypatch.setattr(config, "say", said.append)
    monkeypatch.setattr(finish, "recommend_or_warn", lambda _: found)
    monkeypatch.setattr(finish, "format_notes", lambda _: "")
    finish.announce(config, tmp_path / "adapter", "a caption")
    assert "best checkpoint: step 2 (-6.9 %)" in said[-3:-1]
    exported = [text.partition("--format")[0].split()[-1] for text in said if text.startswith("export ")]
    assert exported == ([] if command.startswith("try") else [said[-1].partition(" --prompt")[0].split()[-1]])
    assert re.match(command.format(re.escape(str(tmp_path))), said[-1])
    assert sum(text.startswith("careful") and unfit in text for text in said) == bool(unfit)


@pytest.mark.parametrize(
    ("settings", "references", "images"),
    [
        ([], [], []),
        ([], ["a.png", "b.png"], ["a.png", "b.png"]),
        ([], [""], ["image.png"]),  # in a table
        (["sample.prompts=[dark]"], ["a.png"], ["a.png"]),
        (["sample.prompts=[dark]", "sample.references=[c.png]"], ["a.png"], ["c.png"]),
    ],
)
def test_the_command_that_uses_an_edit_has_an_image(tmp_path, settings, references, images):
    config = RunConfig(compose("model=tiny", "device=cpu", *settings))
    words = finish.words_to_generate(config, tmp_path / "adapter", "a caption", references)
    assert [after for word, after in pairwise(words) if word == "--image"] == images


@pytest.mark.parametrize(
    ("factor", "optimizer", "again"),
    [
        (0.1, [], "python train/run.py model=tiny steps=9 optimizer.lr=1e-05"),
        (10, ["optimizer.lr=0.002"], "python train/run.py model=tiny steps=9 optimizer.lr=0.02"),
        (1, [], None),
        (0.1, ["optimizer=prodigy"], None),
    ],
)
def test_after_a_run_that_learned_nothing_or_diverged_the_next_command_has_another_rate(
    monkeypatch, tmp_path, factor, optimizer, again
):
    config = load_config(compose("model=tiny", "device=cpu", *optimizer))
    words = ["model=tiny", *optimizer, "output_dir=here", "steps=9", "resume=auto"]
    hydra = SimpleNamespace(mode=RunMode.RUN, overrides=SimpleNamespace(task=words))
    for module in ("train.stages.finish", "train.sweeps.job"):
        fake = SimpleNamespace(initialized=lambda: True, get=lambda: hydra)
        monkeypatch.setattr(f"{module}.HydraConfig", fake)
    found = Recommendation(None, [], [], "it rose" if factor < 1 else "", "none (why)", factor)
    commands = dict(finish.next_commands(config, tmp_path / "adapter", found, "a caption", exports=True))
    assert commands.pop("again", None) == again
    assert list(commands) == (["export", "use it"] if factor == 1 else ["try it"])


# ------------------------------------------------------------------ what is not saved


def in_the_place_of_checkpoints(run):
    """A file, from the second step on."""
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    (run / "checkpoints").write_text("mine")


def fail(*_, **__):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    "what", slow_but(["checkpoints", "grid", "card", "report", "metrics"], fast=["checkpoints", "card"])
)
def test_the_last_lines_and_the_exit_code_say_what_is_not_saved(
    run_command, small, at_step, monkeypatch, tmp_path, what
):
    run = tmp_path / "run"
    expected = {
        "checkpoints": ["step_000002", "step_000004"],
        "grid": ["step 0", "step 4"],
        "card": ["model card"],
        "report": [f"{run / 'report.html'}"],
        "metrics": ["3 lines ... metrics.jsonl"],
    }[what]
    if what == "checkpoints":
        at_step(1, lambda: in_the_place_of_checkpoints(run))
    elif what == "metrics":
        at_step(1, lambda: ((run / "metrics.jsonl").unlink(), (run / "metrics.jsonl").mkdir()))
    else:
        target = {"grid": (Sampler, "write_grid"), "card": (model_card, "write"), "report": (run_report, "write")}[what]
        monkeypatch.setattr(*target, fail)
    grids = ["sample_every=4", "sample.prompts=[a fox]", "sample.steps=1"] if what == "grid" else []
    code, _, err = run_command(*small(f"output_dir={run}", "checkpoint_every=2", *grids))
    assert code == 2
    last = err.splitlines()[-len(expected) :]
    for line, words in zip(last, expected, strict=True):
        assert holds(line, f"error: not saved: ... {words}"), err
    assert (run / "adapter" / "adapter_model.safetensors").is_file()
    assert "Traceback" not in err
    if what == "checkpoints":
        assert (run / "checkpoints").read_text() == "mine"


@pytest.mark.slow
def test_a_command_that_saves_everything_does_not_report_what_an_earlier_one_did_not(
    run_command, small, monkeypatch, tmp_path
):
    with monkeypatch.context() as patch:
        patch.setattr(model_card, "write", fail)
        assert run_command(*small(f"output_dir={tmp_path / 'one'}"))[0] == 2
    code, _, err = run_command(*small(f"output_dir={tmp_path / 'two'}"))
    assert (code, "not saved" in err) == (0, False)


# ------------------------------------------------------------------ an error while a step is logged


@pytest.mark.parametrize("log_every", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_the_numbers_of_a_step_whose_validation_failed_are_logged_on_resuming(train, monkeypatch, tmp_path, log_every):
    settings = ["steps=5", "validate_every=2", f"log_every={log_every}"]
    whole, run = train("whole", *settings), tmp_path / "run"
    call, calls = FixedNoiseLoss.__call__, []

    def third(self, *given):
        calls.append(1)
        if len(calls) == 3:  # after the base and step 2
            raise ValueError("cache entry gone")
        return call(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(FixedNoiseLoss, "__call__", third)
        with pytest.raises(ValueError, match="gone"):
            train("run", *settings)
    assert [place.name for place in checkpoints(run)] == ["step_000004"]
    twice = shutil.copytree(run, tmp_path / "twice")
    train("run", *settings, "resume=auto")
    assert lines(run) == lines(whole)
    assert (run / "validation.jsonl").read_text() == (whole / "validation.jsonl").read_text()
    assert same_tensors(adapter(run), adapter(whole))
    with monkeypatch.context() as patch:  # resumed from the same checkpoint twice: each line is there once
        patch.setattr(Objective, "losses", killed)
        with pytest.raises(Killed):
            train("twice", *settings, "resume=auto")
    train("twice", *settings, "resume=auto")
    assert lines(twice) == lines(whole)


@pytest.mark.parametrize("file", ["command.txt", "wandb_id"])
def test_a_file_of_the_run_folder_that_is_no_text_does_not_prevent_resuming(run_command, small, tmp_path, file):
    run = tmp_path / "run"
    settings = [f"output_dir={run}", "checkpoint_every=2", "tracker=wandb", "tracker.mode=disabled"]
    assert run_command(*small(*settings, "steps=2"))[0] == 0
    (run / file).write_bytes(b"\xff\x00\xfe" * 9)
    code, _, err = run_command(*small(*settings, "resume=auto"))
    assert code == 0, err
    assert holds(err, "wandb_id ... new id") == (file == "wandb_id")
    assert (run / "command.txt").read_text().endswith("resume=auto\n")
