"""Evaluation of an adapter during training: the loss on fixed noise, and sample grids. The package imports
train.objective, train.distributed and train.utils. Begin with loss.py for the loss, samples.py for the images.
"""
