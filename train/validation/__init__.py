"""Evaluation of an adapter during training: the loss on fixed noise, and sample grids. It imports only packages that
are earlier in README's list. Begin with loss.py for the loss, samples.py for the images.
"""
