"""The queue: one after the other on a device, whatever happens to the studio."""

import json
import os
import signal
import time
from dataclasses import replace

import psutil
import pytest
from studio_helpers import PYTHON, wait_for_job

from train.pages import queue as queues
from train.pages.queue import Queue, read_job, write_job


@pytest.fixture(autouse=True)
def own_state(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture
def queue(tmp_path):
    return Queue(tmp_path / "queue", known=lambda command: True)


def test_jobs_of_a_device_run_one_after_the_other_and_others_beside_them(queue, tmp_path):
    slow = [PYTHON, "-c", "import time; time.sleep(1.5); print('first', time.time())"]
    first = queue.add("first", slow, device="cuda:0")
    second = queue.add("second", [PYTHON, "-c", "print('second')"], device="cuda:0")
    other = queue.add("other", [PYTHON, "-c", "import sys; sys.exit(3)"], device="cpu")
    assert [queue.job(job.number).state for job in (first, second)] == ["running", "waiting"]
    assert wait_for_job(queue, other.number, "failed").code == 3
    assert wait_for_job(queue, second.number, "done").started >= wait_for_job(queue, first.number, "done").ended
    assert queue.tail(first.number).startswith("first")
    assert queue.tail(second.number) == "second"


def test_a_job_outlives_the_studio_and_another_one_sees_its_end(queue, tmp_path):
    job = queue.add("job", [PYTHON, "-c", "import time; time.sleep(1); print('end')"])
    again = Queue(queue.folder, queue.known)  # nothing of the first is used below
    assert again.job(job.number).state == "running"
    assert wait_for_job(again, job.number, "done").code == 0
    assert again.tail(job.number) == "end"


def test_a_stop_reaches_the_command_as_a_ctrl_c_and_a_waiting_one_is_taken_out(queue):
    waits = "import time\ntry:\n    print('ready', flush=True)\n    time.sleep(60)\n"
    command = waits + "except KeyboardInterrupt:\n    print('saved')"
    job, waiting = queue.add("job", [PYTHON, "-c", command]), queue.add("waiting", ["true"])
    while queue.tail(job.number) != "ready":
        time.sleep(0.05)
    queue.stop(waiting.number)
    queue.stop(job.number)
    wait_for_job(queue, job.number, "done", "stopped")
    assert queue.tail(job.number) == "ready\nsaved"
    assert queue.job(waiting.number).state == "stopped"


def test_a_killed_runner_is_lost_and_the_next_job_starts(queue):
    job = queue.add("job", [PYTHON, "-c", "import time; time.sleep(3)"])
    runner = psutil.Process(queue.job(job.number).pid)
    os.kill(runner.pid, signal.SIGKILL)
    assert wait_for_job(queue, job.number, "lost").state == "lost"
    other = replace(queue.job(job.number), state="running", born=1.0, pid=os.getpid())  # its pid is now another's
    write_job(queue.file(job.number), other)
    assert queue.job(job.number).state == "lost"
    after = queue.add("after", [PYTHON, "-c", "print(1)"])
    wait_for_job(queue, after.number, "done")


def test_a_command_that_does_not_exist_is_one_message(queue):
    job = queue.add("job", ["/no/such/program"])
    assert wait_for_job(queue, job.number, "failed").code == 127
    assert queue.tail(job.number) == "error: /no/such/program cannot be started (No such file or directory)"


def test_two_studios_start_a_job_once(queue, tmp_path):
    blocker = queue.add("blocker", [PYTHON, "-c", "import time; time.sleep(0.5)"])
    job = queue.add("job", [PYTHON, "-c", f"open({str(tmp_path / 'ran')!r}, 'a').write('x')"])
    others = [Queue(queue.folder, queue.known) for _ in range(3)]
    for one in others:
        one.run()
    wait_for_job(queue, blocker.number, "done")
    wait_for_job(queue, job.number, "done")
    for one in others:
        one.close()
    assert (tmp_path / "ran").read_text() == "x"


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"number": 1}', "null", "{" * 1000])
def test_a_file_that_is_no_job_is_passed_over(queue, content):
    job = queue.add("job", ["true"])
    queue.file(7).write_text(content)
    assert read_job(queue.file(7)) is None
    assert [one.number for one in queue.jobs()] == [job.number]
    values = json.loads(queue.file(job.number).read_text())
    for name, value in {"command": "rm", "state": "other", "number": True, "pid": "1"}.items():
        queue.file(8).write_text(json.dumps({**values, name: value}))
        assert read_job(queue.file(8)) is None
    assert queue.add("next", ["true"]).number == 9


def test_what_is_shown_has_no_secrets_and_one_line_of_a_progress_bar(queue):
    job = queue.add("job", [PYTHON, "train/run.py", "tracker.api_key=hf_abcdefghijklmnopqrstuvwxyz1234"])
    assert "hf_abcdefghij" not in job.shown
    assert job.shown.startswith("python train/run.py")
    queue.log(job.number).write_bytes(b"10 %\r20 %\r100 %\nhf_abcdefghijklmnopqrstuvwxyz1234\n")
    assert queue.tail(job.number).startswith("100 %\n")
    assert "hf_abcdefghij" not in queue.tail(job.number)


