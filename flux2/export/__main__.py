"""Entry point of `python -m flux2.export`."""

import sys

from flux2.export.arguments import arguments

arguments()  # --help and wrong options end here: the imports below take seconds

from flux2.export.command import main

sys.exit(main())
