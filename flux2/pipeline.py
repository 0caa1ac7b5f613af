"""Load once, generate many: `pipe = flux2.load("tiny"); pipe.generate("a small red cup on a blue background")`.

To save memory, only one large model is loaded at a time: the text encoder is loaded, used and freed before the
transformer is loaded, and embeddings of prompts are cached. The samples of a training run also go through `render`, so
inference later gives the same images.
"""

import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from flux2 import adapters
from flux2.adapters.loading import LoadedAdapter, check_scale
from flux2.adapters.strengths import parse_ranges
from flux2.layers.isolated_references import NO_CACHE
from flux2.memory.block_offload import offload, offloaded_blocks
from flux2.memory.model_split import split_model
from flux2.models import tiled_decoding
from flux2.models.autoencoder import Autoencoder
from flux2.models.inpainting import Inpainting
from flux2.models.pixels import reference_image, to_images, to_pixels
from flux2.models.text_encoder import TextStorage
from flux2.models.transformer import Transformer
from flux2.models.variants import PIXELS_PER_TOKEN, Variant, get_variant
from flux2.prompts.embeddings import Prompts, TextSource, free_memory, text_source
from flux2.prompts.upsampling import load_upsampler
from flux2.quantization.precision import Precision, precision_from_name
from flux2.sampling import Start, initial_noise, sample
from flux2.utils import checks
from flux2.utils.device import pick_device
from flux2.utils.files import user_path
from flux2.weights.loading import load_autoencoder, load_transformer
from flux2.weights.sources import ModelSource, model_source

ONE_REFERENCE_PIXELS = 2024**2  # limits of the reference code for one and for several references
MANY_REFERENCES_PIXELS = 1024**2
TILED_PIXELS = 1024**2  # larger images are decoded in stripes by default


def reference_limit(variant: Variant, count: int) -> int:
    """Return the maximum number of pixels of each of `count` references."""
    return (
        ONE_REFERENCE_PIXELS if count == 1 and not variant.transformer.isolated_references else MANY_REFERENCES_PIXELS
    )


