"""Load once, generate many: `pipe = flux2.load("tiny"); pipe.generate("a small red cup on a blue background")`.

One large model is in memory at a time where memory is short: the text encoder is read, used and freed before the
transformer is loaded, and prompts that were encoded stay known. What a training run shows as samples goes through
`render`, the same function, so those are the pictures that inference gives later.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from flux2 import adapters
from flux2.adapters.loading import Loaded
from flux2.memory.block_offload import offload, offloaded_blocks
from flux2.models import tiled_decoding
from flux2.models.autoencoder import Autoencoder
from flux2.models.pixels import reference_image, to_images, to_pixels
from flux2.models.text_encoder import Storage
from flux2.models.transformer import Transformer
from flux2.models.variants import PIXELS_PER_TOKEN, Variant, variant
from flux2.prompts.embeddings import Prompts, TextSource, free_memory, text_source
from flux2.prompts.upsampling import load_upsampler
from flux2.quantization.precision import Precision, precision_from_name
from flux2.sampling import initial_noise, sample
from flux2.utils import checks
from flux2.utils.device import pick_device
from flux2.weights.loading import load_autoencoder, load_transformer
from flux2.weights.sources import ModelSource, model_source

ONE_REFERENCE_PIXELS = 2024**2  # as in the reference code; several share less
MANY_REFERENCES_PIXELS = 1024**2
TILED_PIXELS = 1024**2  # of larger pictures the decoder computes a stripe at a time


def check_size(width: int, height: int) -> None:
    """Raises ValueError unless both are positive multiples of 16 and few enough pixels, TypeError unless whole."""
    checks.size(width, height, PIXELS_PER_TOKEN)


def check_references(images: object) -> list[Image.Image]:
    """Reference pictures as a list. Raises TypeError for anything else, ValueError for more than ten."""
    if isinstance(images, Image.Image | str | bytes) or not isinstance(images, Iterable):
        raise TypeError(f"references must be a list of pictures, got {type(images).__name__}")
    given = list(images)
    for image in given:
        if not isinstance(image, Image.Image):
            raise TypeError(f"references has {image!r} in it, which is {type(image).__name__}: open it with PIL.Image")
    checks.references(len(given))
    return given


@torch.no_grad()
def render(
    transformer: Transformer,
    autoencoder: Autoencoder,
    text: Tensor,
    *,
    seeds: Sequence[int],
    width: int,
    height: int,
    steps: int,
    guidance: float,
    references: Sequence[Tensor] = (),
    empty: Tensor | None = None,
    tiled: bool | None = None,
    progress: Callable[[Tensor], None] | None = None,
) -> list[Image.Image]:
    """Pictures from prompt embeddings.

    Args:
        text: (B, T, text_width); one picture each.
        seeds: B of them; a picture depends on its own alone.
        width, height: pixels, multiples of 16.
        references: latents (B, 128, h_i, w_i).
        empty: (1, T, text_width), for classifier-free guidance.
        tiled: decode in stripes, with less memory (`stripes`); None: above a megapixel.
        steps, guidance, progress: as in `sampling.sample`.
    """
    check_size(width, height)
    device = next(transformer.parameters()).device
    noise = initial_noise(seeds, height // PIXELS_PER_TOKEN, width // PIXELS_PER_TOKEN).to(device)
    latents = sample(
        transformer,
        noise,
        text.to(device),
        steps=steps,
        guidance=guidance,
        references=[reference.to(device) for reference in references],
        empty=None if empty is None else empty.to(device),
        progress=progress,
    )
    parameter = next(autoencoder.parameters())
    in_stripes = width * height > TILED_PIXELS if tiled is None else tiled
    # one at a time: decoding 1024 px takes gigabytes of activations
    decode = partial(tiled_decoding.decode, autoencoder) if in_stripes else autoencoder.decode
    parts = [decode(one[None].to(parameter)) for one in latents]
    return to_images(torch.cat(parts))


class Pipeline:
    """A model ready to generate. Made by `flux2.load`; its parts are loaded when they are first needed."""

    def __init__(
        self,
        source: ModelSource,
        device: torch.device,
        precision: Precision,
        keep_text_encoder: bool,
        offload_blocks: int | float = 0,
        cache: Path | None = None,
        text: TextSource | None = None,
        tiled: bool | None = None,
    ) -> None:
        self.tiled = tiled
        self.streamed = offloaded_blocks(source.variant.transformer, offload_blocks)
        self.offload_blocks = offload_blocks
        self.source = source
        self.device = device
        self.precision = precision
        self.cache = cache
        self.prompts = Prompts(source, device, precision.dtype, replace(text or TextSource(), keep=keep_text_encoder))
        self._autoencoder: Autoencoder | None = None
        self._transformer: Transformer | None = None
        self._adapters: list[tuple[Path | str, float]] = []

    @property
    def variant(self) -> Variant:
        return self.source.variant

    @property
    def autoencoder(self) -> Autoencoder:
        if self._autoencoder is None:
            # float32: small beside the transformer, and in bfloat16 its rounding shows in flat areas
            self._autoencoder = load_autoencoder(self.source, self.device, torch.float32)
        return self._autoencoder

    @property
    def transformer(self) -> Transformer:
        if self._transformer is None:
            transformer = load_transformer(
                self.source,
                self.device,
                self.precision,
                host=self.streamed,
                cache=self.cache,
                say=lambda text: print(text, file=sys.stderr),
            )
            offload(transformer, self.offload_blocks, device=self.device)
            self._transformer = transformer
        return self._transformer

    def load_adapter(self, path: str | Path, scale: float = 1.0) -> Loaded:
        """Add an adapter (`adapters.load` says which files), its update multiplied by `scale`; several of one type add
        up. Returns what was found: its type, layers and ranks.

        Raises TypeError or ValueError, the pipeline being as it was, for a scale or an adapter that cannot be used.
        """
        scale = checks.number("scale", scale)
        name = f"adapter_{len(self._adapters)}"
        found = adapters.load(self.transformer, path, name=name, scale=scale)
        self._adapters.append((path, scale))
        return found

    def merge_adapters(self) -> None:
        """Add the loaded adapters to the weights, once and for all: pictures then take no longer than the base's.

        Raises ValueError, the pipeline being as it was, for what `check_mergeable` refuses, or if none is loaded.
        """
        self.check_mergeable()
        if not self._adapters:
            raise ValueError("there is no adapter to merge: load one first")
        adapters.merge(self.transformer)

    def check_mergeable(self) -> None:
        """Raises ValueError for a base that adapters cannot be merged into; nothing is loaded for it."""
        if self.precision.storage is not None:
            raise ValueError(
                f"precision={self.precision.name}: adapters cannot be merged into a quantized base, as most of them "
                "would be lost in its rounding. Keep them beside it, or use precision=bf16 or fp32"
            )
        if self.streamed:
            raise ValueError(
                "adapters cannot be merged while blocks stream from host memory: keep them beside the base, or use "
                "offload_blocks=0"
            )

    def encode(self, prompts: Sequence[str], length: int | None = None) -> Tensor:
        """(B, T, text_width) embeddings; prompts that were encoded before need no text encoder."""
        return self.prompts.get(prompts, length)

    def save_embeddings(self, file: str | Path, prompts: Sequence[str], length: int | None = None) -> None:
        """Write embeddings of `prompts` to `file`, for `load(..., embeddings=file)` where no text encoder fits."""
        self.prompts.save(file, prompts, length)

    def upsample(
        self, prompt: str | Sequence[str], references: Sequence[Image.Image] = (), *, seed: int = 0
    ) -> list[str]:
        """Prompts, rewritten in more detail by dev's text encoder as a language model (flux2/prompts/upsampling.py).

        The whole of it is loaded, and freed again. Raises ValueError for a model whose text encoder writes nothing.
        """
        prompts, (seed,) = checks.texts("prompt", prompt), checks.seeds(seed, 1)
        references = check_references(references)
        upsampler = load_upsampler(self.source, self.device, self.precision.dtype, self.prompts.text, bool(references))
        try:
            return [upsampler.rewrite(one, references, seed=seed) for one in prompts]
        finally:
            del upsampler
            free_memory(self.device)

    def embeddings(
        self, prompts: Sequence[str], guidance: float | None = None, length: int | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Embeddings of the prompts and, if `guidance` means classifier-free guidance, of the empty prompt, (1, T, D).

        Both at once, so that the text encoder is loaded once.
        """
        guidance = self.variant.guidance if guidance is None else guidance
        classifier_free = not self.variant.transformer.guidance and guidance != 1
        encoded = self.encode([*prompts, ""] if classifier_free else prompts, length)
        return encoded[: len(prompts)], encoded[len(prompts) :] if classifier_free else None

    @torch.no_grad()
    def encode_references(self, images: Sequence[Image.Image]) -> list[Tensor]:
        """Latents (1, 128, h, w) of each reference at its own size."""
        limit = ONE_REFERENCE_PIXELS if len(images) == 1 else MANY_REFERENCES_PIXELS
        sized = [to_pixels([reference_image(image, limit)]).to(self.device) for image in images]
        return [self.autoencoder.encode(pixels) for pixels in sized]

    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        references: Sequence[Image.Image] = (),
        seed: int | Sequence[int] = 0,
        width: int | None = None,
        height: int | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        length: int | None = None,
        batch_size: int = 4,
        progress: Callable[[Tensor], None] | None = None,
    ) -> list[Image.Image]:
        """Pictures of `prompt`, one a prompt.

        Args:
            prompt: one or several.
            references: pictures to edit or to draw from, shared by all prompts.
            seed: of the first prompt, the next ones counting up; or one seed a prompt.
            width, height: multiples of 16; by default the size of the first reference, else the variant's.
            steps, guidance: the variant's defaults if not given.
            length: tokens that a prompt is padded to; the variant's if not given.
            batch_size: pictures made at once; it changes memory and speed, the pictures at most by rounding.
            progress: called after every step with the tokens.

        Raises:
            TypeError, ValueError: an argument is of the wrong type or out of range; before anything is loaded.
            ValueError: the pixels that were computed are not finite.
        """
        variant = self.variant
        # before anything large is loaded
        prompts = checks.texts("prompt", prompt)
        seeds = checks.seeds(seed, len(prompts))
        check_size(PIXELS_PER_TOKEN if width is None else width, PIXELS_PER_TOKEN if height is None else height)
        steps = checks.steps(variant.steps if steps is None else steps)
        guidance = checks.guidance(variant.guidance if guidance is None else guidance)
        length = None if length is None else checks.whole("length", length, 1, checks.MAX_LENGTH)
        batch_size = checks.whole("batch_size", batch_size, 1)
        references = check_references(references)
        text, empty = self.embeddings(prompts, guidance, length)
        latents = self.encode_references(references)
        if latents:
            default_height, default_width = (side * PIXELS_PER_TOKEN for side in latents[0].shape[2:])
        else:
            default_height = default_width = variant.resolution
        images: list[Image.Image] = []
        for start in range(0, len(prompts), batch_size):
            part = slice(start, start + batch_size)
            count = len(prompts[part])
            images += render(
                self.transformer,
                self.autoencoder,
                text[part],
                seeds=seeds[part],
                width=default_width if width is None else width,
                height=default_height if height is None else height,
                steps=steps,
                guidance=guidance,
                references=[latent.expand(count, -1, -1, -1) for latent in latents],
                empty=empty,
                tiled=self.tiled,
                progress=progress,
            )
        return images


