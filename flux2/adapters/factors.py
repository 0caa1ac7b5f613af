"""The update of each layer from the factors in a file: LoRA and DoRA, LoHa and LoKr, and parts joined to our layers.

Adapters of diffusers' separate q, k and v are one of our fused layer, exactly:

    LoRA    A stacked, B block-diagonal; the same A and B on top of each other if they share A
    LoHa    each of its two products like a LoRA
    LoKr    factors with a part as their first dimension: delta W is the products on top of each other
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import peft
import torch
from torch import Tensor

from flux2.adapters import peft_config
from flux2.adapters.formats import AdapterError, LoraPair
from flux2.adapters.keys import FileLayer, Place
from flux2.utils.text import listed
from flux2.weights.key_names import swap_halves

MOST_STRENGTH = 1e6  # beyond it float32 overflows soon; trainers use up to some hundreds
LORA = {"lora_A", "lora_B"}
LOHA = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}
LOKR = {"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"}
EXTRA = {"alpha", "lora_magnitude_vector", "dora_scale", "lora_B.bias"}


@dataclass(frozen=True)
class LohaFactors:
    """delta W = (w1_a @ w1_b) * (w2_a @ w2_b), elementwise, with the scale folded into `w1_a`."""

    w1_a: Tensor  # (out, rank)
    w1_b: Tensor  # (rank, in)
    w2_a: Tensor
    w2_b: Tensor


@dataclass(frozen=True)
class LokrFactors:
    """delta W = kron(w1, w2), with the scale folded into `w1`; w2 is `w2_a` if `w2_b` is None, else their product.

    With a first dimension of parts, delta W is the products on top of each other.
    """

    w1: Tensor  # (a, b)
    w2_a: Tensor  # (out / a, in / b) or (out / a, rank)
    w2_b: Tensor | None = None  # (rank, in / b)


Update = LoraPair | LohaFactors | LokrFactors


@dataclass(frozen=True)
class Strength:
    """Where the scale of a file is: in PEFT's configuration, whose place is called `where`, or in its alphas."""

    config: Any = None
    where: str = ""
    is_musubi: bool = False

    @staticmethod
    def name(layer: FileLayer) -> str:
        """Return the name by which patterns know the layer: that in the file, which has dots."""
        return layer.name if "." in layer.name else layer.place.layer

    def scale(self, layer: FileLayer, rank: int | None) -> float:
        """Return the factor of a layer's update of this rank. Raises AdapterError if there are two or it is invalid."""
        found = self.factor(layer, rank)
        if abs(found) > MOST_STRENGTH:
            raise AdapterError(f"{layer.name} has a strength (alpha / rank) of {found:g}: the file is damaged")
        return found

    def factor(self, layer: FileLayer, rank: int | None) -> float:
        alpha = layer.tensors.get("alpha")
        if self.config is not None:
            if alpha is not None:
                raise AdapterError(
                    f"its strength is in the file twice: {layer.name}.alpha and {self.where}. Remove one of them"
                )
            if rank is not None:
                peft_config.check_rank(self.config, self.name(layer), rank, self.where)
            return peft_config.layer_scale(self.config, self.name(layer))
        if alpha is None or rank is None:
            return 1.0
        if alpha.numel() != 1:
            raise AdapterError(f"{layer.name}: alpha has shape {tuple(alpha.shape)} and must be one number")
        if not math.isfinite(alpha.item()):
            raise AdapterError(f"{layer.name}.alpha is {alpha.item()}, no finite number")
        return alpha.item() / rank


def read_update(layer: FileLayer, strength: Strength) -> Update:
    """Return the update of a layer of a file. Raises AdapterError if its factors are incomplete or do not fit."""
    sides = layer.tensors.keys()
    for kind, known in (("LoRA", LORA), ("LoHa", LOHA), ("LoKr", LOKR)):
        if not sides & known:
            continue
        if kind != "LoRA" and sides & (EXTRA - {"alpha"}):
            raise AdapterError(
                f"{layer.name} is a DoRA of a {kind} (it has {listed(sides & EXTRA - {'alpha'})}), which is not read. "
                "Merge it into the base with the program that trained it, and give the result as the base"
            )
        if extra := sides - known - EXTRA:
            raise AdapterError(f"{layer.name} has factors of several types, {kind} and {listed(extra)}")
        if (kind == "LoKr" and not has_lokr(sides)) or (kind != "LoKr" and not known <= sides):
            break
        readers: dict[str, Callable[[FileLayer, Strength], Update]]
        readers = {"LoRA": read_lora, "LoHa": read_loha, "LoKr": read_lokr}
        return readers[kind](layer, strength)
    raise AdapterError(f"{strength.name(layer)} has only {' and '.join(sorted(sides))}: the file is incomplete")


def has_lokr(sides: Any) -> bool:
    """Whether both factors are there, each in one form."""
    return all(
        (f"lokr_{factor}" in sides) != ({f"lokr_{factor}_a", f"lokr_{factor}_b"} <= sides)
        and (f"lokr_{factor}_a" in sides) == (f"lokr_{factor}_b" in sides)
        for factor in ("w1", "w2")
    )


