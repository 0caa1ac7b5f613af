import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from train_helpers import ask_to_stop, lines, values

from train.stopping import Interrupted
from train.tracking import Metrics, NoTracker, TensorBoardTracker, WandbTracker

pytest_plugins = ("train_helpers",)


class Remembering(NoTracker):
    def __init__(self):
        self.events = []

    def start(self, folder, name, config):
        self.events.append(("start", folder.name, name, config))

    def log(self, step, values):
        self.events.append(("log", step, values))

    def finish(self):
        self.events.append(("finish",))


# ------------------------------------------------------------------ metrics.jsonl


def test_every_value_goes_into_the_file_and_to_the_tracker(tmp_path):
    metrics = Metrics(tmp_path, tracker := Remembering())
    metrics.start("cats", {"steps": 2}, 0)
    metrics.log(1, loss=0.5, lr=1e-4)
    metrics.log(2, validation_loss=0.25)
    metrics.close()
    assert lines(tmp_path) == [{"step": 1, "loss": 0.5, "lr": 1e-4}, {"step": 2, "validation_loss": 0.25}]
    assert tracker.events == [
        ("start", tmp_path.name, "cats", {"steps": 2}),
        ("log", 1, {"loss": 0.5, "lr": 1e-4}),
        ("log", 2, {"validation_loss": 0.25}),
        ("finish",),
    ]


def test_a_line_is_on_disk_as_soon_as_it_is_logged(tmp_path):
    metrics = Metrics(tmp_path, NoTracker())
    metrics.log(1, loss=0.5)
    assert values(tmp_path) == [0.5]


@pytest.mark.parametrize(("step", "kept"), [(0, []), (2, [0, 1, 2]), (3, [0, 1, 2, 3]), (9, [0, 1, 2, 3, 4])], ids=str)
def test_going_on_drops_what_was_logged_past_the_checkpoint_and_a_half_written_line(tmp_path, step, kept):
    text = "".join(json.dumps({"step": i, "loss": i / 7}) + "\n" for i in range(5))
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 5, "loss": 0.')
    metrics = Metrics(tmp_path, NoTracker())
    metrics.start("run", {}, step)
    metrics.log(step + 1, loss=1.0)
    assert [line["step"] for line in lines(tmp_path)] == [*kept, step + 1]
    assert values(tmp_path)[:-1] == [i / 7 for i in kept]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("garbage", ["garbage", "[1]", '{"loss": 1}', '{"step": "x"}', "\x00\x00", "3"])
def test_lines_that_are_none_are_skipped_when_a_run_goes_on(tmp_path, garbage):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1, "loss": 0.5}}\n{garbage}\n{{"step": 2, "loss": 0.25}}\n')
    Metrics(tmp_path, NoTracker()).start("run", {}, 2)
    assert lines(tmp_path) == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}]


def test_numbers_that_cannot_be_written_are_a_warning(tmp_path, capfd):
    metrics = Metrics(tmp_path, tracker := Remembering())
    (tmp_path / "metrics.jsonl").mkdir()
    metrics.log(1, loss=0.5)
    assert "warning: the numbers of step 1 could not be written to" in capfd.readouterr().err
    assert tracker.events == [("log", 1, {"loss": 0.5})]


def test_a_process_that_starts_nothing_finishes_nothing(tmp_path):
    metrics = Metrics(tmp_path, tracker := Remembering())
    metrics.close()
    assert tracker.events == []


# ------------------------------------------------------------------ trackers


def scalars(run):
    """{name: [(step, value)]} of all event files of a run, read as TensorBoard does."""
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return {key: [(event.step, event.value) for event in events.Scalars(key)] for key in events.Tags()["scalars"]}


def test_tensorboard_gets_the_numbers_and_the_sheets(train):
    run = train(
        "run", "tracker=tensorboard", "validate_every=2", "sample_every=4", "sample.prompts=[a fox]", "sample.steps=1"
    )
    found = scalars(run)
    assert [step for step, _ in found["loss"]] == [1, 2, 3, 4]
    assert [value for _, value in found["loss"]] == pytest.approx(values(run), rel=1e-6)
    assert [step for step, _ in found["validation_loss"]] == [0, 2, 4]
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Images("samples")] == [0, 4]
    assert "config/text_summary" in events.Tags()["tensors"]


def test_a_stopped_run_has_given_tensorboard_all_it_logged(train, at_step, tmp_path):
    at_step(2, ask_to_stop())
    with pytest.raises(Interrupted):
        train("run", "tracker=tensorboard")
    assert [step for step, _ in scalars(tmp_path / "run")["loss"]] == [1, 2, 3]


def test_wandb_works_without_network_and_keeps_its_run_over_a_resume(train, at_step, monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    settings = ["tracker=wandb", "tracker.mode=offline"]
    at_step(1, ask_to_stop())
    with pytest.raises(Interrupted):
        train("run", *settings)
    run = tmp_path / "run"
    kept = (run / "wandb_id").read_text()
    assert kept
    train("run", *settings, "resume=auto")
    assert (run / "wandb_id").read_text() == kept
    written = sorted(path.name for path in (run / "wandb").glob("offline-run-*"))
    assert len(written) >= 1
    assert all(name.endswith(f"-{kept}") for name in written)
    assert len(values(run)) == 4


def test_wandb_that_cannot_be_reached_is_one_error_with_a_remedy(tmp_path, monkeypatch):
    import wandb

    def fail(**settings):
        raise wandb.errors.UsageError("No API key configured")

    monkeypatch.setattr(wandb, "init", fail)
    with pytest.raises(ValueError, match=r"tracker=wandb: No API key .*wandb login.*tracker\.mode=offline"):
        WandbTracker().start(tmp_path, "run", {})


def test_tensorboard_that_is_not_installed_is_one_error_with_a_remedy(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match=r"tracker=tensorboard needs TensorBoard: pip install"):
        TensorBoardTracker().start(tmp_path, "run", {})


def test_an_unknown_mode_of_wandb_is_refused():
    with pytest.raises(ValueError, match=r"tracker\.mode='on' must be online, offline or disabled"):
        WandbTracker(mode="on")
