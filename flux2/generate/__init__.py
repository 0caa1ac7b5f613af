"""`python -m flux2.generate`: images from the command line. It imports only packages that are earlier in README's list.
Begin with command.py; requests.py reads which images are wanted, metadata.py records how an image was made.
"""
