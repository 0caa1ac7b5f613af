"""What every part of train may use: checks, text, files, locks, the console, signals, secrets, memory errors, progress.
It imports flux2 and data at most. Begin with files.py; each file stands alone.
"""
