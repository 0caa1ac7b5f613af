"""Searches and schedulers: Optuna's trials, submitit's jobs on this machine, several processes, and no extras."""

import json
import re
import signal
import sys
from pathlib import Path

import pytest
from message_helpers import holds
from omegaconf import OmegaConf
from train_helpers import CONF, adapter, execute, launch, lines, random_tiny, same_tensors

import train.run
import train.stages.model
from train.sweeps import records, slurm
from train.tracking.metrics import last_validation_loss
from train.utils.signals import Interrupted

pytest_plugins = ("train_helpers",)

TPE = ["hydra/sweeper=optuna", "hydra.sweeper.sampler.n_startup_trials=2"]
LOCAL = ["hydra/launcher=submitit_local", "hydra.launcher.timeout_min=5"]


@pytest.fixture
def search(run_command, small, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper.optuna_sweeper", reason="the extra `optuna`")

    def run(*overrides):
        given = {text.partition("=")[0] for text in overrides}  # of a key given twice, the search takes the plain value
        settings = [text for text in small() if text.partition("=")[0] not in {*given, "steps"}]
        return run_command("-m", *TPE, *settings, f"output_dir={tmp_path / 'sweep'}", "steps=2", *overrides)

    return run


# ------------------------------------------------------------------ Optuna


@pytest.mark.slow
def test_a_search_minimizes_the_last_validation_loss_and_survives_a_trial_that_fails(search, tmp_path):
    space = ["optimizer.lr=tag(log,interval(1e-4,1e-1))", "adapter.rank=0,4"]
    code, out, err = search("hydra.sweeper.n_trials=4", "validate_every=1", *space)
    assert code == 2, err
    about = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    done = [job for job in about["jobs"] if job["status"] == "done"]
    failed = [job for job in about["jobs"] if job["status"] == "failed"]
    assert (len(about["jobs"]), bool(done), bool(failed)) == (4, True, True)
    assert {job["overrides"]["adapter.rank"] for job in failed} == {"0"}
    best = min(done, key=lambda job: job["validation_loss"])
    assert about["best"] == best["job"]
    found = OmegaConf.load(tmp_path / "sweep" / "optimization_results.yaml")
    assert found.best_value == best["validation_loss"]
    assert str(found.best_params["optimizer.lr"]) == best["overrides"]["optimizer.lr"]
    assert f"optimizer.lr={found.best_params['optimizer.lr']}" in out[out.index("lowest validation loss") :]
    first = [job["overrides"]["optimizer.lr"] for job in about["jobs"]]
    code, out, _ = search("hydra.sweeper.n_trials=4", "validate_every=1", "resume=auto", *space)  # seeded: the same
    again = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert [job["overrides"]["optimizer.lr"] for job in again["jobs"]] == first
    assert out.count("done before") == len(done)


@pytest.mark.parametrize("setting", ["validate_every=0", "validation.samples=0"])
def test_a_search_without_a_validation_loss_is_one_error_before_anything_is_loaded(search, monkeypatch, setting):
    monkeypatch.setattr(train.stages.model, "load_transformer", lambda *a, **o: pytest.fail("loaded"))
    code, _, err = search("hydra.sweeper.n_trials=3", "validate_every=1", setting, "optimizer.lr=interval(1e-4,1e-1)")
    assert code == 2
    assert err.count("error: ") == 1
    assert holds(err, f"validation loss ... {setting}")


def test_a_job_returns_its_last_validation_loss_if_that_is_a_number(tmp_path):
    for text, value in (
        ('{"step": 1, "validation_loss": 3.0}\n{"step": 2, "validation_loss": 2.5}\n{"step": 3, "loss": 1.0}\n', 2.5),
        ('{"step": 1, "validation_loss": 3.0}\n{"step": 2, "validation_loss": NaN}\n', None),
        ('{"step": 1, "loss": 3.0}\n', None),
    ):
        (tmp_path / "metrics.jsonl").write_text(text)
        assert last_validation_loss(tmp_path) == value


@pytest.mark.parametrize(
    ("plugin", "extra"), [("hydra_optuna_sweeper.X", "optuna"), ("hydra_submitit_launcher.Y", "slurm")]
)
def test_without_an_extra_the_error_names_it(run_command, monkeypatch, plugin, extra):
    def unknown(*arguments, **options):
        raise RuntimeError(f"Unknown plugin class : 'hydra_plugins.{plugin}'")

    monkeypatch.setattr("hydra._internal.hydra.Hydra.multirun", unknown)
    assert f"pip install 'flux2-lora[{extra}]'" in run_command.refused("-m", "steps=1,2")


def test_the_plugins_of_the_configuration_are_those_of_the_extras():
    for file in ("sweeper/optuna", "launcher/slurm"):
        target = OmegaConf.load(CONF / "hydra" / f"{file}.yaml")._target_
        module = pytest.importorskip(target.rpartition(".")[0], reason="an extra")
        assert hasattr(module, target.rpartition(".")[2])


# ------------------------------------------------------------------ processes


@pytest.mark.slow
def test_two_processes_search_alike_and_get_the_same_values(small, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper.optuna_sweeper", reason="the extra `optuna`")
    model = random_tiny(tmp_path / "model")
    settings = [f"model.path={model}", f"output_dir={tmp_path / 'sweep'}", "cache_dir=null", "steps=1"]
    settings += [
        "+experiment=debug",
        "buckets.resolution=32",
        "sample_every=0",
        "checkpoint_every=0",
        "validate_every=1",
    ]
    done = execute(
        launch(
            "train/run.py",
            "-m",
            *TPE,
            "hydra.sweeper.n_trials=3",
            *settings,
            "optimizer.lr=tag(log,interval(1e-4,1e-1))",
            processes=2,
        ),
        ACCELERATE_USE_CPU="true",
    )
    assert done.returncode == 0, done.stderr
    about = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert [job["status"] for job in about["jobs"]] == ["done"] * 3
    assert "processes: 2" in done.stdout
    assert done.stdout.count("transformer of the previous job") == 2
    best = re.findall(r"Best value: ([0-9.]+)", done.stdout)  # of both processes
    assert len(best) == 2
    assert best[0] == best[1] == str(min(job["validation_loss"] for job in about["jobs"]))


# ------------------------------------------------------------------ submitit


@pytest.mark.slow
def test_jobs_of_submitit_leave_the_same_table(small, tmp_path, train):
    """In processes of their own, which a script on this machine starts: one fails, and the other is done."""
    pytest.importorskip("submitit", reason="the extra `slurm`")
    model = random_tiny(tmp_path / "model")
    settings = [f"model.path={model}", f"cache_dir={tmp_path / 'cache'}", "steps=2", "validate_every=1"]
    settings += ["+experiment=debug", "buckets.resolution=32", "sample_every=0", "checkpoint_every=0"]
    done = execute(
        [
            sys.executable,
            "train/run.py",
            "-m",
            *LOCAL,
            *settings,
            f"output_dir={tmp_path / 'sweep'}",
            "adapter.rank=0,2",
        ]
    )
    assert done.returncode == 2, done.stderr
    failed, other = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["jobs"]
    assert (failed["status"], other["status"]) == ("failed", "done")
    assert "adapter.rank=0" in failed["error"]
    assert failed["error"] in done.stdout
    alone = execute([sys.executable, "train/run.py", *settings, f"output_dir={tmp_path / 'alone'}", "adapter.rank=2"])
    assert alone.returncode == 0, alone.stderr
    assert lines(tmp_path / "alone") == lines(tmp_path / "sweep" / "1")
    assert same_tensors(adapter(tmp_path / "alone"), adapter(tmp_path / "sweep" / "1"))


@pytest.fixture
def submitted(monkeypatch, tmp_path):
    """A process as submitit starts it; gives what its handler of the warning was called with."""
    called = []

    def requeue(number, frame):
        called.append((number, records.record(tmp_path).get("status")))
        raise SystemExit(-1)

    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    monkeypatch.setenv("SUBMITIT_FOLDER", str(tmp_path))
    before = signal.signal(signal.SIGUSR2, requeue)
    yield called
    signal.signal(signal.SIGUSR2, before)


def test_before_the_time_limit_a_run_saves_first_and_is_then_started_again(submitted, tmp_path):
    asked = []

    def warn_and_stop():
        signal.raise_signal(signal.SIGUSR2)
        assert (asked, submitted) == ([signal.SIGUSR1], [])
        raise Interrupted("saved", signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, lambda number, frame: asked.append(number))  # as the loop does
    try:
        with pytest.raises(SystemExit), slurm.within_time_limit(tmp_path):
            warn_and_stop()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert submitted == [(signal.SIGUSR2, "waiting")]
    assert slurm.was_started_before(tmp_path)


def test_a_run_that_does_not_train_yet_is_started_again_at_once(submitted, tmp_path):
    with pytest.raises(SystemExit), slurm.within_time_limit(tmp_path):
        signal.raise_signal(signal.SIGUSR2)
    assert submitted == [(signal.SIGUSR2, "waiting")]


def test_a_job_that_is_canceled_is_not_started_again(submitted, tmp_path):
    with pytest.raises(Interrupted), slurm.within_time_limit(tmp_path):
        raise Interrupted("saved", signal.SIGTERM)
    assert submitted == []
    assert not slurm.was_started_before(tmp_path)
    assert callable(signal.getsignal(signal.SIGUSR2))


def test_outside_of_submitit_its_signal_is_left_alone(tmp_path):
    before = signal.getsignal(signal.SIGUSR2)
    with slurm.within_time_limit(tmp_path):
        assert signal.getsignal(signal.SIGUSR2) == before


@pytest.mark.parametrize("restarts", ["0", pytest.param("1", marks=pytest.mark.slow)])
def test_a_job_that_slurm_starts_again_goes_on(run_command, small, train, at_step, tmp_path, monkeypatch, restarts):
    place = tmp_path / "sweep" / "0"
    settings = [f"output_dir={tmp_path / 'sweep'}", "adapter.rank=4", "checkpoint_every=2"]

    def stop():
        raise ValueError("the node failed")

    at_step(3, stop)
    assert run_command("-m", *small(*settings))[0] == 2
    monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
    code, out, err = run_command("-m", *small(*settings))
    if restarts == "0":
        assert code == 2
        assert holds(err, f"{place} ... resume=auto")
        return
    assert code == 0, err
    assert str(place / "checkpoints" / "step_000003") in out
    alone = train("alone")
    assert lines(place) == lines(alone)
    assert same_tensors(adapter(place), adapter(alone))


def test_a_job_that_submitit_runs_gives_no_value_when_it_is_stopped(run_command, monkeypatch, tmp_path):
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    monkeypatch.setenv("SUBMITIT_FOLDER", str(tmp_path))

    def task(config):
        raise Interrupted("stopped after step 3, saved", signal.SIGTERM)

    code, _, err = run_command("-m", "steps=1,2", f"output_dir={tmp_path}", task=task)
    assert code == 2
    assert err.count("stopped after step 3, saved") == 2  # both were run
    assert [job.status for job in records.read_jobs(Path(tmp_path))] == ["stopped"] * 2


def test_a_search_for_the_highest_loss_is_refused(run_command, tmp_path):
    given = ["-m", "hydra/sweeper=optuna", "hydra.sweeper.direction=maximize", "hydra.sweeper.n_trials=2"]
    code, _, err = run_command(*given, "adapter.rank=choice(2,4)", "device=cpu", f"output_dir={tmp_path}")
    assert code == 2
    assert err.count("hydra.sweeper.direction=maximize") == 1
