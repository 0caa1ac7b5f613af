"""A saved run, opened from its folder to generate images with its adapters.

Only `config.yaml` and the adapters are read; groups that only training needs are replaced by the defaults. Every image
is a file in the run's folder, named by a digest of everything that determines it, so that existing images are reused
and stale ones are not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from data.buckets import Size, fit
from data.files import user_path
from data.sources.base import Source
from data.sources.images import Picture
from flux2 import adapters
from flux2.adapters.files import PEFT_FILE, read_tensors
from flux2.adapters.tuners import remove_adapters
from flux2.models.transformer import Transformer
from flux2.prompts.remote_client import PUBLISHED
from flux2.weights.sources import fingerprint
from train.checkpoints import resume
from train.checkpoints.checkpoint import CONFIG_FILE, check, checkpoints, checksum, step_of
from train.config.paths import CONFIG
from train.encoding.prepare import prepare
from train.evaluation.results import FINISHED, FOLDER
from train.stages.data import cache_request, paths, sample_captions
from train.stages.memory import load_config
from train.stages.model import load_sampler, place_blocks, shared_base
from train.utils.files import make_writable, read_image, read_yaml, write_whole
from train.utils.memory import free_memory
from train.validation.samples import Sampler

TRAINING_ONLY = (
    "adapter",
    "optimizer",
    "schedule",
    "timesteps",
    "target",
    "loss",
    "weighting",
    "preservation",
    "tracker",
)
MOST_CAPTIONS = 4  # captions that are used as prompts if the run has none


@dataclass(frozen=True)
class Candidate:
    """An adapter of a run."""

    name: str
    step: int | None  # of its checkpoint; None for a finished adapter that equals no checkpoint's
    place: Path
    digest: str  # checksums of its files


def adapter_digest(adapter: Path) -> str:
    """Return the checksums of an adapter's files."""
    return "-".join(checksum(adapter / name) for name in (PEFT_FILE, "adapter_config.json"))


def candidates(folder: Path, wanted: Sequence[int] | None = None) -> tuple[list[Candidate], list[str]]:
    """Return the readable adapters of a run by step, the finished one last if it differs, and errors of damaged ones.

    `wanted` are the steps of the checkpoints to use; None uses all, and the finished adapter. Raises ValueError if a
    wanted checkpoint does not exist, or if no adapter is readable.
    """
    found, damaged = list[Candidate](), list[str]()
    saved = {step_of(place): place for place in checkpoints(folder)}
    if wanted is not None and (missing := sorted(set(wanted) - set(saved))):
        there = ", ".join(map(str, saved)) or "none"
        raise ValueError(f"checkpoints={list(wanted)}: {folder} has no checkpoint of step {missing[0]}, only: {there}")
    steps = saved.keys() if wanted is None else wanted
    places: dict[int | None, Path] = {step: place / "adapter" for step, place in saved.items() if step in steps}
    if wanted is None and (folder / "adapter" / PEFT_FILE).is_file():
        places[None] = folder / "adapter"
    for step, place in places.items():
        try:
            if step is None:
                read_tensors(place)
            else:
                check(place.parent, "adapter")
            digest = adapter_digest(place)
        except (ValueError, OSError) as error:
            damaged.append(str(error).partition(". Delete")[0])
            continue
        if step is not None or digest not in [one.digest for one in found]:
            found.append(Candidate(FINISHED if step is None else f"step {step}", step, place, digest))
    if not found:
        why = f"no checkpoint is readable: {'; '.join(damaged)}" if damaged else "it has no checkpoint"
        raise ValueError(f"{folder} has no adapter to evaluate: {why}")
    return found, damaged


def check_run_folder(folder: Path, key: str) -> None:
    """Raise ValueError, naming `key`, unless `folder` is a run folder."""
    if not folder.is_dir():
        raise ValueError(f"{key}={str(folder)!r} does not exist. Give a run folder, outputs/<name>/<time>.")
    if not (folder / CONFIG_FILE).is_file():
        hint = " It looks like a sweep. Give one of its jobs." if (folder / "sweep.json").exists() else ""
        raise ValueError(f"{key}={str(folder)!r} is not a run folder: it has no {CONFIG_FILE}.{hint}")


def encoder_address(config: Mapping[str, Any]) -> str | None:
    """Return the address of a run's text encoder, None if it is on this machine."""
    group = config.get("text_encoder")
    return group.get("url") if isinstance(group, dict) else None


