"""`python -m flux2.doctor`: what is installed, what is here, and whether the numbers are right. It imports the rest of
flux2 but for other commands. Begin with command.py; selftest.py compares numbers with diffusers.
"""
