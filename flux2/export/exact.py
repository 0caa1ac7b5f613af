"""Write LoKr, LoHa and DoRA unchanged for the programs that read them, as those programs compute them:

    LoKr    ComfyUI, musubi-tuner, diffusers    W + w1 (x) w2, each of them a matrix or a product of two
    LoHa    ComfyUI, musubi-tuner               W + (w1_a w1_b) * (w2_a w2_b)
    DoRA    ComfyUI                             (W + B A) * dora_scale / |W| for each row; PEFT has m / |W + B A|

Scales are folded into a factor, because ComfyUI and diffusers ignore the alpha of a LoKr of two whole matrices. ComfyUI
and musubi-tuner divide any other alpha by the rank, so their files have alpha = rank; those for diffusers have none.
musubi-tuner takes w1 only as a matrix, and divides alpha by the longer side of w2 if that is one, too. The Kronecker
product of a stacked q, k, v cannot be cut in thirds: diffusers fuses its own layers when the keys name the fused ones.
dora_scale depends on W, so it is exact for the base it is made with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from flux2.adapters import peft_config
from flux2.adapters.formats import KOHYA
from flux2.export.deltas import AdapterDelta
from flux2.weights.key_names import swap_halves, transformer_module
from flux2.weights.loading import BaseWeights

READERS = {  # by type and format: the programs that read the type unchanged, and others that read the format's LoRAs
    ("LoKr", "comfyui"): ("ComfyUI and diffusers", ""),
    ("LoKr", "diffusers"): ("diffusers", ""),
    ("LoKr", "kohya"): ("ComfyUI and musubi-tuner", "diffusers"),
    ("LoHa", "comfyui"): ("ComfyUI", "diffusers"),
    ("LoHa", "kohya"): ("ComfyUI and musubi-tuner", "diffusers"),
    ("DoRA", "comfyui"): ("ComfyUI", "diffusers"),
}


def obstacle(updates: Sequence[AdapterDelta], form: str) -> str | None:
    """Return why the adapters cannot be written unchanged in `form`: a sentence to print, or empty for another type.

    None: they can.
    """
    update = updates[0]
    if len(updates) > 1 or (update.kind, form) not in READERS:
        return ""
    if update.kind == "DoRA" and update.scale != 1:
        return f"a DoRA at scale {update.scale:g} is not a DoRA that ComfyUI can hold: it is converted"
    if update.kind == "LoKr" and form == "diffusers":
        for layer, factors in update.tensors.items():
            if transformer_module(layer).kind == "swapped" and swapped_factor(factors) is None:
                return f"the halves of {layer} cannot be swapped for diffusers in a LoKr: it is converted"
    return None


def swapped_factor(factors: Mapping[str, Tensor]) -> str | None:
    """Return the factor of a LoKr whose halves are those of the product's rows; None if there is none."""
    first = "lokr_w1" if "lokr_w1" in factors else "lokr_w1_a"
    second = "lokr_w2" if "lokr_w2" in factors else "lokr_w2_a"
    rows = len(factors[first])
    return first if rows % 2 == 0 else second if rows == 1 else None


def tensors(
    update: AdapterDelta, form: str, base: Callable[[], BaseWeights], device: torch.device
) -> dict[str, Tensor]:
    """Return the tensors of an adapter without `obstacle`, by the keys of `form`, in float32 on the CPU."""
    if update.kind == "DoRA":
        return dora_tensors(update, base(), device)
    assert update.config is not None
    state: dict[str, Tensor] = {}
    for layer, stored in update.tensors.items():
        config = peft_config.layer_config(update.config, layer, "linear")
        factors = {key: tensor.float() for key, tensor in stored.items()}
        first = next(key for key in ("hada_w1_a", "lokr_w1", "lokr_w1_a") if key in factors)
        factors[first] = factors[first] * (config.alpha / config.r * update.scale)
        name = KOHYA + layer.replace(".", "_") if form == "kohya" else f"diffusion_model.{layer}"
        if form == "kohya" and "lokr_w1_a" in factors:
            factors["lokr_w1"] = factors.pop("lokr_w1_a") @ factors.pop("lokr_w1_b")
        if form == "diffusers":
            published = transformer_module(layer)
            name = f"transformer.{published.names[0]}"
            if published.kind == "stacked":
                fused = "to_qkv" if name.endswith("to_q") else "to_added_qkv"
                name = f"{name.rpartition('.')[0]}.{fused}"
            if published.kind == "swapped" and (key := swapped_factor(factors)):
                factors[key] = swap_halves(factors[key])
        state |= {f"{name}.{key}": tensor.contiguous() for key, tensor in factors.items()}
        products = [len(factors[key]) for key in ("hada_w1_b", "lokr_w2_b", "lokr_w1_b") if key in factors]
        if form == "kohya" and not products:
            products = [max(factors["lokr_w2"].shape)]
        if products and form != "diffusers":
            state[f"{name}.alpha"] = torch.tensor(float(products[0]))
    return state


def dora_tensors(update: AdapterDelta, base: BaseWeights, device: torch.device) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}

    def use(name: str, stored: Tensor) -> None:
        layer, weight = name.removesuffix(".weight"), stored.float()
        pair, name = update.pairs[layer], f"diffusion_model.{layer}"
        assert pair.magnitude is not None
        # ComfyUI adds the smallest step of float32 to |W|
        length = torch.linalg.vector_norm(weight, dim=1, keepdim=True) + torch.finfo(torch.float32).eps
        total = torch.linalg.vector_norm(weight.addmm(pair.b.to(device), pair.a.to(device)), dim=1, keepdim=True)
        state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"] = pair.a, pair.b
        state[f"{name}.dora_scale"] = (pair.magnitude.to(device)[:, None] * length / total).cpu()

    base.each([f"{layer}.weight" for layer in update.layers], device, use)
    return state
