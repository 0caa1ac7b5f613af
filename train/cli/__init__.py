"""The command line of the scripts in train/: Hydra's wrapper, and errors as one message that says what to do. It
imports train.sweeps and train.config. Begin with app.py; start.py runs before any library is imported.
"""
