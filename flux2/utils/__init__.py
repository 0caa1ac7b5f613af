"""What every part of flux2 may use: argument checks, image files, signals, the choice of a device, text for messages,
and what the commands share. It imports nothing else of flux2. Begin with checks.py, whose errors name the argument.
"""
