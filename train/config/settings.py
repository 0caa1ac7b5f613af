"""Dataclasses for the groups of settings without a `_target_`.

Constructing one checks it and raises ValueError with the key, its value and the accepted values.
"""

from __future__ import annotations

import math
import re
import sys
from dataclasses import asdict, dataclass, replace

import torch

from data.buckets import Buckets
from flux2.layers.attention import check_backends, preferred_backends
from flux2.memory.activation_checkpointing import check_policy, set_policy
from flux2.memory.block_offload import check_offload_blocks
from flux2.memory.kernels import check_kernels, use_kernels
from flux2.models.transformer import Transformer
from flux2.quantization.precision import Precision, pick_dtype
from flux2.utils.checks import MAX_GUIDANCE, MAX_PIXELS
from flux2.weights.sources import ModelSource, model_source
from train.checkpoints.rotation import Rotation
from train.config.instantiate import how_to_quote
from train.config.memory import AUTO, FREE, HEADROOM_GB
from train.utils.checks import check_count, check_seed, is_count, is_number
from train.utils.redact import check_no_secret

STORAGES = ("full", "projected", "fp8", "projected_fp8")  # of prompt embeddings
INIT_MODES = ("continue", "frozen")  # what a run does with the adapter that it starts from
DTYPES = ("fp32", "bf16")  # of the trained weights
BATCHES = ("images", "tokens")  # what batches of different buckets have as many of
MOST = 1 << 20  # images in a batch, and micro-batches in a step
NOT_ON_WINDOWS = re.compile(r'[<>:"\\|?*\x00-\x1f]|[. ]$|^(con|prn|aux|nul|com\d|lpt\d)(\.|$)', re.IGNORECASE)
MOST_STEPS = 10**9  # a second each would take 30 years
MOST_GB = 1e6  # of the memory of a device
LEAST_NORM = 1e-6  # a gradient that is clipped to less is lost in rounding, and nothing is learned


@dataclass(frozen=True)
class LoopSettings:
    """The top-level numbers of conf/train.yaml that the loop reads. An interval of 0 is off."""

    seed: int = 0
    steps: int = 300
    gradient_accumulation: int = 1
    max_grad_norm: float = 1.0
    max_nonfinite_steps: int = 5
    ema_decay: float = 0.0
    guidance: float | None = None
    log_every: int = 10
    checkpoint_every: int = 250
    keep_last: int | None = None
    keep_best: int = 0
    keep_every: int = 0
    sample_every: int = 250
    validate_every: int = 50

    def __post_init__(self) -> None:
        check_seed("seed", self.seed)
        for key in ("log_every", "checkpoint_every", "sample_every", "validate_every"):
            check_count(key, getattr(self, key))
        for key, most in (("steps", MOST_STEPS), ("gradient_accumulation", MOST), ("max_nonfinite_steps", MOST_STEPS)):
            check_count(key, getattr(self, key), 1, most)
        self.rotation.check(self.checkpoint_every, self.validate_every)
        if not is_number(self.max_grad_norm, low=LEAST_NORM) and not is_number(self.max_grad_norm, 0, 0):
            raise ValueError(f"max_grad_norm={self.max_grad_norm!r} must be a number >= {LEAST_NORM:g}, or 0 (off)")
        if not is_number(self.ema_decay, 0, 1) or self.ema_decay == 1:
            raise ValueError(f"ema_decay={self.ema_decay!r} must be a number in [0, 1) (0 is off)")
        if self.guidance is not None and not is_number(self.guidance, 0, MAX_GUIDANCE):
            raise ValueError(f"guidance={self.guidance!r} must be a number from 0 to {MAX_GUIDANCE:g}, or null")

    def is_due(self, interval: str, done: int) -> bool:
        """Return whether `interval`, such as "log_every", is due after `done` steps: at multiples and at the end."""
        every = getattr(self, interval)
        return every > 0 and (done % every == 0 or done == self.steps)

    @property
    def rotation(self) -> Rotation:
        return Rotation(self.keep_last, self.keep_best, self.keep_every)