def check_references(images: object) -> list[Image.Image]:
    """Return reference images as a list. Raise TypeError for anything else, ValueError for more than ten."""
    if isinstance(images, Image.Image | str | bytes) or not isinstance(images, Iterable):
        raise TypeError(f"references must be a list of images, got {type(images).__name__}")
    references = list(images)
    for image in references:
        if not isinstance(image, Image.Image):
            raise TypeError(f"references contains {image!r} of type {type(image).__name__}: open it with PIL.Image")
    checks.reference_count(len(references))
    return references


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
    start: Start | None = None,
    cached: bool | None = None,
    tiled: bool | None = None,
    progress: Callable[[Tensor], None] | None = None,
) -> list[Image.Image]:
    """Return images from prompt embeddings.

    Args:
        text: (B, T, text_width) embeddings, one image each.
        seeds: B seeds; an image depends only on its own.
        width, height: Size in pixels, multiples of 16.
        references: Latents (B, 128, h_i, w_i).
        empty: (1, T, text_width) embeddings for classifier-free guidance.
        tiled: Whether to decode in stripes, with less memory (`tiled_decoding`); by default above a megapixel.
        steps, guidance, start, cached, progress: As in `sampling.sample`.
    """
    checks.size(width, height, PIXELS_PER_TOKEN)
    device, parameter = next(transformer.parameters()).device, next(autoencoder.parameters())
    noise = initial_noise(seeds, height // PIXELS_PER_TOKEN, width // PIXELS_PER_TOKEN).to(device)
    latents = sample(
        transformer,
        noise,
        text.to(device),
        steps=steps,
        guidance=guidance,
        references=[reference.to(device) for reference in references],
        empty=None if empty is None else empty.to(device),
        start=start,
        cached=cached,
        progress=progress,
    )
    in_stripes = width * height > TILED_PIXELS if tiled is None else tiled
    decode = partial(tiled_decoding.decode, autoencoder) if in_stripes else autoencoder.decode
    # one image at a time: decoding 1024 px takes gigabytes of activations
    return to_images(torch.cat([decode(latent[None].to(parameter)) for latent in latents]))


class Pipeline:
    """A model ready to generate, returned by `flux2.load`; its parts are loaded on first use."""

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
        devices: Mapping[str, torch.device] | None = None,
        reference_cache: bool | None = None,
    ) -> None:
        self.source, self.variant, self.device, self.precision = source, source.variant, device, precision
        self.cache, self.tiled, self.offload_blocks, self.devices = cache, tiled, offload_blocks, devices or {}
        self.reference_cache = reference_cache
        self.streamed = offloaded_blocks(self.variant.transformer, offload_blocks)
        self.prompts = Prompts(source, device, precision.dtype, replace(text or TextSource(), keep=keep_text_encoder))
        self.adapter_count = 0  # of all that were loaded, also of those that are gone
        self._loaded: dict[str, LoadedAdapter] = {}

    @cached_property
    def autoencoder(self) -> Autoencoder:
        # float32: it is small compared to the transformer, and bfloat16 rounding is visible in flat areas
        return load_autoencoder(self.source, self.device, torch.float32)

    @cached_property
    def transformer(self) -> Transformer:
        say = partial(print, file=sys.stderr)
        transformer = load_transformer(
            self.source,
            self.device,
            self.precision,
            cache=self.cache,
            host=self.streamed,
            devices=self.devices,
            say=say,
        )
        split_model(transformer, self.devices)
        offload(transformer, self.offload_blocks, device=self.device)
        return transformer

    @property
    def adapters(self) -> list[LoadedAdapter]:
        """Return what is loaded and not merged: name, path, scale, ranges, type, layers and ranks of each adapter."""
        return list(self._loaded.values())

    def load_adapter(self, path: str | Path, scale: float = 1.0, ranges: str = "") -> LoadedAdapter:
        """Add an adapter with its update multiplied by `scale`, and return its name, type, layers and ranks.

        `adapters.load` documents the accepted files. Several adapters of one type add up. `ranges` multiply the scale
        in some blocks or at some times, such as `double.0-3=0.5,time.0.5-1=0` (flux2/adapters/strengths.py). Raise
        TypeError or ValueError for a scale, ranges or an adapter that cannot be used; the pipeline is unchanged then.
        """
        scale = checks.number("scale", scale)
        parse_ranges(ranges, self.variant.transformer)
        name = f"adapter_{self.adapter_count}"
        self._loaded[name] = adapters.load(self.transformer, path, name=name, scale=scale, ranges=ranges)
        self.adapter_count += 1
        return self._loaded[name]

    def set_adapter_scale(self, name: str, scale: float) -> None:
        """Change the scale of the loaded adapter `name`; its ranges stay. Raise ValueError if it is not loaded."""
        self._check_loaded(name)
        check_scale(self._loaded[name].kind, scale := checks.number("scale", scale))
        adapters.set_scale(self.transformer, name, scale)
        self._loaded[name] = replace(self._loaded[name], scale=scale)

    def unload_adapter(self, name: str) -> None:
        """Remove the loaded adapter `name`; images are those without it, bit for bit. Raise ValueError for others."""
        self._check_loaded(name)
        adapters.unload(self.transformer, name)
        del self._loaded[name]

    def _check_loaded(self, name: str) -> None:
        if name not in self._loaded:
            raise ValueError(f"adapter {name!r} is not loaded. Loaded are: {', '.join(self._loaded) or 'none'}")

    def merge_adapters(self) -> None:
        """Merge the loaded adapters into the weights permanently, so that images take no longer than without them.

        Raise ValueError if no adapter is loaded or `check_mergeable` fails; the pipeline is unchanged then.
        """
        self.check_mergeable()
        if not self._loaded:
            raise ValueError("there is no adapter to merge: load one first")
        adapters.merge(self.transformer)
        self._loaded.clear()

    def check_mergeable(self) -> None:
        """Raise ValueError if adapters cannot be merged into the base. Load nothing."""
        if self.precision.storage is not None:
            raise ValueError(
                f"precision={self.precision.name}: adapters cannot be merged into a quantized base, because its "
                "rounding would remove most of them. Do not merge them, or use precision=bf16 or fp32"
            )
        if self.streamed:
            raise ValueError(
                "adapters cannot be merged while blocks stream from host memory: do not merge them, or use "
                "offload_blocks=0"
            )

    def encode(self, prompts: Sequence[str], length: int | None = None) -> Tensor:
        """Return the embeddings (B, T, text_width) of `prompts`; cached prompts need no text encoder."""
        return self.prompts.get(prompts, length)

    def save_embeddings(self, file: str | Path, prompts: Sequence[str], length: int | None = None) -> None:
        """Write the embeddings of `prompts` to `file`, for `load(..., embeddings=file)` without a text encoder."""
        self.prompts.save(file, prompts, length)

    def upsample(
        self, prompt: str | Sequence[str], references: Sequence[Image.Image] = (), *, seed: int = 0
    ) -> list[str]:
        """Return prompts rewritten in more detail by dev's text encoder, used as a language model.

        The whole language model (flux2/prompts/upsampling.py) is loaded and freed again. Raise ValueError for a model
        whose text encoder cannot generate text.
        """
        prompts, (seed,) = checks.strings("prompt", prompt), checks.seeds(seed, 1)
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
        """Return the embeddings of the prompts and, if needed, of the empty prompt (1, T, D).

        Only classifier-free guidance needs the empty prompt. Both are encoded at once, so that the text encoder is
        loaded once.
        """
        guidance = self.variant.guidance if guidance is None else guidance
        classifier_free = not self.variant.transformer.guidance and guidance != 1
        encoded = self.encode([*prompts, ""] if classifier_free else prompts, length)
        return encoded[: len(prompts)], encoded[len(prompts) :] if classifier_free else None

    @torch.no_grad()
    def encode_references(self, images: Sequence[Image.Image], inpainting: Inpainting | None = None) -> list[Tensor]:
        """Return latents (1, 128, h, w) of each reference at its own size, the first at that of `inpainting`."""
        limit = reference_limit(self.variant, len(images))
        first = [] if inpainting is None else [inpainting.pixels()]
        sized = first + [to_pixels([reference_image(image, limit)]) for image in images[len(first) :]]
        return [self.autoencoder.encode(pixels.to(self.device)) for pixels in sized]

    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        references: Sequence[Image.Image] = (),
        mask: Image.Image | None = None,
        strength: float | None = None,
        mask_crop: int | None = None,
        seed: int | Sequence[int] = 0,
        width: int | None = None,
        height: int | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        length: int | None = None,
        batch_size: int = 4,
        progress: Callable[[Tensor], None] | None = None,
    ) -> list[Image.Image]:
        """Return one image per prompt.

        Raise TypeError or ValueError for a wrong argument before anything is loaded, ValueError for infinite pixels.

        Args:
            prompt: One or several prompts.
            references: Images to edit or to use as reference, shared by all prompts.
            mask: What is repainted of the first reference: white is, black stays. Images then have its size.
            strength: Share of the steps, which start from the first reference with noise; by default 0.8 with a mask.
            mask_crop: Margin in pixels around the mask, of which the model then computes the region alone.
            seed: Seed of the first prompt, counted up for the next ones; or one seed per prompt.
            width, height: Multiples of 16; by default the size of the first reference, else that of the variant.
            steps, guidance: By default those of the variant.
            length: Number of tokens that prompts are padded to, by default that of the variant.
            batch_size: Number of images computed at once. It changes memory and speed, and images only by rounding.
            progress: Function called with the tokens after every step.
        """
        # 1. check the arguments before anything large is loaded
        prompts = checks.strings("prompt", prompt)
        seeds = checks.seeds(seed, len(prompts))
        unit = PIXELS_PER_TOKEN
        checks.size(unit if width is None else width, unit if height is None else height, unit)
        steps = checks.steps(self.variant.steps if steps is None else steps)
        guidance = checks.guidance(self.variant.guidance if guidance is None else guidance)
        length = None if length is None else checks.integer("length", length, 1, checks.MAX_LENGTH)
        batch_size = checks.integer("batch_size", batch_size, 1)
        references = check_references(references)
        inpainting = Inpainting.from_arguments(references, mask, strength, mask_crop, width, height)

        # 2. encode prompts and references
        text, empty = self.embeddings(prompts, guidance, length)
        latents = self.encode_references(references, inpainting)
        sides = [side * unit for side in latents[0].shape[2:]] if latents else 2 * [self.variant.resolution]
        height = sides[0] if height is None or inpainting else height
        width = sides[1] if width is None or inpainting else width
        start = Start(latents[0], inpainting.strength, inpainting.token_mask()) if inpainting else None

        # 3. render in batches
        images: list[Image.Image] = []
        for first in range(0, len(prompts), batch_size):
            part = slice(first, first + batch_size)
            images += render(
                self.transformer,
                self.autoencoder,
                text[part],
                seeds=seeds[part],
                width=width,
                height=height,
                steps=steps,
                guidance=guidance,
                references=[latent.expand(len(text[part]), -1, -1, -1) for latent in latents],
                empty=empty,
                start=start,
                cached=self.reference_cache,
                tiled=self.tiled,
                progress=progress,
            )
        return [inpainting.paste(image) for image in images] if inpainting else images


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
    text_storage: TextStorage | None = None,
    embeddings: str | os.PathLike[str] | None = None,
    reference_cache: bool | None = None,
) -> Pipeline:
    """Return a pipeline for the model called `name` (see `variants.VARIANTS`).

    Args:
        path: Repository id, folder in the published layout, or one .safetensors file with the transformer; by default
            the published repository, or the embedded files for `tiny`.
        autoencoder: Repository id, folder or file of the autoencoder, if it is not at `path`.
        text_encoder: Repository id or folder of the text encoder, if it is not at `path`, or the address of a server
            (flux2/prompts/remote_client.py); it then takes no memory here.
        device: `cuda`, `cuda:1` or `cpu`; by default the GPU if there is one.
        precision: `fp32`, `bf16`, `fp8`, `int8` or `nf4` for the transformer (flux2/quantization/precision.py). By
            default, and for the text encoder with the last three, bf16 on a GPU and fp32 on a CPU.
        keep_text_encoder: Whether the text encoder stays in memory between calls; by default only for `tiny`.
        offload_blocks: Transformer blocks that stay in host memory and stream to the device: a number, or a share from
            0.0 to 1.0.
        cache: Folder of quantized copies, which make the next start in `fp8`, `int8` or `nf4` faster; by default the
            value of the environment variable FLUX2_CACHE, or none.
        tiled: Whether to decode in stripes, which takes less memory and more time; by default above a megapixel.
        text_storage: `nf4` or `int8` for text encoder layers in 4 or 8 bits; by default the dtype of the rest.
        embeddings: File written by `Pipeline.save_embeddings`. Only its prompts can be used; no text encoder is loaded.
        reference_cache: Whether keys and values of references are computed at the first step and kept; by default, and
            possible, only for `klein_9b_kv`.
    """
    for key, value in (("tiled", tiled), ("reference_cache", reference_cache)):
        if not isinstance(value, bool | None):
            raise ValueError(f"{key}={value!r} must be True, False or None")
    if reference_cache and not get_variant(name).transformer.isolated_references:
        raise ValueError(NO_CACHE)
    paths = (path, autoencoder, text_encoder)
    path, autoencoder, text_encoder = (os.fspath(one) if isinstance(one, os.PathLike) else one for one in paths)
    text, text_encoder = text_source(get_variant(name), text_encoder, embeddings, text_storage)
    source = model_source(name, path, autoencoder, text_encoder)
    target = pick_device(device)
    keep = name == "tiny" if keep_text_encoder is None else keep_text_encoder
    cache = cache or os.environ.get("FLUX2_CACHE")
    folder = user_path(cache) if cache else None
    chosen = precision_from_name(precision, target)
    return Pipeline(source, target, chosen, keep, offload_blocks, folder, text, tiled, reference_cache=reference_cache)
