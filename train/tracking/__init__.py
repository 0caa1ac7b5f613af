"""Metrics of a run, in files and in wandb or TensorBoard. The package implements conf/tracker. It imports only packages
that are earlier in README's list. Begin with metrics.py, which writes and reads metrics.jsonl.
"""

from train.tracking.trackers import NoTracker, TensorBoardTracker, WandbTracker

__all__ = ["NoTracker", "TensorBoardTracker", "WandbTracker"]
