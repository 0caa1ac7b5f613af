"""The decoder, a stripe of rows at a time: the same picture with a fraction of the memory.

Tiles that are decoded apart and blended differ from the whole picture, because group norms see another picture in each.
Here the statistics of a norm are those of the whole: one pass over the stripes adds them up, the next uses them. What a
stripe needs of its neighbors' rows is computed again, not kept; of a residual block only the input and the output are
there whole. That is two to three times the work of a decoder that is small beside the transformer's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flux2.models.autoencoder import AttentionBlock, Autoencoder, Decoder, Level, Middle, ResnetBlock, Upsample

ELEMENTS = 1 << 23  # of a feature map in a stripe: 32 MB in float32
QUERIES = 1024  # positions that attend at once
HALO = 2  # rows that two convolutions see beyond those that they give


class Rows(Protocol):
    """A feature map (1, channels, height, width) of which any rows can be had; `widest` channels are met on the way."""

    channels: int
    height: int
    width: int
    widest: int

    def rows(self, top: int, bottom: int) -> Tensor: ...


def stripes(source: Rows, elements: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows, each of about so many elements but no fewer than eight rows, that cover `source`."""
    step = max(8, elements // (source.widest * source.width))
    for top in range(0, source.height, step):
        yield top, min(source.height, top + step)


class Whole:
    """A feature map that is there."""

    def __init__(self, x: Tensor) -> None:
        self.x = x
        _, self.channels, self.height, self.width = x.shape
        self.widest = self.channels

    def rows(self, top: int, bottom: int) -> Tensor:
        return self.x[:, :, top:bottom]


class Upsampled:
    """Twice the size, then a convolution; computed when asked for."""

    def __init__(self, conv: nn.Conv2d, source: Rows) -> None:
        self.conv, self.source = conv, source
        self.channels, self.height, self.width = conv.out_channels, 2 * source.height, 2 * source.width
        self.widest = max(source.widest, self.channels)

    def rows(self, top: int, bottom: int) -> Tensor:
        low, high = max(0, top - 1), min(self.height, bottom + 1)
        below, above = low // 2, (high + 1) // 2
        x = F.interpolate(self.source.rows(below, above), scale_factor=2.0, mode="nearest")
        y, first, _ = convolved(self.conv, x[:, :, low - 2 * below : high - 2 * below], low, high, self.height)
        return y[:, :, top - first : bottom - first]


def convolved(conv: nn.Conv2d, x: Tensor, low: int, high: int, height: int) -> tuple[Tensor, int, int]:
    """A 3 x 3 convolution of the rows [low, high) of a map of `height` rows, and which rows it gives.

    Zeros are padded at the map's own edges alone, so elsewhere the first or last row is lost.
    """
    above, below = low == 0, high == height
    y = F.conv2d(F.pad(x, (1, 1, int(above), int(below))), conv.weight, conv.bias)
    return y, low + (not above), high - (not below)


class Normed:
    """A group norm with the statistics of a whole map, and SiLU behind it."""

    def __init__(self, norm: nn.GroupNorm, channels: int, parts: Iterator[Tensor]) -> None:
        count, mean, squares = 0, torch.zeros(()), torch.zeros(())  # squares: of the distances from the mean
        for part in parts:
            groups = part.reshape(norm.num_groups, -1)
            found = groups.shape[1]
            var, own = (value.double() for value in torch.var_mean(groups, dim=1, correction=0))
            apart = own - mean.to(own)
            squares = squares.to(own) + var * found + apart.square() * (count * found / (count + found))
            mean = mean.to(own) + apart * (found / (count + found))
            count += found
        scale = torch.rsqrt(squares / count + norm.eps)
        each = channels // norm.num_groups
        weight = scale.repeat_interleave(each) * norm.weight.double()
        self.weight = weight.to(norm.weight)[:, None, None]
        self.bias = (norm.bias.double() - mean.repeat_interleave(each) * weight).to(norm.weight)[:, None, None]

    def __call__(self, x: Tensor) -> Tensor:
        return F.silu(torch.addcmul(self.bias, x, self.weight), inplace=True)


class Residual:
    """A residual block; computed when asked for, but for the statistics of its norms."""

    def __init__(self, block: ResnetBlock, source: Rows, elements: int) -> None:
        self.block, self.source = block, source
        self.channels, self.height, self.width = block.conv1.out_channels, source.height, source.width
        self.widest = max(source.widest, self.channels)
        ranges = list(stripes(self, elements))
        self.norm1 = Normed(block.norm1, source.channels, (source.rows(*rows) for rows in ranges))
        self.norm2 = Normed(block.norm2, self.channels, (self.first(*rows) for rows in ranges))

    def first(self, top: int, bottom: int) -> Tensor:
        """What the first convolution gives."""
        low, high = max(0, top - 1), min(self.height, bottom + 1)
        y, first, _ = convolved(self.block.conv1, self.norm1(self.source.rows(low, high)), low, high, self.height)
        return y[:, :, top - first : bottom - first]

    def rows(self, top: int, bottom: int) -> Tensor:
        low, high = max(0, top - HALO), min(self.height, bottom + HALO)
        x = self.source.rows(low, high)
        h, first, last = convolved(self.block.conv1, self.norm1(x), low, high, self.height)
        h, first, last = convolved(self.block.conv2, self.norm2(h), first, last, self.height)
        assert first <= top < bottom <= last
        same = x[:, :, top - low : bottom - low]
        short = self.block.nin_shortcut(same) if hasattr(self.block, "nin_shortcut") else same
        return h[:, :, top - first : bottom - first] + short


def stored(source: Rows, dtype: torch.dtype, device: torch.device, elements: int) -> Whole:
    """`source` computed stripe by stripe."""
    whole = torch.empty(1, source.channels, source.height, source.width, dtype=dtype, device=device)
    for top, bottom in stripes(source, elements):
        whole[:, :, top:bottom] = source.rows(top, bottom)
    return Whole(whole)


def attended(block: AttentionBlock, x: Tensor) -> Tensor:
    """An attention block, some queries at a time."""
    h = block.norm(x)
    q, k, v = (layer(h).flatten(2).transpose(1, 2)[:, None] for layer in (block.q, block.k, block.v))
    parts = [F.scaled_dot_product_attention(part, k, v) for part in q.split(QUERIES, dim=2)]
    return x + block.proj_out(torch.cat(parts, dim=2)[:, 0].transpose(1, 2).unflatten(2, x.shape[2:]))


def middle(mid: Middle, x: Tensor) -> Tensor:
    return mid.block_2(attended(mid.attn_1, mid.block_1(x)))


class Out:
    """The last norm and convolution."""

    def __init__(self, decoder: Decoder, source: Rows, elements: int) -> None:
        self.conv, self.source = decoder.conv_out, source
        self.channels, self.height, self.width = decoder.conv_out.out_channels, source.height, source.width
        self.widest = source.widest
        parts = (source.rows(*rows) for rows in stripes(source, elements))
        self.norm = Normed(decoder.norm_out, source.channels, parts)

    def rows(self, top: int, bottom: int) -> Tensor:
        low, high = max(0, top - 1), min(self.height, bottom + 1)
        y, first, _ = convolved(self.conv, self.norm(self.source.rows(low, high)), low, high, self.height)
        return y[:, :, top - first : bottom - first]


@torch.no_grad()
def decode(autoencoder: Autoencoder, latents: Tensor, elements: int = ELEMENTS) -> Tensor:
    """What `autoencoder.decode(latents)` gives, to rounding.

    Args:
        latents: (1, 128, h, w), normalized.
        elements: of a feature map that are in a stripe.

    Raises ValueError for more than one picture.
    """
    if latents.shape[0] != 1:
        raise ValueError(f"latents holds {latents.shape[0]} pictures: decode one at a time in stripes")
    decoder = autoencoder.decoder

    def store(source: Rows) -> Whole:
        return stored(source, latents.dtype, latents.device, elements)

    z = autoencoder.unnormalized(latents)
    source: Rows = Whole(middle(decoder.mid, decoder.conv_in(decoder.post_quant_conv(z))))
    for level in reversed(decoder.up):
        assert isinstance(level, Level)
        for block in level.block:
            assert isinstance(block, ResnetBlock)
            source = store(Residual(block, source, elements))
        if level.resample:
            assert isinstance(level.upsample, Upsample)
            source = Upsampled(level.upsample.conv, source)
    return store(Out(decoder, source, elements)).x
