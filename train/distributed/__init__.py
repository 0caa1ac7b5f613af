"""Several processes that train as one: what they exchange, a base model that is sharded over them, and who launched
them. It imports train.utils. Begin with processes.py.
"""
