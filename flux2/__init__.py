"""FLUX.2: text (and pictures) to pictures. `flux2.load("tiny").generate("a small red cup")`."""

import logging

# bitsandbytes, which PEFT imports, warns on some CPUs that a kernel nobody here calls could not be downloaded
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

from flux2.pipeline import Pipeline, load

__all__ = ["Pipeline", "load"]
