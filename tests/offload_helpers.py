"""Copiers that make every mistake of residency show: what the tests of streaming share.

A test module says `pytest_plugins = ("offload_helpers",)` to get the fixture, and may import the rest before that:
PYTEST_DONT_REWRITE.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flux2.memory import block_offload as offload_module
from flux2.memory.block_offload import Offloader
from flux2.memory.ring_buffer import Copier


class LateCopier(Copier):
    """Copies as late as it may, in the order asked, and spoils at once what a copy will write over.

    So what is used before it was waited for, or after its buffer was given to another block, is wrong.
    """

    def __init__(self) -> None:
        self.waiting: list[tuple[Tensor, Tensor]] = []
        self.asked = self.finished = 0

    def start(self, source: Tensor, target: Tensor) -> int:
        target.reshape(-1).view(torch.uint8).fill_(255)  # NaN in every float
        self.waiting.append((source, target))
        self.asked += 1
        return self.asked

    def wait(self, ticket: int) -> None:
        while self.finished < ticket:
            source, target = self.waiting.pop(0)
            self.move(source, target)
            self.finished += 1

    def move(self, source: Tensor, target: Tensor) -> None:
        target.copy_(source)


class ScrambledCopier(LateCopier):
    """For host memory whose bytes are inverted (`scramble`): only what was copied to the device can be read.

    So what is used from where it lies is wrong, though on a CPU it could be reached.
    """

    def move(self, source: Tensor, target: Tensor) -> None:
        target.copy_(source)
        if is_weights(source):
            target.bitwise_not_()


def is_weights(source: Tensor) -> bool:
    """Weights are copied as bytes, activations as what they are."""
    return source.dtype == torch.uint8


def scramble(offloader: Offloader) -> None:
    """Invert the weights in host memory."""
    for block in offloader.blocks:
        block.host.bitwise_not_()


@pytest.fixture
def scrambled(monkeypatch: pytest.MonkeyPatch) -> list[Offloader]:
    """From here on whatever streams does so through a `ScrambledCopier`; the list says what does."""
    made: list[Offloader] = []
    init = Offloader.__init__

    def initialize(self: Offloader, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        scramble(self)
        made.append(self)

    monkeypatch.setattr(Offloader, "__init__", initialize)
    monkeypatch.setattr(offload_module, "copier_for", lambda device: ScrambledCopier())
    return made
