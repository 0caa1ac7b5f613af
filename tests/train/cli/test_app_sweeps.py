"""Sweeps from the command line: jobs that fail or stop, and secrets that nothing keeps."""

import json

from hydra.core.hydra_config import HydraConfig

from train.sweeps import callback
from train.utils.signals import Interrupted

pytest_plugins = ("train_helpers",)


def test_a_job_that_fails_says_so_and_the_others_go_on(run_command, tmp_path):
    ran = []

    def task(config):
        if config.adapter.rank == 0:
            raise ValueError("rank 0")
        ran.append((config.adapter.rank, HydraConfig.get().runtime.output_dir))

    code, _, err = run_command("-m", "adapter.rank=2,0,8", f"output_dir={tmp_path}", task=task)
    assert code == 2
    assert ran == [(2, str(tmp_path / "0")), (8, str(tmp_path / "2"))]
    assert err.startswith("error: job 1 (adapter.rank=0,")
    assert err.endswith("): rank 0\n")
    assert err.count("\n") == 1


def test_a_stop_request_ends_the_whole_sweep(run_command, tmp_path):
    ran = []

    def task(config):
        ran.append(config.steps)
        raise Interrupted("stopped")

    code, _, err = run_command("-m", "steps=1,2,3", f"output_dir={tmp_path}", task=task)
    assert (code, ran) == (130, [1])
    assert err.splitlines()[0] == "stopped"
    (way,) = err.splitlines()[1:]
    assert way.endswith(f"output_dir={tmp_path} resume=auto")


def test_a_sweep_keeps_no_secret(run_command, tmp_path):
    place = "model.path=https://jane:hidden@host/x"
    arguments = ["-m", "+text_encoder.token=hidden", place, "steps=1,2", f"output_dir={tmp_path}"]
    code, out, _ = run_command(*arguments, task=lambda config: None)
    assert code == 0
    record = json.loads((tmp_path / "0" / "job.json").read_text())
    assert record["overrides"][0] == "+text_encoder.token=..."
    assert "hidden" not in json.dumps(record)
    assert "hidden" not in "".join(line for line in out.splitlines() if line.startswith("job "))
    assert record["status"] == "done"


def test_nothing_that_a_sweep_writes_has_a_secret_of_its_command_line(run_command, tmp_path):
    """Not Hydra's multirun.yaml, which has all of it, nor what a job that fails or is stopped says."""

    def task(config):
        if config.steps == 1:
            raise ValueError(f"text_encoder.token={config.text_encoder.token!r} at {config.model.path} is refused")
        raise Interrupted(f"saved; go on with python train/run.py +text_encoder.token={config.text_encoder.token}")

    place = "model.path=https://jane:swordfish@host/x"
    given = ["-m", "+text_encoder.token=swordfish", place, "steps=1,2", f"output_dir={tmp_path}"]
    _, _, err = run_command(*given, task=task)
    written = {path.name: path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    assert [name for name, text in written.items() if "swordfish" in text] == []
    assert f"output_dir={tmp_path}" in written["multirun.yaml"]
    assert "+text_encoder.token=***" in written["multirun.yaml"]
    assert "is refused" in written["sweep.html"]
    assert "swordfish" not in err


def test_a_sweep_that_is_started_again_without_resume_leaves_what_is_done_as_done(run_command, tmp_path):
    given = ["-m", "steps=1", f"output_dir={tmp_path}"]
    assert run_command(*given, task=lambda config: None)[0] == 0

    def refuse(config):
        raise ValueError("it already holds a run")

    code, _, err = run_command(*given, task=refuse)
    assert code == 2
    assert "it already holds a run" in err
    assert json.loads((tmp_path / "0" / "job.json").read_text())["status"] == "done"
    assert run_command(*given, "resume=auto", task=refuse)[0] == 2
    assert json.loads((tmp_path / "0" / "job.json").read_text())["status"] == "failed"


def test_a_multirun_yaml_that_cannot_be_masked_is_removed(tmp_path):
    (tmp_path / "multirun.yaml").write_text("token: hidden: [")
    callback.mask_command_line(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_job_that_fails_through_a_mistake_of_ours_shows_where_and_the_others_go_on(run_command, tmp_path):
    ran = []

    def task(config):
        ran.append(config.steps)
        if config.steps == 1:
            raise KeyError("a bug")

    code, _, err = run_command("-m", "steps=1,2", f"output_dir={tmp_path}", task=task)
    assert (code, ran) == (2, [1, 2])
    assert 'raise KeyError("a bug")' in err
    assert "error: job 0 (" in err
    assert json.loads((tmp_path / "sweep.json").read_text())["jobs"][0]["status"] == "failed"
