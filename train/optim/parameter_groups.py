"""Learning rates that differ between the parameters of an adapter: those of B (LoRA+), and by layer.

LoRA+ (Hayou et al. 2024, arxiv.org/abs/2402.12354) trains B with a larger rate than A: B starts at zero, and in wide
layers both learn equally well only if B's steps are larger.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import peft
from torch import nn

from flux2.adapters import adapter_parameters
from flux2.adapters.settings import values_by_layer
from flux2.adapters.tuners import adapter_layers
from train.utils.checks import is_number

FACTOR = "rate_factor"  # key of a parameter group: its rate divided by optimizer.lr
LIMITS = 1e-3, 1e3  # a factor beyond these limits trains nothing, or diverges


def check_factor(key: str, value: Any) -> None:
    if not is_number(value, *LIMITS):
        raise ValueError(f"optimizer.{key}={value!r} must be a number from {LIMITS[0]:g} to {LIMITS[1]:g}")


@dataclass(frozen=True)
class RateSettings:
    """The settings of the group `optimizer` that every optimizer has, and that give some parameters another rate.

    Args:
        lora_plus_ratio: Learning rate of B divided by that of A; None is 1.
        layer_rates: Factors of the rate for the layers that a preset or a regular expression matches; each layer may
            match once.
    """

    lora_plus_ratio: float | None = None
    layer_rates: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        if self.lora_plus_ratio is not None:
            check_factor("lora_plus_ratio", self.lora_plus_ratio)

    def factors(self, model: nn.Module) -> list[float]:
        """Return the factor of the learning rate of each of `adapter_parameters(model)`.

        Raises ValueError if a pattern matches no layer with an adapter or two match one, or if the adapter has no B.
        """
        model = model.get_base_model() if isinstance(model, peft.PeftModel) else model
        layers = adapter_layers(model)
        rates = values_by_layer("layer_rates", self.layer_rates, list(layers), check_factor, group="optimizer")
        trained = dict.fromkeys(adapter_parameters(model), 1.0)
        has_b = False
        for layer, module in layers.items():
            for name, parameter in module.named_parameters():
                if parameter in trained:
                    is_b = name.startswith("lora_B.")
                    has_b |= is_b
                    trained[parameter] = rates.get(layer, 1.0) * ((self.lora_plus_ratio or 1.0) if is_b else 1.0)
        if self.lora_plus_ratio is not None and not has_b:
            raise ValueError(
                f"optimizer.lora_plus_ratio={self.lora_plus_ratio:g} is the rate of a LoRA's B over that of its A, and "
                "this type of adapter has neither. Set it to null, or use adapter=lora, rslora, tlora, dora or pissa"
            )
        return list(trained.values())


def parameter_groups(parameters: Sequence[nn.Parameter], factors: Sequence[float]) -> list[Any]:
    """Return what an optimizer takes: the parameters themselves if all factors are 1, else a group for each factor."""
    groups: dict[float, list[nn.Parameter]] = {}
    for parameter, factor in zip(parameters, factors, strict=True):
        groups.setdefault(factor, []).append(parameter)
    if groups.keys() <= {1.0}:
        return list(parameters)
    return [{"params": members, FACTOR: factor} for factor, members in groups.items()]
