"""Short training runs on small random models, in this process: what the tests of train/ share.

A test module says `pytest_plugins = ("train_helpers",)` to get the fixtures, and imports the functions before that, so
pytest is told: PYTEST_DONT_REWRITE.
"""

from __future__ import annotations

import copy
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import helpers
import hydra
import numpy as np
import pytest
import torch
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.hydra import Hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from safetensors.torch import load_file, save_file

from data.loader import Batch
from flux2.models.variants import VARIANTS
from flux2.weights.sources import TINY_FOLDER
from train.cli.app import command
from train.cli.errors import USER_ERRORS, format_error
from train.config.run_config import RunConfig
from train.loop import Trainer
from train.objective import objective
from train.objective.noise import Noised, add_noise, draw
from train.objective.timesteps import Uniform
from train.run import main
from train.run import train as run_stages
from train.stages.memory import load_config
from train.stages.run_folder import claim_run_folder

ROOT = Path(__file__).resolve().parent.parent
# settings of a run in which all that happens between steps happens
EVENTS = [
    "gradient_accumulation=2",
    "validate_every=2",
    "sample_every=2",
    "sample.prompts=[a red cup]",
    "sample.steps=2",
    "preservation=base",
    "preservation.prompts=[a cup]",
    "preservation.weight=1.0",
]
CONF = ROOT / "conf"
# a word of the small tokenizer's each, so that no two captions have the same embedding
CAPTIONS = ["a red cup", "a blue fox", "the small card", "a tarot cup", "trtcrd in red", "the blue background"]
PRESERVE = ["preservation=base", "preservation.prompts=[a fox, the cup, a card]", "preservation.samples=1"]
NOT_NUMBERS_OF_LEARNING = ("images_per_second", "peak_memory_gb")

same_tensors = helpers.same_tensors
Train = Callable[..., Path]


@cache
def composed(*choices: str) -> DictConfig:
    """conf/train.yaml with these choices of groups. Hydra takes 0.1 s for it: once per process, not to be changed."""
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra.compose("train", list(choices))


def compose(*overrides: str) -> DictConfig:
    """conf/train.yaml with `overrides`, as the command line composes it: choices of groups first, then values."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    choices = [one for one in parsed if (CONF / one.key_or_group).is_dir() or one.key_or_group.startswith("hydra.")]
    config = copy.deepcopy(composed(*(one.input_line for one in choices)))
    ConfigLoaderImpl._apply_overrides_to_config([one for one in parsed if one not in choices], config)
    return config


def slow_but(values: Iterable[Any], fast: Iterable[Any]) -> list[Any]:
    """Return `values` as parameters of a test, with those not in `fast` in the slow set."""
    chosen = list(fast)
    assert set(chosen) <= set(values)
    return [
        pytest.param(
            *(value if isinstance(value, tuple) else (value,)), marks=[pytest.mark.slow] * (value not in chosen)
        )
        for value in values
    ]


def drawn_and_mixed(batch: Batch, timesteps: Uniform, seed: int, step: int) -> Noised:
    """A batch as the model sees it in a step."""
    return add_noise(batch, draw(batch, timesteps, seed, step))


def lines(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl of a run without what depends on the machine's speed."""
    read = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in NOT_NUMBERS_OF_LEARNING} for line in read]


def values(folder: Path, key: str = "loss") -> list[float]:
    return [line[key] for line in lines(folder) if key in line]


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    """The finished adapter of a run folder, or that of a checkpoint."""
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB")).astype(int)


