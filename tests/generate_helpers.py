"""Adapters for the generate command, and the command without settings of its own."""

import sys
from pathlib import Path

import helpers
import pytest
import torch

from flux2 import adapters
from flux2.generate import command as generate


def write_adapter(folder: Path, seed: int = 0) -> None:
    model = helpers.transformer("dev")
    wrapped = adapters.attach(model, rank=2, seed=seed)
    for parameter in adapters.adapter_parameters(model):
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)) * 0.3
    adapters.save(wrapped, folder, base="small")


def repeat(*arguments: str) -> int:
    """The command without a prompt or sizes of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["generate", "--device", "cpu", *arguments])
        return generate.main()
