"""Commands in processes where this project's code finds no part of Unix that Windows lacks (sitecustomize.py)."""

import json
import os
import pkgutil
import signal
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from http.client import HTTPResponse
from pathlib import Path
from urllib.error import URLError

import pytest
from train_helpers import environment

ROOT = Path(__file__).resolve().parents[2]
OURS = ("data", "flux2", "train")


@pytest.fixture
def windows(tmp_path: Path) -> dict[str, str]:
    """The environment of a process in which this project's code finds Windows."""
    return environment(
        PYTHONPATH=os.pathsep.join([str(ROOT / "tests" / "windows"), str(ROOT)]),
        WINDOWS_CODE=os.pathsep.join([*(str(ROOT / top) for top in OURS), str(tmp_path / "code")]),
        PYTHONWARNDEFAULTENCODING="1",
        PYTHONIOENCODING="cp1252",
        HF_HUB_OFFLINE="1",
        XDG_STATE_HOME=str(tmp_path / "state"),
    )


def run(windows: dict[str, str], here: Path, *words: str, code: int = 0) -> str:
    """Run a Python command and return its output."""
    done = subprocess.run([sys.executable, *words], cwd=here, env=windows, capture_output=True, timeout=500)
    errors = done.stderr.decode("cp1252", errors="replace")
    assert done.returncode == code, errors[-6000:]
    return done.stdout.decode("cp1252") if code == 0 else errors


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("import fcntl", "ModuleNotFoundError: No module named 'fcntl'"),
        ("import os; os.getuid()", "AttributeError: module 'os' has no attribute 'getuid' on Windows"),
        ("import os; f = open(__file__, 'rb'); os.fsync(f.fileno())", "Bad file descriptor"),
        ("import os; os.open(__file__, os.O_RDONLY)", "translates ends of lines"),
        ("open(__file__)", "EncodingWarning"),
        ("from pathlib import Path; Path(__file__).read_text()", "EncodingWarning"),
        ("from pathlib import Path; f = open('x', 'wb'); Path('x').unlink()", "PermissionError"),
        ("from pathlib import Path; f = open('x', 'wb'); Path('y').touch(); Path('y').replace('x')", "PermissionError"),
        ("import os; os.mkdir('d'); f = open('d/x', 'wb'); os.replace('d', 'e')", "PermissionError"),
        ("import os; open('x', 'wb'); open('y', 'wb'); os.rename('x', 'y')", "FileExistsError"),
        ("import mmap, os; f = open('x', 'wb'); f.write(b'x'); f.close(); f = open('x', 'rb');"
         "m = mmap.mmap(f.fileno(), 1, access=mmap.ACCESS_READ); f.close(); os.unlink('x')", "PermissionError"),
        ("import signal; signal.SIGUSR1", "AttributeError"),
        ("import signal; signal.signal(signal.SIGBREAK + 1, print)", "invalid signal value"),
        ("import subprocess, sys; subprocess.Popen([sys.executable], start_new_session=True)", "not supported"),
        ("print('\\u732b')", "UnicodeEncodeError"),
    ],
)  # fmt: skip
def test_the_stand_in_refuses_what_windows_refuses(windows, tmp_path, source, error):
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "fault.py").write_text(source, encoding="utf-8")
    assert error in run(windows, tmp_path, "code/fault.py", code=1)


def test_all_modules_import(windows, tmp_path):
    packages = [str(ROOT / top) for top in OURS]
    names = [one.name for top in OURS for one in pkgutil.walk_packages([str(ROOT / top)], f"{top}.")]
    names = [name for name in names if not name.endswith("__main__") and "triton_kernels" not in name]
    assert len(names) > 200, packages
    code = f"import importlib, sys\nfor name in {names}: importlib.import_module(name)\nprint(len(sys.modules))"
    run(windows, tmp_path, "-c", code)


def test_pages_for_pinned_memory_and_the_peak_of_a_process(windows, tmp_path):
    code = (
        "import torch\n"
        "from flux2.memory.ring_buffer import CudaCopier\n"
        "from train.utils.throughput import peak_memory_gb\n"
        "copier = object.__new__(CudaCopier); copier.pins = False\n"
        "print(copier.host(100).fill_(3).sum().item(), 0.1 < peak_memory_gb(torch.device('cpu')) < 20)\n"
    )
    assert run(windows, tmp_path, "-c", code).split() == ["300", "True"]


