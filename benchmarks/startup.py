"""CPU seconds (user + system) that commands take to start: `--help` of each, and a plan.

    python benchmarks/startup.py

Each command runs once to write bytecode and to see what it imports, then `--repeats` times, of which the least counts.
The result keeps the figures of `baseline`, written with `--baseline` before imports moved to where they are used. Fails
if a command is above its limit: 1.5 s and no torch for `--help`, half of the baseline for the plan.
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

from benchmarks.common import at_least, environment, write_result

RESULT = ROOT / "benchmarks" / "results" / "startup_cpu.json"
SCRIPTS = ("run", "plan", "cache", "evaluate", "sweep", "demo", "demo_edit")
MODULES = ("flux2.generate", "flux2.export", "flux2.doctor", "flux2.serve", "train.hub", "train.tiny_model")
HELP = [f"train/{name}.py --help" for name in SCRIPTS] + [f"-m {name} --help" for name in MODULES]
PLAN = "train/plan.py +experiment=tarot"
HELP_LIMIT = 1.5  # CPU seconds
PLAN_LIMIT = 0.5  # of the baseline
HEAVY = ("torch", "transformers", "datasets", "wandb", "bitsandbytes", "peft", "accelerate")


def start(*command: str) -> str:
    """Run `python COMMAND` and return what it writes to stderr. Raises CalledProcessError if it fails."""
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=variables, capture_output=True, text=True, check=True
    )
    return done.stderr


def cpu_seconds(command: str) -> float:
    """User and system time of one run of `python COMMAND`."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start(*command.split())
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def heavy_imports(command: str) -> list[str]:
    """Which of HEAVY are imported by `python COMMAND`."""
    lines = start("-X", "importtime", *command.split()).splitlines()
    imported = {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}
    return [name for name in HEAVY if name in imported]


def broken_limits(result: dict[str, Any]) -> list[str]:
    """A sentence for each command that is above its limit."""
    broken = []
    for command in HELP:
        found = result["commands"][command]
        if found["cpu_seconds"] > HELP_LIMIT or "torch" in found["imports"]:
            broken.append(
                f"{command}: {found['cpu_seconds']:.2f} s, imports {', '.join(found['imports']) or 'nothing heavy'}"
            )
    ratio = result["commands"][PLAN]["cpu_seconds"] / result["baseline"]["commands"][PLAN]["cpu_seconds"]
    if ratio > PLAN_LIMIT:
        broken.append(f"{PLAN}: {ratio:.2f} of the baseline")
    return broken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=at_least(1), default=3)
    parser.add_argument("--baseline", action="store_true", help="write the figures as the baseline")
    parser.add_argument("--out", type=Path, default=RESULT)
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
    before = json.loads(options.out.read_text()) if options.out.exists() else {}
    baseline = measured if options.baseline else before.get("baseline", measured)
    result = {"what": "user + system seconds of a command, the least of its runs", **measured, "baseline": baseline}
    write_result(options.out, result)
    if broken := broken_limits(result):
        sys.exit("\n".join(["above the limits:", *broken]))


if __name__ == "__main__":
    main()
