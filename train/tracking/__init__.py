"""The numbers of a run, as files and for wandb or TensorBoard. It imports train.utils. Begin with metrics.py, which
writes and reads metrics.jsonl; conf/tracker names what is exported here.
"""

from train.tracking.trackers import NoTracker, TensorBoardTracker, WandbTracker

__all__ = ["NoTracker", "TensorBoardTracker", "WandbTracker"]
