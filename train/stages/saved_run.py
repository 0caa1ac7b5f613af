"""A run of before, opened again from its folder: the model, its adapters, and the pictures they make.

All that is read is `config.yaml` and the adapters; what is needed for training alone (the optimizer that is not
installed here, the GPU's kernels) is replaced by the defaults. Every picture is a file in the run's folder, named by a
digest of all that determines it, so that what was drawn before is not drawn again, and nothing stale is taken for it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor

from data.buckets import Size, fit
from data.sources.base import Source
from data.sources.images import Picture
from flux2 import adapters
from flux2.adapters.files import PEFT_FILE, read_tensors
from flux2.adapters.tuners import remove_adapters
from flux2.models.transformer import Transformer
from flux2.weights.sources import fingerprint
from train.checkpoints import resume
from train.checkpoints.checkpoint import CONFIG_FILE, check, checkpoints, checksum, number
from train.config.paths import CONFIG
from train.encoding.prepare import prepare
from train.stages.data import cache_request, paths
from train.stages.memory import load_config
from train.stages.model import load_sampler, offload_blocks, shared_base
from train.utils.files import make_writable, read_image, write_whole
from train.utils.memory import free_memory
from train.validation.samples import Sampler

FOLDER = "evaluation"  # in a run's
TRAINING_ONLY = ("adapter", "optimizer", "schedule", "timesteps", "weighting", "preservation", "tracker")
MOST_CAPTIONS = 4  # that are prompts where a run has none


class NoSamples(Source):
    """An empty source: of a run, only prompts are encoded."""

    def __init__(self) -> None:
        super().__init__("no samples", None, None, False, 0)


# ------------------------------------------------------------------ what there is


@dataclass(frozen=True)
class Candidate:
    """An adapter of a run. `step` is None for a finished one that is no checkpoint's; `digest` is of its files."""

    name: str
    step: int | None
    place: Path
    digest: str


def digest_of(adapter: Path) -> str:
    """Of the files that an adapter is read from."""
    files = [adapter / PEFT_FILE, adapter / "adapter_config.json"]
    return "-".join(checksum(file) for file in files)


def candidates(folder: Path, wanted: Sequence[int] | None = None) -> tuple[list[Candidate], list[str]]:
    """The adapters of a run by step, the finished one last unless it is the last checkpoint's; and what is damaged.

    Args:
        wanted: the steps to take of the checkpoints; None takes all, and the finished adapter.

    Raises ValueError if a wanted one is not there, or if there is none at all that can be read.
    """
    found, damaged = [], []
    saved = {number(place): place for place in checkpoints(folder)}
    if wanted is not None and (missing := sorted(set(wanted) - set(saved))):
        steps = ", ".join(map(str, saved)) or "none"
        raise ValueError(f"checkpoints={list(wanted)}: there is none of step {missing[0]} in {folder}; kept: {steps}")
    for step, place in saved.items():
        if wanted is not None and step not in wanted:
            continue
        try:
            check(place, "adapter")
            found.append(Candidate(f"step {step}", step, place / "adapter", digest_of(place / "adapter")))
        except (ValueError, OSError) as error:
            damaged.append(str(error).partition(": delete")[0])
    final = folder / "adapter"
    if wanted is None and (final / PEFT_FILE).is_file():
        try:
            digest = digest_of(final)
            read_tensors(final)
            if digest not in [one.digest for one in found]:
                found.append(Candidate("finished", None, final, digest))
        except (ValueError, OSError) as error:
            damaged.append(str(error))
    if not found:
        why = f"none of its checkpoints can be read: {'; '.join(damaged)}" if damaged else "it has no checkpoint"
        raise ValueError(f"{folder} has no adapter to evaluate: {why}")
    return found, damaged


def check_run_folder(folder: Path, key: str) -> None:
    """Raises ValueError, naming `key`, unless `folder` is that of a run."""
    if not folder.is_dir():
        raise ValueError(f"{key}={str(folder)!r} does not exist: give the folder of a run, outputs/<name>/<time>")
    if not (folder / CONFIG_FILE).is_file():
        hint = " It looks like a sweep: give one of its jobs." if (folder / "sweep.json").exists() else ""
        raise ValueError(f"{key}={str(folder)!r} is not the folder of a run: {CONFIG_FILE} is not in it.{hint}")


