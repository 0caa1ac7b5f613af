"""The stages of a run, each a function that takes what it needs and returns what it made. It imports every other
package of train. Begin with run_folder.py, then data.py and model.py, in the order in which train/run.py calls them.
"""
