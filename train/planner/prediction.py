"""What the planner predicts for one choice of memory settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from train.config.memory import Choice
from train.planner.gpus import Gpu
from train.planner.step_memory import Work

ENCODING = ("prompts", "images")  # phases that fill the cache, before the transformer is loaded
NOT_OVERLAPPED = 0.1  # assumed: the share of the shorter of copies and compute that the longer does not hide


@dataclass(frozen=True)
class Prediction:
    """Bytes on the device by phase and component, bytes in host memory by component, and the work of a step.

    If the blocks are divided over several devices, `phases` are those of the first, `later_phases` those of the others.
    """

    choice: Choice
    phases: Mapping[str, Mapping[str, float]]
    host: Mapping[str, float]
    work: Work
    moved: float  # bytes copied between host and device per step
    compiled: bool = False  # whether elementwise operations are fused
    split: tuple[int, ...] = ()  # number of blocks on each of several devices
    later_phases: Sequence[Mapping[str, Mapping[str, float]]] = ()
    between: float = 0.0  # bytes copied from device to device per step
    host_encoding: Mapping[str, float] = field(default_factory=dict)  # while the CPU encodes prompts for a GPU

    @property
    def settings(self) -> str:
        """The overrides of this prediction."""
        split = ",".join(map(str, self.split))
        return f"{self.choice} memory.split=[{split}]" if split else str(self.choice)

    def total(self, phase: str) -> float:
        return sum(self.phases[phase].values())

    @property
    def host_parts(self) -> Mapping[str, float]:
        """Bytes in host memory by component, in the phase that needs most: training, or prompts that a CPU encodes."""
        return max(self.host, self.host_encoding, key=lambda parts: sum(parts.values()))

    @property
    def host_memory(self) -> float:
        return sum(self.host_parts.values())

    @property
    def pinned(self) -> float:
        """Bytes of host memory that cannot be swapped out."""
        return self.host["streamed blocks"] + self.host["block inputs"]

    @property
    def peaks(self) -> list[float]:
        """The peak of each device in the phases with the transformer loaded."""
        return [training_peak(phases) for phases in (self.phases, *self.later_phases)]

    @property
    def training(self) -> float:
        """The peak of the phases with the transformer loaded, on the device that needs most."""
        return max(self.peaks)

    def seconds(self, gpu: Gpu) -> float:
        """Return the time of a step: the longer of compute and copies, plus the unhidden part of the other.

        What is copied from device to device is not hidden: they compute one after the other.
        """
        both = gpu.seconds(self.work, fused=self.compiled), self.moved / (gpu.bus * 1e9)
        return max(both) + NOT_OVERLAPPED * min(both) + self.between / (gpu.bus * 1e9)


def training_peak(phases: Mapping[str, Mapping[str, float]]) -> float:
    return max(sum(parts.values()) for phase, parts in phases.items() if phase not in ENCODING)