def draw_picture(seed: int, size: tuple[int, int]) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def random_tiny(folder: Path) -> Path:
    """A model of the size called `tiny` with random weights, for runs in other processes: what it predicts depends on
    all of its weights, whatever the embedded ones are."""
    folder.mkdir(parents=True, exist_ok=True)
    for part in ("vae", "text_encoder", "tokenizer"):
        (folder / part).symlink_to(TINY_FOLDER / part, target_is_directory=True)
    generator = torch.Generator().manual_seed(0)
    state = {}
    for file in sorted((TINY_FOLDER / "transformer").glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            normal = torch.randn(tensor.shape, generator=generator)
            state[name] = normal / tensor.shape[-1] ** 0.5 if tensor.ndim > 1 else 1 + 0.1 * normal
    (folder / "transformer").mkdir()
    save_file(state, folder / "transformer" / "diffusion_pytorch_model.safetensors")
    return folder


def reread(run: Path) -> list[str]:
    """The overrides of a run's model."""
    kept = OmegaConf.load(run / "config.yaml").model
    return [f"model.name={kept.name}", f"model.path={kept.path}"]


def run_training(config: DictConfig | RunConfig) -> Path:
    """Train one configuration without saying where everything is; returns the adapter's folder."""
    run = load_config(config) if isinstance(config, DictConfig) else config
    with claim_run_folder(run) as location:
        return run_stages(run, location)[0]


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six captioned pictures, four square and two wide: two buckets at 48 px."""
    folder = tmp_path_factory.mktemp("pictures")
    for i, caption in enumerate(CAPTIONS):
        draw_picture(i, (48, 48) if i < 4 else (100, 50)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(caption)
    return folder


@pytest.fixture(scope="session")
def parquet(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as a table with the columns `image` and `caption`."""
    file = tmp_path_factory.mktemp("table") / "cards.parquet"
    images = [{"bytes": (pictures / f"{i}.png").read_bytes(), "path": None} for i in range(len(CAPTIONS))]
    datasets.Dataset.from_dict({"image": images, "caption": CAPTIONS}).to_parquet(str(file))
    return file


@pytest.fixture(scope="session")
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Filled by the first run that needs an entry."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def small(
    monkeypatch: pytest.MonkeyPatch, model_folders: Callable[[str], Path], pictures: Path, cache_folder: Path
) -> Callable[..., list[str]]:
    """`small(*overrides)`: the settings of a run of four steps on a small random model; `kind` is dev or klein."""
    for variant in helpers.VARIANTS.values():
        monkeypatch.setitem(VARIANTS, variant.name, replace(variant, resolution=48))

    def overrides(*more: str, kind: str = "dev") -> list[str]:
        intervals = ["log_every=1", "checkpoint_every=0", "sample_every=0", "validate_every=0"]
        return [
            f"model.name=small_{kind}",
            f"model.path={model_folders(kind)}",
            "model.resolution=48",
            "dataset=folder",
            f"dataset.path={pictures}",
            f"cache_dir={cache_folder}",
            "batch_size=2",
            "steps=4",
            "adapter.rank=4",
            "optimizer.lr=1e-2",
            *intervals,
            *more,
        ]

    return overrides


@pytest.fixture
def train(small: Callable[..., list[str]], tmp_path: Path) -> Train:
    """`train("run", *overrides)`: a small run into `tmp_path / "run"`; gives the run folder."""

    def run(name: str, *overrides: str, kind: str = "dev") -> Path:
        return run_training(compose(*small(f"output_dir={tmp_path / name}", *overrides, kind=kind))).parent

    return run


@pytest.fixture(scope="session")
def reference_runs() -> dict[tuple[str, ...], Path]:
    """The run folders that `reference` gave."""
    return {}


@pytest.fixture
def reference(
    small: Callable[..., list[str]],
    tmp_path_factory: pytest.TempPathFactory,
    reference_runs: dict[tuple[str, ...], Path],
) -> Callable[..., Path]:
    """`reference(*overrides)`: the folder of a small run that all tests compare theirs with; not to be changed.

    It is trained once in this process: whoever asks first must not have patched anything yet that it would run into.
    """

    def run(*overrides: str, kind: str = "dev") -> Path:
        if (kind, *overrides) not in reference_runs:
            place = tmp_path_factory.mktemp("reference") / "run"
            trained = run_training(compose(*small(f"output_dir={place}", *overrides, kind=kind)))
            reference_runs[kind, *overrides] = trained.parent
        return reference_runs[kind, *overrides]

    return run


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], None]], None]:
    """`at_step(3, action)`: call `action` once, before the gradients of the step with three finished ones."""

    def plant(step: int, action: Callable[[], None]) -> None:
        accumulate = Trainer.accumulate_gradients

        def planted(self: Trainer, model: torch.nn.Module, now: int) -> Any:
            if now == step:
                monkeypatch.setattr(Trainer, "accumulate_gradients", accumulate)
                action()
            return accumulate(self, model, now)

        monkeypatch.setattr(Trainer, "accumulate_gradients", planted)

    return plant


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[Trainer]:
    """The `Trainer` of every run that reaches its end."""
    found: list[Trainer] = []
    run = Trainer.run

    def keep(self: Trainer, first_step: int) -> Path:
        folder = run(self, first_step)
        found.append(self)
        return folder

    monkeypatch.setattr(Trainer, "run", keep)
    return found


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[Batch]:
    """Every micro-batch that is trained on."""
    seen: list[Batch] = []
    add_noise = objective.add_noise

    def keep(batch: Batch, *rest: Any) -> Noised:
        seen.append(batch)
        return add_noise(batch, *rest)

    monkeypatch.setattr(objective, "add_noise", keep)
    return seen


