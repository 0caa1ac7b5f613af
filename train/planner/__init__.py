"""Prediction of a run's memory and step time before it starts, and the choice of memory settings that fit: what
memory=auto and the presets of conf/memory, such as memory=24gb, leave open. It imports only packages that are earlier
in README's list. Begin with from_config.py, then predictor.py; step_memory.py counts activations.
"""