def configuration(folder: Path, device: str | None, sample: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a run, changed to draw pictures with: `sample` replaces what the sample grids show."""
    config = resume.configuration(folder)
    standard = OmegaConf.load(CONFIG / "train.yaml")
    choices = {
        str(key): value for entry in standard.defaults if hasattr(entry, "items") for key, value in entry.items()
    }
    for group in TRAINING_ONLY:
        config[group] = OmegaConf.to_container(OmegaConf.load(CONFIG / group / f"{choices[group]}.yaml"))
    memory = config.get("memory")
    streamed = memory.get("offload_blocks", 0) if isinstance(memory, dict) else 0
    own = config.get("sample")
    return {
        **config,
        "memory": {"checkpointing": "none", "offload_blocks": streamed},
        "validation": {},
        "hub": {},
        "sample": {**(own if isinstance(own, dict) else {}), **sample},
        "resume": None,
        "output_dir": None,
        "shard": False,
        "device": device,
        "sample_every": 1,
    }


# ------------------------------------------------------------------ opened


@dataclass(frozen=True)
class Trained:
    """A training picture; `load` reads it again, for who keeps only a few."""

    name: str
    image: Image.Image
    load: Callable[[], Image.Image]


class SavedRun:
    """A run whose adapters draw pictures of `prompts`. Nothing large is loaded before the first that is not there yet.

    Attributes:
        notes: what a reader should know, such as that the training pictures are not here.
        samples: the training pictures; None where they are not here.
    """

    def __init__(self, folder: Path, device: str | None, sample: Mapping[str, Any], seeds: Sequence[int]) -> None:
        self.folder, self.seeds = folder, list(seeds)
        self.place = folder / FOLDER
        self.notes: list[str] = []
        config = load_config(OmegaConf.create(configuration(folder, device, sample)))
        if config.accelerator.num_processes > 1:
            raise ValueError("evaluation runs in one process: start it with python, without accelerate launch")
        make_writable(self.place / "pictures", "evaluation folder")
        self.samples: Source | None = None
        try:
            self.samples = config.instantiate("dataset")
        except (ValueError, OSError) as error:
            said = str(error).splitlines()[0]
            self.notes.append(f"the training pictures are not here, so nothing is compared with them ({said})")
            gone = [str(place) for place in paths(config.config["dataset"]) if place and str(place) in said]
            if any(not Path(place).expanduser().is_absolute() for place in gone):
                self.notes[-1] += f". That is looked for in {Path.cwd()}: start this where the run was started"
        if not config.sample.prompts:
            captions = [sample.caption for sample in self.samples or [] if sample.caption]
            captions = list(dict.fromkeys(captions))[:MOST_CAPTIONS]
            if not captions:
                raise ValueError("there is nothing to draw: the run has no sample.prompts. Give prompts=['a cup']")
            config = config.with_prompts(captions)
            self.notes.append(f"the run has no sample.prompts: drawn are the captions of {len(captions)} trained ones")
        self.config = config
        self._transformer: Transformer | None = None

    @property
    def prompts(self) -> list[str]:
        return list(self.config.sample.prompts)

    @cached_property
    def sampler(self) -> Sampler:
        """What draws, with the prompts encoded as training had them."""
        cached = prepare(self.config.accelerator, cache_request(self.config, NoSamples()))
        found = load_sampler(self.config, cached)
        assert found is not None
        return found

    @property
    def transformer(self) -> Transformer:
        """The base."""
        if self._transformer is None:
            base = shared_base(self.config)
            self.config.memory.apply(base.transformer, self.config.accelerator.device, self.config.buckets)
            offload_blocks(self.config, base)
            self._transformer = base.transformer
        return self._transformer

    def forget(self) -> None:
        """Let go of the transformer: all is drawn."""
        self._transformer = None
        free_memory()

    @contextmanager
    def adapted(self, adapter: Candidate | None, strength: float) -> Iterator[Transformer]:
        """The base with the adapter within this context, and without it afterwards."""
        if adapter is None:
            yield self.transformer
            return
        adapters.load(self.transformer, adapter.place, scale=strength)
        try:
            yield self.transformer
        finally:
            remove_adapters(self.transformer)

    @cached_property
    def _base(self) -> dict[str, str]:
        source = self.config.source
        return {
            "transformer": fingerprint(source, "transformer"),
            "autoencoder": fingerprint(source, "vae"),
            "precision": repr(self.config.precision),
        }

    def file(self, adapter: Candidate | None, strength: float, i: int, seed: int) -> Path:
        """Where the picture of prompt `i` is or will be."""
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
        at = "" if adapter is None or strength == 1 else f"_x{strength:g}"
        return self.place / "pictures" / f"{row}{at}_prompt_{i}_seed_{seed}_{name}.png"

    def missing(self, adapter: Candidate | None, strength: float, seeds: Sequence[int]) -> list[tuple[int, int, Path]]:
        """(prompt, seed, file) of the pictures that are not there, or cannot be read."""
        every = [(i, seed, self.file(adapter, strength, i, seed)) for seed in seeds for i in range(len(self.prompts))]
        return [one for one in every if not failed_mark(one[2]).exists() and read_image(one[2]) is None]

    def draw(self, adapter: Candidate | None, strength: float, seeds: Sequence[int]) -> Iterator[Path]:
        """Draw what is missing, and give each file when it is there, or `failed_mark` of it is: what the model gave was
        not finite."""
        missing = self.missing(adapter, strength, seeds)
        if not missing:
            return
        with self.adapted(adapter, strength) as model:
            for i, seed, file in missing:
                try:
                    picture = self.sampler.picture(model, i, seed)
                except ValueError as error:  # NaN and infinite pixels
                    write_whole(failed_mark(file), f"{error}\n")
                else:
                    write_whole(file, picture)
                yield file

    def trained(self, most: int) -> Iterator[Trained]:
        """Training samples as they were trained, each content once; at most `most`, evenly chosen.

        Those that cannot be read are left out, which is noted.
        """
        if self.samples is None:
            return
        count, seen, bad = len(self.samples), set[str](), 0
        indices = sorted({i * count // most for i in range(most)}) if count > most else range(count)
        if count > most:
            self.notes.append(f"compared with {most} of the {count} training pictures (training_pictures={most})")
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
            yield Trained(picture.name, image, partial(cut_out, picture, size))
        if bad:
            self.notes.append(f"{bad} training pictures cannot be read, and are not compared with")


def cut_out(picture: Picture, size: Size) -> Image.Image:
    return fit(picture.load(), size)


def failed_mark(file: Path) -> Path:
    """What is there in place of a picture that could not be computed; it says why."""
    return file.with_suffix(".failed.txt")


def digest(*tensors: Tensor) -> str:
    """Of shapes, dtypes and bits."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(f"{tuple(tensor.shape)} {tensor.dtype} ".encode())
        found.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
