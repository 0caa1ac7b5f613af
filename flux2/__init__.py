"""FLUX.2: text (and pictures) to pictures. `flux2.load("tiny").generate("a small red cup")`."""

import logging
from typing import TYPE_CHECKING, Any

# bitsandbytes, which PEFT imports, warns on some CPUs that a kernel nobody here calls could not be downloaded
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

if TYPE_CHECKING:
    from flux2.pipeline import Pipeline, load

__all__ = ["Pipeline", "load"]


def __getattr__(name: str) -> Any:
    """`Pipeline` and `load` when they are asked for: their imports take seconds, and a command first says so."""
    if name in __all__:
        from flux2 import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