def check_address(folder: Path, config: Mapping[str, Any], given: str | None) -> None:
    """Raise ValueError unless the text encoder is on this machine, Hugging Face's, or at the address that is `given`.

    The folder may come from someone else, and the server receives prompts and the token.
    """
    url = encoder_address(config)
    if given is None and url is not None and url != PUBLISHED:
        raise ValueError(
            f"text_encoder_url is missing: {folder} names a text encoder at {url!r}, and prompts and the token are not "
            "sent to an address that a run folder names. If it is yours, set text_encoder_url to it"
        )


def split_of(config: Mapping[str, Any]) -> list[int]:
    """Return the numbers of blocks on each GPU of a run whose model was divided, else an empty list."""
    memory = config.get("memory")
    split = memory.get("split") if isinstance(memory, dict) else None
    return split if isinstance(split, list) else []


def configuration(
    folder: Path, device: str | None, sample: Mapping[str, Any], text_encoder_url: str | None = None
) -> dict[str, Any]:
    """Return the configuration of a run, changed for inference: `sample` overrides its group `sample`."""
    config = resume.configuration(folder)
    check_address(folder, config, text_encoder_url)
    adapter = config.get("adapter")
    if isinstance(adapter, dict) and adapter.get("init_mode") == "frozen":
        raise ValueError(
            f"{folder} trained an adapter next to a frozen one, and without that one its images would be others. Draw "
            "them with python -m flux2.generate --adapter FROZEN --adapter NEW"
        )
    if text_encoder_url is not None and encoder_address(config) is not None:
        config["text_encoder"] = {**config["text_encoder"], "url": text_encoder_url}
    groups = [entry for entry in read_yaml(CONFIG / "train.yaml")["defaults"] if isinstance(entry, dict)]
    choices = {str(key): value for entry in groups for key, value in entry.items()}
    for group in TRAINING_ONLY:
        config[group] = read_yaml(CONFIG / group / f"{choices[group]}.yaml")
        config[group].pop("defaults", None)  # what is included has defaults in the code too
    memory, own = config.get("memory"), config.get("sample")
    streamed = memory.get("offload_blocks", 0) if isinstance(memory, dict) else 0
    gpus = 0 if device == "cpu" else torch.cuda.device_count()
    split = split_of(config) if len(split_of(config)) <= gpus else []
    return {
        **config,
        "memory": {"checkpointing": "none", "offload_blocks": streamed, "split": split or None},
        "validation": {},
        "hub": {},
        "sample": {**(own if isinstance(own, dict) else {}), **sample},
        "resume": None,
        "output_dir": None,
        "shard": False,
        "device": device,
        "sample_every": 1,
    }


@dataclass(frozen=True)
class TrainingImage:
    """A training image. `load` reads it again, so that a caller need not keep all of them in memory."""

    name: str
    image: Image.Image
    load: Callable[[], Image.Image]


