"""Starts runs by forking a process that has imported everything: a start takes one second and not ten.

What is forked is a process of its own, which can be sent any signal. One request a line, in JSON: `{"start": [...],
"out": FILE, "environment": {...}}` runs the command line train/run.py and answers with the process's id; `{"wait": ID}`
answers with its exit code, -9 for one that was killed. This process itself computes nothing, so it can be forked.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch  # noqa: E402

from train.command import command  # noqa: E402
from train.run import main  # noqa: E402


def run(arguments: list[str], out: str, environment: dict[str, str]) -> int:
    """The exit code of one command line, whose output goes to the file `out`."""
    file = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(environment)
    sys.argv = ["train/run.py", *arguments]
    try:
        command(main)
    except SystemExit as stop:
        return int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
        return 70
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            status = os.waitpid(request["wait"], 0)[1]
            print(json.dumps(os.waitstatus_to_exitcode(status)), flush=True)
            continue
        child = os.fork()
        if child == 0:
            code = run(request["start"], request["out"], request["environment"])
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        print(json.dumps(child), flush=True)