def test_a_run_folder_has_one_lock(windows, tmp_path):
    code = (
        "from pathlib import Path\n"
        "from train.utils.lock import Lock, InUse, in_use\n"
        "folder = Path('run'); folder.mkdir(); lock = Lock(folder)\n"
        "try: Lock(folder)\nexcept InUse: print(in_use(folder))\n"
        "lock.release(); print(folder.exists()); print(in_use(folder))\n"
    )
    assert run(windows, tmp_path, "-c", code).split() == ["True", "False", "False"]


TINY = ("+experiment=debug", "model=tiny", "dataset.path=cards", "adapter.rank=2", "cache_dir=cache")


@pytest.fixture
def cards(tmp_path: Path) -> Path:
    """A folder with four pictures, one of whose names no code page of the West has."""
    place = tmp_path / "cards"
    place.mkdir()
    for file, name in zip(sorted((ROOT / "data/demo").glob("*.png"))[:4], ("a", "b", "c", "\u732b"), strict=True):
        (place / f"{name}.png").write_bytes(file.read_bytes())
        (place / f"{name}.txt").write_text("a card, \u732b\n", encoding="utf-8")
    return tmp_path


@pytest.mark.slow
def test_training_resuming_generating_and_planning(windows, cards):
    train = str(ROOT / "train" / "run.py")
    first = run(windows, cards, train, *TINY, "output_dir=run", 'sample.prompts=["\u732b"]')
    assert "resume" not in first
    losses = (cards / "run" / "metrics.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["step"] for line in losses if "loss" in json.loads(line)] == [1, 2]
    assert (cards / "run" / "report.html").is_file()
    run(windows, cards, train, *TINY, "resume=run", "steps=4")
    assert (cards / "run" / "checkpoints" / "step_000004").is_dir()
    image = run(windows, cards, "-m", "flux2.generate", "--model", "tiny", "--adapter", "run/adapter", "--prompt",
                "a \u732b", "--steps", "2", "--width", "64", "--height", "64", "--out", "\u732b.png")  # fmt: skip
    assert "\\u732b.png" in image
    assert (cards / "\u732b.png").is_file()
    assert "GB" in run(windows, cards, str(ROOT / "train" / "plan.py"), *TINY)
    assert "run" in run(windows, cards, str(ROOT / "train" / "evaluate.py"), "run=run")
    run(windows, cards, "-m", "flux2.export", "run/adapter", "--out", "out.safetensors", "--format", "comfyui")
    assert "no name of a folder on Windows" in run(windows, cards, train, *TINY, "name=con", code=2)


@pytest.mark.slow
def test_the_queue_of_the_studio_starts_and_stops_a_training(windows, cards):
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from train.pages.app import application\n"
        "from train.pages.base import Studio\n"
        "from train.pages.queue import Queue\n"
        "from train.pages.workspace import Workspace\n"
        "here = Path.cwd()\n"
        "queue = Queue(here / 'queue')\n"
        "application(Studio(Workspace([here]), queue, None, None))\n"
        "queue.run()\n"
        f"words = [sys.executable, {str(ROOT / 'train' / 'run.py')!r}, *{TINY}, 'output_dir=run', 'steps=2000']\n"
        "job = queue.add('a training', words + ['checkpoint_every=0', 'sample_every=0'])\n"
        "until = time.monotonic() + 200\n"
        "lines = here / 'run' / 'metrics.jsonl'\n"
        "while not lines.is_file() and queue.job(1).is_active and time.monotonic() < until: time.sleep(0.1)\n"
        "queue.stop(1)\n"
        "while queue.job(1).is_active and time.monotonic() < until: time.sleep(0.1)\n"
        "job = queue.job(1)\n"
        "queue.close()\n"
        "print(job.state, job.code, queue.tail(1))\n"
    )
    output = run(windows, cards, "-c", code)
    assert f"stopped {128 + signal.SIGTTIN}" in output  # 21, which is SIGBREAK there
    assert list((cards / "run" / "checkpoints").glob("step_*"))


def fetch(address: str) -> HTTPResponse:
    for _ in range(100):  # it listens a moment after it says so
        with suppress(URLError), urllib.request.urlopen(address, timeout=60) as answer:
            return answer
        time.sleep(0.1)
    raise AssertionError(address)


@pytest.mark.slow
def test_the_studio_answers(windows, cards):
    command = [sys.executable, str(ROOT / "train" / "studio.py"), "--port", "0"]
    with subprocess.Popen(command, cwd=cards, env=windows, stdout=subprocess.PIPE, text=True) as studio:
        try:
            line = studio.stdout.readline()
            assert line.startswith("studio at http://127.0.0.1:"), line
            for page in ("/", "/jobs", "/start", "/pictures?path=cards&resolution=128"):
                assert fetch(line.split()[2] + page).status == 200
        finally:
            studio.terminate()
