"""Fill the cache: run autoencoder and text encoder over the missing entries, one model in memory at a time.

data/cache decides what is missing (latents.py, embeddings.py) and writes it (store.py).
"""

from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from functools import cache as memoized
from functools import partial

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
from data.sources.images import BadPicture, Picture
from flux2.models.autoencoder import Autoencoder
from flux2.models.pixels import to_pixels
from flux2.utils.text import gigabytes
from flux2.weights.loading import load_autoencoder, load_text_projection
from flux2.weights.sources import Fingerprints, ModelSource, fingerprint
from train.encoding.bucket_table import show_buckets
from train.encoding.text_encoders import Encode, PromptEncoder
from train.utils.console import name_process_in_errors
from train.utils.files import make_writable
from train.utils.memory import explain_oom, free_memory
from train.utils.progress import ItemProgress
from train.utils.redact import masked_text
from train.utils.text import many

PICTURES, FINGERPRINTS = "pictures.sqlite", "fingerprints.json"  # in the cache folder


@dataclass(frozen=True)
class CacheRequest:
    """Everything that one configuration needs in the cache."""

    source: ModelSource
    text_encoder: PromptEncoder
    cache: Cache
    samples: Source
    prompts: Sequence[str]  # of sample grids and of preservation, in addition to the captions and the empty prompt
    buckets: Buckets
    reference_pixels: int  # maximum area of a reference
    # of the text encoder; the autoencoder runs in float32: it is small, and its rounding would be learned
    dtype: torch.dtype
    storage: str = "full"  # of embeddings, one of `STORAGES`
    before_loading: Callable[[], None] = field(default=lambda: None, compare=False, repr=False)
    table: str = "Buckets"  # title of the bucket table
    share: tuple[int, int] = (0, 1)  # this start fills every n-th missing entry, from the i-th on: (i, n)
    digests: Digests = field(default_factory=Digests, compare=False, repr=False)  # what is known of the images

    @property
    def projected(self) -> bool:
        return self.storage.startswith("projected")

    def plan_embeddings(self) -> EmbeddingPlan:
        captions = (caption for sample in self.samples for caption in sample.captions)
        identity = self.text_encoder.identity(self.source, self.dtype)
        if self.projected:
            identity += f" txt_in {fingerprint(self.source, 'transformer')} {self.dtype}"
        wanted = list(dict.fromkeys([*captions, "", *self.prompts]))
        return plan_embeddings(self.cache, wanted, identity, fp8=self.storage.endswith("fp8"))

    def plan_latents(self, identity: str | None = None) -> LatentPlan:
        """Return the plan, and skip `samples` with bad images; too many of them are an error.

        `identity` is the encoder's, by default that of the autoencoder's files.
        """
        identity = f"{fingerprint(self.source, 'vae')} float32" if identity is None else identity
        plan = plan_latents(self.cache, self.samples, self.buckets, identity, self.reference_pixels, self.digests)
        if plan.bad:
            self.samples.leave_out(plan.bad)
        return plan

    def load_text_encoder(self, device: torch.device) -> Encode:
        """Load the text encoder; return a function from prompts to the embeddings to store."""
        self.before_loading()
        encode = self.text_encoder.load(self.source, device, self.dtype)
        if not self.projected:
            return encode
        project = load_text_projection(self.source, device, self.dtype)
        return torch.no_grad()(lambda prompts: project(encode(prompts).to(device, self.dtype)))

    def load_autoencoder(self, device: torch.device) -> Callable[[list], Tensor]:
        """Return a function from images to latents that loads the autoencoder when it is first called.

        It is not needed if only masks, or images that cannot be decoded, are missing.
        """

        @memoized
        def load() -> Autoencoder:
            self.before_loading()
            return load_autoencoder(self.source, device, torch.float32)

        return torch.no_grad()(lambda images: load().encode(to_pixels(images).to(device)))

    def check_space(self, embeddings: EmbeddingPlan, prompts: int, latents: LatentPlan, pictures: list[str]) -> str:
        """Return a line about missing entries: `prompts` embeddings, latents with the keys `pictures`.

        Raise ValueError if there is not enough space for them.
        """
        length, model = self.text_encoder.length or self.source.variant.text.length, self.source.variant.transformer
        text = prompts * embeddings.size(length, model.hidden if self.projected else model.text_width, self.dtype)
        other = sum(map(latents.size, pictures))
        parts = (prompts, "prompt", text), (len(pictures), "image", other)
        needed = " and ".join(f"{many(count, noun)} ({gigabytes(size)})" for count, noun, size in parts if count)
        free = self.cache.free()
        if text + other > free:
            less = ", or set embedding_storage=projected, fp8 or projected_fp8 to store embeddings in less space"
            place = repr(str(self.cache)) if self.cache.shared else "null, in memory"
            raise ValueError(
                f"cache_dir={place}: {needed} do not fit into the {gigabytes(free)} that are free there. Make "
                f"room, or give another folder{less if text > other and self.storage == 'full' else ''}"
            )
        return f"to encode: {needed}; {gigabytes(free)} are free in {self.cache}"