def check_product(layer: FileLayer, left: str, right: str) -> int:
    """Return the rank of two factors. Raises AdapterError unless they are matrices that multiply."""
    a, b = layer.tensors[left], layer.tensors[right]
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0] or not b.shape[0]:
        raise AdapterError(
            f"{layer.name}: {right} has shape {tuple(b.shape)} and {left} {tuple(a.shape)}, not (rank, in) and "
            "(out, rank)"
        )
    return b.shape[0]


def check_features(layer: FileLayer, rows: int, columns: int) -> None:
    """Raise AdapterError unless an update of `rows` and `columns` fits the layer."""
    place = layer.place
    if (rows, columns) != (place.rows, place.columns):
        raise AdapterError(
            f"{layer.name}: the adapter is for a layer of {columns} to {rows} features, but the model's has "
            f"{place.columns} to {place.rows}. It was trained on another model."
        )


def read_lora(layer: FileLayer, strength: Strength) -> LoraPair:
    rank = check_product(layer, "lora_B", "lora_A")
    a, b = layer.tensors["lora_A"], layer.tensors["lora_B"]
    check_features(layer, b.shape[0], a.shape[1])
    lengths = [side for side in ("lora_magnitude_vector", "dora_scale") if side in layer.tensors]
    if len(lengths) > 1:
        raise AdapterError(f"{layer.name} has the lengths of a DoRA twice: {' and '.join(lengths)}")
    magnitude = read_magnitude(layer, lengths[0]) if lengths else None
    if isinstance(strength.config, peft.LoraConfig) and strength.config.use_dora != (magnitude is not None):
        found = "no lora_magnitude_vector" if magnitude is None else lengths[0]
        raise AdapterError(f"{strength.where} has use_dora={strength.config.use_dora}, but {layer.name} has {found}")
    bias = layer.tensors.get("lora_B.bias")
    if bias is not None and (magnitude is not None or bias.shape != b.shape[:1]):
        what = f"shape {tuple(bias.shape)}, not {tuple(b.shape[:1])}" if magnitude is None else "a DoRA next to it"
        raise AdapterError(f"{layer.name}: lora_B.bias has {what}")
    scale = strength.scale(layer, rank)
    return LoraPair(a, b * scale, magnitude, None if bias is None else bias * scale)


def read_magnitude(layer: FileLayer, side: str) -> Tensor:
    """Return the lengths of a DoRA: (out,) of rows, or (1, in) of columns."""
    found, place = layer.tensors[side], layer.place
    if found.shape in ((place.rows,), (place.rows, 1)):
        return found.flatten()
    if side == "dora_scale" and found.shape == (1, place.columns):
        return found
    raise AdapterError(f"{layer.name}: {side} has shape {tuple(found.shape)}, not {(place.rows,)}")


def read_loha(layer: FileLayer, strength: Strength) -> LohaFactors:
    rank = check_product(layer, "hada_w1_a", "hada_w1_b")
    one, two, three, four = (layer.tensors[side] for side in sorted(LOHA))
    if check_product(layer, "hada_w2_a", "hada_w2_b") != rank or (one.shape, two.shape) != (three.shape, four.shape):
        raise AdapterError(f"{layer.name}: the two products of the LoHa have factors of different shapes")
    check_features(layer, one.shape[0], two.shape[1])
    return LohaFactors(one * strength.scale(layer, rank), two, three, four)


def read_lokr(layer: FileLayer, strength: Strength) -> LokrFactors:
    """Return the factors of a LoKr. With two whole matrices there is no rank, and all programs but two drop alpha:
    PEFT scales by alpha and r of its configuration, musubi divides by the longer side of w2.
    """
    tensors, rank = layer.tensors, None
    for factor in ("w1", "w2"):
        if f"lokr_{factor}" not in tensors:
            rank = check_product(layer, f"lokr_{factor}_a", f"lokr_{factor}_b")
        elif tensors[f"lokr_{factor}"].ndim != 2 or not tensors[f"lokr_{factor}"].numel():
            raise AdapterError(f"{layer.name}: lokr_{factor} has shape {tuple(tensors[f'lokr_{factor}'].shape)}")
    w1 = tensors["lokr_w1"] if "lokr_w1" in tensors else tensors["lokr_w1_a"] @ tensors["lokr_w1_b"]
    w2_a, w2_b = tensors.get("lokr_w2", tensors.get("lokr_w2_a")), tensors.get("lokr_w2_b")
    assert w2_a is not None
    columns = (w2_a if w2_b is None else w2_b).shape[1]
    check_features(layer, w1.shape[0] * w2_a.shape[0], w1.shape[1] * columns)
    if rank is None and strength.is_musubi:
        rank = max(w2_a.shape)
    return LokrFactors(w1 * strength.scale(layer, rank), w2_a, w2_b)


# ---------------------------------------------------------------- parts of our layers


