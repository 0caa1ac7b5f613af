"""The FLUX.2 transformer: a multimodal diffusion transformer (MM-DiT) with shared modulation.

Text and image tokens run first through *double* blocks (separate weights, one joint attention), then, concatenated,
through *single* blocks (attention and mlp in parallel between two fused linears):

    image (B, N, 128)       -> img_in -+
                                       +-> double blocks -> [text, image] (B, L, D) -> single blocks -+
    text (B, T, text_width) -> txt_in -+                                                              |
                                                      (B, N, 128) <- final_layer <- image (B, N, D) <-+

The time embedding controls every block through a shift, a scale and a gate, with m(x) = (1 + scale) * norm(x) + shift:

    double:  x += gate1 * proj(attention(q, k, v))                  q, k, v = qkv(m1(x))
             x += gate2 * mlp(m2(x))
    single:  x += gate  * linear2([attention(q, k, v), swiglu(h)])  q, k, v, h = linear1(m(x))

Unlike in FLUX.1, all blocks of a kind share one modulation, which is computed once per forward. No layer has a bias.

Parameter names and fused layouts are those of Black Forest Labs' files: a published single file loads without renaming,
LoRAs carry names that ComfyUI knows, and q, k and v are one matrix product.
Source: github.com/black-forest-labs/flux2, src/flux2/model.py. Values are tested against diffusers'
`Flux2Transformer2DModel`.

Shapes: B images, N image tokens (with references), T text tokens, L = T + N, H heads, D = H * head_dim.
"""

import math
from collections.abc import Callable
from operator import call
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flux2.layers.attention import attention
from flux2.layers.frozen_linear import TailLinear
from flux2.layers.fused_elementwise import FusedModule, modulated_norm, project_heads, swiglu
from flux2.layers.isolated_references import (
    NO_CACHE,
    BlockCache,
    Modulation,
    ReferenceCache,
    add_gated,
    in_parts,
    isolated_attention,
    isolation,
    joined,
)
from flux2.models.variants import TransformerConfig

# The last linear of an attention, an mlp and a single block is a `TailLinear`: an `nn.Linear` whose output activation
# checkpointing can skip, or recall, when it runs the block again in the backward (flux2/layers/recompute_context.py).

# q, k, v, each (B, H, L, head_dim); for kernels the product qkv (B, L, 3 * D) and the weights of the norms of q and k
Stream = tuple[Tensor, Tensor, Tensor]
RotaryAngles = tuple[Tensor, Tensor, Tensor]  # cos, sin, cos + i sin of each token; each (1, 1, L, head_dim / 2)


