"""The strength of a loaded adapter: its scale, times factors for ranges of blocks and of sampling times.

Ranges are one string for Python, the command line and the record in a PNG, such as `double.0-3=0.5,time.0.5-1=0`:

    double.0-3=0.5    half of the scale in the double blocks 0 to 3
    single=0          nothing in any single block
    time.0.5-1=0      nothing at times above 0.5 and up to 1, which are the first steps (flux2/sampling.py)

The factor is 1 where no range applies; the factors of a block and a time multiply. Layers outside of blocks have only
the factor of the time.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from flux2.adapters.formats import AdapterError
from flux2.adapters.tuners import adapter_layers
from flux2.models.variants import TransformerConfig

RANGE = re.compile(r"(double|single)(?:\.(\d+)(?:-(\d+))?)?=(.*)|(time)\.([\d.]+)-([\d.]+)=(.*)", re.ASCII)
EXAMPLES = "double.0-3=0.5, single=0 or time.0.5-1=0"


@dataclass(frozen=True)
class Range:
    """A factor for blocks `first` to `last` of a kind (double, single), or for times above `first` up to `last`."""

    kind: str
    first: float
    last: float
    factor: float
    text: str

    def contains(self, layer: str) -> bool:
        """Whether it is a range of blocks with this layer: `single_blocks.3.linear1`."""
        child, _, rest = layer.partition(".")
        return child == f"{self.kind}_blocks" and self.first <= int(rest.partition(".")[0]) <= self.last


@dataclass(frozen=True)
class Ranges:
    """Ranges of blocks and of times; those of a kind do not overlap."""

    blocks: tuple[Range, ...] = ()
    times: tuple[Range, ...] = ()

    def of_layer(self, layer: str) -> float:
        return next((one.factor for one in self.blocks if one.contains(layer)), 1.0)

    def of_time(self, time: float) -> float:
        return next((one.factor for one in self.times if one.first < time <= one.last), 1.0)

    def check_layers(self, layers: Iterable[str]) -> None:
        """Raise AdapterError for a range of blocks in which an adapter on these layers has none."""
        layers = list(layers)
        for one in self.blocks:
            if not any(one.contains(layer) for layer in layers):
                raise AdapterError(f"ranges={one.text} has no effect: the adapter has no layers in these blocks")


def parse_ranges(text: str, config: TransformerConfig) -> Ranges:
    """Return the ranges that `text` describes, none if it is empty. Raise TypeError or AdapterError if it is wrong."""
    if not isinstance(text, str):
        raise TypeError(f"ranges={text!r} must be a string such as {EXAMPLES}")
    found = [parse_range(item, config) for item in text.split(",")] if text else []
    ordered = sorted(found, key=lambda one: (one.kind, one.first))
    for one, following in pairwise(ordered):
        touch = following.first < one.last or (following.first == one.last and one.kind != "time")
        if one.kind == following.kind and touch:
            raise AdapterError(f"ranges={text}: {one.text} and {following.text} overlap. Give each place one factor")
    times = tuple(one for one in found if one.kind == "time")
    return Ranges(tuple(one for one in found if one.kind != "time"), times)


def parse_range(item: str, config: TransformerConfig) -> Range:
    match = RANGE.fullmatch(item.strip())
    try:
        if match is None:
            raise ValueError
        kind, first, last, factor = match.groups()[:4] if match[1] else match.groups()[4:]
        value = float(factor)
        start = float(first or 0) if kind == "time" else int(first or 0)
        stop = float(last) if kind == "time" else int(last or first or getattr(config, f"{kind}_blocks") - 1)
    except ValueError:
        raise AdapterError(f"ranges={item} is not a range with a factor, such as {EXAMPLES}") from None
    if not abs(value) < float("inf"):
        raise AdapterError(f"ranges={item}: the factor must be a finite number")
    if kind == "time":
        if not 0 <= start < stop <= 1:
            raise AdapterError(f"ranges={item}: times must ascend and be from 0 to 1")
    elif not start <= stop < getattr(config, f"{kind}_blocks"):
        most = getattr(config, f"{kind}_blocks") - 1
        raise AdapterError(f"ranges={item}: numbers of {kind} blocks must ascend and be from 0 to {most}")
    return Range(kind, start, stop, value, item.strip())


class AdapterStrength:
    """The strength of the adapter `name` in a model, as its layers compute with it."""

    def __init__(self, model: nn.Module, name: str, scale: float, ranges: Ranges) -> None:
        self.name, self.scale, self.ranges, self.time = name, scale, ranges, 1.0
        # layers with the adapter, and the scale that PEFT has given it, such as alpha / rank
        self.layers: list[tuple[str, Any, float]] = [
            (layer, module, module.scaling[name])
            for layer, module in adapter_layers(model).items()
            if name in getattr(module, "scaling", {})
        ]
        self.hook: RemovableHandle | None = None
        if ranges.times:
            self.hook = model.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        self.apply()

    def apply(self) -> None:
        at_time = self.scale * self.ranges.of_time(self.time)
        for layer, module, unit in self.layers:
            strength = at_time * self.ranges.of_layer(layer)
            if self.name in getattr(module, "lora_magnitude_vector", {}):  # of a DoRA, which divides by lengths first
                module.lora_magnitude_vector[self.name].strength = strength
            else:
                module.scaling[self.name] = unit * strength

    def close(self) -> None:
        """Stop following the time."""
        if self.hook is not None:
            self.hook.remove()

    def _before_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Take the strength at the time of a transformer's forward; images of a batch share it."""
        timestep: Tensor = args[4] if len(args) > 4 else kwargs["timestep"]
        time = float(timestep.flatten()[0])
        if time != self.time:
            self.time = time
            self.apply()


def strengths(model: nn.Module) -> dict[str, AdapterStrength]:
    """Return the strengths of the adapters that `model` has loaded, by name."""
    return vars(model).setdefault("adapter_strengths", {})


def set_scale(model: nn.Module, name: str, scale: float) -> None:
    """Change the scale of a loaded adapter, in place; its ranges stay."""
    strengths(model)[name].scale = scale
    strengths(model)[name].apply()
