"""Everything from image files to batches of tensors. `train` uses it; it knows neither models nor training.

sources/ finds samples, cache/ stores their latents and embeddings, buckets.py and sampler.py choose sizes and order,
and loader.py draws captions, crops and dropout and yields batches. Begin with sources/base.py, then loader.py.
"""
