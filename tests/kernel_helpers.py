"""Triton's interpreter for tests: the kernels of flux2/layers/triton_kernels.py on CPU tensors."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from flux2.layers import fused_elementwise

NUMPY_INTEGERS = {8: np.uint8, 16: np.uint16, 32: np.uint32}
TORCH_INTEGERS = {8: torch.uint8, 16: torch.uint16, 32: torch.uint32}


def convert_float(values: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
    """Replace Triton's conversion of floats, which truncates bfloat16 and rounds e4m3 differently from a GPU."""
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8e4nv": torch.float8_e4m3fn}
    bits = np.ascontiguousarray(values).view(NUMPY_INTEGERS[source.primitive_bitwidth])
    numbers = torch.from_numpy(bits.copy()).view(dtypes[str(source)]).to(dtypes[str(target)])
    integers = TORCH_INTEGERS[target.primitive_bitwidth]
    return numbers.view(integers).numpy().reshape(values.shape)


def interpreted_kernels(patch: pytest.MonkeyPatch, source: str | None = None) -> ModuleType:
    """Make `fused_elementwise` run interpreted kernels on CPU tensors until `patch` is undone; return their module.

    `source` replaces the text of the module, for tests that need a faulty one.
    """
    from triton import JITFunction, language
    from triton.runtime import interpreter

    patch.setenv("TRITON_INTERPRET", "1")
    patch.setattr(interpreter, "_convert_float", convert_float)
    for owner in (language, language.standard):  # Triton's own functions, which were defined without the variable
        for name, function in list(vars(owner).items()):
            if isinstance(function, JITFunction):
                patch.setattr(owner, name, interpreter.InterpretedFunction(function.fn))
    spec = importlib.util.find_spec("flux2.layers.triton_kernels")
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    patch.setitem(sys.modules, "flux2.layers.triton_kernels", module)
    patch.setattr("flux2.layers.triton_kernels", module, raising=False)
    patch.setattr(fused_elementwise, "runs_on_gpu", lambda x: True)
    return module
