"""The command line of the scripts in train/: Hydra's wrapper, and errors as one message with a remedy.
Imports train.sweeps and train.config. Read app.py first; start.py runs before any library is imported.
"""
