"""The HTML pages of runs and evaluations, which need no network: text, pictures, plots, a slider. It imports only
packages that are earlier in README's list. Begin with run_report.py.
"""
