"""Read adapters from their files without a model: what each adds to the weight of each layer.

Export and merging work layer by layer, so a model of 64 GB need not fit in memory. LoRA, rsLoRA, PiSSA and DoRA are
read as pairs (flux2/adapters/formats.py); for LoHa, LoKr and OFT, PEFT computes the change of a single layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import peft
import torch
from torch import Tensor, nn

from flux2 import adapters
from flux2.adapters import files as adapter_files
from flux2.adapters import peft_config
from flux2.adapters.formats import AdapterError, LoraPair, rescale
from flux2.adapters.loading import LoadedAdapter, check_scale, fill_adapter, inject
from flux2.adapters.reading import read_adapter, recorded_base
from flux2.models.transformer import Transformer
from flux2.models.variants import VARIANTS, TransformerConfig, Variant, find_variant
from flux2.utils import checks
from flux2.utils.text import listed

ORDER_DEPENDENT = ("DoRA", "column DoRA", "OFT")  # not sums: a DoRA divides by row lengths, an OFT rotates the input


@dataclass(frozen=True)
class AdapterDelta:
    """An adapter in its files: `pairs` for low-rank types, `config` and `tensors` for the others."""

    place: Path  # its file or folder
    kind: str
    scale: float  # factor of its change
    model: Transformer  # of names and shapes only
    pairs: Mapping[str, LoraPair] = field(default_factory=dict)
    config: peft.PeftConfig | None = None
    tensors: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)  # by layer and PEFT's key
    note: str = ""  # what is not certain

    @property
    def layers(self) -> list[str]:
        return list(self.pairs or self.tensors)

    @property
    def is_plain(self) -> bool:
        """Whether it adds a low-rank pair to each weight, independently of the weight."""
        return bool(self.pairs) and not self.needs_weights

    @property
    def needs_weights(self) -> bool:
        """Whether its change depends on the base's weights."""
        return self.kind in ORDER_DEPENDENT

    def description(self) -> str:
        """Return type, ranks and number of layers."""
        ranks = [pair.a.shape[0] for pair in self.pairs.values()]
        return str(LoadedAdapter(self.kind, tuple(self.layers), tuple(ranks), self.note))

    def pair(self, layer: str) -> LoraPair:
        """Return the pair of a layer of a plain adapter, with its scale folded in."""
        pair = self.pairs[layer]
        return pair if self.scale == 1 else LoraPair(pair.a, pair.b * self.scale)

    def change(self, layer: str, weight: Tensor | None, device: torch.device) -> Tensor:
        """Return what it adds to the weight of `layer`: a new tensor (out, in) in float32 on `device`.

        `weight` is the base's, in float32 on `device`; it is required if `needs_weights`.
        """
        if layer in self.pairs:
            pair = self.pairs[layer]
            delta = pair.b.to(device) @ pair.a.to(device)
            if pair.magnitude is not None:
                assert weight is not None
                delta = rescale(delta.add_(weight), pair.magnitude.to(device)).sub_(weight)
        else:
            assert self.config is not None
            if weight is None:
                weight = torch.zeros(self.model.get_parameter(f"{layer}.weight").shape, device=device)
            delta = change_by_peft(self.config, layer, self.tensors[layer], weight)
        if not bool(torch.isfinite(delta.mul_(self.scale)).all()):
            raise AdapterError(
                f"adapter {self.place}: it changes {layer} by NaN or infinite values. Use a smaller scale, or another "
                "adapter"
            )
        return delta


