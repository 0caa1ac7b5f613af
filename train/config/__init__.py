"""The configuration of a run as typed objects, checked before anything large is loaded.

The package implements conf/train.yaml. It imports only packages that are earlier in README's list. Begin with
settings.py for the keys, run_config.py for the object.
"""
