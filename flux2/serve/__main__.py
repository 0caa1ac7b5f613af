"""What `python -m flux2.serve` runs."""

import sys

from flux2.serve.command import main

sys.exit(main())
