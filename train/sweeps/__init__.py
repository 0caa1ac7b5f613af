"""Many runs with different settings: their jobs, records, table and page, on this machine or through Slurm. It imports
train.config and what stands below. Begin with job.py; conf/train.yaml names the callback that is exported here.
"""

from train.sweeps.callback import SweepCallback

__all__ = ["SweepCallback"]
