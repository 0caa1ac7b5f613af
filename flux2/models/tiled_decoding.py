"""The decoder, one stripe of rows at a time: the same image with a fraction of the memory.

Separately decoded and blended tiles differ from the whole image, because group norms see another image in each tile.
Here the statistics of a norm are those of the whole map: one pass over the stripes accumulates them, the next uses
them. Rows of neighboring stripes are recomputed instead of kept; of a residual block only input and output exist as a
whole. This is two to three times the work of a decoder that is small compared to the transformer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flux2.models.autoencoder import AttentionBlock, Autoencoder, Decoder, Level, ResnetBlock, Upsample

ELEMENTS = 1 << 23  # elements of a feature map in a stripe: 32 MB in float32
QUERIES = 1024  # query positions per attention call
HALO = 2  # input rows of two convolutions above and below their output rows


class FeatureMap(Protocol):
    """A feature map (1, channels, height, width) whose rows can be computed on demand, with at most `widest` channels
    in between.
    """

    channels: int
    height: int
    width: int
    widest: int

    def rows(self, top: int, bottom: int) -> Tensor: ...


def stripes(source: FeatureMap, elements: int) -> Iterator[tuple[int, int]]:
    """Yield ranges of rows that cover `source`, each of about `elements` elements and at least eight rows."""
    step = max(8, elements // (source.widest * source.width))
    for top in range(0, source.height, step):
        yield top, min(source.height, top + step)


class StoredMap:
    """A feature map in memory."""

    def __init__(self, x: Tensor) -> None:
        self.x = x
        _, self.channels, self.height, self.width = x.shape
        self.widest = self.channels

    def rows(self, top: int, bottom: int) -> Tensor:
        return self.x[:, :, top:bottom]


class UpsampledMap:
    """A map at twice the size, followed by a convolution; computed on demand."""

    def __init__(self, conv: nn.Conv2d, source: FeatureMap) -> None:
        self.conv, self.source = conv, source
        self.channels, self.height, self.width = conv.out_channels, 2 * source.height, 2 * source.width
        self.widest = max(source.widest, self.channels)

    def rows(self, top: int, bottom: int) -> Tensor:
        def upsampled_rows(low: int, high: int) -> Tensor:
            first, last = low // 2, (high + 1) // 2
            x = F.interpolate(self.source.rows(first, last), scale_factor=2.0, mode="nearest")
            return x[:, :, low - 2 * first : high - 2 * first]

        return convolved_rows(self.conv, upsampled_rows, top, bottom, self.height)


def convolve(conv: nn.Conv2d, x: Tensor, low: int, high: int, height: int) -> tuple[Tensor, int, int]:
    """Return a 3 x 3 convolution of the rows [low, high) of a map of `height` rows, and the range of its rows.

    Zeros are padded only at the edges of the map, so elsewhere the first or last row is lost.
    """
    at_top, at_bottom = low == 0, high == height
    y = F.conv2d(F.pad(x, (1, 1, int(at_top), int(at_bottom))), conv.weight, conv.bias)
    return y, low + (not at_top), high - (not at_bottom)


def convolved_rows(conv: nn.Conv2d, rows: Callable[[int, int], Tensor], top: int, bottom: int, height: int) -> Tensor:
    """Return the rows [top, bottom) of a 3 x 3 convolution of a map of `height` rows, which `rows` computes."""
    low, high = max(0, top - 1), min(height, bottom + 1)
    y, first, _ = convolve(conv, rows(low, high), low, high, height)
    return y[:, :, top - first : bottom - first]


class NormSiLU:
    """A group norm with the statistics of a whole map, followed by SiLU."""

    def __init__(self, norm: nn.GroupNorm, channels: int, parts: Iterator[Tensor]) -> None:
        # merge the statistics of the parts (Chan et al. 1979); squares: sum of squared distances from the mean
        count, mean, squares = 0, torch.zeros(()), torch.zeros(())
        for part in parts:
            groups = part.reshape(norm.num_groups, -1)
            size = groups.shape[1]
            part_var, part_mean = (value.double() for value in torch.var_mean(groups, dim=1, correction=0))
            delta = part_mean - mean.to(part_mean)
            squares = squares.to(delta) + part_var * size + delta.square() * (count * size / (count + size))
            mean = mean.to(delta) + delta * (size / (count + size))
            count += size
        scale = torch.rsqrt(squares / count + norm.eps)
        group_size = channels // norm.num_groups
        weight = scale.repeat_interleave(group_size) * norm.weight.double()
        self.weight = weight.to(norm.weight)[:, None, None]
        self.bias = (norm.bias.double() - mean.repeat_interleave(group_size) * weight).to(norm.weight)[:, None, None]

    def __call__(self, x: Tensor) -> Tensor:
        return F.silu(torch.addcmul(self.bias, x, self.weight), inplace=True)


class ResidualMap:
    """The output of a residual block; computed on demand, except for the statistics of its norms."""

    def __init__(self, block: ResnetBlock, source: FeatureMap, elements: int) -> None:
        self.block, self.source = block, source
        self.channels, self.height, self.width = block.conv1.out_channels, source.height, source.width
        self.widest = max(source.widest, self.channels)
        ranges = list(stripes(self, elements))
        self.norm1 = NormSiLU(block.norm1, source.channels, (source.rows(*rows) for rows in ranges))
        self.norm2 = NormSiLU(block.norm2, self.channels, (self.first_convolution(*rows) for rows in ranges))

    def first_convolution(self, top: int, bottom: int) -> Tensor:
        return convolved_rows(
            self.block.conv1, lambda *rows: self.norm1(self.source.rows(*rows)), top, bottom, self.height
        )

    def rows(self, top: int, bottom: int) -> Tensor:
        low, high = max(0, top - HALO), min(self.height, bottom + HALO)
        x = self.source.rows(low, high)
        h, first, last = convolve(self.block.conv1, self.norm1(x), low, high, self.height)
        h, first, last = convolve(self.block.conv2, self.norm2(h), first, last, self.height)
        assert first <= top < bottom <= last
        x = x[:, :, top - low : bottom - low]
        shortcut = self.block.nin_shortcut(x) if hasattr(self.block, "nin_shortcut") else x
        return h[:, :, top - first : bottom - first] + shortcut


def attend(block: AttentionBlock, x: Tensor) -> Tensor:
    """Run an attention block, `QUERIES` queries at a time."""
    h = block.norm(x)
    q, k, v = (layer(h).flatten(2).transpose(1, 2)[:, None] for layer in (block.q, block.k, block.v))
    parts = [F.scaled_dot_product_attention(part, k, v) for part in q.split(QUERIES, dim=2)]
    return x + block.proj_out(torch.cat(parts, dim=2)[:, 0].transpose(1, 2).unflatten(2, x.shape[2:]))


def decode_middle(decoder: Decoder, z: Tensor) -> Tensor:
    """Run the decoder up to its first level: (1, 32, 2h, 2w) -> (1, channels, 2h, 2w)."""
    block_1, attention, block_2 = decoder.mid
    assert isinstance(attention, AttentionBlock)
    return block_2(attend(attention, block_1(decoder.conv_in(decoder.post_quant_conv(z)))))


class OutputMap:
    """The pixels after the last norm and convolution; computed on demand."""

    def __init__(self, decoder: Decoder, source: FeatureMap, elements: int) -> None:
        self.conv, self.source = decoder.conv_out, source
        self.channels, self.height, self.width = decoder.conv_out.out_channels, source.height, source.width
        self.widest = source.widest
        parts = (source.rows(*rows) for rows in stripes(source, elements))
        self.norm = NormSiLU(decoder.norm_out, source.channels, parts)

    def rows(self, top: int, bottom: int) -> Tensor:
        return convolved_rows(self.conv, lambda *rows: self.norm(self.source.rows(*rows)), top, bottom, self.height)


@torch.no_grad()
def decode(autoencoder: Autoencoder, latents: Tensor, elements: int = ELEMENTS) -> Tensor:
    """Return `autoencoder.decode(latents)`, equal up to rounding.

    Args:
        autoencoder: The autoencoder whose decoder is used.
        latents: (1, 128, h, w), normalized.
        elements: Number of elements of a feature map in a stripe.

    Raises:
        ValueError: `latents` has more than one image.
    """
    if latents.shape[0] != 1:
        raise ValueError(f"latents holds {latents.shape[0]} images: decode one at a time in stripes")
    decoder = autoencoder.decoder

    def store(source: FeatureMap) -> StoredMap:
        whole = torch.empty(1, source.channels, source.height, source.width, dtype=latents.dtype, device=latents.device)
        for top, bottom in stripes(source, elements):
            whole[:, :, top:bottom] = source.rows(top, bottom)
        return StoredMap(whole)

    source: FeatureMap = StoredMap(decode_middle(decoder, autoencoder.unnormalize(latents)))
    for level in reversed(decoder.up):
        assert isinstance(level, Level)
        for block in level.block:
            assert isinstance(block, ResnetBlock)
            source = store(ResidualMap(block, source, elements))
        if level.resample:
            assert isinstance(level.upsample, Upsample)
            source = UpsampledMap(level.upsample.conv, source)
    return store(OutputMap(decoder, source, elements)).x
