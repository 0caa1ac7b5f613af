"""What an exported adapter does to the small models."""

from pathlib import Path

from adapter_helpers import fresh
from torch import Tensor

from flux2 import adapters
from flux2.models.transformer import Transformer


def loaded(*places: tuple[Path, float], kind: str = "dev") -> Transformer:
    """The small model with adapters attached, each at its scale."""
    model = fresh(kind)
    for i, (place, scale) in enumerate(places):
        adapters.load(model, place, name=f"adapter_{i}", scale=scale)
    return model


def changes(place: Path, kind: str = "dev") -> dict[str, Tensor]:
    """What an adapter adds to each weight that it changes, by PEFT's merge, in float64."""
    model, base = loaded((place, 1.0), kind=kind), fresh(kind).state_dict()
    adapters.merge(model)
    found = {name.removesuffix(".weight"): tensor.double() - base[name] for name, tensor in model.state_dict().items()}
    return {name: delta for name, delta in found.items() if delta.any()}
