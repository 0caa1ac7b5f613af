"""What `python -m flux2.export` runs."""

import sys

from flux2.export.command import main

sys.exit(main())
