"""Import PEFT for a plan without the libraries that a plan does not use, which take a third of its CPU time.

A plan attaches an adapter to shapes alone: it loads no text encoder, quantizes no weight and compiles nothing. PEFT
imports transformers for base classes and `isinstance` checks, and bitsandbytes for its layers. bitsandbytes, which
optimizer=adamw_8bit needs, imports torch's compiler for functions that a plan does not call.
"""

from __future__ import annotations

import importlib.abc
import os
import sys
from importlib import metadata
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class StandIn(ModuleType):
    """A module in which every name is an empty class."""

    __version__ = metadata.version("transformers")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(self, name, type(name, (), {}))
        return getattr(self, name)


class StandInFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds a stand-in for transformers and each of its modules."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] == "transformers" else None

    def exec_module(self, module: ModuleType) -> None:
        module.__class__ = StandIn


def import_lightly() -> None:
    """Import PEFT with stand-ins, which later imports do not see, and as if bitsandbytes were not installed.

    PEFT then never checks for layers of bitsandbytes; our models have none.
    """
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # `torch.compile` does and imports nothing
    finder = StandInFinder()
    sys.meta_path.insert(0, finder)
    sys.modules["bitsandbytes"] = None  # type: ignore[assignment]
    try:
        from peft.import_utils import is_bnb_4bit_available, is_bnb_available

        assert not is_bnb_available()  # PEFT caches both results
        assert not is_bnb_4bit_available()
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.partition(".")[0] == "transformers"]:
            del sys.modules[name]
        del sys.modules["bitsandbytes"]
