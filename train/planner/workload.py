"""The part of a configuration that determines memory and step time."""

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
    """The part of a configuration that determines memory and step time. Sizes in pixels are (width, height).

    Attributes:
        model: The transformer on the meta device, in its precision and with its adapter.
        dtype: Dtype of activations and of layers that are not quantized.
        storage: Storage of the quantized layers: fp8, nf4, or None.
        optimizer: Makes the optimizer from a list of parameters.
        pixels, references: Sizes of the largest training image and of each of its references.
        sample_pixels: Size of the sampled images; None without sample grids.
        sample_references: Sizes of the references of the sample prompt with the most reference tokens.
        rows: Images in a micro-batch, including those that base preservation adds.
        held: The images that base preservation adds, which the base predicts too.
        averaged: Whether an EMA of the adapter is kept.
        class_rows: Class images in their own micro-batch.
        class_pixels: Size of the class images that the base generates before training; None if there are none.
        validates: Whether a validation loss is computed.
        on_gpu: Whether the run uses a GPU; otherwise everything is in host memory.
        compiled: Whether blocks are compiled; memory is counted as if they were not.
        usual: Whether the run has the precision and attention of the benchmarks and no preservation.
        text_storage: Storage of the text encoder's layers: nf4, int8, or None.
        text_here: Whether the text encoder runs on this machine.
        shares: Number of processes that the base is sharded over; 1 without sharding.
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
        """The name of the group choice `precision`."""
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
