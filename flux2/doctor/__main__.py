"""Entry point of `python -m flux2.doctor`."""

import sys

from flux2.doctor.command import main

sys.exit(main())
