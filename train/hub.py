"""Put a finished adapter on the Hugging Face Hub: `hub.push=true`, or afterwards `python -m train.hub RUN_FOLDER`.

What the push needs is tried before training. If it fails in the end all the same, that is a warning, and the adapter
stays where it is.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from train.publishing.hub import NotPushed, push, settings_of
from train.utils.redact import masked_text


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m train.hub", description="Push the adapter of a run to the Hub.")
    parser.add_argument("run", type=Path, help="the folder of a finished run")
    parser.add_argument("--repo-id", help="owner/name; by default what hub.repo_id was")
    seen = parser.add_mutually_exclusive_group()
    seen.add_argument("--private", dest="private", action="store_true", default=None)
    seen.add_argument("--public", dest="private", action="store_false")
    given = parser.parse_args(argv)
    try:
        settings = settings_of(given.run, {"repo_id": given.repo_id, "private": given.private, "push": False})
        if settings.repo_id:
            replace(settings, push=True).check(trained=True)
        print(push(given.run, settings))
    except (NotPushed, ValueError) as error:
        print(f"error: {masked_text(str(error))}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
