"""Training in several processes: communication, a base model that is sharded over them, and detection of the launcher.
It imports only packages that are earlier in README's list. Begin with processes.py.
"""
