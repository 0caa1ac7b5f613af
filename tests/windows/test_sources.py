"""What can be known of Windows without one: rules for the sources, names, commands to copy, and what is refused."""

import ast
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from omegaconf import OmegaConf
from studio_helpers import wait_for_job

import flux2.utils.text as text
from train.config.settings import NOT_ON_WINDOWS
from train.distributed import processes
from train.distributed.sharding import check_processes
from train.pages.queue import Queue
from train.sweeps.slurm import check_launcher

ROOT = Path(__file__).resolve().parents[2]
OURS = ("data", "flux2", "train")
OF_UNIX = {"fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "posix"}
SIGNALS = {"SIGHUP", "SIGUSR1", "SIGUSR2", "SIGKILL", "SIGALRM", "SIGCHLD", "SIGPIPE"}
HERE = {"train/sweeps/slurm.py": {"SIGUSR1"}}  # Windows does not get there: it has no SIGUSR2, or no launcher


# ---------------------------------------------------------------- the sources


def mode_of(call: ast.Call, index: int) -> str:
    given = [*call.args[index : index + 1], *(word.value for word in call.keywords if word.arg == "mode")]
    texts = [node.value for one in given for node in ast.walk(one) if isinstance(node, ast.Constant)]
    modes = [text for text in texts if isinstance(text, str) and re.fullmatch("[rwax+bt]{1,3}", text)]
    return "".join(modes) or ("b" if given else "r")  # a name is not looked up: processes below see


def opens_text(call: ast.Call) -> bool:
    """Return whether a call opens a text file in the encoding of the system."""
    if any(word.arg == "encoding" for word in call.keywords):
        return False
    if isinstance(call.func, ast.Name):
        return call.func.id == "open" and "b" not in mode_of(call, 1)
    if not isinstance(call.func, ast.Attribute):
        return False
    name = call.func.attr
    if name in ("read_text", "write_text"):
        return len(call.args) < (1 if name == "read_text" else 2)
    if name == "fdopen":
        return "b" not in mode_of(call, 1)
    return name == "open" and bool(call.args) and "b" not in mode_of(call, 0)


def faults(source: str, file: str = "") -> Iterator[str]:
    """Yield what a source does that Windows does not, or does otherwise."""
    tree = ast.parse(source)
    guarded = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.If | ast.Try)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom) and node not in guarded:
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            yield from (f"line {node.lineno}: imports {name} for all systems" for name in names if name in OF_UNIX)
        elif isinstance(node, ast.Attribute) and node.attr in SIGNALS - HERE.get(file, set()):
            yield f"line {node.lineno}: Windows has no {node.attr}"
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if opens_text(node):
                yield f"line {node.lineno}: {called} without encoding"
            elif called == "os.rename" or (called.endswith(".rename") and len(node.args) == 1):
                yield f"line {node.lineno}: {called} instead of move()"
            elif called == "os.kill" and file != "train/pages/queue.py":
                yield f"line {node.lineno}: os.kill ends a process on Windows, also with 0"
            elif called == "os.open" and not re.search(r"\bBINARY\b|\bno_wait\b", ast.unparse(node)):
                yield f"line {node.lineno}: os.open translates ends of lines"


@pytest.mark.parametrize("top", OURS)
def test_sources_use_what_windows_has(top):
    files = sorted((ROOT / top).rglob("*.py"))
    found = {str(file.relative_to(ROOT)): file for file in files}
    wrong = [f"{name} {fault}" for name, file in found.items() for fault in faults(file.read_text("utf-8"), name)]
    assert len(files) > 10
    assert wrong == []


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("import resource", "imports resource for all systems"),
        ("from fcntl import flock", "imports fcntl for all systems"),
        ("open(x)", "open without encoding"),
        ("open(x, 'a')", "open without encoding"),
        ("open(x, mode='w')", "open without encoding"),
        ("os.fdopen(x, 'w')", "os.fdopen without encoding"),
        ("x.open('w')", "x.open without encoding"),
        ("x.read_text()", "x.read_text without encoding"),
        ("x.write_text(y, newline='')", "x.write_text without encoding"),
        ("os.rename(x, y)", "os.rename instead of move()"),
        ("x.rename(y)", "x.rename instead of move()"),
        ("os.kill(x, 0)", "os.kill ends a process on Windows, also with 0"),
        ("os.open(x, os.O_RDONLY)", "os.open translates ends of lines"),
        ("signal.signal(signal.SIGHUP, x)", "Windows has no SIGHUP"),
    ],
)
def test_a_fault_in_a_source_is_seen(source, fault):
    assert list(faults(source)) == [f"line 1: {fault}"]


