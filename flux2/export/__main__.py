"""Entry point of `python -m flux2.export`."""

import sys

from flux2.export.command import main

sys.exit(main())
