"""Sweeps, many runs with different settings: their jobs, records and table, on this machine or through Slurm.

Imports train.config and the layers below it. Read job.py first; conf/train.yaml names the callback exported here.
"""

from train.sweeps.callback import SweepCallback

__all__ = ["SweepCallback"]
