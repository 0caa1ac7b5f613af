"""Show what a bug report needs: `python -m flux2.doctor`.

It lists versions, devices, free memory and disk, whether there is a Hub login (never the token), which models and
caches exist, and runs the self-test of `flux2.doctor.selftest`. With --verify it compares the files of a model with the
hashes that the Hub gave for them. It changes and downloads nothing, and exits with 1 if a comparison failed.
"""

import argparse


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m flux2.doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = "model, repository id, folder or file to compare with the Hub's hashes; reads it completely"
    parser.add_argument("--verify", metavar="MODEL", help=what)
    return parser.parse_args(argv)
