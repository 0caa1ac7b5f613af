"""The part of a configuration that determines memory and step time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from flux2.adapters import adapter_parameters
from flux2.models.transformer import Transformer
from flux2.models.variants import PIXELS_PER_TOKEN, Variant
from train.optim.optimizers import MakeOptimizer
from train.planner.step_memory import Shape


@dataclass(frozen=True)
class TextEncoderChoice:
    """Values for the keys of `text_encoder` that can be `auto`."""

    storage: str | None = None  # of its layers: int8, nf4, or None
    device: str | None = None  # cpu, or None: that of the run

    @property
    def words(self) -> str:
        """What differs from the default, such as "in nf4"; empty without a difference."""
        return " ".join([*([f"in {self.storage}"] if self.storage else []), *(["on the CPU"] if self.device else [])])

    @property
    def overrides(self) -> str:
        values = {"storage": self.storage, "device": self.device}
        return " ".join(f"text_encoder.{key}={value}" for key, value in values.items() if value)


@dataclass(frozen=True)
class Workload:
    """The part of a configuration that determines memory and step time. Sizes in pixels are (width, height)."""

    variant: Variant
    model: Transformer  # on the meta device, in its precision and with its adapter
    dtype: torch.dtype  # of activations and of layers that are not quantized
    optimizer: MakeOptimizer
    pixels: tuple[int, int]  # of the largest training image
    references: Sequence[tuple[int, int]] = ()  # sizes of its references
    sample_pixels: tuple[int, int] | None = None  # of the sampled images; None without sample grids
    sample_references: Sequence[tuple[int, int]] = ()  # of the sample prompt with the most reference tokens
    twin: bool = False  # whether another model of this size draws the samples
    text_tokens: int = 512
    rows: int = 1  # images in a micro-batch, including `held`
    held: int = 0  # the images that preservation adds, and the rejected ones of pairs
    frozen_rows: Sequence[int] = ()  # images of each prediction without a gradient that a micro-batch makes first
    guides: int = 0  # embeddings of the prompts that the target is made of
    accumulation: int = 1  # micro-batches of a step; a slider from pairs has one for each end
    averaged: bool = False  # whether an EMA of the adapter is kept
    class_rows: int = 0  # class images in their own micro-batch
    class_pixels: tuple[int, int] | None = None  # of the class images that the base generates before training
    validates: bool = False  # whether a validation loss is computed
    on_gpu: bool = True  # otherwise everything is in host memory
    float32_attention: bool = False  # as on GPUs below compute capability 8.0
    storage: str | None = None  # of the quantized layers: fp8, int8, nf4, or None
    compiled: bool = False  # whether blocks are compiled; memory is counted as if they were not
    kernels: bool = False  # whether Triton kernels compute what lies between the products
    usual: bool = True  # whether the run has the precision, attention and kernels of the benchmarks, no preservation
    text_sizes: Mapping[str, int] = field(default_factory=dict)
    text_encoder: TextEncoderChoice = field(default_factory=TextEncoderChoice)
    text_here: bool = True  # whether the text encoder runs on this machine
    num_shards: int = 1  # number of processes that the base is sharded over
    num_gpus: int = 1  # GPUs that the blocks are divided over
    split: tuple[int, ...] | None = None  # number of blocks on each; None: as even as their memory allows

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
        return Shape(self.rows, image, self.text_tokens, predicted, self.float32_attention)

    @property
    def embedding_bytes(self) -> int:
        """Bytes of the embedding of a prompt on the device, in float32."""
        return 4 * self.text_tokens * self.model.config.text_width

    @property
    def input_bytes(self) -> int:
        """Bytes of a micro-batch: latents and embeddings in float32, the first block's input, and rotary angles."""
        config, shape = self.model.config, self.shape
        row = shape.text * config.text_width * (4 + self.dtype.itemsize) + shape.image * config.channels * 12
        stream = shape.tokens * config.hidden * self.dtype.itemsize
        return shape.rows * (row + stream) + self.guides * self.embedding_bytes + shape.tokens * config.head_dim * 4

    @property
    def trained_parameters(self) -> int:
        return sum(parameter.numel() for parameter in adapter_parameters(self.model))

    @property
    def blocks(self) -> list[nn.Module]:
        return [*self.model.double_blocks, *self.model.single_blocks]


def tokens(pixels: tuple[int, int]) -> int:
    return (pixels[0] // PIXELS_PER_TOKEN) * (pixels[1] // PIXELS_PER_TOKEN)


def frozen(module: nn.Module) -> list[torch.Tensor]:
    return [*(p for p in module.parameters() if not p.requires_grad), *module.buffers()]
