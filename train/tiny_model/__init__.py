"""The embedded model: `python -m train.tiny_model` draws its images and trains it."""
