import json
import re
import struct
import time

import pytest
import wandb
from message_helpers import holds
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from train_helpers import ask_to_stop, lines, values
from wandb.proto import wandb_internal_pb2

from train.tracking import NoTracker, TensorBoardTracker, WandbTracker
from train.tracking.metrics import Metrics
from train.utils.signals import Interrupted

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


@pytest.mark.parametrize(("step", "kept"), [(-1, []), (0, [0]), (2, [0, 1, 2]), (9, [0, 1, 2, 3, 4])], ids=str)
def test_going_on_drops_what_was_logged_past_the_checkpoint_and_a_half_written_line(tmp_path, step, kept):
    text = "".join(json.dumps({"step": i, "loss": i / 7}) + "\n" for i in range(5))
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 5, "loss": 0.')
    metrics = Metrics(tmp_path, NoTracker())
    metrics.start("run", {}, step)
    metrics.log(step + 1, loss=1.0)
    assert [line["step"] for line in lines(tmp_path)] == [*kept, step + 1]
    assert values(tmp_path)[:-1] == [i / 7 for i in kept]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]  # such a line is not worth a copy


DAMAGED = ["garbage", "[1]", '{"loss": 1}', '{"step": "x"}', "\x00\x00", "3", "[" * 100_000, '{"step": true}']
FOREIGN = ['{"step": 1, "note": "by hand"}', '{"step": -1, "loss": 2}', '{"step": 2, "x": {}}']
CONFLICTING = ['{"step": 1, "loss": 0.75}', '{"step": 2, "loss": 0.75}']  # that of step 2 comes before the run's own


@pytest.mark.parametrize("line", [*DAMAGED, *FOREIGN, *CONFLICTING])
def test_lines_that_cannot_be_used_are_removed_on_resuming_and_kept_in_a_copy(tmp_path, line, capfd):
    text = f'{{"step": 1, "loss": 0.5}}\n{line}\n{{"step": 2, "loss": 0.25}}\n'
    (tmp_path / "metrics.jsonl").write_text(text)
    Metrics(tmp_path, NoTracker()).start("run", {}, 2)
    second = 0.75 if '"step": 2, "loss": 0.75' in line else 0.25
    assert lines(tmp_path) == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": second}]
    assert holds(capfd.readouterr().err, "warning: ... metrics.jsonl ... 1 line ... metrics.damaged.jsonl")
    assert (tmp_path / "metrics.damaged.jsonl").read_text() == text
    Metrics(tmp_path, NoTracker()).start("run", {}, 2)
    assert capfd.readouterr().err == ""
    (tmp_path / "metrics.jsonl").write_text(again := text + "garbage\n")  # the first copy stays
    Metrics(tmp_path, NoTracker()).start("run", {}, 2)
    assert (tmp_path / "metrics.damaged.jsonl").read_text() == text
    assert (tmp_path / "metrics.damaged1.jsonl").read_text() == again


def test_a_step_that_is_there_twice_is_kept_once_and_all_are_in_order(tmp_path, capfd):
    found = [{"step": 1, "loss": 0.5}, {"step": 2, "skipped": 1}, {"step": 2, "validation_loss": 0.5}]
    again = [found[0], *found, {"step": 0, "validation_loss": 1.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in again))
    Metrics(tmp_path, NoTracker()).start("run", {}, 2)
    assert lines(tmp_path) == [again[-1], *found]
    assert capfd.readouterr().err == ""


def test_numbers_that_cannot_be_written_are_a_warning(tmp_path, capfd):
    metrics = Metrics(tmp_path, tracker := Remembering())
    (tmp_path / "metrics.jsonl").mkdir()
    metrics.log(1, loss=0.5)
    assert holds(capfd.readouterr().err, "warning: ... step 1 ... metrics.jsonl")
    assert tracker.events == [("log", 1, {"loss": 0.5})]


def test_numbers_that_could_not_be_written_are_kept_until_they_can_be_and_said_once(tmp_path, capfd):
    metrics = Metrics(tmp_path, NoTracker())
    (tmp_path / "metrics.jsonl").mkdir()
    metrics.log(1, loss=0.5)
    metrics.log(2, loss=0.25)
    assert capfd.readouterr().err.count("warning:") == 1
    (tmp_path / "metrics.jsonl").rmdir()
    metrics.log(3, loss=0.125)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]


def test_the_end_writes_what_could_not_be_written_or_says_that_it_is_lost(tmp_path, capfd):
    metrics = Metrics(tmp_path, NoTracker())
    (tmp_path / "metrics.jsonl").mkdir()
    metrics.log(1, loss=0.5)
    metrics.log(2, loss=0.25)
    capfd.readouterr()
    metrics.close()
    assert holds(capfd.readouterr().err, "warning: 2 lines ... metrics.jsonl")
    (tmp_path / "metrics.jsonl").rmdir()
    metrics.close()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]