def fill(
    plan: LatentPlan | EmbeddingPlan,
    load: Callable[[], Callable[..., Tensor]],
    what: str,
    accelerator: Accelerator,
    share: tuple[int, int] = (0, 1),
    **options: int,
) -> dict[str, BadPicture]:
    """Load an encoder, compute this process's missing entries of `plan`, and free it; do nothing if there are none.

    The processes divide `share`; `options` are those of `plan.fill`. Returns the errors of images that cannot be
    decoded, the same in all processes.
    """
    processes = accelerator.num_processes
    index = share[0] * processes + accelerator.process_index
    missing = plan.missing_in(index, share[1] * processes)
    accelerator.wait_for_everyone()  # all must count the missing entries before a fast process fills any
    bad: dict[str, BadPicture] = {}
    if missing:
        bar = ItemProgress(f"{what} encoded", shown=accelerator.is_main_process)
        doing = explain_oom(f"while encoding {what}", what, accelerator.device)
        with name_process_in_errors(accelerator.process_index), doing, closing(bar):
            encode = load()

            def progress(done: int, total: int, stored: int) -> None:
                bar.update(done, total, gigabytes(stored))

            bad = plan.fill(encode, index, share[1] * processes, progress, **options) or {}
        del encode
        free_memory()
    accelerator.wait_for_everyone()
    if accelerator.num_processes > 1:
        found = gather_object([(key, error.name, error.reason) for key, error in bad.items()])
        bad = {key: BadPicture(name, reason) for key, name, reason in sorted(found)}
    return bad


def with_fingerprints(request: CacheRequest, known: Fingerprints) -> CacheRequest:
    return replace(request, source=replace(request.source, fingerprints=known))


def missing_prompts(request: CacheRequest) -> int:
    """Return the number of prompts without an embedding in the cache; loads and writes nothing."""
    cache = request.cache
    known = Fingerprints(cache.folder / FINGERPRINTS if cache.shared else None)
    return with_fingerprints(request, known).plan_embeddings().missing


def prepare(accelerator: Accelerator, request: CacheRequest) -> CachedDataset:
    """Fill the cache, or this start's share, with the latents of all samples and the embeddings of all their prompts.

    Raises ValueError for a cache that cannot be written or is too small, and for more bad images than allowed.
    """
    cache, device = request.cache, accelerator.device
    lease = Lease(cache)
    known = Fingerprints(cache.folder / FINGERPRINTS if cache.shared else None)
    request = with_fingerprints(request, known)
    # images first, so that their errors are known before the slow text encoder runs
    latents = request.plan_latents()
    embeddings = request.plan_embeddings()
    if accelerator.is_main_process and latents.entries:
        show_buckets(latents, request.buckets, request.samples.bad, request.table)
    prompts, pictures = embeddings.missing, latents.lacking
    accelerator.wait_for_everyone()  # no process may fill before all have planned
    if prompts or pictures:
        if cache.shared:
            make_writable(cache.folder, "cache_dir")  # fail before an encoder is loaded
            lease = Lease(cache)
        summary = request.check_space(embeddings, prompts, latents, pictures)
        if accelerator.is_main_process:
            print(summary, flush=True)
    request.digests.save()
    if accelerator.is_main_process and cache.shared:
        with suppress(OSError):  # for a read-only cache, the next start reads all files again
            known.save()
    text_encoder = request.text_encoder
    try:
        if prompts:
            workers = text_encoder.max_concurrent_requests
            load = partial(request.load_text_encoder, device)
            fill(embeddings, load, "prompts", accelerator, request.share, workers=workers)
    finally:
        text_encoder.close()
    cut = gather_object(text_encoder.cut) if accelerator.num_processes > 1 else text_encoder.cut
    if cut and accelerator.is_main_process:
        length = text_encoder.length or request.source.variant.text.length
        print(f"truncated {many(len(cut), 'prompt')} to {length} tokens, e.g. {masked_text(cut[0])[:80]!r}")
    load_autoencoder = partial(request.load_autoencoder, device)
    if pictures and (bad := fill(latents, load_autoencoder, "images", accelerator, request.share)):
        latents = latents.without(bad)
        request.samples.leave_out(latents.bad)
    return CachedDataset.from_plan(latents, embeddings.keys, lease)


def remove_unused(request: CacheRequest, *others: CacheRequest) -> str:
    """Delete all cache entries that no request needs; return a summary. Raise ValueError if a run uses the cache."""
    cache = request.cache
    if not cache.folder.is_dir():
        raise ValueError(f"cache_dir={str(cache)!r} does not exist, so there is nothing to prune. Give its folder.")
    known = Fingerprints(cache.folder / FINGERPRINTS)
    used, pictures = set[str](), list[Picture]()
    for each in (request, *others):
        own = with_fingerprints(each, known)
        latents = own.plan_latents()
        used |= {*latents.work, *own.plan_embeddings().keys.values()}
        pictures += [work.picture for work in latents.work.values()]
    removed = prune(cache, used)
    request.digests.forget_others(pictures)
    request.digests.close()
    if not removed:
        return f"nothing was deleted from {cache}: all entries are used"
    kinds = ", ".join(f"{count} {kind} ({gigabytes(size)})" for kind, (count, size) in sorted(removed.items()))
    return f"deleted from {cache}: {kinds}; the entries of {request.samples.where} and of the prompts were kept"
