"""A content-addressed store of tensors: latents of images and embeddings of prompts, digests of image files, and
pruning of unused entries. The package imports data.sources and data.buckets. Begin with store.py, then latents.py.
"""

from data.cache.prepared import CachedDataset
from data.cache.store import Cache, MemoryCache

__all__ = ["Cache", "CachedDataset", "MemoryCache"]