@dataclass(frozen=True)
class RunSettings(LoopSettings):
    """The keys of conf/train.yaml that are not in a group."""

    name: str = "default"
    batch_size: int = 4
    batch_by: str = "images"
    caption_dropout: float = 0.0
    reference_dropout: float = 0.0
    reference_resolution: int = 1024
    resume: str | None = None
    allow_changed_data: bool = False
    output_dir: str | None = None
    cache_dir: str | None = "outputs/cache"
    embedding_storage: str = "full"
    quantized_cache_dir: str | None = None
    device: str | None = None
    shard: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("shard", "allow_changed_data"):
            if not isinstance(getattr(self, key), bool):
                raise ValueError(f"{key}={getattr(self, key)!r} must be true or false")
        check_no_secret("name", self.name)
        if not is_count(self.batch_size, 1) or self.batch_size > MOST:
            raise ValueError(f"batch_size={self.batch_size!r} must be an integer from 1 to {MOST}, or {AUTO}")
        if self.batch_by not in BATCHES:
            raise ValueError(f"batch_by={self.batch_by!r} must be one of {', '.join(BATCHES)}")
        check_count("reference_resolution", self.reference_resolution, 16, math.isqrt(MAX_PIXELS))
        for key in ("caption_dropout", "reference_dropout"):
            if not is_number(getattr(self, key), 0, 1):
                raise ValueError(f"{key}={getattr(self, key)!r} must be a number from 0 to 1")
        if self.embedding_storage not in STORAGES:
            raise ValueError(f"embedding_storage={self.embedding_storage!r} must be one of {', '.join(STORAGES)}")
        for key in ("name", "resume", "output_dir", "cache_dir", "quantized_cache_dir", "device"):
            value = getattr(self, key)
            if not isinstance(value, str) and not (value is None and key != "name"):
                raise ValueError(f"{key}={value!r} must be a string: {how_to_quote(key)}")
            if key != "name" and value == "":
                origin = "; it comes from the environment variable FLUX2_CACHE" if key == "quantized_cache_dir" else ""
                raise ValueError(f"{key}='' must not be empty: leave it out, or set null{origin}")
        if self.name in ("", ".", "..") or "/" in self.name:
            raise ValueError(f"name={self.name!r} must be a word without slashes: it becomes a folder")
        if sys.platform == "win32" and NOT_ON_WINDOWS.search(self.name):
            raise ValueError(f"name={self.name!r} is no name of a folder on Windows. Give letters, digits, - and _")


@dataclass(frozen=True)
class ModelSettings:
    """The group `model`."""

    name: str
    path: str | None
    autoencoder: str | None
    text_encoder: str | None
    resolution: int

    def __post_init__(self) -> None:
        check_count("model.resolution", self.resolution, 16)
        if isinstance(self.text_encoder, str) and self.text_encoder.startswith(("http:", "https:")):
            raise ValueError("model.text_encoder is an address: write text_encoder=remote text_encoder.url=... instead")

    def source(self) -> ModelSource:
        return model_source(self.name, self.path, self.autoencoder, self.text_encoder)


@dataclass(frozen=True)
class AdapterSettings:
    """The settings of the group `adapter` that every type has: what a new one starts from, and the dtype of weights."""

    init: str | None = None
    init_mode: str = "continue"
    dtype: str = "fp32"

    def __post_init__(self) -> None:
        if self.init == "":
            raise ValueError("adapter.init='' must not be empty: leave it out, or set null")
        if self.init_mode not in INIT_MODES:
            raise ValueError(f"adapter.init_mode={self.init_mode!r} must be one of {', '.join(INIT_MODES)}")
        if self.dtype not in DTYPES:
            raise ValueError(f"adapter.dtype={self.dtype!r} must be one of {', '.join(DTYPES)}")
        if self.is_frozen and self.init is None:
            raise ValueError("adapter.init_mode='frozen' has no effect without a saved adapter. Set adapter.init=PATH")

    @property
    def is_frozen(self) -> bool:
        """Whether the saved adapter stays as it is, active next to the trained one."""
        return self.init_mode == "frozen"

    @property
    def is_bfloat16(self) -> bool:
        """Whether the trained weights are bfloat16, rounded stochastically."""
        return self.dtype == "bf16"


@dataclass(frozen=True)
class PrecisionSettings:
    """The group `precision` of the frozen base. Missing keys default as in `flux2.quantization.precision.Precision`."""

    dtype: str | None
    storage: str | None = None
    layers: list[str] | None = None
    rowwise: bool | None = None
    backward: str | None = None
    matmul: str | None = None
    rotate: bool | None = None

    def on(self, device: torch.device) -> Precision:
        """Return the precision on `device`. Raise ValueError for a value it does not support or that has no effect."""
        given = {key: value for key, value in asdict(self).items() if key != "dtype" and value is not None}
        usable = {None: (), "nf4": ("storage", "layers")}.get(self.storage, given)
        for key, value in given.items():
            if key not in usable:
                raise ValueError(f"precision.{key}={value!r} has no effect with precision.storage={self.storage!r}")
        if self.layers is not None:
            if not isinstance(self.layers, list) or not all(isinstance(layer, str) for layer in self.layers):
                raise ValueError(f"precision.layers={self.layers!r} must be a list of regular expressions")
            given["layers"] = tuple(self.layers)
        precision = Precision(pick_dtype(self.dtype, device), **given)
        precision.multiplies_in_8_bits(device)
        return precision


