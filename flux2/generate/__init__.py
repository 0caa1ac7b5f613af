"""`python -m flux2.generate`: images from the command line. The package imports the rest of flux2 except other
commands. Begin with command.py; requests.py reads which images are wanted, metadata.py records how an image was made.
"""
