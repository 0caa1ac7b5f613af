"""The stages of a run as functions, which train/run.py calls in order. They import every other package of train.
Start with run_folder.py, then data.py and model.py.
"""
