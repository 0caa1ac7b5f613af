"""Fill the caches: `accelerate launch train/cache.py +experiment=tarot`.

Training does this by itself for whatever is missing. As a command it prepares a data set where the encoders fit (the
text encoder of dev needs 38 GB in bfloat16), so that training elsewhere loads neither of them. One encoder is in memory
at a time; with several processes each fills its share.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # a script's own folder comes first in sys.path, and ours would hide libraries
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from omegaconf import DictConfig
from torch import Tensor
from tqdm import tqdm

from data.buckets import Buckets
from data.cache import EMBEDDING_SHAPE, Cache, EmbeddingPlan, LatentEntry, LatentPlan, plan_embeddings, plan_latents
from data.samples import Sample
from flux2.pipeline import to_pixels
from flux2.sources import ModelSource, fingerprint
from flux2.weights import load_autoencoder
from train.command import command, own_errors
from train.folder import make_writable
from train.outofmemory import watched
from train.text_encoders import PromptEncoder


@dataclass(frozen=True)
class Prepared:
    """What training reads from the cache: an entry a sample, and the key of every prompt's embedding."""

    cache: Cache
    entries: tuple[LatentEntry, ...]
    prompts: dict[str, str]

    def embeddings(self, prompts: Sequence[str]) -> Tensor:
        """(B, L, D), read from the cache."""
        return torch.stack(
            [self.cache.tensor(self.prompts[prompt], "embeddings", EMBEDDING_SHAPE) for prompt in prompts]
        )


def fill(
    plan: LatentPlan | EmbeddingPlan,
    load: Callable[[], Callable[..., Tensor]],
    what: str,
    accelerator: Accelerator,
    **options: int,
) -> None:
    """Compute what `plan` misses with the encoder that `load` gives, then free it. Nothing missing, nothing loaded.

    `options` are those of `plan.fill`.
    """
    missing = plan.missing
    accelerator.wait_for_everyone()  # or a fast process's work would look done to a slow one, and its load be skipped
    if missing:
        if accelerator.is_main_process:
            print(f"encoding {missing} {what}")
        bar = tqdm(total=0, unit=what, disable=not accelerator.is_main_process, leave=False)
        doing = watched(f"while encoding {what}", what, accelerator.device)
        with own_errors(accelerator.process_index), doing, bar:
            encode = load()

            def progress(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            plan.fill(encode, accelerator.process_index, accelerator.num_processes, progress, **options)
        del encode
        gc.collect()
        if accelerator.device.type == "cuda":
            torch.cuda.empty_cache()
    accelerator.wait_for_everyone()


def prepare(
    accelerator: Accelerator,
    source: ModelSource,
    text_encoder: PromptEncoder,
    cache: Cache,
    samples: Sequence[Sample],
    prompts: Sequence[str],
    buckets: Buckets,
    reference_pixels: int,
    dtype: torch.dtype,
) -> Prepared:
    """Make sure that the cache holds the latents of every sample and the embeddings of every caption and prompt.

    Args:
        prompts: besides the captions and the empty prompt: those of sample sheets and of preservation.
        reference_pixels: references are made smaller to at most this area.
        dtype: of the text encoder. The autoencoder runs in float32: it is small, and its rounding would be learned.
    """
    device = accelerator.device
    wanted = dict.fromkeys([*(sample.caption for sample in samples), "", *prompts])
    embeddings = plan_embeddings(cache, list(wanted), text_encoder.identity(source, dtype))
    # planned before the slow text encoder runs, since it finds pictures that cannot be read
    latents = plan_latents(cache, samples, buckets, f"{fingerprint(source, 'vae')} float32", reference_pixels)
    if embeddings.missing or latents.missing:
        make_writable(cache.folder, "cache_dir")  # and not only when an encoder is loaded
    try:
        fill(
            embeddings,
            lambda: text_encoder.load(source, device, dtype),
            "prompts",
            accelerator,
            workers=text_encoder.workers,
        )
    finally:
        text_encoder.close()
    if text_encoder.cut:
        length = text_encoder.length or source.variant.text.length
        first = text_encoder.cut[0][:80]
        print(f"{len(text_encoder.cut)} prompts are longer than {length} tokens and were cut, such as {first!r}")

    def load_encoder() -> Callable[..., Tensor]:
        autoencoder = load_autoencoder(source, device, torch.float32)

        @torch.no_grad()
        def encode(images: list) -> Tensor:
            return autoencoder.encode(to_pixels(images).to(device))

        return encode

    fill(latents, load_encoder, "pictures", accelerator)
    return Prepared(cache, latents.entries, dict(embeddings.keys))


def main(config: DictConfig) -> None:
    """Fill the caches of one configuration."""
    from train.run import Run

    run = Run(config)
    run.prepare()
    run.say(f"the caches in {run.settings.cache_dir} are complete")


if __name__ == "__main__":
    command(main)
