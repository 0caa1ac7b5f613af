"""The adapter that is shown (validated, sampled, saved) where it is not the one that is trained.

There are two such cases. `Ema` keeps an exponential moving average of the trained parameters beside them. Schedule-free
optimizers (`train.optim.optimizers.averages`) keep an average of their own. Either way
`EvaluationWeights.swapped()` puts the average into the parameters for a while, and afterwards exactly what was there
before: looking at a run does not change it.

A checkpoint then holds the average as its adapter, which is what is used, and beside it the parts "trained" (the
parameters that are trained) and "ema" (the average in float32), so that going on is exact.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from train.optim.optimizers import averages


class Ema:
    """A float32 moving average of parameters: after each update, `average += (1 - d) (parameter - average)`.

    d is `min(decay, (1 + t) / (10 + t))` with t updates before this one, so that the start, which is not learned, is
    soon forgotten. (As in TensorFlow's ExponentialMovingAverage.)
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        self.parameters, self.decay = list(parameters), decay
        self.average = [parameter.detach().float().clone() for parameter in self.parameters]
        # on the device: which updates were left out, the host knows too late
        self.updates = torch.zeros((), device=self.average[0].device)

    @torch.no_grad()
    def update(self, left_out: Tensor | None = None) -> None:
        """Take in the parameters as they are now, unless `left_out`, shape (), says that they were not updated.

        Waits for no device.
        """
        made = torch.ones_like(self.updates) if left_out is None else 1 - left_out.to(self.updates)
        decay = ((1 + self.updates) / (10 + self.updates)).clamp(max=self.decay)
        change = torch._foreach_sub([parameter.float() for parameter in self.parameters], self.average)
        torch._foreach_mul_(change, (1 - decay) * made)
        torch._foreach_add_(self.average, change)
        self.updates += made

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "average": self.average}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError or KeyError for a state of other parameters."""
        put([self.updates, *self.average], [state["updates"], *state["average"]])


class EvaluationWeights:
    """Which weights are shown, of `parameters` that `optimizer` trains. As a part of a checkpoint: those trained.

    With an `ema_decay` of 0 and an optimizer that does not average, these are the parameters themselves.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer, ema_decay: float = 0.0
    ) -> None:
        check_one_average(optimizer, ema_decay)
        self.parameters, self.optimizer = list(parameters), optimizer
        self.ema = Ema(parameters, ema_decay) if ema_decay else None
        self.averages = averages(optimizer)
        self._trained: list[Tensor] | None = None  # those swapped out now

    @property
    def differ(self) -> bool:
        """Whether what is shown is not what is trained."""
        return self.ema is not None or self.averages

    @property
    def parts(self) -> dict[str, Any]:
        """What a checkpoint keeps of it, to be restored in this order and after the optimizer."""
        if not self.differ:
            return {}
        return {"trained": self} if self.ema is None else {"ema": self.ema, "trained": self}

    def update(self, left_out: Tensor | None = None) -> None:
        """To be called after each update of the parameters, as `Ema.update`."""
        if self.ema is not None:
            self.ema.update(left_out)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Within this context the parameters are what is shown. It may be entered again within itself."""
        if not self.differ or self._trained is not None:
            yield
            return
        self._trained = [parameter.detach().clone() for parameter in self.parameters]
        try:
            if self.ema is not None:
                put(self.parameters, self.ema.average)
            else:
                self.optimizer.eval()  # type: ignore[attr-defined]
            yield
        finally:
            self._train(self._trained)
            self._trained = None

    def _train(self, values: Sequence[Tensor]) -> None:
        """Go on training at `values`."""
        if self.averages:
            self.optimizer.train()  # type: ignore[attr-defined]  # its own way back rounds, so the values follow
        put(self.parameters, values)

    def state_dict(self) -> dict[str, Any]:
        values = self.parameters if self._trained is None else self._trained
        return {"trained": [value.detach() for value in values]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """To be called after the optimizer's. Raises ValueError or KeyError for a state of other parameters."""
        self._train(state["trained"])


def check_one_average(optimizer: torch.optim.Optimizer, ema_decay: float) -> None:
    """Raises ValueError if there would be an average of averages."""
    if ema_decay and averages(optimizer):
        raise ValueError(
            f"ema_decay={ema_decay} is not for {type(optimizer).__name__}, which averages the weights by itself: "
            "ema_decay=0"
        )


@torch.no_grad()
def put(into: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copy `values`, on any device, into tensors of the same shapes. Raises ValueError if they are not."""
    if [one.shape for one in into] != [one.shape for one in values]:
        raise ValueError(f"{len(values)} tensors do not have the shapes of these {len(into)}")
    for one, value in zip(into, values, strict=True):
        one.copy_(value)
