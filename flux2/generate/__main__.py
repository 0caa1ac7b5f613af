"""Entry point of `python -m flux2.generate`."""

import signal
import sys

from flux2.generate.arguments import option_parser

# the imports below take seconds
option_parser().parse_args()  # --help and wrong options end here
if sys.stderr.isatty():
    print("loading libraries ...", end="\r", file=sys.stderr, flush=True)
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C then ends them at once, without a traceback

from flux2.generate.command import main

sys.exit(main())
