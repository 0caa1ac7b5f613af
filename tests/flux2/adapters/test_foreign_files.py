"""flux2.adapters.reading: files of every program, type, strength and dtype add what plain arithmetic says."""

from itertools import product
from pathlib import Path

import pytest
import torch
from adapter_helpers import fresh
from foreign_adapters import WRITERS, Writer, strengths_of, write

from flux2 import adapters

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.float8_e4m3fn}


def place_of(writer: Writer, folder: Path) -> Path:
    return folder if writer.file != "lora.safetensors" else folder / writer.file


def cases() -> list[object]:
    """Every program, type, strength and dtype; `make test` runs each pair of the first two, once, and all strengths."""
    found: list[object] = []
    for name, writer in WRITERS.items():
        for kind in writer.types:
            strengths = strengths_of(writer, kind)
            often = (strengths[len(found) % len(strengths)], list(DTYPES)[len(found) % 3])
            for strength, dtype in product(strengths, DTYPES):
                marks = () if (strength, dtype) == often or (kind, dtype) == ("lora", "fp32") else pytest.mark.slow
                found.append(pytest.param(name, kind, strength, dtype, marks=marks))
    return found


@pytest.mark.parametrize(("name", "kind", "strength", "dtype"), cases())
def test_a_file_adds_what_plain_arithmetic_says(
    name: str, kind: str, strength: str, dtype: str, tmp_path: Path
) -> None:
    writer, base, model = WRITERS[name], fresh(), fresh()
    wanted = write(writer, kind, strength, DTYPES[dtype], tmp_path, base)
    loaded = adapters.load(model, place_of(writer, tmp_path))
    assert len(loaded.layers) == 4
    adapters.merge(model)
    for layer, weight in base.state_dict().items():
        found = model.state_dict()[layer].double() - weight.double()
        change = wanted.get(layer.removesuffix(".weight"))
        if change is None:
            assert not found.any(), layer
        else:
            assert float((found - change).norm() / change.norm()) <= 1e-5, layer
            assert float(change.norm() / weight.norm()) > 0.02, "the comparison says something"
