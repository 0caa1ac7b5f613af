"""The sources of training data, by the names that `_target_` in conf/dataset/ has: `data.samples.Folder` and so on.

Each is a sequence of `Sample`; what they have in common is in data/source.py.
"""

from data.folders import Folder, Pairs
from data.mix import Mix
from data.pictures import Picture
from data.shards import WebDataset
from data.source import Bad, BadData, Sample, Source
from data.tables import HuggingFace

__all__ = ["Bad", "BadData", "Folder", "HuggingFace", "Mix", "Pairs", "Picture", "Sample", "Source", "WebDataset"]