Parts = Sequence[tuple[Place, Any]]  # of one layer, in the order of its rows


def join(parts: Parts, names: Sequence[str]) -> Update:
    """Return the update of one of our layers from those of its parts, called `names` in the file.

    Raises AdapterError if parts overlap, are of several types, or cannot be joined.
    """
    place, first = parts[0]
    if any(above.start + above.rows > below.start for (above, _), (below, _) in pairwise(parts)):
        raise AdapterError(f"{listed(names)} are the same rows of {place.layer}: the file has them twice")
    if len({type(update) for _, update in parts}) > 1:
        raise AdapterError(f"{listed(names)} are one layer here and must be of one type")
    if isinstance(first, LoraPair):
        joined: Update = join_loras(parts, names)
    elif isinstance(first, LohaFactors):
        joined = join_lohas(parts)
    else:
        joined = join_lokrs(parts, names)
    return swap(joined, names[0]) if place.is_swapped else joined


def block_rows(parts: Sequence[tuple[Place, Tensor]]) -> Tensor:
    """Return factors (rows, rank) of parts as one block-diagonal factor; rows without a part are zero."""
    if len(parts) == 1 and parts[0][0].is_whole:
        return parts[0][1]
    result = parts[0][1].new_zeros(parts[0][0].total, sum(tensor.shape[1] for _, tensor in parts))
    column = 0
    for place, tensor in parts:
        result[place.start : place.start + place.rows, column : column + tensor.shape[1]] = tensor
        column += tensor.shape[1]
    return result


def join_loras(parts: Parts, names: Sequence[str]) -> LoraPair:
    place, first = parts[0]
    is_complete = sum(place.rows for place, _ in parts) == place.total
    doras = [name for name, (_, pair) in zip(names, parts, strict=True) if pair.magnitude is not None]
    if doras and not (is_complete and len(doras) == len(parts)):
        raise AdapterError(
            f"only {listed(doras)} have a DoRA magnitude, but {listed(place.parts)} are one layer here and must have "
            "all or none"
        )
    magnitude = bias = None
    if doras:
        if len({pair.magnitude.ndim for _, pair in parts}) > 1:
            raise AdapterError(f"{listed(doras)} have lengths of rows and of columns: the file is damaged")
        magnitude = torch.cat([pair.magnitude for _, pair in parts])
    if any(pair.bias is not None for _, pair in parts):
        bias = torch.zeros(place.total)
        for at, pair in parts:
            if pair.bias is not None:
                bias[at.start : at.start + at.rows] = pair.bias
    if is_complete and all(torch.equal(pair.a, first.a) for _, pair in parts):
        return LoraPair(first.a, torch.cat([pair.b for _, pair in parts]), magnitude, bias)
    a = torch.cat([pair.a for _, pair in parts])
    return LoraPair(a, block_rows([(place, pair.b) for place, pair in parts]), magnitude, bias)


def join_lohas(parts: Parts) -> LohaFactors:
    return LohaFactors(
        block_rows([(place, update.w1_a) for place, update in parts]),
        torch.cat([update.w1_b for _, update in parts]),
        block_rows([(place, update.w2_a) for place, update in parts]),
        torch.cat([update.w2_b for _, update in parts]),
    )


def join_lokrs(parts: Parts, names: Sequence[str]) -> LokrFactors:
    place, first = parts[0]
    if len(parts) == 1 and place.is_whole:
        return first
    shapes = {(u.w1.shape, u.w2_a.shape, None if u.w2_b is None else u.w2_b.shape) for _, u in parts}
    if len(shapes) > 1 or place.total % place.rows:
        raise AdapterError(f"{listed(names)} are one layer here, and LoKr factors of these shapes cannot be joined")
    by_start = {place.start: update for place, update in parts}
    nothing = replace(first, w1=torch.zeros_like(first.w1))
    updates = [by_start.get(start, nothing) for start in range(0, place.total, place.rows)]
    w2_b = None if first.w2_b is None else torch.stack([update.w2_b for update in updates])
    return LokrFactors(torch.stack([u.w1 for u in updates]), torch.stack([u.w2_a for u in updates]), w2_b)


def swap(update: Update, name: str) -> Update:
    """Return an update with the halves of its rows swapped."""
    if isinstance(update, LoraPair):
        magnitude = update.magnitude
        if magnitude is not None and magnitude.ndim == 1:
            magnitude = swap_halves(magnitude)
        bias = None if update.bias is None else swap_halves(update.bias)
        return LoraPair(update.a, swap_halves(update.b), magnitude, bias)
    if isinstance(update, LohaFactors):
        return replace(update, w1_a=swap_halves(update.w1_a), w2_a=swap_halves(update.w2_a))
    if len(update.w1) % 2 == 0:
        return replace(update, w1=swap_halves(update.w1))
    if len(update.w1) == 1:
        return replace(update, w2_a=swap_halves(update.w2_a))
    raise AdapterError(f"{name}: a LoKr whose first factor has {len(update.w1)} rows, an odd number, cannot be read")
