"""Sampling from noise to latents: the time schedule, Euler steps and classifier-free guidance.

The model predicts the flow `noise - image` along `x_s = (1 - s) * image + s * noise`, so sampling integrates dx/ds from
s = 1 down to 0. The times are evenly spaced, then shifted towards noise by `exp(mu)`: more for larger images and fewer
steps.
Source: github.com/black-forest-labs/flux2, src/flux2/sampling.py (`get_schedule`, `compute_empirical_mu`, `denoise`).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from flux2.layers.isolated_references import ReferenceCache
from flux2.models.positions import from_tokens, positions_with_references, text_positions, to_tokens, with_references
from flux2.models.transformer import Transformer
from flux2.models.variants import TOKEN_CHANNELS
from flux2.utils import checks


def empirical_mu(tokens: int, steps: int) -> float:
    """Return the published fit of the log-shift for an image of `tokens` tokens; references do not count.

    Two lines in the number of tokens, for 10 and for 200 steps, are interpolated in the number of steps. Above 4300
    tokens only the second line is used.
    """
    at_200 = 0.00016927 * tokens + 0.45666666
    if tokens > 4300:
        return at_200
    at_10 = 8.73809524e-05 * tokens + 1.89833333
    slope = (at_200 - at_10) / 190.0
    return slope * steps + at_200 - 200.0 * slope


def shift(times: Tensor, mu: float) -> Tensor:
    """Move times in [0, 1] towards 1: `a s / (1 + (a - 1) s)` with `a = exp(mu)`."""
    a = math.exp(mu)
    return a * times / (1 + (a - 1) * times)


def schedule(steps: int, tokens: int) -> Tensor:
    """Return the times (steps + 1,) in float32 from 1 to 0 for an image of `tokens` tokens."""
    steps = checks.steps(steps)
    return shift(torch.linspace(1, 0, steps + 1, dtype=torch.float64), empirical_mu(tokens, steps)).float()


def initial_noise(seeds: Sequence[int], height: int, width: int) -> Tensor:
    """Return float32 noise (B, 128, height, width) on the CPU, one image per seed, for any batch and device."""
    shape = (TOKEN_CHANNELS, height, width)
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


@dataclass(frozen=True)
class Start:
    """An image that sampling starts from, with noise on it, instead of from noise alone.

    Attributes:
        latents: (B or 1, 128, h, w) of the image.
        strength: Share of the steps that are computed, above 0 and at most 1; 1 starts from noise alone.
        mask: (B or 1, 1, h, w) from 0, where the image stays, to 1, where it is repainted; None: 1 everywhere.
    """

    latents: Tensor
    strength: float
    mask: Tensor | None = None


def first_step(steps: int, strength: float) -> int:
    """Return the number of steps that are left out at `strength`, at least one less than `steps`."""
    return min(int(steps - min(steps * strength, steps)), steps - 1)


def euler(
    flow: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    times: Tensor,
    progress: Callable[[Tensor], None] | None = None,
    blend: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """Integrate dx/ds = flow(x, s) along `times`, with x in float32 whatever dtype the model computes in.

    `flow` receives x and the time as a (B,) tensor. After every step, `blend` returns the x to continue with from x and
    the time that it has reached, and `progress` is called with it.
    """
    x = x.float()
    for now, after in pairwise(times):
        x = x + (after - now) * flow(x, now.expand(x.shape[0])).float()
        if blend is not None:
            x = blend(x, after)
        if progress is not None:
            progress(x)
    return x


@torch.no_grad()
def sample(
    model: Transformer,
    noise: Tensor,
    text: Tensor,
    *,
    steps: int,
    guidance: float,
    references: Sequence[Tensor] = (),
    empty: Tensor | None = None,
    start: Start | None = None,
    cached: bool | None = None,
    progress: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Denoise `noise` to latents (B, 128, h, w) in float32.

    Args:
        noise: (B, 128, h, w) at time 1.
        text: (B, T, text_width) embeddings of the prompts.
        guidance: Input of a model with a guidance embedding. For other models, the scale g of classifier-free guidance
            `empty + g * (prompt - empty)`; 1 turns it off.
        references: Latents (B, 128, h_i, w_i) of reference images.
        empty: (B or 1, T, text_width) embeddings of the empty prompt, required for classifier-free guidance.
        start: An image to start from. After every step, what its mask keeps is the image again, with as much of the
            same noise as the step has left.
        cached: Whether keys and values of isolated references are computed once and kept; by default if the model has
            isolated references (flux2/layers/isolated_references.py).
        progress: Function called with the tokens after every step.
    """
    guidance = checks.guidance(guidance)
    height, width = noise.shape[2:]
    x = to_tokens(noise)
    positions = positions_with_references(noise, references)
    prompt_positions = text_positions(text.shape[1], noise.device)
    value = torch.full((x.shape[0],), guidance, device=x.device) if model.config.guidance else None
    prompts = [text]
    if not model.config.guidance and guidance != 1:
        if empty is None:
            raise ValueError(f"guidance={guidance}: this model needs the embeddings of the empty prompt. Pass empty.")
        prompts.append(empty.expand_as(text))

    cached = model.config.isolated_references if cached is None else cached
    cache = ReferenceCache() if cached and references else None

    def predict(tokens: Tensor, prompt: Tensor, time: Tensor) -> Tensor:
        keep = tokens.shape[1]
        if cache is None:
            return model(with_references(tokens, references), positions, prompt, prompt_positions, time, value, keep)
        given = tokens if cache.blocks else with_references(tokens, references)
        at = positions[: given.shape[1]]
        return model(given, at, prompt, prompt_positions, time, value, keep, cache)

    def flow(tokens: Tensor, time: Tensor) -> Tensor:
        flows = [predict(tokens, prompt, time) for prompt in prompts]
        return flows[0] if len(flows) == 1 else flows[1] + guidance * (flows[0] - flows[1])

    times = schedule(steps, x.shape[1]).to(x.device)
    if start is None:
        return from_tokens(euler(flow, x, times, progress), height, width)
    times = times[first_step(steps, start.strength) :]
    image, mask = to_tokens(start.latents).to(x), None if start.mask is None else to_tokens(start.mask).to(x)

    def noisy(time: Tensor) -> Tensor:
        return time * x + (1 - time) * image

    def blend(tokens: Tensor, time: Tensor) -> Tensor:
        return tokens if mask is None else (1 - mask) * noisy(time) + mask * tokens

    return from_tokens(euler(flow, noisy(times[0]), times, progress, blend), height, width)
