"""Measure the CPU seconds (user + system) that commands take to start: `--help` of each, and a plan.

    python benchmarks/startup.py

Each command runs once to write bytecode and to list its imports, then `--repeats` times, of which the minimum counts.
The result keeps the figures of `baseline`, which `--baseline` wrote before imports were moved to where they are used.
Fails if a command exceeds its limit: 1.5 s and no torch for `--help`, half of the baseline for the plan.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

import argparse
import json
import os
import resource
import subprocess
from typing import Any

from benchmarks.common import RESULTS, environment, integer_type, write_result

SCRIPTS = ("run", "plan", "cache", "caption", "evaluate", "sweep", "demo", "demo_edit")
MODULES = ("flux2.generate", "flux2.export", "flux2.doctor", "flux2.serve", "train.hub", "train.tiny_model")
HELP = [f"train/{name}.py --help" for name in SCRIPTS] + [f"-m {name} --help" for name in MODULES]
PLAN = "train/plan.py +experiment=tarot"
HELP_LIMIT = 1.5  # CPU seconds
PLAN_LIMIT = 0.5  # of the baseline
HEAVY = ("torch", "transformers", "datasets", "wandb", "bitsandbytes", "peft", "accelerate")


def run_python(*command: str) -> str:
    """Run `python COMMAND` and return its stderr. Raises CalledProcessError if it fails."""
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=variables, capture_output=True, text=True, check=True
    )
    return done.stderr


def cpu_seconds(command: str) -> float:
    """Return the user and system time of one run of `python COMMAND`."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run_python(*command.split())
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def heavy_imports(command: str) -> list[str]:
    """Return the members of HEAVY that `python COMMAND` imports."""
    lines = run_python("-X", "importtime", *command.split()).splitlines()
    imported = {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}
    return [name for name in HEAVY if name in imported]


def exceeded_limits(result: dict[str, Any]) -> list[str]:
    """Return a line for each command that exceeds its limit."""
    exceeded = []
    for command in HELP:
        seconds, imports = (result["commands"][command][key] for key in ("cpu_seconds", "imports"))
        if seconds > HELP_LIMIT or "torch" in imports:
            exceeded.append(f"{command}: {seconds:.2f} s, imports {', '.join(imports) or 'nothing heavy'}")
    ratio = result["commands"][PLAN]["cpu_seconds"] / result["baseline"]["commands"][PLAN]["cpu_seconds"]
    if ratio > PLAN_LIMIT:
        exceeded.append(f"{PLAN}: {ratio:.2f} of the baseline")
    return exceeded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=integer_type(1), default=3)
    parser.add_argument("--baseline", action="store_true", help="write the figures as the new baseline")
    parser.add_argument("--out", type=Path, default=RESULTS / "startup_cpu.json")
    options = parser.parse_args()

    commands = {}
    for command in (*HELP, PLAN):
        imports = heavy_imports(command)
        seconds = min(cpu_seconds(command) for _ in range(options.repeats))
        commands[command] = {"cpu_seconds": round(seconds, 2), "imports": imports}
        print(f"{seconds:6.2f} s  {command}", flush=True)
    about = environment()
    measured = {key: about[key] for key in ("processor", "cpus", "load_average", "torch", "python")} | {
        "commands": commands
    }
    previous = json.loads(options.out.read_text()) if options.out.exists() else {}
    baseline = measured if options.baseline else previous.get("baseline", measured)
    result = {"what": "user + system seconds of a command, the minimum of its runs", **measured, "baseline": baseline}
    write_result(options.out, result)
    if exceeded := exceeded_limits(result):
        sys.exit("\n".join(["limits exceeded:", *exceeded]))


if __name__ == "__main__":
    main()
