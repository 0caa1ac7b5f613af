"""The configuration of a run as typed objects, checked before anything large is loaded.

It imports the packages whose settings it holds. Start with settings.py for the keys, run_config.py for the object.
"""
