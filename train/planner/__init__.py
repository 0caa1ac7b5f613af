"""Prediction of a run's memory and step time before it starts, and the choice of memory settings that fit.
It imports train.config and the packages below it. Start with from_config.py, then predictor.py.
"""
