"""`python -m flux2.doctor`: installed packages, devices and files, and whether the numbers are right. It imports only
packages that are earlier in README's list. Begin with command.py; selftest.py compares numbers with diffusers, and
verify.py files with the Hub's hashes.
"""
