"""What of a configuration decides memory and time (`Workload`), and how the group `memory` could be set (`Choice`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from flux2.models.transformer import Transformer
from flux2.models.variants import PIXELS_PER_TOKEN, Variant
from train.optim.optimizers import MakeOptimizer
from train.planner.step_memory import Shape


@dataclass(frozen=True)
class Workload:
    """What of a configuration decides memory and time.

    Attributes:
        model: the transformer on the meta device, in its precision and with its adapter.
        dtype: of what is not converted, and of activations.
        storage: of the converted layers: fp8, nf4, or None.
        optimizer: makes the optimizer from a list of parameters.
        pixels: (width, height) of the largest training picture; references: those of each of its references.
        sample_pixels: of the sample grids' pictures, None if none are made; sample_references: of what one edits.
        rows: pictures a micro-batch, those of preservation counted again.
        held: of them, those of preservation, which the base predicts too.
        averaged: whether a moving average of the adapter is kept.
        class_rows: class pictures in a micro-batch of their own; class_pixels: (width, height) of those that the base
            draws before training, None if it draws none.
        validates: whether a validation loss is taken.
        on_gpu: else everything is in host memory.
        compiled: whether blocks are compiled; memory is counted as if they were not.
        usual: whether precision and attention are set as they are where steps are measured, and nothing is preserved.
        text_storage: of the text encoder's layers: nf4, int8, or None; text_here: whether it runs on this machine.
        shares: of how many processes each holds a part of the base; 1 if it is not sharded.
    """

    variant: Variant
    model: Transformer
    dtype: torch.dtype
    optimizer: MakeOptimizer
    pixels: tuple[int, int]
    references: Sequence[tuple[int, int]] = ()
    sample_pixels: tuple[int, int] | None = None
    sample_references: Sequence[tuple[int, int]] = ()
    text_tokens: int = 512
    rows: int = 1
    held: int = 0
    accumulation: int = 1
    averaged: bool = False
    class_rows: int = 0
    class_pixels: tuple[int, int] | None = None
    validates: bool = False
    on_gpu: bool = True
    storage: str | None = None
    compiled: bool = False
    usual: bool = True
    text_sizes: Mapping[str, int] = field(default_factory=dict)
    text_storage: str | None = None
    text_here: bool = True
    shares: int = 1

    @property
    def precision(self) -> str:
        """As in `precision=...`."""
        return self.storage or {torch.float32: "fp32", torch.bfloat16: "bf16"}[self.dtype]

    @property
    def autocast(self) -> bool:
        return self.dtype == torch.bfloat16

    @property
    def shape(self) -> Shape:
        predicted = tokens(self.pixels)
        image = predicted + sum(tokens(reference) for reference in self.references)
        return Shape(self.rows, image, self.text_tokens, predicted)

    @property
    def blocks(self) -> list[nn.Module]:
        return [*self.model.double_blocks, *self.model.single_blocks]


def tokens(pixels: tuple[int, int]) -> int:
    return (pixels[0] // PIXELS_PER_TOKEN) * (pixels[1] // PIXELS_PER_TOKEN)


def frozen(module: nn.Module) -> list[torch.Tensor]:
    return [*(p for p in module.parameters() if not p.requires_grad), *module.buffers()]


def trained(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]
