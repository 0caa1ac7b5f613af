"""Update the adapter only if the loss and its gradient are finite.

A non-finite update would turn the adapter, the optimizer's moments and everything averaged from them into NaN. The
guard skips it, so all of them stay exactly as they were. One sample or an overflow may cause it, and training
continues; after several skipped steps in a row it stops.

On a GPU the host runs ahead of the device, and reading a number makes it wait. So the device decides by itself where
the optimizer can (torch's fused optimizers take `found_inf`, as they do from `torch.amp.GradScaler`), and the host
reads the result one step later, when the device has work again. For other optimizers the host decides and waits once a
step, as GradScaler does. On a CPU there is nothing to wait for.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from data.loader import copy_to_device
from train.utils.console import warn
from train.utils.signals import SIGNALS, StopRequest

SHOWN = 8  # names in a message


class TrainingError(ValueError):
    """Training cannot go on; the message says what is saved and what to do."""


@dataclass(frozen=True)
class Reading:
    """What the host knows of a step once the device is done with it.

    Attributes:
        step: from 0.
        loss, norm: what is differentiated, and its gradient's norm before clipping.
        stop: the signal that asked any of the processes to stop, if one did.
    """

    step: int
    loss: float
    norm: float
    stop: int | None = None

    @property
    def bad(self) -> bool:
        return not (math.isfinite(self.loss) and math.isfinite(self.norm))


def clip(parameters: Sequence[nn.Parameter], most: float) -> Tensor:
    """Scale the gradients down to a norm of at most `most`, in place (0: leave them); returns their norm, shape ().

    As `nn.utils.clip_grad_norm_`, which multiplies by 1 what is small enough. A CPU need not; a GPU would have to be
    waited for to know.
    """
    norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    if most and not (norm.device.type == "cpu" and norm < most - 1e-6):  # torch adds 1e-6 to the norm
        nn.utils.clip_grads_with_norm_(parameters, most, norm)
    return norm


def names_of(names: Sequence[str]) -> str:
    """The first of them, each once, and how many more there are."""
    each = list(dict.fromkeys(names))
    more = f" and {len(each) - SHOWN} more" if len(each) > SHOWN else ""
    return ", ".join(each[:SHOWN]) + more


class UpdateGuard:
    """Makes the updates of one run, and knows which of its steps were bad.

    Args:
        max_nonfinite_steps: Number of skipped steps in a row after which training stops.
        is_untrained: Whether no update was made yet, so that training is not the cause of a skipped step.
        sample_names: Returns the names of a step's samples.
        last_checkpoint: Returns a sentence that names the last checkpoint.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        accelerator: Accelerator,
        *,
        max_nonfinite_steps: int,
        is_untrained: bool,
        sample_names: Callable[[int], list[str]],
        last_checkpoint: Callable[[], str],
    ) -> None:
        self.optimizer, self.accelerator = optimizer, accelerator
        self.max_nonfinite_steps, self.is_untrained = max_nonfinite_steps, is_untrained
        self.sample_names, self.last_checkpoint = sample_names, last_checkpoint
        self.device = accelerator.device
        self.on_device = self.device.type == "cuda" and bool(getattr(optimizer, "_step_supports_amp_scaling", False))
        self.skipped: list[Reading] = []  # the steps without an update since the last one with an update
        self._sent: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()

    def update(self, loss: Tensor, norm: Tensor) -> Tensor:
        """The optimizer's step, unless `loss` or `norm` is not finite; returns whether it was left out, shape (), bool.

        The answer is on the device: to look at it is to wait. `torch.where` and a weight of 0 need not.
        """
        bad = ~(torch.isfinite(loss) & torch.isfinite(norm))
        if self.on_device:
            self.optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
            self.optimizer.step()
            del self.optimizer.found_inf  # type: ignore[attr-defined]
        elif not bad:
            self.optimizer.step()
        return bad

    def send(self, step: int, loss: Tensor, norm: Tensor, request: StopRequest) -> None:
        """Let the host know of a step: loss and norm, shape (), and whether a process was asked to stop."""
        asked = copy_to_device(torch.tensor([float(number == request.number) for number in SIGNALS]), self.device)
        if self.accelerator.num_processes > 1:
            asked = self.accelerator.reduce(asked, "sum")
        numbers = torch.cat([torch.stack([loss, norm]).double(), asked.double()])
        if self.device.type != "cuda":
            self._sent.append((step, numbers, None))
            return
        host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
        host.copy_(numbers, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        self._sent.append((step, host, arrived))

    def receive(self, *, wait: bool) -> list[Reading]:
        """The steps that have become known, oldest first: with `wait` all, else all but the newest on a GPU.

        That newest one is still being computed. The step before it is waited for in every process, so that all decide
        the same at the same step. Warns of those that are bad.

        Raises TrainingError if as many as `most` of them are so in a row.
        """
        found = []
        while self._sent and (wait or self.device.type != "cuda" or len(self._sent) > 1):
            step, numbers, arrived = self._sent.popleft()
            if arrived is not None:
                arrived.synchronize()
            loss, norm, *flags = numbers.tolist()
            stops = [number for number, flag in zip(SIGNALS, flags, strict=True) if flag]
            found.append(Reading(step, loss, norm, stops[0] if stops else None))
        for reading in found:
            self._count(reading)
        return found

    def _count(self, reading: Reading) -> None:
        if not reading.bad:
            self.skipped, self.is_untrained = [], False
            return
        self.skipped.append(reading)
        if len(self.skipped) >= self.max_nonfinite_steps:
            raise TrainingError(self.message())
        if self.accelerator.is_main_process:
            warn(
                f"{self.describe(reading)}: no update is made, and nothing of it is learned. Its samples: "
                f"{names_of(self.sample_names(reading.step))}. Training stops after "
                f"max_nonfinite_steps={self.max_nonfinite_steps} in a row."
            )

    def stop(self, request: StopRequest, readings: Sequence[Reading]) -> int | None:
        """The signal that asked to stop. Of several processes all get the same answer, when they have read it."""
        if self.accelerator.num_processes == 1:
            return request.number
        return next((reading.stop for reading in readings if reading.stop is not None), None)

    def check_end(self) -> None:
        """At the end of training: raises TrainingError if it ends in several bad steps, with no good one after them to
        show that the adapter still works, or never made an update."""
        if len(self.skipped) > 1 or (self.skipped and self.is_untrained):
            raise TrainingError(self.message())

    @staticmethod
    def describe(reading: Reading) -> str:
        return (
            f"step {reading.step + 1}: the loss is {reading.loss:.4g} and its gradient's norm {reading.norm:.4g}, "
            "which is not finite"
        )

    def message(self) -> str:
        names = names_of([name for reading in self.skipped for name in self.sample_names(reading.step)])
        count = f"{len(self.skipped)} steps in a row" if len(self.skipped) > 1 else "its step"
        remedy = (
            "No update was made yet, so it is not the rate alone: look at these samples, try precision=fp32, and look "
            "at the model's files."
            if self.is_untrained
            else f"The adapter may already be corrupted: {self.last_checkpoint()}. Restart with a lower optimizer.lr, "
            "and if that does not help, with precision=fp32; if the samples are always the same, look at them."
        )
        return f"{self.describe(self.skipped[-1])}. The samples of {count}: {names}. {remedy}"
