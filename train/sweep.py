"""Sweeps: `python train/config.py -m +experiment=demo adapter.rank=2,4,8`, and one table of what came out.

Hydra makes the jobs and a launcher runs them, here or elsewhere. When they have ended, also by Ctrl-C, `end_all` reads
their folders and writes `sweep.html`, `sweep.json` and `sweep.csv` beside them. So does, at any time, also while jobs
run,

    python train/sweep.py outputs/demo/<time>
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # a script's own folder comes first in sys.path, and ours would hide libraries
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
from collections.abc import Sequence

from train.sweeps.records import read_jobs
from train.sweeps.table import say, write

# ------------------------------------------------------------------ the table


def main(arguments: Sequence[str] | None = None) -> int:
    """Write and print the table of a sweep's folder."""
    parser = argparse.ArgumentParser(description="The table of a sweep: sweep.html, sweep.json and sweep.csv.")
    parser.add_argument("folder", type=Path, help="of the sweep, with its jobs in 0, 1 ...")
    sweep = parser.parse_args(arguments).folder
    found = read_jobs(sweep) if sweep.is_dir() else []
    try:
        if not found:
            raise ValueError(f"{sweep} is not the folder of a sweep: there are no jobs 0, 1 ... in it")
        say(write(sweep, found), found)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
