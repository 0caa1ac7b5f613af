"""FLUX.2: images from text and reference images. `flux2.load("tiny").generate("a small red cup")`."""

import logging
from typing import TYPE_CHECKING, Any

# bitsandbytes, imported by PEFT, warns on some CPUs that a kernel could not be downloaded; flux2 does not use it
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

if TYPE_CHECKING:
    from flux2.pipeline import Pipeline, load

__all__ = ["Pipeline", "load"]


def __getattr__(name: str) -> Any:
    """Import `Pipeline` and `load` on first use: their imports take seconds, and commands print something before."""
    if name in __all__:
        from flux2 import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
