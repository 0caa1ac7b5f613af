"""What the page of a run starts and stops."""

import subprocess
import time

import psutil
import pytest
from run_folders import logged_run
from studio_helpers import PYTHON, part, wait_for_job, words

from train.pages import runs
from train.pages.queue import ROOT
from train.utils.lock import LOCK_FILE, Lock

pytest_plugins = ("studio_helpers",)

RUN = str(ROOT / "train/run.py")
HOLD = """
import signal, sys, time
from pathlib import Path
from train.utils.lock import Lock
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell starts in the background
lock = Lock(Path(sys.argv[1]))
print("locked", flush=True)
try:
    time.sleep(60)
except KeyboardInterrupt:
    print("saved", flush=True)
    lock.release()
    sys.exit(130)
"""


@pytest.fixture
def page(studio_page):
    return studio_page()


@pytest.fixture
def folder(page):
    return page.known.workspace.outputs / "cards" / "run"


def test_a_run_of_a_shell_is_stopped_by_a_signal(page, folder):
    run = logged_run(folder, 0, 10)
    assert "does not run" in page.submit("/runs/stop", folder=str(run))["error"]
    process = subprocess.Popen([PYTHON, "-c", HOLD, str(run)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "locked\n"
    assert "Stop" in part(page, run, "actions")
    assert "asked to stop" in page.submit("/runs/stop", folder=str(run))["message"]
    assert process.communicate(timeout=30)[0] == "saved\n"


def test_a_run_of_the_queue_is_stopped_as_its_job(page, folder):
    run = logged_run(folder, 0, 10)
    page.known.queue.known = lambda command: True
    job = page.known.queue.add("run", [PYTHON, "-c", HOLD, str(run)])
    while page.known.queue.tail(job.number) != "locked":
        time.sleep(0.05)
    assert "asked to stop" in page.submit("/runs/stop", folder=str(run))["message"]
    assert wait_for_job(page.known.queue, job.number, "stopped", "done", "failed").state == "stopped"
    assert page.known.queue.tail(job.number) == "locked\nsaved"


def test_a_run_whose_process_is_not_found_says_how_to_stop_it(page, folder, monkeypatch):
    run = logged_run(folder, 0, 10)
    lock = Lock(run)  # of this process, which the studio never signals
    sent = []
    monkeypatch.setattr("psutil.Process.send_signal", lambda self, number: sent.append(number))
    error = page.submit("/runs/stop", folder=str(run))["error"]
    assert LOCK_FILE in error
    assert "Ctrl-C" in error
    assert sent == []
    lock.release()


def test_a_sample_grid_is_asked_for_where_a_run_draws_them(page, folder):
    run = logged_run(folder, 0, 10)
    assert "does not run" in page.submit("/runs/sample", folder=str(run))["error"]
    lock = Lock(run)
    assert "Sample now" in part(page, run, "actions")
    assert "asked" in page.submit("/runs/sample", folder=str(run))["message"]
    assert (run / "sample").read_bytes() == b""
    lock.release()
    none = logged_run(folder.with_name("none"), 0, 10, sample_every=0)
    lock = Lock(none)
    assert "Sample now" not in part(page, none, "actions")
    assert "sample_every=0" in page.submit("/runs/sample", folder=str(none))["error"]
    assert not (none / "sample").exists()
    lock.release()


def test_a_run_whose_lock_is_not_seen_may_run_elsewhere(page, folder):
    run = logged_run(folder, 0, 10)
    assert "runs on a machine whose locks are not shared" not in words(part(page, run, "now"))
    (run / LOCK_FILE).touch()
    assert "runs on a machine whose locks are not shared" in words(part(page, run, "now"))
    assert "asked" in page.submit("/runs/sample", folder=str(run))["message"]


def test_a_stopped_run_resumes_with_its_own_command(page, folder, monkeypatch):
    monkeypatch.setattr(page.known.queue, "start_next", lambda: None)
    run = logged_run(folder, 0, 10, 20, device="cuda:1")
    shown = words(part(page, run, "actions"))
    command = f"python {RUN} +experiment=tarot steps=40 'sample.prompts=[a red cup]' resume=outputs/cards/run"
    assert command in shown
    assert page.submit("/runs/resume", folder=str(run), steps=40)["redirect"] == "/jobs/1"
    job = page.known.queue.job(1)
    assert (job.shown, job.device, job.folder) == (command, "cuda:1", str(run))
    assert job.command[0] == PYTHON
    assert "is in the queue already" in page.submit("/runs/resume", folder=str(run), steps=40)["error"]


def test_more_steps_take_the_place_of_the_old_ones(page, folder, monkeypatch):
    monkeypatch.setattr(page.known.queue, "start_next", lambda: None)
    run = logged_run(folder, 0, 10, 40, finished=True)
    text = part(page, run, "actions")
    assert "Train longer" in text
    assert 'value="60"' in text
    assert "steps=60 resume=" in words(text)  # half as many again, in the command too
    assert "has done its 40 steps" in page.submit("/runs/resume", folder=str(run))["error"]
    assert "has done its 40 steps" in page.submit("/runs/resume", folder=str(run), steps=40)["error"]
    page.submit("/runs/resume", folder=str(run), steps=60)
    settings = page.known.queue.job(1).command[2:]
    assert settings == ["+experiment=tarot", "sample.prompts=[a red cup]", "steps=60", "resume=outputs/cards/run"]


def test_processes_of_a_run_are_started_again(page, folder):
    run = logged_run(folder, 0, 10)
    (run / "command.txt").write_text("python train/run.py\naccelerate launch --num_processes 2 train/run.py seed=1\n")
    words_of = runs.resume_command(page.known, run, None)
    assert words_of[1:] == [
        *("-m", "accelerate.commands.launch", "--num_processes", "2"),
        *(RUN, "seed=1", "resume=outputs/cards/run"),
    ]


@pytest.mark.parametrize(
    "command",
    [
        "rm -rf /",
        "python -c 'import os'",
        "python train/run.py --config-dir /tmp/x",
        "python train/run.py optimizer._target_=os.system",
        "python train/run.py 'name=${oc.env:HOME}'",
        "python train/run.py hydra.run.dir=/tmp",
        "python train/run.py hub.token='***'",
        "accelerate launch --num_processes 2 --config_file x train/run.py",
        "python train/run.py 'unclosed",
        "",
    ],
)
def test_a_command_of_someone_else_is_not_started(page, folder, command):
    run = logged_run(folder, 0, 10)
    (run / "command.txt").write_text(command)
    answer = page.submit("/runs/resume", folder=str(run))
    assert answer["status"] == 400
    assert "with resume=outputs/cards/run" in answer["error"]
    assert page.known.queue.jobs() == []
    assert "To resume it:" in words(part(page, run, "actions"))


def test_nothing_is_resumed_while_a_run_is_running_or_without_a_checkpoint(page, folder):
    run = logged_run(folder, 0)
    assert "no checkpoint" in page.submit("/runs/resume", folder=str(run))["error"]
    lock = Lock(run)
    assert "is running" in page.submit("/runs/resume", folder=str(run))["error"]
    lock.release()


def test_signals_reach_only_the_process_that_holds_the_lock(folder):
    run = logged_run(folder, 0, 10)
    code = HOLD.replace('print("locked"', 'import os\nif os.fork() == 0:\n    time.sleep(60)\nprint("locked"')
    process = subprocess.Popen(
        [PYTHON, "-c", code, str(run)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout.readline() == "locked\n"
    try:
        assert runs.lock_holder(run).pid == process.pid  # not its worker, which inherited the open file
    finally:
        children = psutil.Process(process.pid).children()
        for child in children:
            child.kill()
        process.kill()
        process.wait()
        psutil.wait_procs(children, timeout=30)
    assert runs.lock_holder(run) is None
