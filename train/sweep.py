"""Write the table of a sweep: `python train/sweep.py outputs/demo/<time>`, at any time, also while jobs run.

`python train/run.py -m +experiment=demo adapter.rank=2,4,8` starts a sweep: Hydra creates the jobs and a launcher runs
them, on this machine or elsewhere. When they end, also by Ctrl-C, the command writes the same files, `sweep.html`,
`sweep.json` and `sweep.csv`, into the folder of the sweep.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # a script's own folder comes first in sys.path, and ours would hide libraries
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
from collections.abc import Sequence

from data.files import user_path


def main(arguments: Sequence[str] | None = None) -> int:
    """Write and print the table of a sweep's folder."""
    parser = argparse.ArgumentParser(description="Write the table of a sweep: sweep.html, sweep.json and sweep.csv.")
    parser.add_argument("folder", type=user_path, help="folder of the sweep, with its jobs in 0, 1 ...")
    sweep = parser.parse_args(arguments).folder
    from train.sweeps.records import read_jobs  # after the options, as `--help` imports no torch
    from train.sweeps.table import print_table, write
    from train.utils.console import say

    found = read_jobs(sweep) if sweep.is_dir() else []
    try:
        if not found:
            raise ValueError(f"{sweep} is not the folder of a sweep: there are no jobs 0, 1 ... in it")
        print_table(write(sweep, found), found)
    except ValueError as error:
        say(f"error: {error}", to_errors=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
