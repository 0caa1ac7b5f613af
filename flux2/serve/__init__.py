"""`python -m flux2.serve`: a text encoder for machines that have no room for one. The package imports the rest of flux2
except other commands. Begin with command.py, which loads the encoder; app.py answers requests.
"""
