"""The embedded model: `python -m train.tiny_model` draws its images and trains it. It imports only packages that are
earlier in README's list. Begin with __main__.py, whose steps the other files implement.
"""