@dataclass(frozen=True)
class MemorySettings:
    """The group `memory`. With `gpu_memory_gb`, the planner chooses the keys that are null."""

    checkpointing: str
    budget_gb: float | None = None
    compile: bool | str = False
    kernels: str = "torch"
    attention: list[str] | None = None
    offload_blocks: int | float = 0
    offload_activations: bool = False
    cache_transposed_weights: bool = False
    split: list[int] | str | None = None
    gpu_memory_gb: float | str | None = None
    headroom_gb: float = HEADROOM_GB

    def __post_init__(self) -> None:
        check_policy(self.checkpointing, self.budget_gb)
        if self.budget_gb is not None and self.budget_gb > MOST_GB:
            raise ValueError(f"memory.budget_gb={self.budget_gb!r} must be a number of GB from 0 to {MOST_GB:g}")
        check_kernels(self.kernels)
        check_backends(self.attention, "memory.attention")
        check_offload_blocks(self.offload_blocks, "memory.offload_blocks")
        if self.compile != AUTO and not isinstance(self.compile, bool):
            raise ValueError(f"memory.compile={self.compile!r} must be true, false or auto")
        for key in ("offload_activations", "cache_transposed_weights"):
            if not isinstance(getattr(self, key), bool):
                raise ValueError(f"memory.{key}={getattr(self, key)!r} must be true or false")
        self.check_split()
        given = self.gpu_memory_gb
        if given is not None and given != FREE and not is_number(given, 1, MOST_GB):
            raise ValueError(f"gpu_memory_gb={given!r} must be a number of GB from 1 to {MOST_GB:g}, `{FREE}`, or null")
        if not is_number(self.headroom_gb, 0, MOST_GB):
            raise ValueError(f"headroom_gb={self.headroom_gb!r} must be a number of GB from 0 to {MOST_GB:g}")

    def check_split(self) -> None:
        """Raise ValueError for a bad `split`, and for settings that do not work with one."""
        if self.split is None:
            return
        is_list = isinstance(self.split, list) and len(self.split) > 1
        if self.split != AUTO and not (is_list and all(is_count(count, 1) for count in self.split)):
            raise ValueError(
                f"memory.split={self.split!r} must be `{AUTO}`, or a list with the number of blocks on each of several "
                "GPUs, each an integer >= 1, or null"
            )
        for key, off in (("offload_blocks", 0), ("offload_activations", False)):
            if value := getattr(self, key):
                raise ValueError(
                    f"memory.{key}={str(value).lower()} does not work with memory.split, because offload is set up for "
                    f"one GPU. Set memory.{key}={str(off).lower()} or memory.split=null."
                )

    @property
    def parts(self) -> list[int]:
        """Number of blocks on each GPU that the model is divided over; empty for one device."""
        assert not isinstance(self.split, str), "the planner chooses it before"
        return self.split or []

    def apply(self, model: Transformer, device: torch.device, buckets: Buckets) -> None:
        """Apply checkpointing, attention backend, compilation and kernels to `model`, which runs on `device`."""
        use_kernels(model, self.kernels == "triton")
        set_policy(
            model,
            self.checkpointing,
            budget_gb=self.budget_gb,
            attention=preferred_backends(self.attention, device),
            compile=self.compile is True,
            # references, validation and sampling add further shapes, and each GPU has its own graphs
            shapes=4 * len(buckets.sizes) * (len(self.split) if isinstance(self.split, list) else 1),
        )

    def check_sharded(self) -> None:
        """Raise ValueError for a setting that does not work with a sharded base."""
        for key, off in (("offload_blocks", 0), ("offload_activations", False), ("compile", False)):
            value = getattr(self, key)
            if value and value != AUTO:
                raise ValueError(
                    f"memory.{key}={str(value).lower()} does not work with shard=true, because a block is gathered "
                    f"only while it runs. Set memory.{key}={str(off).lower()} or shard=false."
                )

    def with_layouts(self, precision: Precision) -> Precision:
        """Return `precision` with `cache_transposed_weights` set. Raise ValueError where that would have no effect."""
        for key, value, needed in (
            ("storage", precision.storage or "null", ("fp8", "int8")),
            ("backward", precision.backward, ("fp8", "int8")),
            ("matmul", precision.matmul, ("auto", "fp8", "int8")),
        ):
            if self.cache_transposed_weights and value not in needed:
                raise ValueError(
                    f"memory.cache_transposed_weights=true has no effect with precision.{key}={value}: it needs "
                    "gradients that are multiplied in 8 bits (precision=fp8 or int8)"
                )
        return replace(precision, cache_transposed_weights=self.cache_transposed_weights)
