"""The embedded model: `python -m train.tiny_model` draws its pictures and trains it."""