@pytest.mark.parametrize("name", ["metrics.jsonl", "validation.jsonl"])
def test_a_folder_in_the_place_of_the_numbers_is_named_with_a_remedy(tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "file").touch()
    with pytest.raises(ValueError, match=rf"{name}\b"):
        Metrics(tmp_path, NoTracker()).start("run", {}, 2)


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


def test_tensorboard_gets_the_numbers_and_the_grids(train):
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
    assert all(f"-{kept}" in name for name in written)  # wandb numbers two of the same second
    assert len(values(run)) == 4


HUB_TOKEN = "hf_" + "Qz7" * 11 + "x"
PLANTED = {
    "HF_TOKEN": HUB_TOKEN,
    "WANDB_API_KEY": "5ecre7" * 6 + "abcd",
    "FLUX2_TEXT_ENCODER_TOKEN": "planted-text-encoder-token",
    "AWS_SECRET_ACCESS_KEY": "planted/aws+key0123456789",
}


def records(file):
    """The records of a .wandb file: a log of LevelDB's form, with a header of 7 bytes."""
    data, at, found, parts = file.read_bytes(), 7, [], b""
    while at + 7 <= len(data):
        if (1 << 15) - at % (1 << 15) < 7:  # the rest of a block that no header fits into
            at += (1 << 15) - at % (1 << 15)
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            found.append(wandb_internal_pb2.Record.FromString(parts))
            parts = b""
    return found


@pytest.fixture
def planted(monkeypatch, tmp_path):
    """Secrets in the environment, and a home folder of its own."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("WANDB_SILENT", "true")
    for key, value in PLANTED.items():
        monkeypatch.setenv(key, value)


def without_secrets(folder):
    """All files below, of which none holds a planted secret."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    for file in files:
        content = file.read_bytes()
        for name, value in PLANTED.items():
            assert value.encode() not in content, f"{name} is in {file}"
    return files


def looked_at(tmp_path):
    """A short run with numbers and grids, and a secret in its command line."""
    return [
        *(f"output_dir={tmp_path / 'run'}", "steps=2", "validate_every=1", "sample_every=2", "sample.steps=1"),
        f"sample.prompts=[a cup {HUB_TOKEN}]",
    ]


