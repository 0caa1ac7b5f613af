"""Metrics of a run, in files and in wandb or TensorBoard. The package imports train.utils, and conf/tracker names its
exports. Begin with metrics.py, which writes and reads metrics.jsonl.
"""

from train.tracking.trackers import NoTracker, TensorBoardTracker, WandbTracker

__all__ = ["NoTracker", "TensorBoardTracker", "WandbTracker"]
