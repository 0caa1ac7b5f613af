"""Compare the numbers that every implementation of FLUX.2 must agree on with diffusers, if that is installed.

`python -m flux2.doctor` runs this. It needs no network: values are compared on the embedded model, which diffusers
can read too, and constants with the defaults of diffusers' functions.
"""

import importlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from flux2.models.positions import image_positions, positions_with_references, text_positions
from flux2.models.text_encoder import SYSTEM_MESSAGE
from flux2.models.variants import VARIANTS
from flux2.sampling import empirical_mu, schedule
from flux2.weights.loading import load_autoencoder, load_transformer
from flux2.weights.sources import TINY_FOLDER, model_source

TOLERANCE = 1e-5  # of float32 values, relative to the norm of diffusers'
SIZES = ((256, 4), (1024, 28), (4096, 50), (4300, 28), (8100, 50))  # tokens and steps of the compared schedules


@dataclass(frozen=True)
class Finding:
    """Result of a comparison. `passed` is None if there was none; `detail` is the figure, or the reason."""

    what: str
    passed: bool | None
    detail: str


def relative_difference(ours: Tensor, theirs: Tensor) -> float:
    """Return the norm of the difference over the norm of `theirs`. Raises ValueError if the shapes differ."""
    if ours.shape != theirs.shape:
        raise ValueError(f"shape {tuple(ours.shape)} here, {tuple(theirs.shape)} there")
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm().clamp_min(1e-30))


def compare_values(*pairs: tuple[Tensor, Tensor]) -> tuple[bool, str]:
    worst = max(relative_difference(ours, theirs) for ours, theirs in pairs)
    return worst <= TOLERANCE, f"relative difference {worst:.1e}"


def compare_equal(ours: object, theirs: object) -> tuple[bool, str]:
    return ours == theirs, "equal" if ours == theirs else f"{ours!r} here, {theirs!r} there"


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def default(function: Callable[..., Any], name: str) -> tuple[int, ...]:
    return tuple(inspect.signature(function).parameters[name].default)


def text_layers(diffusers: Any) -> tuple[bool, str]:
    """Compare which hidden states of the text encoders are stacked."""
    pipelines = (("dev", diffusers.Flux2Pipeline), ("klein_base_4b", diffusers.Flux2KleinPipeline))
    theirs = [default(pipeline.encode_prompt, "text_encoder_out_layers") for _, pipeline in pipelines]
    return compare_equal([VARIANTS[name].text.layers for name, _ in pipelines], theirs)


def system_message(diffusers: Any) -> tuple[bool, str]:
    """Compare the system message of prompts for Mistral."""
    return compare_equal(SYSTEM_MESSAGE, importlib.import_module(f"{module(diffusers)}.system_messages").SYSTEM_MESSAGE)


def latent_normalization(diffusers: Any) -> tuple[bool, str]:
    """Compare pixels to latents: mean, order of patches, running statistics."""
    theirs = diffusers.AutoencoderKLFlux2.from_pretrained(TINY_FOLDER / "vae", torch_dtype=torch.float32)
    pixels = draw(1, 3, 48, 32).clamp(-1, 1)
    pipeline = SimpleNamespace(vae=theirs, _patchify_latents=diffusers.Flux2Pipeline._patchify_latents)
    expected = diffusers.Flux2Pipeline._encode_vae_image(pipeline, pixels, generator=None)
    return compare_values((load_autoencoder(model_source("tiny")).encode(pixels), expected))


def position_ids(diffusers: Any) -> tuple[bool, str]:
    """Compare the positions of tokens of the image, two references and the prompt."""
    pipeline = diffusers.Flux2Pipeline
    picture, references = draw(1, 4, 3, 2), [draw(1, 4, 2, 5), draw(1, 4, 4, 1)]
    pairs = [
        (image_positions(3, 2), pipeline._prepare_latent_ids(picture)[0]),
        (positions_with_references(picture, references)[6:], pipeline._prepare_image_ids(references)[0]),
        (text_positions(7), pipeline._prepare_text_ids(draw(1, 7, 2))[0]),
    ]
    return compare_equal([ours.tolist() for ours, _ in pairs], [theirs.tolist() for _, theirs in pairs])


def times(diffusers: Any) -> tuple[bool, str]:
    """Compare the sampling schedule for several sizes and numbers of steps."""
    fit = importlib.import_module(f"{module(diffusers)}.pipeline_flux2").compute_empirical_mu
    pairs = []
    for tokens, steps in SIZES:
        euler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
        sigmas = torch.linspace(1, 1 / steps, steps).tolist()
        euler.set_timesteps(sigmas=sigmas, mu=fit(tokens, steps))
        shifts = torch.tensor([empirical_mu(tokens, steps)]), torch.tensor([fit(tokens, steps)])
        pairs += [(schedule(steps, tokens), euler.sigmas), shifts]
    return compare_values(*pairs)


def forward(diffusers: Any) -> tuple[bool, str]:
    """Compare one prediction of the embedded model, with a reference."""
    variant = VARIANTS["tiny"]
    theirs = diffusers.Flux2Transformer2DModel.from_pretrained(TINY_FOLDER / "transformer", torch_dtype=torch.float32)
    ours = load_transformer(model_source("tiny"))
    picture, reference = draw(1, 128, 4, 6), draw(1, 128, 3, 3)
    positions = positions_with_references(picture, [reference])
    tokens, text = draw(1, len(positions), 128), draw(1, variant.text.length, variant.transformer.text_width)
    text_at, time, guidance = text_positions(variant.text.length), torch.tensor([0.7]), torch.tensor([3.0])
    inputs = {"hidden_states": tokens, "encoder_hidden_states": text, "img_ids": positions, "txt_ids": text_at}
    expected = theirs(**inputs, timestep=time, guidance=guidance, return_dict=False)[0]
    return compare_values((ours(tokens, positions, text, text_at, time, guidance), expected))


CHECKS: dict[str, Callable[[Any], tuple[bool, str]]] = {
    "text encoder layers": text_layers,
    "system message": system_message,
    "latent normalization": latent_normalization,
    "position ids": position_ids,
    "schedule": times,
    "forward of the embedded model": forward,
}


def module(diffusers: Any) -> str:
    """Return the module of diffusers' FLUX.2 pipelines."""
    return diffusers.Flux2Pipeline.__module__.rpartition(".")[0]


@torch.no_grad()
def selftest() -> Iterator[Finding]:
    """Yield the result of each comparison, also if it is an error of another version; without diffusers only that."""
    try:
        diffusers = importlib.import_module("diffusers")
    except ImportError as error:
        yield Finding("comparison with diffusers", None, f"skipped: diffusers cannot be imported ({error})")
        return
    if not hasattr(diffusers, "Flux2Pipeline"):
        yield Finding("comparison with diffusers", None, f"skipped: diffusers {diffusers.__version__} has no FLUX.2")
        return
    for what, check in CHECKS.items():
        try:
            passed, detail = check(diffusers)
        except Exception as error:  # any error of any library: the report must continue
            yield Finding(what, None, f"failed ({type(error).__name__}: {' '.join(str(error).split())[:200]})")
        else:
            yield Finding(what, passed, detail)
