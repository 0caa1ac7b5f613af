"""Jobs of several processes: what Slurm, or submitit on this machine, starts trains together as one run."""

import os
import re
import signal
import sys

import pytest
import torch
from message_helpers import holds
from omegaconf import OmegaConf
from train_helpers import compose, execute, random_tiny, run_training, values

from train.checkpoints import resume_command
from train.sweeps import records, slurm
from train.utils.signals import Interrupted

pytest_plugins = ("train_helpers",)

TOLD = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")


@pytest.fixture
def task(monkeypatch, tmp_path):
    """`task(3)`: this process is the fourth of four that Slurm started for a job, two on each of two nodes."""
    pytest.importorskip("submitit", reason="the extra `slurm`")
    threads = torch.get_num_threads()
    for key in TOLD:
        monkeypatch.setenv(key, "")  # so that it is put back, though it is set by no monkeypatch
        monkeypatch.delenv(key)

    def of(rank, tasks=4):
        given = {
            **{"SUBMITIT_EXECUTOR": "slurm", "SUBMITIT_FOLDER": str(tmp_path), "SLURM_JOB_ID": "17"},
            **{"SLURM_NTASKS": str(tasks), "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "gpu[07-08]"},
            **{"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank % 2), "SLURM_CPUS_PER_TASK": "3"},
        }
        for key, value in given.items():
            monkeypatch.setenv(key, value)
        slurm.join_tasks()
        return {key: os.environ.get(key) for key in TOLD}

    yield of
    torch.set_num_threads(threads)


def test_each_process_of_a_job_is_told_of_the_others(task, monkeypatch):
    told = [task(rank) for rank in range(4)]
    assert [each["RANK"] for each in told] == ["0", "1", "2", "3"]
    assert [each["LOCAL_RANK"] for each in told] == ["0", "1", "0", "1"]
    common = {(each["WORLD_SIZE"], each["LOCAL_WORLD_SIZE"], each["MASTER_ADDR"]) for each in told}
    assert common == {("4", "2", "gpu07")}
    (port,) = {each["MASTER_PORT"] for each in told}
    assert 20000 <= int(port) <= 60000
    assert torch.get_num_threads() == int(os.environ["OMP_NUM_THREADS"]) == 3
    monkeypatch.delenv("MASTER_PORT")
    monkeypatch.setenv("SLURM_JOB_ID", "18")
    assert task(0)["MASTER_PORT"] == port  # of the same job
    monkeypatch.delenv("MASTER_PORT")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "17")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    assert task(0)["MASTER_PORT"] != port  # another job of the sweep may run on the same machine


def test_a_job_of_one_process_is_told_nothing(task):
    assert set(task(0, tasks=1).values()) == {None}


def test_outside_of_submitit_slurms_variables_are_left_alone(monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    slurm.join_tasks()
    assert "WORLD_SIZE" not in os.environ


def test_of_several_processes_the_first_notes_that_the_job_is_started_again(task, tmp_path):
    """submitit's handler starts the job again in the first, and comes back in the others."""
    called = []
    before = signal.signal(signal.SIGUSR2, lambda number, frame: called.append(number))
    try:
        for rank in (1, 0):
            task(rank)
            with pytest.raises(Interrupted), slurm.within_time_limit(tmp_path):
                raise Interrupted("saved", signal.SIGUSR1)
            assert records.record(tmp_path).get("status") == (None if rank else "waiting")
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert called == [signal.SIGUSR2] * 2


def test_the_command_that_goes_on_with_a_submitted_job_is_not_submitits(run_command, task, tmp_path, monkeypatch):
    said = []
    task(0, tasks=2)

    def work(config):
        said.append(resume_command.command_line(tmp_path))

    monkeypatch.setattr(slurm, "join_tasks", lambda: None)
    code, _, err = run_command("-m", f"output_dir={tmp_path}", "steps=3", task=work)
    assert code == 0, err
    assert said == [f"accelerate launch --multi_gpu --num_processes 2 train/run.py steps=3 resume={tmp_path}"]


# ------------------------------------------------------------------ settings


def launcher(**changes):
    made = {"_target_": "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher", "tasks_per_node": 1}
    return OmegaConf.create(made | {"gpus_per_node": 1} | changes)


def test_every_process_of_a_job_has_a_gpu_or_none_has(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    slurm.check_launcher(launcher())
    slurm.check_launcher(launcher(tasks_per_node=4, gpus_per_node=4))
    slurm.check_launcher(launcher(tasks_per_node=2, gpus_per_node=None))
    for tasks, gpus in ((1, 4), (2, 1)):
        said = rf"gpus_per_node={gpus}\b.*hydra\.launcher\.tasks_per_node={tasks}\b"
        with pytest.raises(ValueError, match=said):
            slurm.check_launcher(launcher(tasks_per_node=tasks, gpus_per_node=gpus))


def test_what_cannot_be_submitted_is_one_message_and_nothing_is_submitted(run_command, monkeypatch, tmp_path):
    pytest.importorskip("submitit", reason="the extra `slurm`")
    given = ["-m", "hydra/launcher=slurm", f"output_dir={tmp_path / 'sweep'}", "steps=1,2"]
    message = run_command.refused(*given, "hydra.launcher.gpus_per_node=4")
    assert holds(message, "hydra.launcher.gpus_per_node=4 ... hydra.launcher.tasks_per_node=1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "several processes" in run_command.refused(*given)
    monkeypatch.setenv("RANK", "1")
    code, _, err = run_command(*given)
    assert (code, err) == (2, "")
    assert not (tmp_path / "sweep").exists()


# ------------------------------------------------------------------ processes


@pytest.mark.slow
def test_a_job_of_two_processes_is_the_run_of_one(tmp_path):
    """On submitit's local executor, which starts both; of jobs that fail in all processes the table says so once."""
    pytest.importorskip("submitit", reason="the extra `slurm`")
    settings = [f"model.path={random_tiny(tmp_path / 'model')}", f"cache_dir={tmp_path / 'cache'}", "steps=2"]
    settings += ["+experiment=debug", "buckets.resolution=32", "sample_every=0", "checkpoint_every=0"]
    local = ["hydra/launcher=submitit_local", "hydra.launcher.tasks_per_node=2", "hydra.launcher.timeout_min=5"]
    start = [sys.executable, "train/run.py", "-m", *local, *settings, "batch_size=1", "adapter.rank=2,0"]
    done = execute([*start, f"output_dir={tmp_path / 'two'}"])
    assert done.returncode == 2, done.stderr
    said = "".join(file.read_text() for file in (tmp_path / "two" / ".submitit").glob("*/*_0_log.out"))
    assert len(re.findall("processes: 2, CPU threads each: ", said)) == 1, said
    assert [job.status for job in records.read_jobs(tmp_path / "two")] == ["done", "failed"]
    assert len(re.findall(r"^job 1: .*adapter\.rank=0", done.stdout, re.MULTILINE)) == 1
    one = run_training(compose(*settings, "batch_size=2", "adapter.rank=2", f"output_dir={tmp_path / 'one'}")).parent
    for key in ("loss", "validation_loss"):
        assert values(tmp_path / "two" / "0", key) == pytest.approx(values(one, key), rel=1e-5)
