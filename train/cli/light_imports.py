"""Import PEFT and PyTorch for a plan without what a plan does not use, which takes a third of its CPU time.

A plan attaches an adapter to a model that has shapes only: it loads no text encoder, quantizes no weight, shards no
tensor and compiles nothing. PEFT imports transformers for base classes and `isinstance` checks, and bitsandbytes for
its layers. PyTorch imports its compiler when it makes an optimizer or a fake tensor, and DTensor for such checks.
"""

from __future__ import annotations

import importlib
import importlib.abc
import sys
from importlib import metadata
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch


class StandIn(ModuleType):
    """A module in which every name is an empty class."""

    __version__ = metadata.version("transformers")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(self, name, type(name, (), {}))
        return getattr(self, name)


class Compiler(StandIn):
    """A stand-in for torch._dynamo, PyTorch's compiler: only its module `config` is real."""

    __path__ = [f"{torch.__path__[0]}/_dynamo"]  # noqa: RUF012

    @staticmethod
    def disable(function: Any = None, *_: object, **__: object) -> Any:
        """Return `function`, or a decorator that does: also in place of `torch.compile`."""
        return Compiler.disable if function is None else function


class StandInFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds a stand-in for transformers and each of its modules."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] == "transformers" else None

    def exec_module(self, module: ModuleType) -> None:
        module.__class__ = StandIn


def import_lightly() -> None:
    """Import PEFT with stand-ins, and as if bitsandbytes were not installed, because our models have no such layers."""
    for name, stand_in in (("torch._dynamo", Compiler), ("torch.distributed.tensor", StandIn)):
        sys.modules[name] = stand_in(name)
        parent, _, child = name.rpartition(".")
        setattr(sys.modules[parent], child, sys.modules[name])
    importlib.import_module("torch._dynamo.config")
    torch.compile = Compiler.disable  # type: ignore[assignment]
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