def run(*words: str) -> list[str]:
    return [PYTHON, str(queues.ROOT / "train/run.py"), *words]


@pytest.mark.parametrize(
    ("command", "known"),
    [
        (run("model=tiny"), True),
        ([PYTHON, "-m", "flux2.generate", "--prompt", "x"], True),
        ([PYTHON, *queues.LAUNCHER, "2", *run("model=tiny")[1:]], True),
        ([PYTHON, *queues.LAUNCHER, "2", "/tmp/train/run.py", "x"], False),
        ([PYTHON, *queues.LAUNCHER, "--config_file", *run("model=tiny")[1:]], False),
        ([PYTHON, *queues.LAUNCHER, "2"], False),
        (run("optimizer._target_=os.system"), False),
        (run("+hydra.searchpath=[/tmp]"), False),
        (run("--config-dir=/tmp"), False),
        (run("name=${oc.env:HOME}"), False),
        ([PYTHON, "-c", "print(1)"], False),
        ([PYTHON, "-m", "http.server"], False),
        ([PYTHON, "/tmp/train/run.py", "x"], False),
        (["sh", "-c", "id"], False),
    ],
)
def test_only_commands_of_the_studio_are_started_also_from_files_of_others(tmp_path, monkeypatch, command, known):
    queue, started = Queue(tmp_path / "queue"), []
    monkeypatch.setattr(Queue, "_start", lambda self, job: started.append(job.command))
    if known:
        queue.add("job", command)
    else:
        with pytest.raises(ValueError, match="no command that the studio starts"):
            queue.add("job", command)
        queue.folder.mkdir(exist_ok=True, mode=0o700)
        write_job(queue.file(1), queues.QueuedJob(1, "job", command, seal=queue.seal(1, command)))
        queue.start_next()
        assert queue.job(1).state == "failed"
    assert started == ([command] if known else [])


def test_a_folder_that_others_may_write_is_refused(tmp_path):
    queue = Queue(tmp_path / "queue")
    queue.folder.mkdir()
    queue.folder.chmod(0o777)
    with pytest.raises(ValueError, match="others may write there"):
        queue.add("job", run("model=tiny"))


def test_the_end_of_a_job_is_shown_for_a_while(tmp_path):
    now = time.time()
    for state, ended, shown in (("running", 0.0, True), ("failed", now - 9, True), ("done", now - 900, False)):
        job = queues.QueuedJob(1, "job", ["true"], state=state, started=now - 1000, ended=ended)
        assert job.is_recent == shown


def test_a_job_of_someone_else_is_not_started(tmp_path, monkeypatch):
    queue, started = Queue(tmp_path / "queue"), []
    monkeypatch.setattr(Queue, "_start", lambda self, job: started.append(job.number))
    queue.folder.mkdir(mode=0o700)
    command = [PYTHON, "-m", "flux2.export", "a", "--format", "comfyui", "--out", str(tmp_path / "victim")]
    for number, seal in ((1, ""), (2, "0" * 64), (3, queue.seal(9, command)), (4, queue.seal(4, [*command, "x"]))):
        write_job(queue.file(number), queues.QueuedJob(number, "job", command, seal=seal))
    write_job(queue.file(5), queues.QueuedJob(5, "job", command, seal=queue.seal(5, command)))
    queue.start_next()
    assert started == [5]
    assert [queue.job(number).state for number in (1, 2, 3, 4)] == ["failed"] * 4
    assert "no command that the studio starts" in queue.tail(1)
    assert queues.own_secret().stat().st_mode & 0o777 == 0o600


def test_files_that_are_no_jobs_do_not_stop_the_queue(queue):
    job = queue.add("job", ["true"])
    values = json.loads(queue.file(job.number).read_text())
    for name in ("1x.json", "000001.sync-conflict.json", "a.json"):
        (queue.folder / name).write_text("{}")
    for number, change in ((5, {"pid": -5}), (6, {"number": 10**9}), (7, {"number": 8}), (9, {"pid": 10**30})):
        state = {"number": number, "state": "running", **change}
        queue.file(number).write_text(json.dumps({**values, **state}))
    assert {one.number for one in queue.jobs()} <= {job.number, 9}
    assert queue.add("next", ["true"]).number == 10


def test_the_queue_goes_on_after_an_error(queue, monkeypatch):
    queue.folder.mkdir(mode=0o700)
    monkeypatch.setattr(queues, "POLL_SECONDS", 0.05)
    original, fails = Queue.start_next, [True]

    def start_next(self):
        if fails:
            raise OSError("no space")
        original(self)

    monkeypatch.setattr(Queue, "start_next", start_next)
    queue.run()
    until = time.monotonic() + 20
    while not queue.problem:
        assert time.monotonic() < until
        time.sleep(0.02)
    assert queue.problem == "the queue waits: no space"
    fails.clear()
    while queue.problem:
        assert time.monotonic() < until
        time.sleep(0.02)
    queue.close()
