"""Commands as `python -m` runs them, in this process or in one forked from it.

A fresh interpreter would first import torch, for seconds.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

TOKENIZERS = "TOKENIZERS_PARALLELISM"  # threads do not survive a fork, and what is forked would wait for them


def run_module(name: str, *arguments: str) -> int:
    """Run `python -m NAME ARGUMENTS` in this process; returns its exit code."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setattr(sys, "argv", [name, *arguments])
        warnings.filterwarnings("ignore", ".* found in sys.modules", RuntimeWarning)
        try:
            runpy.run_module(name, run_name="__main__")
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def in_fork(function: Callable[[], Any]) -> Any:
    """What `function` returns in a process forked from this one, as JSON tells it."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        code = 70
        try:
            torch.set_num_threads(1)
            os.write(writing, json.dumps(function()).encode())
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading) as stream:
        answer = stream.read()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    return json.loads(answer)


class ForkedModule:
    """`python -m NAME ARGUMENTS` in a process forked from this one.

    It shares no open file with this process: a server that this process stops has to be gone.
    """

    def __init__(self, name: str, *arguments: str, environment: Mapping[str, str]) -> None:
        out, err = os.pipe(), os.pipe()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(TOKENIZERS, "false")
            self.id = os.fork()
        if self.id == 0:
            code = 70
            try:
                self._become(out[1], err[1], environment)
                code = run_module(name, *arguments)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        os.close(out[1])
        os.close(err[1])
        self.stdout, self.stderr = os.fdopen(out[0]), os.fdopen(err[0])
        self.code: int | None = None

    @staticmethod
    def _become(out: int, err: int, environment: Mapping[str, str]) -> None:
        os.dup2(out, 1)
        os.dup2(err, 2)
        nothing = os.open(os.devnull, os.O_RDWR)
        for number in [int(entry.name) for entry in Path("/dev/fd").iterdir()]:
            if number > 2:
                os.dup2(nothing, number)  # and not closed: what owns the number may still close it
        sys.stdout, sys.stderr = open(1, "w", buffering=1), open(2, "w", buffering=1)  # noqa: SIM115
        os.environ.clear()
        os.environ.update({**environment, TOKENIZERS: "false"})
        torch.set_num_threads(1)

    def stop(self, timeout: float = 120) -> tuple[int, str, str]:
        """Terminate it; returns its exit code, and what it wrote since."""
        os.kill(self.id, signal.SIGTERM)
        end = time.monotonic() + timeout
        while self.code is None:
            assert time.monotonic() < end, "it does not end"
            done, status = os.waitpid(self.id, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if done else None
            time.sleep(0.01)
        with self.stdout, self.stderr:
            return self.code, self.stdout.read(), self.stderr.read()
