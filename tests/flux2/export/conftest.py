"""Adapters of every type and the export command, for its tests."""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

import helpers
import pytest
from adapter_helpers import TYPES, fresh, stirred

from flux2 import adapters
from flux2.adapters.tuners import attach_loha
from flux2.export import command as export
from flux2.models.variants import VARIANTS

EXPORTED = TYPES | {"loha": (attach_loha, {"rank": 3})}  # a LoHa has the square of its rank: 9, not 16


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`saved("dora", "all_linear")`: the PEFT folder of an adapter that was trained a little, written once."""
    made: dict[tuple[str, ...], Path] = {}

    def folder(kind: str, targets: str = "blocks", model: str = "dev", base: str = "tiny") -> Path:
        key = (kind, targets, model, base)
        if key not in made:
            attach_it, options = EXPORTED[kind]
            wrapped = stirred(attach_it(fresh(model), targets=targets, **options), by=0.1, seed=len(made))
            made[key] = tmp_path_factory.mktemp(kind) / "adapter"
            adapters.save(wrapped, made[key], base=base)
        return made[key]

    return folder


@pytest.fixture
def command(
    model_folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., int]:
    """Runs the command in an empty folder, with the small models in the place of `tiny` and of klein 4B."""
    small = helpers.VARIANTS
    monkeypatch.setitem(VARIANTS, "tiny", dataclasses.replace(small["dev"], name="tiny"))
    for name in ("klein_base_4b", "klein_4b"):
        monkeypatch.setitem(VARIANTS, name, dataclasses.replace(small["klein"], name=name))
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object, kind: str = "dev", path: bool = True) -> int:
        given = ["--device", "cpu", *(["--path", str(model_folders(kind))] if path else []), *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", ["export", *given])
        return export.main()

    return run