@torch.no_grad()
def change_by_peft(config: peft.PeftConfig, layer: str, state: Mapping[str, Tensor], weight: Tensor) -> Tensor:
    """Return the change that PEFT makes when it merges an adapter of `config` into a layer."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.clone(), requires_grad=False)  # PEFT merges in place
    container = nn.ModuleDict({"linear": linear})
    inject(container, peft_config.layer_config(config, layer, "linear"), "default")
    fill_adapter(container, "default", {f"linear.{key}": tensor for key, tensor in state.items()}, weight.device)
    return adapter_files.merged_weight(container["linear"]).sub_(weight)


def skeleton(sizes: TransformerConfig) -> Transformer:
    """Return a model without memory, for its names and shapes."""
    with torch.device("meta"):
        return Transformer(sizes)


def read(path: str | Path, model: Transformer, scale: float = 1.0) -> AdapterDelta:
    """Return the adapter at `path`, as `adapters.find` resolves it, checked against names and shapes of `model`.

    Raises AdapterError for an adapter that cannot be used, TypeError or ValueError for an invalid scale.
    """
    scale = checks.number("scale", scale)
    place = adapters.find(path)
    try:
        stored = read_adapter(place, model)
        check_scale(stored.kind, scale)
        if stored.schedule is not None:
            raise AdapterError(
                "the rank of a T-LoRA depends on the timestep, which no weight and no other format holds"
            )
        if biased := [layer for layer, pair in stored.pairs.items() if pair.bias is not None]:
            raise AdapterError(f"it adds a bias to {listed(biased, 2)}, which no weight and no other format holds")
    except ValueError as error:
        text = str(error)
        raise AdapterError(text if text.startswith("adapter ") else f"adapter {place}: {text}") from error
    if stored.pairs:
        return AdapterDelta(place, stored.kind, scale, model, stored.pairs, note=stored.note)
    return AdapterDelta(place, stored.kind, scale, model, {}, stored.config, stored.tensors, stored.note)


def total_change(updates: Sequence[AdapterDelta], layer: str, weight: Tensor | None, device: torch.device) -> Tensor:
    """Return the sum of what several adapters, which all have `layer`, add to its weight; as `AdapterDelta.change`."""
    total = updates[0].change(layer, weight, device)
    for update in updates[1:]:
        total += update.change(layer, weight, device)
    return total


def check_together(updates: Sequence[AdapterDelta]) -> None:
    """Raise AdapterError unless the changes of several adapters add up."""
    dependent = [update.kind for update in updates if update.needs_weights]
    if dependent and len(updates) > 1:
        raise AdapterError(
            f"a {dependent[0]} cannot be added to another adapter: its change depends on the current weights, so the "
            "result would depend on the order. Merge one into a full checkpoint (--format full-bfl), and the next "
            "into that (--path)"
        )


def variant_for(places: Sequence[Path], requested: str | None) -> tuple[Variant, bool]:
    """Return the model that the adapters are for, and whether that is certain: requested, or recorded in one of them.

    Otherwise it is the first variant whose layers the first adapter fits: klein base and its distilled twin have the
    same.

    Raises AdapterError if an adapter records a base of other sizes, or if none fits.
    """
    recorded = {place: found for place in places if (found := find_variant(recorded_base(place)))}
    if requested is not None:
        for place, candidate in recorded.items():
            if candidate.transformer != VARIANTS[requested].transformer:
                raise AdapterError(
                    f"adapter {place} was trained on {candidate.name}, whose layers differ from {requested}'s"
                )
        return VARIANTS[requested], True
    sizes = {candidate.transformer for candidate in recorded.values()}
    if len(sizes) > 1:
        names = sorted(candidate.name for candidate in recorded.values())
        raise AdapterError(f"the adapters were trained on models of different sizes: {', '.join(names)}")
    if recorded:
        return next(iter(recorded.values())), True
    reasons = {}
    for candidate in VARIANTS.values():
        try:
            read(places[0], skeleton(candidate.transformer))
        except AdapterError as error:
            reasons[candidate.name] = str(error).removeprefix(f"adapter {places[0]}: ")
        else:
            return candidate, False
    if len(set(reasons.values())) == 1:  # the file is the cause, not the model
        raise AdapterError(f"adapter {places[0]}: {next(iter(reasons.values()))}")
    raise AdapterError(
        f"adapter {places[0]} does not record its base, and fits none of {listed(VARIANTS)}. For "
        f"{next(iter(reasons))}: {next(iter(reasons.values()))}"
    )
