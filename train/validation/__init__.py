"""How good an adapter is while it trains: the loss on fixed noise, and sample grids. It imports train.objective,
train.distributed and train.utils. Begin with loss.py for the number, samples.py for the pictures.
"""
