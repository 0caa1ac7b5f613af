"""Show what a bug report needs: `python -m flux2.doctor`.

It lists versions, devices, free memory and disk, whether there is a Hub login (never the token), which models and
caches exist, and runs the self-test of `flux2.doctor.selftest`. It changes and downloads nothing, and exits with 1 if a
comparison failed.
"""

import argparse


def check_arguments(argv: list[str] | None = None) -> None:
    """Answer `--help` and refuse everything else: the command has no options."""
    argparse.ArgumentParser(
        prog="python -m flux2.doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args(argv)
