"""What `python -m flux2.doctor` runs."""

import sys

from flux2.doctor.command import main

sys.exit(main())
