"""Training in several processes: communication, a base model that is sharded over them, and detection of the launcher.
The package imports train.utils. Begin with processes.py.
"""
