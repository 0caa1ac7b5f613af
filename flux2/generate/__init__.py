"""`python -m flux2.generate`: pictures from the command line. It imports the rest of flux2 but for other commands.
Begin with command.py; requests.py says which pictures are asked for, metadata.py how one was made.
"""
