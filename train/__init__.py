"""Train adapters and evaluate them; inference needs only `flux2`.

Each file here is a command, except loop.py. Begin with run.py, which runs the stages of stages/, then loop.py.
"""

import flux2  # noqa: F401  before PEFT is imported: flux2 silences a warning of bitsandbytes
