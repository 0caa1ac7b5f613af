"""`python -m flux2.serve`: a text encoder for machines that have no room for one. It imports the rest of flux2 but for
other commands. Begin with command.py, which loads the encoder; app.py answers requests.
"""