def refuse_encoders(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on a run that loads a text encoder or an autoencoder fails."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("an encoder was loaded")

    monkeypatch.setattr("train.encoding.text_encoders.load_text_encoder", refuse)
    monkeypatch.setattr("train.encoding.prepare.load_autoencoder", refuse)


def ask_to_stop(number: int = signal.SIGTERM) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


class Command:
    """Runs the command line in this process: `command("steps=3")` gives (exit code, standard output, errors)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capfd = monkeypatch, capfd

    def __call__(
        self, *arguments: str, task: Callable[[DictConfig], Any] = main, name: str = "train"
    ) -> tuple[int, str, str]:
        self.monkeypatch.setattr(sys, "argv", ["train/run.py", *arguments])
        # Hydra composes everything twice, first to look for `hydra.mode`, which no file of conf/ has
        self.monkeypatch.setattr(Hydra, "get_mode", lambda *_, **__: None)
        GlobalHydra.instance().clear()
        self.capfd.readouterr()
        code = 0
        try:
            command(task, name)
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = self.capfd.readouterr()
        return code, out, err

    def refused(self, *arguments: str, task: Callable[[DictConfig], Any] = main, name: str = "train") -> str:
        """The one message of a command line that is refused with exit code 2."""
        code, out, err = self(*arguments, task=task, name=name)
        assert code == 2
        message = one_message(err)
        assert "Traceback" not in out
        return message


def refusal(*overrides: str, task: Callable[[DictConfig], Any] = load_config) -> str:
    """The message for settings that `task` refuses, by default before anything is looked for or loaded; without the
    command line around it."""
    with pytest.raises(USER_ERRORS) as raised:
        task(compose(*overrides))
    return format_error(raised.value, overrides)


def one_message(err: str) -> str:
    """The only thing that was written on the error stream, but for how far it is: a line `error: ...`."""
    shown = r"\d\d:\d\d[<,]|^loading libraries$"
    said = [line for line in err.splitlines() if line.strip() and not re.search(shown, line)]
    assert len(said) == 1, err
    assert said[0].startswith("error: "), err
    return said[0].removeprefix("error: ")


@pytest.fixture
def run_command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Command]:
    yield Command(monkeypatch, capfd)
    GlobalHydra.instance().clear()


def environment(**extra: str) -> dict[str, str]:
    """For another process: as after a login, without what a launcher has set.

    The number of threads stays: tests run beside each other, and waiting threads of one slow the other down.
    """
    dropped = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "PYTHONPATH", "HYDRA_FULL_ERROR")
    mine = {key: value for key, value in os.environ.items() if key not in dropped and not key.startswith("ACCELERATE_")}
    return mine | {"HF_HUB_OFFLINE": "1"} | extra


def free_port() -> int:
    """Of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launch(*arguments: str, processes: int = 1) -> list[str]:
    """The command line of `accelerate launch`."""
    start = [sys.executable, "-m", "accelerate.commands.launch"]
    if processes > 1:
        start += ["--multi_gpu", "--num_processes", str(processes), "--main_process_port", str(free_port())]
    return [*start, *arguments]


def execute(arguments: list[str], timeout: float = 900, **extra: str) -> subprocess.CompletedProcess[str]:
    """Run another process from the repository root, to its end."""
    return subprocess.run(
        arguments, cwd=ROOT, env=environment(**extra), capture_output=True, text=True, timeout=timeout, check=False
    )
