"""Sweeps, many runs with different settings: their jobs, records and table, on this machine or through Slurm.

conf/train.yaml names the callback that is exported here. It imports only packages that are earlier in README's list.
Begin with job.py.
"""

from train.sweeps.callback import SweepCallback

__all__ = ["SweepCallback"]
