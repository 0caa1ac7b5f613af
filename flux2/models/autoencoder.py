"""The FLUX.2 autoencoder: pixels to and from the 128-channel latents of the transformer.

    pixels (B, 3, H, W) -> encoder -> mean (B, 32, H/8, W/8) -> patchify, normalize -> latents (B, 128, H/16, W/16)

Patches of 2 x 2 are folded into channels in the order (c, i, j), and each of the 128 channels is standardized with
running statistics from the file (`bn`). Latents are always the *mean* of the encoder's distribution: sampling it would
add noise that no published model was trained on.

Parameter names are those of Black Forest Labs' `ae.safetensors`; `flux2.weights` maps the diffusers folder onto them.
Values are tested against diffusers' `AutoencoderKLFlux2`.
"""

from collections import OrderedDict
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flux2.models.variants import AutoencoderConfig

FEW_POSITIONS = 4096  # up to this many, a kernel may hold all pairs of positions (64 MB in float32)


def patchify(latents: Tensor) -> Tensor:
    """(B, C, 2h, 2w) -> (B, 4C, h, w); channel order (c, i, j)."""
    return F.pixel_unshuffle(latents, 2)


def unpatchify(latents: Tensor) -> Tensor:
    """(B, 4C, h, w) -> (B, C, 2h, 2w): the inverse of `patchify`."""
    return F.pixel_shuffle(latents, 2)


class ResnetBlock(nn.Module):
    def __init__(self, channels_in: int, channels_out: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels_in, eps=1e-6)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, channels_out, eps=1e-6)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        same_width = channels_in == channels_out
        self.nin_shortcut = nn.Identity() if same_width else nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.nin_shortcut(x) + h


class AttentionBlock(nn.Module):
    """Self-attention with one head over all positions."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, queries: int | None = None) -> Tensor:
        """Attend with `queries` positions at a time, by default with all."""
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2).transpose(1, 2)[:, None] for layer in (self.q, self.k, self.v))
        if queries is None and q.shape[2] > FEW_POSITIONS:
            # kernels that never hold all pairs of positions need contiguous channels
            q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        parts = [F.scaled_dot_product_attention(part, k, v) for part in q.split(queries or q.shape[2], dim=2)]
        return x + self.proj_out(torch.cat(parts, dim=2)[:, 0].transpose(1, 2).unflatten(2, x.shape[2:]))


def downsample(channels: int) -> nn.Sequential:
    pad = nn.ZeroPad2d((0, 1, 0, 1))  # only right and bottom, as the published weights expect
    return nn.Sequential(OrderedDict(pad=pad, conv=nn.Conv2d(channels, channels, 3, stride=2)))


def upsample(channels: int) -> nn.Sequential:
    nearest = nn.Upsample(scale_factor=2.0, mode="nearest")
    return nn.Sequential(OrderedDict(nearest=nearest, conv=nn.Conv2d(channels, channels, 3, padding=1)))


def middle(channels: int, groups: int) -> nn.Sequential:
    """Return the layers between down- and upsampling."""
    block_1, attn_1 = ResnetBlock(channels, channels, groups), AttentionBlock(channels, groups)
    block_2 = ResnetBlock(channels, channels, groups)
    return nn.Sequential(OrderedDict(block_1=block_1, attn_1=attn_1, block_2=block_2))


class Level(nn.Sequential):
    """The blocks of one resolution, followed by `downsample` or `upsample`, if any."""

    def __init__(self, channels_in: int, channels_out: int, blocks: int, groups: int, resample: str = "") -> None:
        widths = [channels_in] + blocks * [channels_out]
        super().__init__(OrderedDict(block=nn.Sequential(*(ResnetBlock(*pair, groups) for pair in pairwise(widths)))))
        if resample:
            self.add_module(resample, {"downsample": downsample, "upsample": upsample}[resample](channels_out))


class Encoder(nn.Module):
    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths, last = config.widths, len(config.widths) - 1
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down = nn.Sequential()
        for i, width in enumerate(widths):
            resample = "downsample" if i < last else ""
            self.down.append(Level(widths[max(i - 1, 0)], width, config.blocks, config.groups, resample))
        self.mid = middle(widths[-1], config.groups)
        self.norm_out = nn.GroupNorm(config.groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.down(self.conv_in(x)))
        return self.quant_conv(self.conv_out(F.silu(self.norm_out(x))))


class Decoder(nn.Module):
    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths, last = config.widths, len(config.widths) - 1
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.mid = middle(widths[-1], config.groups)
        self.up = nn.ModuleList()  # up.0 has the full resolution, so `forward` runs the list backwards
        for i, width in enumerate(widths):
            resample = "upsample" if i else ""
            self.up.append(Level(widths[min(i + 1, last)], width, config.blocks + 1, config.groups, resample))
        self.norm_out = nn.GroupNorm(config.groups, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(self.post_quant_conv(z)))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Autoencoder(nn.Module):
    """Encoder and decoder with the 128-channel normalization."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.bn = nn.BatchNorm2d(4 * config.latent_channels, eps=config.bn_eps, affine=False)
        self.eval()

    def _statistics(self) -> tuple[Tensor, Tensor]:
        mean, var = self.bn.get_buffer("running_mean"), self.bn.get_buffer("running_var")
        return mean[:, None, None], torch.sqrt(var + self.bn.eps)[:, None, None]

    def moments(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log-variance (B, 32, H/8, W/8) of the latent distribution; only training needs the second."""
        return self.encoder(pixels).chunk(2, dim=1)

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in [-1, 1], sides multiples of 16 -> latents (B, 128, H/16, W/16), normalized."""
        if pixels.shape[-1] % 16 or pixels.shape[-2] % 16:
            raise ValueError(f"image sides must be multiples of 16, got {pixels.shape[-1]} x {pixels.shape[-2]}")
        mean, std = self._statistics()
        return (patchify(self.moments(pixels)[0]) - mean) / std

    def decode(self, latents: Tensor) -> Tensor:
        """Normalized latents (B, 128, h, w) -> pixels (B, 3, 16h, 16w), nominally in [-1, 1], not clipped.

        `tiled_decoding.decode` computes the same with less memory.
        """
        return self.decoder(self.unnormalize(latents))

    def unnormalize(self, latents: Tensor) -> Tensor:
        """(B, 128, h, w) -> (B, 32, 2h, 2w), the input of the decoder."""
        mean, std = self._statistics()
        return unpatchify(latents * std + mean)
