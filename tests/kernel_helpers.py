"""Triton's interpreter for tests: the kernels of flux2/layers/triton_kernels.py on CPU tensors."""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from flux2.layers import fused_elementwise

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="Triton comes with PyTorch for GPUs, and otherwise with the extra `triton`",
)
NUMPY_INTEGERS = {8: np.uint8, 16: np.uint16, 32: np.uint32}
TORCH_INTEGERS = {8: torch.uint8, 16: torch.uint16, 32: torch.uint32}


def convert_float(values: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
    """Replace Triton's conversion of floats, which truncates bfloat16 and rounds e4m3 differently from a GPU."""
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8e4nv": torch.float8_e4m3fn}
    bits = np.ascontiguousarray(values).view(NUMPY_INTEGERS[source.primitive_bitwidth])
    numbers = torch.from_numpy(bits.copy()).view(dtypes[str(source)]).to(dtypes[str(target)])
    integers = TORCH_INTEGERS[target.primitive_bitwidth]
    return numbers.view(integers).numpy().reshape(values.shape)


@contextmanager
def interpreted_kernels() -> Iterator[Counter[str]]:
    """Context manager in which interpreted kernels run on CPU tensors; it yields the number of launches of each."""
    from triton import JITFunction, language
    from triton.runtime import interpreter

    with restored_language(interpreter), pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        patch.setattr(interpreter, "_convert_float", convert_float)
        for owner in (language, language.standard):  # Triton's own functions, which were defined without the variable
            for name, function in list(vars(owner).items()):
                if isinstance(function, JITFunction):
                    patch.setattr(owner, name, interpreter.InterpretedFunction(function.fn))
        yield run_interpreted(patch)


@contextmanager
def restored_language(interpreter: Any) -> Iterator[None]:
    """Context manager that undoes what the interpreter does to Triton's language: Triton 3.6 leaves some of it."""
    originals: dict[tuple[int, str], tuple[Any, Any]] = {}
    set_attribute = interpreter._LangPatchScope.set_attr

    def recorded(scope: Any, owner: Any, name: str, value: Any) -> None:
        originals.setdefault((id(owner), name), (owner, vars(owner).get(name)))
        set_attribute(scope, owner, name, value)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter._LangPatchScope, "set_attr", recorded)
        try:
            yield
        finally:
            for (_, name), (owner, value) in originals.items():
                if value is not None:
                    setattr(owner, name, value)
                elif name in vars(owner):
                    delattr(owner, name)


def run_interpreted(patch: pytest.MonkeyPatch) -> Counter[str]:
    """Make `fused_elementwise` launch kernels that are defined now, on any tensors, and count the launches."""
    spec = importlib.util.find_spec("flux2.layers.triton_kernels")
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    patch.setitem(sys.modules, "flux2.layers.triton_kernels", module)
    patch.setattr("flux2.layers.triton_kernels", module, raising=False)
    patch.setattr(fused_elementwise, "runs_on_gpu", lambda x: True)

    launches: Counter[str] = Counter()
    launch = fused_elementwise.launch

    def counted(name: str, *args: Any, **options: Any) -> None:
        launches[name] += 1
        launch(name, *args, **options)

    patch.setattr(fused_elementwise, "launch", counted)
    return launches


@dataclass(frozen=True)
class Launch:
    """A launch of a kernel: its name, its arguments, and its constants and options."""

    name: str
    arguments: tuple[Any, ...]
    options: dict[str, Any]


def record_launches(patch: pytest.MonkeyPatch) -> list[Launch]:
    """Make `fused_elementwise` append its launches to a list instead of running them, also on CPU tensors."""
    launches: list[Launch] = []

    def record(name: str, grid: Any, *arguments: Any, **options: Any) -> None:
        launches.append(Launch(name, arguments, options))

    patch.setattr(fused_elementwise, "runs_on_gpu", lambda x: True)
    patch.setattr(fused_elementwise, "launch", record)
    return launches
