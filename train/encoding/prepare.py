"""Fill the cache: run autoencoder and text encoder over whatever is missing, one model in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from data.buckets import Buckets
from data.cache import Cache
from data.cache.embeddings import EmbeddingPlan, plan_embeddings
from data.cache.image_digests import Digests
from data.cache.latents import LatentPlan, plan_latents
from data.cache.prepared import CachedDataset
from data.cache.pruning import Lease, prune
from data.sources import Source
from data.sources.images import BadPicture
from flux2.models.autoencoder import Autoencoder
from flux2.models.pixels import to_pixels
from flux2.utils.text import gigabytes
from flux2.weights.loading import load_autoencoder, load_text_projection
from flux2.weights.sources import Fingerprints, ModelSource, fingerprint
from train.encoding.bucket_table import show_buckets
from train.encoding.text_encoders import Encode, PromptEncoder
from train.utils.console import own_errors
from train.utils.files import make_writable
from train.utils.memory import free_memory, watched
from train.utils.progress import ItemProgress
from train.utils.text import many

PICTURES, FINGERPRINTS = "pictures.json", "fingerprints.json"  # in the cache's folder


# ------------------------------------------------------------------ what is needed


@dataclass(frozen=True)
class CacheRequest:
    """All that one configuration wants to have cached.

    Attributes:
        prompts: besides the captions and the empty prompt: those of sample grids and of preservation.
        reference_pixels: references are made smaller to at most this area.
        dtype: of the text encoder. The autoencoder runs in float32: it is small, and its rounding would be learned.
        storage: of embeddings, one of `STORAGES`.
        before_loading: called before an encoder is loaded.
        table: heads the table of buckets.
    """

    source: ModelSource
    text_encoder: PromptEncoder
    cache: Cache
    samples: Source
    prompts: Sequence[str]
    buckets: Buckets
    reference_pixels: int
    dtype: torch.dtype
    storage: str = "full"
    before_loading: Callable[[], None] = field(default=lambda: None, compare=False, repr=False)
    table: str = "Buckets"

    @property
    def projected(self) -> bool:
        return self.storage.startswith("projected")

    @property
    def embedding_width(self) -> int:
        transformer = self.source.variant.transformer
        return transformer.hidden if self.projected else transformer.text_width

    def plan_embeddings(self) -> EmbeddingPlan:
        captions = (caption for sample in self.samples for caption in sample.captions)
        identity = self.text_encoder.identity(self.source, self.dtype)
        if self.projected:
            identity += f" txt_in {fingerprint(self.source, 'transformer')} {self.dtype}"
        wanted = list(dict.fromkeys([*captions, "", *self.prompts]))
        return plan_embeddings(self.cache, wanted, identity, fp8=self.storage.endswith("fp8"))

    def plan_latents(self, digests: Digests) -> LatentPlan:
        """Samples whose pictures cannot be used are left out of `samples`, or are an error."""
        identity = f"{fingerprint(self.source, 'vae')} float32"
        plan = plan_latents(self.cache, self.samples, self.buckets, identity, self.reference_pixels, digests)
        if plan.bad:
            self.samples.leave_out(plan.bad)
        return plan

    def load_text_encoder(self, device: torch.device) -> Encode:
        """A function from prompts to what is stored of their embeddings, before it is packed."""
        self.before_loading()
        encode = self.text_encoder.load(self.source, device, self.dtype)
        if not self.projected:
            return encode
        project = load_text_projection(self.source, device, self.dtype)

        @torch.no_grad()
        def encode_and_project(prompts: list[str]) -> Tensor:
            return project(encode(prompts).to(device, self.dtype))

        return encode_and_project

    def load_autoencoder(self, device: torch.device) -> Callable[[list], Tensor]:
        """A function from pictures to latents; loads the autoencoder when it is first called.

        Where all that is missing are masks, or pictures that cannot be decoded, it is not needed.
        """
        loaded: list[Autoencoder] = []

        @torch.no_grad()
        def encode(images: list) -> Tensor:
            if not loaded:
                self.before_loading()
                loaded.append(load_autoencoder(self.source, device, torch.float32))
            return loaded[0].encode(to_pixels(images).to(device))

        return encode

    def check_space(self, embeddings: EmbeddingPlan, prompts: int, latents: LatentPlan, pictures: list[str]) -> str:
        """What is to come, in a line. ValueError if there is no room for it.

        Args:
            prompts, pictures: how many embeddings, and which latents, are missing.
        """
        length = self.text_encoder.length or self.source.variant.text.length
        each = embeddings.size(length, self.embedding_width, self.dtype)
        text, other = prompts * each, sum(map(latents.size, pictures))
        parts = (prompts, "prompt", text), (len(pictures), "picture", other)
        said = " and ".join(f"{many(count, noun)} ({gigabytes(size)})" for count, noun, size in parts if count)
        free = self.cache.free()
        if text + other > free:
            less = ", or embeddings in less space: embedding_storage=projected, fp8 or projected_fp8"
            place = repr(str(self.cache)) if self.cache.shared else "null, in memory"
            raise ValueError(
                f"cache_dir={place}: {said} are to be stored, and {gigabytes(free)} are free there. Make "
                f"room, or give another place{less if text > other and self.storage == 'full' else ''}"
            )
        return f"to encode: {said}; {gigabytes(free)} are free in {self.cache}"


# ------------------------------------------------------------------ filling


def fill(
    plan: LatentPlan | EmbeddingPlan,
    load: Callable[[], Callable[..., Tensor]],
    what: str,
    accelerator: Accelerator,
    **options: int,
) -> dict[str, BadPicture]:
    """Compute what `plan` misses with the encoder that `load` gives, then free it. Nothing missing, nothing loaded.

    `options` are those of `plan.fill`. Returns what is wrong with pictures that cannot be decoded, by key, the same in
    all processes.
    """
    missing = plan.missing
    accelerator.wait_for_everyone()  # or a fast process's work would look done to a slow one, and its load be skipped
    bad: dict[str, BadPicture] = {}
    if missing:
        bar = ItemProgress(f"{what} encoded", shown=accelerator.is_main_process)
        doing = watched(f"while encoding {what}", what, accelerator.device)
        with own_errors(accelerator.process_index), doing, closing(bar):
            encode = load()

            def progress(done: int, total: int, stored: int) -> None:
                bar.update(done, total, gigabytes(stored))

            bad = plan.fill(encode, accelerator.process_index, accelerator.num_processes, progress, **options) or {}
        del encode
        free_memory()
    accelerator.wait_for_everyone()
    return shared(bad, accelerator)


def shared(bad: dict[str, BadPicture], accelerator: Accelerator) -> dict[str, BadPicture]:
    """What all processes found, in an order that is the same in all."""
    if accelerator.num_processes == 1:
        return bad
    found = gather_object([(key, error.name, error.reason) for key, error in bad.items()])
    return {key: BadPicture(name, reason) for key, name, reason in sorted(found)}


def prepare(accelerator: Accelerator, needs: CacheRequest) -> CachedDataset:
    """Make sure that the cache holds the latents of every sample and the embeddings of every caption and prompt.

    Raises ValueError for a cache that cannot be written, or has no room, and for pictures that cannot be used, unless
    the samples may do without them.
    """
    cache, device = needs.cache, accelerator.device
    lease = Lease(cache)
    digests = Digests(cache.folder / PICTURES if cache.shared else None)
    known = Fingerprints(cache.folder / FINGERPRINTS if cache.shared else None)
    needs = replace(needs, source=replace(needs.source, fingerprints=known))
    # pictures first: what is wrong with them is known before the slow text encoder runs
    latents = needs.plan_latents(digests)
    embeddings = needs.plan_embeddings()
    if accelerator.is_main_process and latents.entries:
        show_buckets(latents, needs.buckets, needs.samples.bad, needs.table)
    prompts, pictures = embeddings.missing, latents.lacking
    accelerator.wait_for_everyone()  # all have looked before any fills
    if prompts or pictures:
        if cache.shared:
            make_writable(cache.folder, "cache_dir")  # and not only when an encoder is loaded
            lease = Lease(cache)
        said = needs.check_space(embeddings, prompts, latents, pictures)
        if accelerator.is_main_process:
            print(said, flush=True)
    if accelerator.is_main_process and cache.shared:
        with suppress(OSError):  # a cache that is read and not written: the next start looks at all files again
            digests.save()
            known.save()
    text_encoder = needs.text_encoder
    try:
        if prompts:
            fill(
                embeddings,
                lambda: needs.load_text_encoder(device),
                "prompts",
                accelerator,
                workers=text_encoder.workers,
            )
    finally:
        text_encoder.close()
    cut = gather_object(text_encoder.cut) if accelerator.num_processes > 1 else text_encoder.cut
    if cut and accelerator.is_main_process:
        length = text_encoder.length or needs.source.variant.text.length
        print(f"longer than {length} tokens and cut: {many(len(cut), 'prompt')}, such as {cut[0][:80]!r}")
    if pictures and (bad := fill(latents, lambda: needs.load_autoencoder(device), "pictures", accelerator)):
        latents = latents.without(bad)
        needs.samples.leave_out(latents.bad)
    contents = tuple(latents.work[entry.key].digest for entry in latents.entries)
    return CachedDataset(cache, latents.entries, dict(embeddings.keys), contents, lease)


def remove_unused(needs: CacheRequest, *others: CacheRequest) -> str:
    """Remove from the cache what nothing here needs; says what and how much. ValueError if a run uses the cache now.

    Args:
        others: of further samples in the same cache, as class pictures.
    """
    cache = needs.cache
    if not cache.shared:
        raise ValueError("prune=true has nothing to prune: cache_dir=null keeps nothing on disk")
    known = Fingerprints(cache.folder / FINGERPRINTS)
    digests, used = Digests(cache.folder / PICTURES), set[str]()
    for each in (needs, *others):
        own = replace(each, source=replace(each.source, fingerprints=known))
        used |= {*own.plan_latents(digests).work, *own.plan_embeddings().keys.values()}
    removed = prune(cache, used)
    digests.forget_others()
    if not removed:
        return f"nothing was removed from {cache}: all that it holds is used"
    kinds = ", ".join(f"{count} {kind} ({gigabytes(size)})" for kind, (count, size) in sorted(removed.items()))
    return f"removed from {cache}: {kinds}; what {needs.samples.where} and the prompts need was kept"
