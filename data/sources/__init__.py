"""Datasets: sequences of samples from folders, pairs, preferences, tables, WebDataset shards, or a mix of them. The
package implements conf/dataset. It imports only packages that are earlier in README's list. Begin with base.py, which
all sources share.
"""

from data.sources.base import Bad, Sample, Source
from data.sources.captions import Captions
from data.sources.folders import Folder, Pairs
from data.sources.mix import Mix
from data.sources.preference import Preference
from data.sources.tables import HuggingFace
from data.sources.webdataset import WebDataset

__all__ = ["Bad", "Captions", "Folder", "HuggingFace", "Mix", "Pairs", "Preference", "Sample", "Source", "WebDataset"]
