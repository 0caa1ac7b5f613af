"""Entry point of `python -m flux2.serve`."""

import sys

from flux2.serve.command import main

sys.exit(main())
