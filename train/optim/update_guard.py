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

from data.loader import copy_to_device, pin
from flux2.utils.text import listed
from train.utils.console import warn
from train.utils.signals import SIGNALS, StopRequest


class TrainingError(ValueError):
    """Training cannot continue; the message says what is saved and what to do."""


@dataclass(frozen=True)
class Reading:
    """What the host reads of a finished step."""

    step: int  # from 0
    loss: float  # the differentiated one
    norm: float  # of the gradient before clipping
    stop_signal: int | None = None  # number of the stop signal that any of the processes received
    sample: bool = False  # whether a sample grid was asked for

    @property
    def bad(self) -> bool:
        return not (math.isfinite(self.loss) and math.isfinite(self.norm))


def clip(parameters: Sequence[nn.Parameter], most: float) -> Tensor:
    """Scale the gradients down in place to a norm of at most `most` (0: any); return their norm, shape ().

    Like `nn.utils.clip_grad_norm_`, which multiplies small gradients by 1. On a CPU this is skipped; on a GPU the host
    would have to wait for the norm.
    """
    norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None]).float()
    if most and not (norm.device.type == "cpu" and norm < most - 1e-6):  # torch adds 1e-6 to the norm
        nn.utils.clip_grads_with_norm_(parameters, most, norm)
    return norm


def clear_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Free the gradients, also those of parameters that the optimizer updates through copies."""
    for parameter in parameters:
        parameter.grad = None


@dataclass
class UpdateGuard:
    """Makes the updates of one run, and counts skipped ones."""

    optimizer: torch.optim.Optimizer
    accelerator: Accelerator
    max_nonfinite_steps: int  # number of skipped steps in a row after which training stops
    is_untrained: bool  # whether no update was made yet, so that training is not the cause of a skipped step
    sample_names: Callable[[int], list[str]]  # of a step
    last_checkpoint: Callable[[], str]  # returns a sentence that names it

    def __post_init__(self) -> None:
        self.device, scales = self.accelerator.device, getattr(self.optimizer, "_step_supports_amp_scaling", False)
        self.on_device = self.device.type == "cuda" and bool(scales)  # whether the optimizer decides on the GPU
        self.skipped: list[Reading] = []  # the steps without an update since the last one with an update
        self._queue: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()

    def update(self, loss: Tensor, norm: Tensor) -> Tensor:
        """Update the parameters unless `loss` or `norm` is not finite; return whether that was skipped, shape (), bool.

        The result is on the device: reading it makes the host wait, `torch.where` and a weight of 0 do not.
        """
        norm = norm.to(loss.device)  # it is on the device of the first gradient
        bad = ~(torch.isfinite(loss) & torch.isfinite(norm))
        if self.on_device:
            self.optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
            self.optimizer.step()
            del self.optimizer.found_inf  # type: ignore[attr-defined]
        elif not bad:
            self.optimizer.step()
        return bad

    def queue_reading(self, step: int, loss: Tensor, norm: Tensor, request: StopRequest, sample: bool) -> None:
        """Start the copy of a step to the host: loss and norm, shape (), and what the processes were asked for."""
        flags = [sample, *(number == request.number for number in SIGNALS)]
        asked = copy_to_device(torch.tensor(flags, dtype=torch.float32), self.device)
        if self.accelerator.num_processes > 1:
            asked = self.accelerator.reduce(asked, "sum")
        numbers, arrived = torch.cat([torch.stack([loss, norm.to(loss.device)]).double(), asked.double()]), None
        if self.device.type == "cuda":
            host = pin(torch.empty(numbers.shape, dtype=numbers.dtype))
            numbers, arrived = host.copy_(numbers, non_blocking=True), torch.cuda.Event()
            arrived.record()
        self._queue.append((step, numbers, arrived))

    def read_finished_steps(self, *, wait: bool) -> list[Reading]:
        """Return the queued steps, oldest first: all with `wait`, else all but the newest on a GPU.

        The newest is still being computed. Every process waits for the one before it, so that all decide the same at
        the same step. Warns about skipped steps, and raises TrainingError after `max_nonfinite_steps` in a row.
        """
        readings = []
        while self._queue and (wait or self.device.type != "cuda" or len(self._queue) > 1):
            step, numbers, arrived = self._queue.popleft()
            if arrived is not None:
                arrived.synchronize()
            loss, norm, sample, *flags = numbers.tolist()
            stop_signal = next((number for number, flag in zip(SIGNALS, flags, strict=True) if flag), None)
            readings.append(Reading(step, loss, norm, stop_signal, bool(sample)))
            self._count(readings[-1])
        return readings

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
                f"{listed(set(self.sample_names(reading.step)))}. Training stops after "
                f"max_nonfinite_steps={self.max_nonfinite_steps} in a row."
            )

    def find_stop_signal(self, request: StopRequest, readings: Sequence[Reading]) -> int | None:
        """Return the stop signal, if there was one. Several processes all return the same, once they have read it."""
        if self.accelerator.num_processes == 1:
            return request.number
        return next((reading.stop_signal for reading in readings if reading.stop_signal is not None), None)

    def raise_if_last_steps_skipped(self) -> None:
        """Raise TrainingError if several last steps were skipped (no later one proves the adapter), or all steps."""
        if len(self.skipped) > 1 or (self.skipped and self.is_untrained):
            raise TrainingError(self.message())

    @staticmethod
    def describe(reading: Reading) -> str:
        return (
            f"step {reading.step + 1}: the loss is {reading.loss:.4g} and its gradient's norm {reading.norm:.4g}, "
            "which is not finite"
        )

    def message(self) -> str:
        names = listed({name for reading in self.skipped for name in self.sample_names(reading.step)})
        count = f"{len(self.skipped)} steps in a row" if len(self.skipped) > 1 else "its step"
        remedy = (
            "No update was made yet, so it is not the rate alone: look at these samples, try precision=fp32, and look "
            "at the model's files."
            if self.is_untrained
            else f"The adapter may already be corrupted: {self.last_checkpoint()}. Restart with a lower optimizer.lr, "
            "and if that does not help, with precision=fp32; if the samples are always the same, look at them."
        )
        return f"{self.describe(self.skipped[-1])}. The samples of {count}: {names}. {remedy}"