@pytest.mark.parametrize(
    "source",
    [
        "def f():\n    import resource",
        "if sys.platform != 'win32':\n    import fcntl",
        "open(x, 'rb')",
        "x.open('wb')",
        "x.open()",  # of what is no path; of a path, the processes below complain
        "x.read_text('utf-8')",
        "read_text(x)",
        "Image.open(x)",
        "os.open(x, os.O_RDONLY | BINARY)",
    ],
)
def test_what_is_no_fault_is_not_seen(source):
    assert list(faults(source)) == []


# ---------------------------------------------------------------- names and commands


@pytest.mark.parametrize(
    "name", ["con", "NUL", "aux.txt", "com1", "a:b", "a*", "run.", "run ", 'a"b', "a\\b", "a?", "<a"]
)
def test_names_that_windows_refuses(name):
    assert NOT_ON_WINDOWS.search(name)


@pytest.mark.parametrize("name", ["train", "console", "2026-01-01_10-00-00", "my run", "a=1,b=2", "nul-1", ".hidden"])
def test_names_that_windows_has(name):
    assert not NOT_ON_WINDOWS.search(name)


@pytest.mark.parametrize(
    ("word", "typed"),
    [
        ("steps=100", "steps=100"),
        ("outputs/x", "outputs/x"),
        (r"dataset.path=C:\my cats", r"'dataset.path=C:\my cats'"),
        (r"C:\cats" + "\\", r"'C:\cats" + "\\'"),
        ("a dog's ball", '"a dog\'s ball"'),
        ("[a,b]", "'[a,b]'"),
        ('key="x"', "'key=\"x\"'"),
        ("$HOME", "'$HOME'"),
        ("", "''"),
        ("a$ dog's", "'a$ dog''s'"),
    ],
)
def test_commands_are_typed_for_powershell(word, typed, monkeypatch):
    monkeypatch.setattr(text.sys, "platform", "win32")
    assert text.quote_word(word) == typed
    if "''s" not in typed:
        assert text.split_words(text.join_words(["python", word])) == ["python", word]


def test_typed_folders_keep_their_backslashes(monkeypatch):
    monkeypatch.setattr(text.sys, "platform", "win32")
    assert text.split_words(r"dataset.path=C:\cats x='a b'") == [r"dataset.path=C:\cats", "x=a b"]


# ---------------------------------------------------------------- what is refused, or chosen otherwise


@pytest.mark.parametrize(("has_nccl", "backend"), [(True, "nccl"), (False, "gloo")])
def test_processes_on_gpus_connect_without_nccl(has_nccl, backend, monkeypatch):
    class ConnectedError(Exception):
        """What is asked for is known; there is no GPU here."""

    def connect(*, kwargs_handlers, **_):
        raise ConnectedError(kwargs_handlers[0].backend)

    monkeypatch.setattr(processes, "pick_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr(processes, "Accelerator", connect)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: has_nccl)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConnectedError, match=backend):
        processes.make_accelerator(None)


def test_a_base_is_not_sharded_on_gpus_without_nccl(monkeypatch):
    two = SimpleNamespace(sharded=True, accelerator=SimpleNamespace(num_processes=2, device=torch.device("cuda")))
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    check_processes(two)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    with pytest.raises(ValueError, match=r"^shard=true needs NCCL.*WSL 2"):
        check_processes(two)


def test_slurm_is_refused(monkeypatch):
    launcher = OmegaConf.create({"_target_": "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher"})
    check_launcher(launcher)
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(ValueError, match=r"^hydra/launcher=slurm needs signals"):
        check_launcher(launcher)


def test_a_job_in_another_window_cannot_be_stopped(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    queue = Queue(tmp_path / "queue", lambda words: True)
    job = queue.add("sleep", [sys.executable, "-c", "import time; time.sleep(60)"])

    while not psutil.Process(queue.job(1).pid).children():  # the runner handles signals from here on
        time.sleep(0.05)

    def kill(process: int, number: int) -> None:
        raise OSError(87, "The parameter is incorrect")

    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", "win32")
        patch.setattr(signal, "CTRL_BREAK_EVENT", 1, raising=False)
        patch.setattr(os, "kill", kill)
        with pytest.raises(ValueError, match="another window"):
            queue.stop(job.number)
    queue.stop(job.number)
    wait_for_job(queue, job.number, "stopped")
