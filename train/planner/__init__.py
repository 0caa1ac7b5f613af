"""How much memory a run needs and how long it takes, before it starts, and which memory settings fit. It imports
train.config and what stands below. Begin with from_config.py, then predictor.py.
"""
