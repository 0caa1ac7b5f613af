"""Import PEFT without transformers, which takes a third of the CPU time of a plan.

PEFT imports transformers for base classes and `isinstance` checks; the adapters of FLUX.2, which is no transformers
model, need none of it. The planner attaches an adapter and loads no text encoder, so it never needs transformers.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from importlib import metadata
from types import ModuleType
from typing import Any


class StandIn(ModuleType):
    """A module whose every name is an empty class."""

    __path__: Sequence[str] = ()
    __version__ = metadata.version("transformers")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(self, name, type(name, (), {}))
        return getattr(self, name)


class StandInFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds a stand-in for transformers and each of its modules."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] != "transformers":
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def import_peft() -> None:
    """Import PEFT with stand-ins for transformers, which later imports do not see."""
    if "transformers" in sys.modules:
        return
    finder = StandInFinder()
    sys.meta_path.insert(0, finder)
    try:
        import peft  # noqa: F401
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.partition(".")[0] == "transformers"]:
            del sys.modules[name]
