"""Push a finished adapter to the Hugging Face Hub: `python -m train.hub RUN_FOLDER`, or `hub.push=true` at the end.

With `hub.push=true` the login is checked before training. A push that still fails is a warning; the adapter stays in
the run folder.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace

from data.files import user_path
from train.publishing.hub import PushError, given_settings, push
from train.utils.console import say
from train.utils.redact import masked_text


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m train.hub", description="Push the adapter of a run to the Hub.")
    parser.add_argument("run", type=user_path, help="folder of a finished run")
    parser.add_argument("--repo-id", help="owner/name: the repository, created if it does not exist")
    visibility = parser.add_mutually_exclusive_group()
    visibility.add_argument("--private", dest="private", action="store_true", default=True, help="the default")
    visibility.add_argument("--public", dest="private", action="store_false")
    options = parser.parse_args(argv)
    try:
        settings = given_settings(options.run, options.repo_id, options.private)
        replace(settings, push=True).check(trained=True)
        print(push(options.run, settings))
    except (PushError, ValueError) as error:
        say(f"error: {masked_text(str(error))}", to_errors=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
