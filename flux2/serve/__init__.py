"""`python -m flux2.serve`: a text encoder for machines that have no room for one. It imports only packages that are
earlier in README's list. Begin with command.py, which loads the encoder; app.py answers requests.
"""