def load(
    name: str = "tiny",
    path: str | os.PathLike[str] | None = None,
    *,
    autoencoder: str | os.PathLike[str] | None = None,
    text_encoder: str | os.PathLike[str] | None = None,
    device: str | None = None,
    precision: str | None = None,
    keep_text_encoder: bool | None = None,
    offload_blocks: int | float = 0,
    cache: str | Path | None = None,
    tiled: bool | None = None,
    text_storage: Storage | None = None,
    embeddings: str | os.PathLike[str] | None = None,
) -> Pipeline:
    """A pipeline for the model called `name` (see `variants.VARIANTS`).

    Args:
        path: a repository id, a folder in the published layout, or one .safetensors file with the transformer; the
            published repository by default, the embedded files for `tiny`.
        autoencoder, text_encoder: likewise, where they are not at `path`; for the text encoder also the address of a
            server (flux2/prompts/remote_client.py), and then it takes no memory here.
        device: `cuda`, `cuda:1`, `cpu`; the GPU if there is one.
        precision: `fp32`, `bf16`, `fp8` or `nf4` of the transformer (see `flux2/quantization/precision.py`); by default
        bf16 on a GPU and
            fp32 on a CPU, as the text encoder is for `fp8` and `nf4`.
        keep_text_encoder: keep it in memory between calls; by default only for `tiny`.
        offload_blocks: blocks of the transformer that stay in host memory and stream to the device: a number, or a
            share from 0.0 to 1.0.
        cache: folder of quantized copies, with which the next start in `fp8` or `nf4` is faster; by default what the
            environment variable FLUX2_CACHE names, or none.
        tiled: decode pictures in stripes, which takes less memory and more time; by default those above a megapixel.
        text_storage: `nf4` or `int8`: the text encoder's layers in 4 or 8 bits; by default in the dtype of the rest.
        embeddings: a file of `Pipeline.save_embeddings`: its prompts alone can be used, and no text encoder is loaded.
    """
    if not isinstance(tiled, bool | None):
        raise ValueError(f"tiled={tiled!r} must be True, False or None")
    given = (
        os.fspath(place) if isinstance(place, os.PathLike) else place for place in (path, autoencoder, text_encoder)
    )
    path, autoencoder, text_encoder = given
    text, text_encoder = text_source(variant(name), text_encoder, embeddings, text_storage)
    source = model_source(name, path, autoencoder, text_encoder)
    chosen = pick_device(device)
    keep = name == "tiny" if keep_text_encoder is None else keep_text_encoder
    copies = cache or os.environ.get("FLUX2_CACHE")
    folder = Path(copies).expanduser() if copies else None
    return Pipeline(source, chosen, precision_from_name(precision, chosen), keep, offload_blocks, folder, text, tiled)
