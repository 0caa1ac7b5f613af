"""A store of tensors that are found by their content: latents of pictures, embeddings of prompts, what is known of
picture files, and what nobody uses any more. It imports data.sources and data.buckets. Begin with store.py, then
latents.py.
"""

from data.cache.prepared import CachedDataset
from data.cache.store import Cache, MemoryCache

__all__ = ["Cache", "CachedDataset", "MemoryCache"]
