"""`python -m flux2.doctor`: installed packages, devices and files, and whether the numbers are right. The package
imports the rest of flux2 except other commands. Begin with command.py; selftest.py compares numbers with diffusers.
"""
