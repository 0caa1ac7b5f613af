"""Runs in processes of their own, for tests of what happens to a process: see tests/fork_server.py.

A test module says `pytest_plugins = ("train_helpers", "train_processes")` to get the fixtures.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from train_helpers import ROOT, draw_picture, environment, random_tiny

LIMIT = 240  # seconds that anything may take on a busy machine


def until(condition: Callable[[], Any], what: str) -> None:
    """Wait until `condition` holds."""
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.01)


def done(folder: Path) -> int:
    """The logged steps of a run."""
    file = folder / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


@dataclass
class Process:
    """One run under way; its output is in `out`."""

    server: Server
    id: int
    out: Path

    def wait(self) -> int:
        """Its exit code; -9 for one that was killed."""
        return self.server.ask(wait=self.id)

    def go(self) -> None:
        """Let it go on where it is held."""
        Path(f"{self.out}.go").touch()

    def says(self, text: str) -> None:
        """Wait until it says so."""
        until(lambda: text in self.out.read_text(errors="replace"), text)


class Server:
    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0
        self.process = subprocess.Popen(
            [sys.executable, "tests/fork_server.py"],
            cwd=ROOT,
            env=environment(OMP_NUM_THREADS="1"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def ask(self, **request: Any) -> int:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, *arguments: str, file: str = "train/run.py", **extra: str) -> Process:
        """Start a script with these arguments, and with these variables in its environment."""
        self.count += 1
        out = self.folder / f"{self.count}.txt"
        out.touch()
        return Process(self, self.ask(start=[file, *arguments], out=str(out), environment=extra), out)

    def run(self, *arguments: str, **extra: str) -> str:
        """Run to a good end; what was said."""
        process = self.start(*arguments, **extra)
        assert process.wait() == 0, process.out.read_text()
        return process.out.read_text()

    def start_two(self, *arguments: str, **extra: str) -> list[Process]:
        """Two processes of one run, as a launcher starts them."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        ranks = [{"RANK": rank, "LOCAL_RANK": rank} for rank in ("0", "1")]
        return [self.start(*arguments, **world, **rank, ACCELERATE_USE_CPU="true", **extra) for rank in ranks]


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    started = Server(tmp_path_factory.mktemp("processes"))
    yield started
    assert started.process.stdin is not None
    started.process.stdin.close()
    started.process.wait(timeout=LIMIT)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The settings of a run of the size called tiny, with random weights, on edits of two shapes."""
    folder = tmp_path_factory.mktemp("tiny")
    for name in ("source", "target"):
        (folder / "edits" / name).mkdir(parents=True)
        for i, caption in enumerate(("a red cup", "a blue fox", "the small card")):
            size = (32, 32) if i < 2 else (64, 32)
            draw_picture(i + 10 * len(name), size).save(folder / "edits" / name / f"{i}.png")
            (folder / "edits" / name / f"{i}.txt").write_text(caption)
    return [
        *("model=tiny", f"model.path={random_tiny(folder / 'model')}", "model.resolution=32", "dataset=pairs"),
        *(f"dataset.path={folder / 'edits'}", f"cache_dir={folder / 'cache'}", "batch_size=1", "log_every=1"),
        *("adapter.rank=2", "adapter.dropout=0.1", "optimizer.lr=1e-3", "caption_dropout=0.3"),
        *("sample_every=0", "validate_every=0", "checkpoint_every=0"),
    ]
