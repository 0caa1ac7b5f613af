"""The decoder, one stripe of rows at a time: the same image with a fraction of the memory.

Separately decoded and blended tiles differ from the whole image, because group norms see another image in each tile.
Here the statistics of a norm are those of the whole map: one pass over the stripes accumulates them, the next uses
them. Rows of neighboring stripes are recomputed instead of kept; of a residual block only input and output exist as a
whole. This is two to three times the work of a decoder that is small compared to the transformer.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flux2.models.autoencoder import Autoencoder

ELEMENTS = 1 << 23  # elements of a feature map in a stripe: 32 MB in float32
QUERIES = 1024  # query positions per attention call
HALO = 2  # input rows of two convolutions above and below their output rows


@dataclass
class FeatureMap:
    """A feature map (1, channels, height, width), in memory or computed on demand.

    Attributes:
        widest: Largest number of channels of the maps that are computed on the way.
        rows: Function that returns the rows [top, bottom).
    """

    channels: int
    height: int
    width: int
    widest: int
    rows: Callable[[int, int], Tensor]

    def stripes(self, elements: int) -> Iterator[tuple[int, int]]:
        """Yield ranges that cover all rows, each of about `elements` elements and at least eight rows."""
        step = max(8, elements // (self.widest * self.width))
        for top in range(0, self.height, step):
            yield top, min(self.height, top + step)


def stored_map(x: Tensor) -> FeatureMap:
    _, channels, height, width = x.shape
    return FeatureMap(channels, height, width, channels, lambda top, bottom: x[:, :, top:bottom])


def convolve(conv: nn.Conv2d, x: Tensor, low: int, high: int, height: int) -> tuple[Tensor, int, int]:
    """Return a 3 x 3 convolution of the rows [low, high) of a map of `height` rows, and the range of its rows.

    Zeros are padded only at the edges of the map, so elsewhere the first or last row is lost.
    """
    at_top, at_bottom = low == 0, high == height
    y = F.conv2d(F.pad(x, (1, 1, int(at_top), int(at_bottom))), conv.weight, conv.bias)
    return y, low + (not at_top), high - (not at_bottom)


def convolved_map(conv: nn.Conv2d, source: FeatureMap) -> FeatureMap:
    """Return a 3 x 3 convolution of a map."""

    def rows(top: int, bottom: int) -> Tensor:
        low, high = max(0, top - 1), min(source.height, bottom + 1)
        y, first, _ = convolve(conv, source.rows(low, high), low, high, source.height)
        return y[:, :, top - first : bottom - first]

    channels = conv.out_channels
    return FeatureMap(channels, source.height, source.width, max(source.widest, channels), rows)


def upsampled_map(source: FeatureMap) -> FeatureMap:
    """Return a map at twice the size."""

    def rows(top: int, bottom: int) -> Tensor:
        first, last = top // 2, (bottom + 1) // 2
        x = F.interpolate(source.rows(first, last), scale_factor=2.0, mode="nearest")
        return x[:, :, top - 2 * first : bottom - 2 * first]

    return FeatureMap(source.channels, 2 * source.height, 2 * source.width, source.widest, rows)


def pointwise_map(function: Callable[[Tensor], Tensor], source: FeatureMap) -> FeatureMap:
    return replace(source, rows=lambda top, bottom: function(source.rows(top, bottom)))


def norm_silu(norm: nn.GroupNorm, source: FeatureMap, ranges: Iterable[tuple[int, int]]) -> Callable[[Tensor], Tensor]:
    """Return a group norm, followed by SiLU, with the statistics of a whole map, computed over `ranges` of its rows."""
    # merge the statistics of the parts (Chan et al. 1979); squares: sum of squared distances from the mean
    count, mean, squares = 0, torch.zeros(()), torch.zeros(())
    for top, bottom in ranges:
        groups = source.rows(top, bottom).reshape(norm.num_groups, -1)
        size = groups.shape[1]
        part_var, part_mean = (value.double() for value in torch.var_mean(groups, dim=1, correction=0))
        delta = part_mean - mean.to(part_mean)
        squares = squares.to(delta) + part_var * size + delta.square() * (count * size / (count + size))
        mean = mean.to(delta) + delta * (size / (count + size))
        count += size
    group_size = source.channels // norm.num_groups
    scale = torch.rsqrt(squares / count + norm.eps).repeat_interleave(group_size) * norm.weight.double()
    shift = norm.bias.double() - mean.repeat_interleave(group_size) * scale
    weight, bias = (value.to(norm.weight)[:, None, None] for value in (scale, shift))
    return lambda x: F.silu(torch.addcmul(bias, x, weight), inplace=True)


def residual_map(block: Any, source: FeatureMap, elements: int) -> FeatureMap:
    """Return the output of a residual block, computed on demand except for the statistics of its norms."""
    height, channels = source.height, block.conv1.out_channels

    def rows(top: int, bottom: int) -> Tensor:
        low, high = max(0, top - HALO), min(height, bottom + HALO)
        x = source.rows(low, high)
        h, first, last = convolve(block.conv1, norm1(x), low, high, height)
        h, first, _ = convolve(block.conv2, norm2(h), first, last, height)
        return h[:, :, top - first : bottom - first] + block.nin_shortcut(x[:, :, top - low : bottom - low])

    result = FeatureMap(channels, height, source.width, max(source.widest, channels), rows)
    ranges = list(result.stripes(elements))
    norm1 = norm_silu(block.norm1, source, ranges)
    norm2 = norm_silu(block.norm2, convolved_map(block.conv1, pointwise_map(norm1, source)), ranges)
    return result


@torch.no_grad()
def decode(autoencoder: Autoencoder, latents: Tensor, elements: int = ELEMENTS) -> Tensor:
    """Return `autoencoder.decode(latents)`, equal up to rounding.

    Args:
        latents: (1, 128, h, w), normalized. Several images raise ValueError.
        elements: Number of elements of a feature map in a stripe.
    """
    if latents.shape[0] != 1:
        raise ValueError(f"latents holds {latents.shape[0]} images: decode one at a time in stripes")
    decoder: Any = autoencoder.decoder  # mypy does not know the types of its modules

    def store(source: FeatureMap) -> Tensor:
        whole = latents.new_empty(1, source.channels, source.height, source.width)
        for top, bottom in source.stripes(elements):
            whole[:, :, top:bottom] = source.rows(top, bottom)
        return whole

    z = decoder.post_quant_conv(autoencoder.unnormalize(latents))
    source = stored_map(decoder.mid.block_2(decoder.mid.attn_1(decoder.mid.block_1(decoder.conv_in(z)), QUERIES)))
    for level in reversed(decoder.up):
        for block in level.block:
            source = stored_map(store(residual_map(block, source, elements)))
        if hasattr(level, "upsample"):
            source = convolved_map(level.upsample.conv, upsampled_map(source))
    norm = norm_silu(decoder.norm_out, source, source.stripes(elements))
    return store(convolved_map(decoder.conv_out, pointwise_map(norm, source)))