class SavedRun:
    """A run whose adapters generate images of `prompts`. Models are loaded when the first missing image is drawn."""

    def __init__(
        self,
        folder: Path,
        device: str | None,
        sample: Mapping[str, Any],
        seeds: Sequence[int],
        text_encoder_url: str | None = None,
    ) -> None:
        self.folder, self.seeds = folder, list(seeds)
        self.place = folder / FOLDER
        self.notes: list[str] = []  # for the report
        config = load_config(configuration(folder, device, sample, text_encoder_url))
        if config.accelerator.num_processes > 1:
            raise ValueError("evaluation runs in one process only. Start it with python, not with accelerate launch.")
        make_writable(self.place / "pictures", "evaluation folder")
        if not config.memory.parts and (count := len(split_of(resume.configuration(folder)))):
            self.notes.append(f"the model was divided over {count} GPUs in training, and is on one device here")
        self.samples: Source | None = None  # None if the training images are not available
        try:
            self.samples = config.instantiate("dataset")
        except (ValueError, OSError) as error:
            message = str(error).splitlines()[0]
            self.notes.append(f"the training images are not available, so there is no comparison with them ({message})")
            absent = [str(place) for place in paths(config.composed["dataset"]) if place and str(place) in message]
            if any(not user_path(place).is_absolute() for place in absent):
                self.notes[-1] += f". The path is relative to {Path.cwd()}: start this where the run was started"
        if not config.sample.prompts:
            config = sample_captions(config, self.samples or [], MOST_CAPTIONS)
            if not config.sample.prompts:
                why = self.notes[-1] if self.samples is None else "the training images have no captions"
                raise ValueError(f"prompts=null: the run has no sample.prompts, and {why}. Set prompts=['a cup'].")
            count = len(config.sample.prompts)
            self.notes.append(f"the run has no sample.prompts: {count} training captions are the prompts")
        self.config = config

    @property
    def prompts(self) -> list[str]:
        return list(self.config.sample.prompts)

    @cached_property
    def sampler(self) -> Sampler:
        """The sampler of training, with its encoded prompts."""
        no_samples = Source("no samples", None, None, False, 0)  # only prompts are encoded
        cached = prepare(self.config.accelerator, cache_request(self.config, no_samples))
        sampler = load_sampler(self.config, cached)
        assert sampler is not None
        return sampler

    @cached_property
    def transformer(self) -> Transformer:
        base = shared_base(self.config)
        self.config.memory.apply(base.transformer, self.config.accelerator.device, self.config.buckets)
        place_blocks(self.config, base)
        return base.transformer

    def free_transformer(self) -> None:
        vars(self).pop("transformer", None)
        free_memory()

    @cached_property
    def _base(self) -> dict[str, str]:
        source = self.config.source
        return {
            "transformer": fingerprint(source, "transformer"),
            "autoencoder": fingerprint(source, "vae"),
            "precision": repr(self.config.precision),
        }

    def file(self, adapter: Candidate | None, strength: float, i: int, seed: int) -> Path:
        """Return the image file of prompt `i`, whether or not it exists."""
        sampler = self.sampler
        recipe = {
            **self._base,
            "adapter": None if adapter is None else [adapter.digest, strength],
            "text": digest(sampler.text[i], sampler.empty),
            "references": digest(*sampler.references[i]),
            "size": sampler.sizes[i],
            "seed": seed,
            "sampling": [sampler.steps, sampler.guidance],
        }
        name = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]
        row = "base" if adapter is None else adapter.name.replace(" ", "_")
        suffix = "" if adapter is None or strength == 1 else f"_x{strength:g}"
        return self.place / "pictures" / f"{row}{suffix}_prompt_{i}_seed_{seed}_{name}.png"

    def missing(self, adapter: Candidate | None, strength: float, seeds: Sequence[int]) -> list[tuple[int, int, Path]]:
        """Return (prompt, seed, file) of the images that do not exist or are not readable."""
        every = [(i, seed, self.file(adapter, strength, i, seed)) for seed in seeds for i in range(len(self.prompts))]
        return [one for one in every if not failed_mark(one[2]).exists() and read_image(one[2]) is None]

    def draw(self, adapter: Candidate | None, strength: float, seeds: Sequence[int]) -> Iterator[Path]:
        """Generate the missing images and yield each file; of a non-finite image, only its `failed_mark` is written."""
        missing = self.missing(adapter, strength, seeds)
        if not missing:
            return
        if adapter is not None:
            adapters.load(self.transformer, adapter.place, scale=strength)
        try:
            for i, seed, file in missing:
                try:
                    image = self.sampler.picture(self.transformer, i, seed)
                except ValueError as error:  # NaN and infinite pixels
                    write_whole(failed_mark(file), f"{error}\n")
                else:
                    write_whole(file, image)
                yield file
        finally:
            if adapter is not None:
                remove_adapters(self.transformer)

    def training_images(self, most: int) -> Iterator[TrainingImage]:
        """Yield up to `most` distinct training images at their trained size; count unreadable ones in `notes`."""
        if self.samples is None:
            return
        count, seen, bad = len(self.samples), set[str](), 0
        indices = sorted({i * count // most for i in range(most)}) if count > most else range(count)
        if count > most:
            self.notes.append(f"compared with {most} of the {count} training images (training_pictures={most})")
        for i in indices:
            picture = self.samples[i].target
            try:
                content, size = picture.digest(), self.config.buckets.assign(*picture.size)
                if content in seen or size is None:
                    continue
                image = cut_out(picture, size)
            except (ValueError, OSError):
                bad += 1
                continue
            seen.add(content)
            yield TrainingImage(picture.name, image, partial(cut_out, picture, size))
        if bad:
            self.notes.append(f"{bad} training images are not readable and not compared")


def cut_out(picture: Picture, size: Size) -> Image.Image:
    return fit(picture.load(), size)


def failed_mark(file: Path) -> Path:
    """Return the text file that replaces an image that could not be computed; it contains the error."""
    return file.with_suffix(".failed.txt")


def digest(*tensors: Tensor) -> str:
    """Return the SHA-256 of shapes, dtypes and bits."""
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(f"{tuple(tensor.shape)} {tensor.dtype} ".encode())
        sha.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()
