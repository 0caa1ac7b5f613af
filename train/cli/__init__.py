"""The command line of the scripts in train/: Hydra's wrapper, and errors as one message with a remedy. It imports only
packages that are earlier in README's list. Begin with app.py; start.py runs before any library is imported.
"""
