"""Entry point of `python -m flux2.doctor`."""

import sys

from flux2.doctor.arguments import arguments

arguments()  # --help and wrong options end here: the imports below take seconds

from flux2.doctor.command import main

sys.exit(main())
