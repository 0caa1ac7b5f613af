"""The HTML pages of runs and evaluations, which need no network: text, pictures, plots, a slider. It imports
train.evaluation, train.tracking, train.validation and train.utils. Begin with run_report.py.
"""
