"""The weights that are evaluated (validated, sampled, saved), if they differ from the trained ones.

Either `Ema` keeps an exponential moving average of the trained parameters, or a schedule-free optimizer
(`train.optim.optimizers.averages_weights`) keeps its own. `EvaluationWeights.swapped()` temporarily puts the average
into the parameters and then restores them exactly: evaluation does not change a run.

A checkpoint then contains the average as its adapter, and in addition the parts "trained" (the trained parameters) and
"ema" (the average in float32), so that resuming is exact.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from train.optim.optimizers import averages_weights


class Ema:
    """A float32 moving average of parameters: after each update, `average += (1 - d) (parameter - average)`.

    d is `min(decay, (1 + t) / (10 + t))` with t previous updates, so that the untrained start is soon forgotten, as in
    TensorFlow's ExponentialMovingAverage.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        self.parameters, self.decay = list(parameters), decay
        self.average = [parameter.detach().float().clone() for parameter in self.parameters]
        # on the device, because the host learns too late which updates were skipped
        self.updates = torch.zeros((), device=self.average[0].device)

    @torch.no_grad()
    def update(self, left_out: Tensor | None = None) -> None:
        """Update the average, unless `left_out`, shape (), is 1 for a skipped update; does not synchronize."""
        made = torch.ones_like(self.updates) if left_out is None else 1 - left_out.to(self.updates)
        decay = ((1 + self.updates) / (10 + self.updates)).clamp(max=self.decay)
        for device in dict.fromkeys(average.device for average in self.average):
            pairs = zip(self.parameters, self.average, strict=True)
            own = [(parameter.float(), average) for parameter, average in pairs if average.device == device]
            parameters, averages = zip(*own, strict=True)
            change = torch._foreach_sub(parameters, averages)
            torch._foreach_mul_(change, ((1 - decay) * made).to(device))
            torch._foreach_add_(averages, change)
        self.updates += made

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "average": self.average}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state. Raise ValueError or KeyError if it belongs to other parameters."""
        copy_values([self.updates, *self.average], [state["updates"], *state["average"]])


class EvaluationWeights:
    """The weights to evaluate: an average of `parameters`, or themselves. The state dict contains the trained ones."""

    def __init__(
        self, parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer, ema_decay: float = 0.0
    ) -> None:
        check_one_average(optimizer, ema_decay)
        self.parameters, self.optimizer = list(parameters), optimizer
        self.ema = Ema(parameters, ema_decay) if ema_decay else None
        self.averages = averages_weights(optimizer)
        self._trained: list[Tensor] | None = None  # the trained weights while they are swapped out

    @property
    def differ(self) -> bool:
        """Whether the evaluated weights differ from the trained ones."""
        return self.ema is not None or self.averages

    @property
    def parts(self) -> dict[str, Any]:
        """The parts of a checkpoint, to be restored in this order and after the optimizer."""
        ema = {} if self.ema is None else {"ema": self.ema}
        return {**ema, "trained": self} if self.differ else {}

    def update(self, left_out: Tensor | None = None) -> None:
        """Update the average after each update of the parameters, as `Ema.update`."""
        if self.ema is not None:
            self.ema.update(left_out)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Context manager that puts the evaluated weights into the parameters; it can be nested."""
        if not self.differ or self._trained is not None:
            yield
            return
        self._trained = [parameter.detach().clone() for parameter in self.parameters]
        try:
            if self.ema is not None:
                copy_values(self.parameters, self.ema.average)
            else:
                self.optimizer.eval()  # type: ignore[attr-defined]
            yield
        finally:
            self.load_state_dict({"trained": self._trained})
            self._trained = None

    def state_dict(self) -> dict[str, Any]:
        values = self.parameters if self._trained is None else self._trained
        return {"trained": [value.detach() for value in values]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state, after the optimizer's. Raise ValueError or KeyError if it belongs to other parameters."""
        if self.averages:
            self.optimizer.train()  # type: ignore[attr-defined]  # it restores with rounding, so values are copied
        copy_values(self.parameters, state["trained"])


def check_one_average(optimizer: torch.optim.Optimizer, ema_decay: float) -> None:
    """Raise ValueError if there would be an average of averages."""
    if ema_decay and averages_weights(optimizer):
        raise ValueError(
            f"ema_decay={ema_decay} cannot be used with {type(optimizer).__name__}, which averages weights itself. "
            "Set ema_decay=0"
        )


@torch.no_grad()
def copy_values(into: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copy `values`, on any device, into tensors of the same shapes. Raise ValueError if shapes differ."""
    if [one.shape for one in into] != [one.shape for one in values]:
        raise ValueError(f"{len(values)} tensors do not have the shapes of these {len(into)}")
    for one, value in zip(into, values, strict=True):
        one.copy_(value)