class Transformer(nn.Module):
    """Predict the flow of noisy image tokens from a prompt: the whole model.

    Attributes:
        run_block: Function that runs a block with its arguments: directly, or under a policy of flux2/memory.
        has_offloaded_blocks: Whether weights of blocks are in host memory (flux2/memory/block_offload.py).
        devices: Devices of the modules that do not compute on the device of `img_in` (flux2/memory/model_split.py).
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.run_block: Callable[..., Any] = call
        self.has_offloaded_blocks = False
        self.devices: dict[str, torch.device] = {}
        self.img_in = nn.Linear(config.channels, config.hidden, bias=False)
        # training replaces it by the identity where cached embeddings are already projected
        self.txt_in: nn.Module = nn.Linear(config.text_width, config.hidden, bias=False)
        self.time_in = MLPEmbedder(config.time_width, config.hidden)
        if config.guidance:
            self.guidance_in = MLPEmbedder(config.time_width, config.hidden)
        self.double_stream_modulation_img = SharedModulation(config.hidden, sets=2)
        self.double_stream_modulation_txt = SharedModulation(config.hidden, sets=2)
        self.single_stream_modulation = SharedModulation(config.hidden, sets=1)
        self.double_blocks = nn.ModuleList([DoubleBlock(config) for _ in range(config.double_blocks)])
        self.single_blocks = nn.ModuleList([SingleBlock(config) for _ in range(config.single_blocks)])
        self.final_layer = FinalLayer(config)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        text: Tensor,
        text_positions: Tensor,
        timestep: Tensor,
        guidance: Tensor | None = None,
        keep: int | None = None,
        cache: ReferenceCache | None = None,
    ) -> Tensor:
        """Predict the flow `noise - image` of noisy latent tokens: (B, keep, 128) in the dtype of the weights.

        Args:
            tokens: (B, N, 128); the image's noisy tokens first, then those of any references.
            positions: (N, 4) integers (t, h, w, l) of `tokens`, shared by the batch: image number t (0, references 10,
                20, ...), row h, column w, and l = 0 (flux2/models/positions.py).
            text: (B, T, text_width) prompt embeddings.
            text_positions: (T, 4) integers (0, 0, 0, l) of `text`: l is the index of the token in the prompt.
            timestep: (B,) in [0, 1]; 1 is pure noise. References share it with the image, unless they are isolated.
            guidance: (B,) guidance values; required if and only if the model has a guidance embedding.
            keep: Number of leading tokens to predict (the image's, without references); all by default.
            cache: Of isolated references: empty, to be filled from `tokens`, or filled, instead of references in them.
        """
        if cache is not None and not self.config.isolated_references:
            raise ValueError(NO_CACHE)
        # 1. time -> modulation, positions -> rotary angles; shared by all blocks
        time = self.embed_time(timestep, guidance)  # (B, D)
        image_mod = self.double_stream_modulation_img(time)
        text_mod = self.double_stream_modulation_txt(time)
        single_mod = self.single_stream_modulation(time)[0]
        references = 0 if keep is None or not self.config.isolated_references else tokens.shape[1] - keep
        if references:
            clean = self.embed_time(torch.zeros_like(timestep), guidance)
            image_mod = joined(image_mod, self.double_stream_modulation_img(clean))
            (single_mod,) = joined([single_mod], self.single_stream_modulation(clean))
        if cache is not None and not cache.blocks:
            cache.blocks = [BlockCache() for _ in self.config.block_names]
        caches = iter([None] * len(self.config.block_names) if cache is None else cache.blocks)
        rope = rotary_angles(torch.cat([text_positions, positions]), self.config.rope_axes, self.config.rope_theta)

        # 2. both streams to the hidden width, then through the double blocks
        dtype = self.img_in.weight.dtype
        image = self.img_in(tokens.to(dtype))  # (B, N, D)
        text = self.txt_in(text.to(dtype))  # (B, T, D)
        for block in self.double_blocks:
            isolated = isolation(references, next(caches))
            image, text = self.run_block(block, image, text, image_mod, text_mod, rope, *isolated)

        # 3. one stream through the single blocks
        x = torch.cat([text, image], dim=1)  # (B, L, D)
        for block in self.single_blocks:
            x = self.run_block(block, x, single_mod, rope, *isolation(references, next(caches)))

        # 4. the image tokens back to latent channels
        start = text.shape[1]
        stop = x.shape[1] if keep is None else start + keep
        return self.final_layer(x[:, start:stop], time.to(x.device)).to(tokens.device)

    def device_of(self, name: str) -> torch.device:
        """Return the device on which the parameter or module called `name` computes."""
        child, _, rest = name.partition(".")
        block = f"{child}.{rest.partition('.')[0]}"
        return self.devices.get(block) or self.devices.get(child) or self.img_in.weight.device

    def embed_time(self, timestep: Tensor, guidance: Tensor | None) -> Tensor:
        """Return the embedding (B, D) of timesteps (B,) in [0, 1] and, for guided models, of guidance values (B,)."""
        if not self.config.guidance:
            return self.time_in(timestep)
        if guidance is None:
            raise ValueError("this model was trained with a guidance value: pass guidance (training uses 1.0)")
        return self.time_in(timestep) + self.guidance_in(guidance)


class DoubleBlock(nn.Module):
    """Text and image tokens with separate weights and one attention over (text, image)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.norm = ModulatedNorm(config.hidden, config.eps)
        self.img_attn = Attention(config)
        self.img_mlp = mlp(config)
        self.txt_attn = Attention(config)
        self.txt_mlp = mlp(config)

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        image_mod: list[Modulation],
        text_mod: list[Modulation],
        rope: RotaryAngles,
        references: int = 0,
        cache: BlockCache | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return image (B, N, D) and text (B, T, D) after this block, in the same shapes.

        The last `references` tokens of `image` are isolated; `cache` is as in `isolated_attention`.
        """
        (shift1, scale1, gate1), (shift2, scale2, gate2) = image_mod
        (text_shift1, text_scale1, text_gate1), (text_shift2, text_scale2, text_gate2) = text_mod

        # joint attention over text and image
        fused = all(part.norm.fuses(image, *part.norm.weights) for part in (self.img_attn, self.txt_attn))
        # what is modulated, here and below, is in no variable: there it would stay until the block ends
        image_qkv = self.img_attn.project(in_parts(self.norm, references, [image], [shift1, scale1]), fused)
        text_qkv = self.txt_attn.project(self.norm(text, text_shift1, text_scale1), fused)
        if fused:
            q, k, v = project_heads(self.txt_attn.norm.eps, *rope[:2], [text_qkv, image_qkv])  # (B, H, L, head_dim)
        else:
            q, k, v = (torch.cat(pair, dim=2) for pair in zip(text_qkv, image_qkv, strict=True))
        attended = attend(q, k, v, None if fused else rope, *isolation(references, cache))  # (B, L, D)
        text_attended, image_attended = attended.split([text.shape[1], image.shape[1]], dim=1)

        # x += gate1 * proj(attended);  x += gate2 * mlp(m2(x))
        image = in_parts(add_gated, references, [image, self.img_attn.proj(image_attended)], [gate1])
        fed_forward = self.img_mlp(in_parts(self.norm, references, [image], [shift2, scale2]))
        image = in_parts(add_gated, references, [image, fed_forward], [gate2])
        del fed_forward
        text = torch.addcmul(text, text_gate1, self.txt_attn.proj(text_attended))
        text = torch.addcmul(text, text_gate2, self.txt_mlp(self.norm(text, text_shift2, text_scale2)))
        return image, text


class SingleBlock(nn.Module):
    """All tokens together; attention and mlp in parallel between two fused linears."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.split = [3 * config.hidden, 2 * config.mlp_width]
        self.pre_norm = ModulatedNorm(config.hidden, config.eps)
        self.linear1 = nn.Linear(config.hidden, sum(self.split), bias=False)
        self.linear2 = TailLinear(config.hidden + config.mlp_width, config.hidden, bias=False)
        self.norm = QKNorm(config.head_dim, config.eps)
        self.act = SwiGLU()

    def forward(
        self, x: Tensor, mod: Modulation, rope: RotaryAngles, references: int = 0, cache: BlockCache | None = None
    ) -> Tensor:
        """Return x (B, L, D) after this block, in the same shape; `references` and `cache` as in a double block."""
        shift, scale, gate = mod
        projected = self.linear1(
            in_parts(self.pre_norm, references, [x], [shift, scale])
        )  # q, k, v and the input of SwiGLU
        if self.norm.fuses(projected, *self.norm.weights):
            streams = [(projected, *self.norm.weights)]
            q, k, v, activated = project_heads(self.norm.eps, *rope[:2], streams, mlp=self.split[1])
            mixed = torch.cat([attend(q, k, v, None, *isolation(references, cache)), activated], dim=-1)
            del q, k, v, activated  # copied, and not needed by the last linear
        else:
            qkv, h = projected.split(self.split, dim=-1)
            q, k, v = self.norm(qkv)
            mixed = torch.cat([attend(q, k, v, rope, *isolation(references, cache)), self.act(h)], dim=-1)
        return in_parts(add_gated, references, [x, self.linear2(mixed)], [gate])


class FinalLayer(nn.Module):
    """Modulated norm and the projection back to latent channels: (B, N, D) -> (B, N, 128)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.norm = ModulatedNorm(config.hidden, config.eps)
        self.linear = nn.Linear(config.hidden, config.channels, bias=False)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.hidden, 2 * config.hidden, bias=False))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(time)[:, None].chunk(2, dim=-1)
        return self.linear(self.norm(x, shift, scale))


class Attention(nn.Module):
    """The projections of one stream in a double block; the attention itself is joint."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.qkv = nn.Linear(config.hidden, 3 * config.hidden, bias=False)
        self.norm = QKNorm(config.head_dim, config.eps)
        self.proj = TailLinear(config.hidden, config.hidden, bias=False)

    def project(self, x: Tensor, fused: bool) -> Stream:
        """Return normalized q and k, and v, of x (B, L, D); if `fused`, what `project_heads` makes them of."""
        qkv = self.qkv(x)
        return (qkv, *self.norm.weights) if fused else self.norm(qkv)


class ModulatedNorm(FusedModule, nn.LayerNorm):
    """Layer norm without weights, modulated: x (B, L, D) -> (1 + scale) * norm(x) + shift."""

    def __init__(self, hidden: int, eps: float) -> None:
        super().__init__(hidden, eps=eps, elementwise_affine=False)

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:  # type: ignore[override]
        if self.fuses(x, shift, scale):
            return modulated_norm(x, shift, scale, self.eps)
        return torch.addcmul(shift, super().forward(x), 1 + scale)


class QKNorm(FusedModule, nn.Module):
    """Split of q, k and v into heads, with a norm of q and of k over each head."""

    def __init__(self, head_dim: int, eps: float) -> None:
        super().__init__()
        self.head_dim, self.eps = head_dim, eps
        self.query_norm = RMSNorm(head_dim, eps)
        self.key_norm = RMSNorm(head_dim, eps)

    def forward(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Split qkv (B, L, 3 * D) into normalized q and k, and v; each (B, H, L, head_dim)."""
        q, k, v = qkv.unflatten(-1, (3, -1, self.head_dim)).permute(2, 0, 3, 1, 4)
        return self.query_norm(q), self.key_norm(k), v

    @property
    def weights(self) -> tuple[Tensor, Tensor]:
        return self.query_norm.scale, self.key_norm.scale


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, in float32; published files call its weight `scale`."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], self.scale.float(), self.eps).to(x.dtype)


class SwiGLU(FusedModule, nn.Module):
    """SiLU of the first half times the second half: (..., 2 * M) -> (..., M)."""

    def forward(self, x: Tensor) -> Tensor:
        if self.fuses(x):
            return swiglu(x)
        gate, value = x.chunk(2, dim=-1)
        return F.silu(gate) * value


def mlp(config: TransformerConfig) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(config.hidden, 2 * config.mlp_width, bias=False),
        SwiGLU(),
        TailLinear(config.mlp_width, config.hidden, bias=False),
    )


def attend(
    q: Tensor, k: Tensor, v: Tensor, rope: RotaryAngles | None, references: int = 0, cache: BlockCache | None = None
) -> Tensor:
    """Rotate q and k, unless `rope` is None, and apply attention: three of (B, H, L, head_dim) -> (B, L, D).

    Attention is full unless there are isolated references (flux2/layers/isolated_references.py).
    """
    if rope is not None:
        q, k = apply_rope(q, rope), apply_rope(k, rope)
    is_full = not references and cache is None
    attended = attention(q, k, v) if is_full else isolated_attention(q, k, v, references, cache)
    return attended.transpose(1, 2).flatten(2)


class MLPEmbedder(nn.Module):
    """Sinusoidal features of 1000 x, cosines first, and two linears with a SiLU in between: (B,) -> (B, D)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.width = width
        self.in_layer = nn.Linear(width, hidden, bias=False)
        self.out_layer = nn.Linear(hidden, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        half = self.width // 2
        frequencies = torch.exp(-math.log(10000.0) * torch.arange(half, dtype=torch.float32, device=x.device) / half)
        angles = 1000.0 * x.float()[:, None] * frequencies  # frequency i is 10000^(-i / half)
        features = torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.in_layer.weight.dtype)
        return self.out_layer(F.silu(self.in_layer(features)))


class SharedModulation(nn.Module):
    """Time embedding (B, D) -> `sets` of (shift, scale, gate), each (B, 1, D)."""

    def __init__(self, hidden: int, sets: int) -> None:
        super().__init__()
        self.sets = sets
        self.lin = nn.Linear(hidden, 3 * sets * hidden, bias=False)

    def forward(self, time: Tensor) -> list[Modulation]:
        parts = self.lin(F.silu(time))[:, None].chunk(3 * self.sets, dim=-1)
        return [(parts[3 * i], parts[3 * i + 1], parts[3 * i + 2]) for i in range(self.sets)]


def rotary_angles(positions: Tensor, axes: tuple[int, ...], theta: int) -> RotaryAngles:
    """Return the angles position / theta^(2i / width) of each axis for integer positions (L, len(axes)).

    They are computed in float64, because positions can be large.
    """
    angles = []
    for axis, width in enumerate(axes):
        exponents = torch.arange(0, width, 2, dtype=torch.float64, device=positions.device) / width
        angles.append(positions[:, axis, None].double() / theta**exponents)
    angle = torch.cat(angles, dim=-1)[None, None]  # (1, 1, L, head_dim / 2)
    cos, sin = angle.cos().float(), angle.sin().float()
    return cos, sin, torch.complex(cos, sin)


def apply_rope(x: Tensor, rope: RotaryAngles) -> Tensor:
    """Rotate adjacent pairs of the last dimension of x (B, H, L, head_dim), in float32."""
    cos, sin, turn = rope
    if not torch.compiler.is_compiling():  # pairs as complex numbers: one operation, which compilers do not support
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([cos * even - sin * odd, sin * even + cos * odd], dim=-1).flatten(-2).to(x.dtype)