def test_wandb_draws_no_numbers_between_the_last_step_and_what_a_run_says_at_its_end(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(wandb, "init", lambda **settings: given.append(settings["settings"]))
    WandbTracker(mode="offline").start(tmp_path, "run", {})
    assert (given[0].max_end_of_run_history_metrics, given[0].max_end_of_run_summary_metrics) == (0, 0)
    assert not given[0].quiet  # which would hide how to send it, too


def test_an_offline_run_of_wandb_has_configuration_numbers_and_grids_and_no_secret(
    run_command, small, planted, at_step, tmp_path
):
    at_step(1, lambda: print("on the screen:", HUB_TOKEN))
    code, out, err = run_command(*small(*looked_at(tmp_path), "tracker=wandb", "tracker.mode=offline"))
    assert code == 0, err
    assert f"on the screen: {HUB_TOKEN}" in out
    assert "warning" not in err
    wandb.teardown()  # its process may write for a moment after the run has finished
    files = without_secrets(tmp_path)
    (file,) = [file for file in files if file.suffix == ".wandb"]
    found = records(file)
    assert not any(value in str(record) for record in found for value in PLANTED.values())
    kinds = [record.WhichOneof("record_type") for record in found]
    assert kinds[0] == "header"
    assert "exit" in kinds  # it was read to its end
    config = {item.key: json.loads(item.value_json) for item in found[kinds.index("run")].run.config.update}
    assert config["adapter"]["rank"] == 4
    assert config["sample"]["prompts"] == ["a cup ***"]
    lines = [record.history.item for record in found if record.WhichOneof("record_type") == "history"]
    logged = [{"".join(item.nested_key) or item.key: json.loads(item.value_json) for item in line} for line in lines]
    for key in ("loss", "validation_loss/0.55"):
        assert [line[key] for line in logged if key in line] == values(tmp_path / "run", key) != []
    grids = [path.read_bytes() for path in (tmp_path / "run" / "samples").iterdir()]
    sent = [path.read_bytes() for path in file.parent.glob("files/media/images/samples_*.png")]
    assert len(grids) == 2
    assert sorted(sent) == sorted(grids)
    # nor is there what wandb would find by itself
    assert "train/run.py" not in str(found)
    assert {path.name for path in file.parent.glob("files/*")} == {"media", "requirements.txt"}


def test_tensorboard_the_card_and_the_configuration_have_no_secret(run_command, small, planted, tmp_path):
    code, _, err = run_command(*small(*looked_at(tmp_path), "tracker=tensorboard"))
    assert code == 0, err
    without_secrets(tmp_path)
    run = tmp_path / "run"
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    (config,) = events.Tensors("config/text_summary")
    assert b"a cup ***" in config.tensor_proto.string_val[0]
    assert "a cup ***" in (run / "config.yaml").read_text()
    assert "'sample.prompts=[a cup ***]'" in (run / "adapter" / "README.md").read_text()


def test_a_run_with_a_masked_configuration_is_resumed(train, monkeypatch, at_step, tmp_path):
    monkeypatch.setenv("MY_TOKEN", "planted-token")
    settings = ["preservation=base", "preservation.prompts=[a cup planted-token]", "preservation.samples=1"]
    at_step(1, ask_to_stop())
    with pytest.raises(Interrupted):
        train("run", *settings)
    assert "planted-token" not in (tmp_path / "run" / "config.yaml").read_text()
    assert len(values(train("run", *settings, "resume=auto"))) == 4


# ------------------------------------------------------------------ a tracker that is down


def test_wandb_without_a_login_is_one_error_with_a_remedy(tmp_path, monkeypatch):
    def fail(**settings):
        raise wandb.errors.UsageError("No API key configured")

    monkeypatch.setattr(wandb, "init", fail)
    with pytest.raises(ValueError, match=r"tracker=wandb.*No API key.*wandb login.*tracker\.mode=offline"):
        WandbTracker().start(tmp_path, "run", {})


def test_a_missing_login_is_an_error_before_anything_is_computed(run_command, small, monkeypatch, tmp_path):
    monkeypatch.setattr(wandb, "login", lambda *, prompt, verify: prompt or verify)  # as without one
    monkeypatch.setattr("train.run.prepare_data", lambda config: pytest.fail("the cache was filled"))
    message = run_command.refused(*small(f"output_dir={tmp_path / 'run'}", "tracker=wandb"))
    assert holds(message, "tracker=wandb: ... no login ... `wandb login` ... tracker.mode=offline")
    assert not (tmp_path / "run").exists()


def test_wandb_that_cannot_be_reached_goes_on_offline_with_a_warning(train, monkeypatch, capfd):
    wandb.teardown()  # or an earlier run's settings hold
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", PLANTED["WANDB_API_KEY"])
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setattr("train.tracking.trackers.INIT_SECONDS", 2.0)
    began = time.monotonic()
    run = train("run", "tracker=wandb")
    assert time.monotonic() - began < 90
    err = capfd.readouterr().err
    assert re.search(r"warning: tracker=wandb\b.*`wandb sync .*run/wandb/offline-run-\*`", err)
    assert err.count("warning") == 1
    kept = (run / "wandb_id").read_text()
    (file,) = run.glob(f"wandb/offline-run-*/run-{kept}.wandb")
    wandb.teardown()  # its process may write for a moment after the run has finished
    steps = [record for record in records(file) if record.WhichOneof("record_type") == "history"]
    assert len(steps) == len(values(run)) == 4


def test_neither_start_nor_end_wait_long_for_a_server_and_the_run_keeps_its_id(tmp_path, monkeypatch):
    asked = {}
    monkeypatch.setattr(wandb, "init", lambda **settings: asked.update(settings))
    tracker = WandbTracker()
    assert tracker.run_id is None
    tracker.start(tmp_path, "run", {"steps": 3})
    assert asked["settings"].finish_timeout == 120
    assert asked["settings"].init_timeout == 30
    assert asked["mode"] == "online"
    assert asked["id"] == tracker.run_id == (tmp_path / "wandb_id").read_text()
    again = WandbTracker()
    again.start(tmp_path, "run", {"steps": 3})
    assert again.run_id == tracker.run_id


def test_tensorboard_that_is_not_installed_is_one_error_with_a_remedy(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match=r"tracker=tensorboard.*pip install"):
        TensorBoardTracker().start(tmp_path, "run", {})


def test_where_tensorboard_cannot_write_is_one_error_with_a_remedy(tmp_path):
    (tmp_path / "tensorboard").touch()
    with pytest.raises(ValueError, match=r"tracker=tensorboard.*/tensorboard\b.*tracker=none"):
        TensorBoardTracker().start(tmp_path, "run", {})


def test_an_unknown_mode_of_wandb_is_refused():
    with pytest.raises(ValueError, match=r"tracker\.mode='?on\b.*online.*offline.*disabled"):
        WandbTracker(mode="on")
