"""A content-addressed store of tensors: latents of images and embeddings of prompts, digests of image files, and
pruning of unused entries. It imports only packages that are earlier in README's list. Begin with store.py, then
latents.py.
"""

from data.cache.prepared import CachedDataset
from data.cache.store import Cache, MemoryCache

__all__ = ["Cache", "CachedDataset", "MemoryCache"]
