"""Entry point of `python -m flux2.serve`."""

import sys

from flux2.serve.arguments import arguments

arguments()  # --help and wrong options end here: the imports below take seconds

from flux2.serve.command import main

sys.exit(main())
