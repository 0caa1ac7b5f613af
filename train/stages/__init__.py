"""The stages of a run as functions, which train/run.py calls in order. It imports only packages that are earlier in
README's list. Begin with run_folder.py, then data.py and model.py.
"""
