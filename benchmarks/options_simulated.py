"""Compare the planner's memory with what PyTorch's allocator holds on a simulated GPU, for options of training.

    .venv-cuda/bin/python benchmarks/options_simulated.py                  all cases, about 10 minutes
    .venv-cuda/bin/python benchmarks/options_simulated.py --only slider    some of them; the others keep their results

Needs an environment with a CUDA build of PyTorch (`make .venv-cuda/installed`), and no GPU: see
tests/simulated_gpu/README.md. A case is a configuration: the planner predicts its memory, and its own loop, objective,
optimizer and sampler run at the true shapes of its model, with weights, latents and embeddings whose values are not
set. What is compared are the peaks of three phases: forward and backward, the update, and a sample grid. As in
planner_simulated.py, workspaces inside cuBLAS and cuDNN do not show, and the one that PyTorch allocates for cuBLAS is
taken off.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)
sys.path.insert(1, str(ROOT / "tests"))

import flux2  # noqa: F401, I001  before torch: it sets how long threads spin

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast
from unittest import mock

import hydra
import peft
import torch
from torch import Tensor

from benchmarks.common import free_memory, write_result
from data.loader import Batch, Loader
from flux2 import adapters
from flux2.adapters.files import save
from flux2.adapters.tuners import adapter_layers, layer_adapter_tensors
from flux2.memory.block_offload import offload
from flux2.models.autoencoder import Autoencoder
from flux2.models.transformer import Transformer
from flux2.models.variants import VARIANTS
from flux2.quantization.precision import Precision
from flux2.weights.sources import ModelSource
from simulated_gpu.build import environment
from simulated_gpu.simulated import RepeatedCopier, device, empty_transformer
from train.checkpoints.resume import RunLocation
from train.cli.start import prepare_hydra
from train.config.memory import choice_of
from train.config.paths import CONFIG
from train.config.run_config import RunConfig
from train.loop import Trainer
from train.objective.loss import DPO
from train.objective.objective import Objective
from train.optim.ema import EvaluationWeights
from train.optim.schedules import LearningRate
from train.optim.update_guard import clear_gradients, clip
from train.planner.from_config import workload_of
from train.planner.predictor import LIBRARIES, Planner
from train.stages import model as model_stage
from train.stages.memory import load_config

RESULT = ROOT / "benchmarks" / "results" / "options_simulated.json"
CUDA = torch.device("cuda", 0)
PARTS = {"step": ["targets", "step"]}  # phases of the planner in one that is simulated
STEPS = 4  # both scales of a slider, and each of two resolutions twice
CAPTION = "a photo of xyz dog"
RUN = """
    dataset=folder dataset.path=. dataset.captions.trigger=xyz batch_size=1 steps=4 log_every=0 checkpoint_every=0
    validate_every=0 sample_every=0 sample.steps=1
""".split()
SAMPLES = ["sample_every=1", f"sample.prompts=[{CAPTION}]"]
SAVED = re.compile(r"SAVED/(\d+)")  # stands for the folder of a saved LoRA of this rank
KLEIN_4B = ["model=klein_base_4b", "precision=bf16"]
KLEIN_9B = ["model=klein_base_9b", "precision=int8"]
BASES = {
    "klein 4B": KLEIN_4B,
    "klein 4B, no recompute": [*KLEIN_4B, "memory.checkpointing=none"],
    "klein 4B, all offloaded": [*KLEIN_4B, "memory.offload_blocks=1.0", "memory.offload_activations=true"],
    "klein 9B, int8": KLEIN_9B,
    "dev, nf4": ["model=dev", "precision=nf4"],
}
FROZEN = "adapter.init=SAVED/16 adapter.init_mode=frozen"
OPTIONS = {
    "none": "",
    "adapter.init_mode=frozen": FROZEN,
    "the same, of rank 128": FROZEN.replace("16", "128"),
    "adapter.dtype=bf16": "adapter.dtype=bf16",
    "adapter=tlora": "adapter=tlora",
    "target=slider": "target=slider target.positive=old target.negative=young",
    "target=contrastive": "target=contrastive",
    "preservation=class": "preservation=class",
    "preservation=blank": "preservation=blank",
    "loss.unmasked_prior": "loss.unmasked_prior=0.5 dataset.mask=alpha",
    "loss=dpo": "loss=dpo dataset=preference",
    "buckets.each_resolution": "buckets.resolution=[512,1024] buckets.each_resolution=true",
}


@dataclass(frozen=True)
class Case:
    """A configuration: `option` on `base`, with these overrides."""

    base: str
    option: str
    overrides: Sequence[str]

    @property
    def name(self) -> str:
        return f"{self.base}: {self.option}"


CASES = [
    Case(base, option, [*RUN, *given, *overrides.split()])
    for base, given in BASES.items()
    for option, overrides in OPTIONS.items()
    if (base, option) != ("dev, nf4", "target=contrastive")  # dev takes the guidance scale as an input
] + [
    Case("klein 4B", "sample.model", [*RUN, *KLEIN_4B, *SAMPLES, "sample.model=klein_4b"]),
    *(
        Case("klein 9B, int8", option, [*RUN, *KLEIN_9B, *SAMPLES, "sample.model=klein_9b", *overrides.split()])
        for option, overrides in (
            ("sample.model", ""),
            ("sample.model, frozen, bf16", f"{FROZEN} adapter.dtype=bf16"),
        )
    ),
    Case(
        "klein 9B, int8",
        "model=klein_9b_kv, a reference",
        [*RUN, "model=klein_9b_kv", "precision=int8", "dataset=pairs", *SAMPLES],
    ),
]


def composed(overrides: Sequence[str]) -> Any:
    with hydra.initialize_config_dir(str(CONFIG), version_base="1.3"):
        return hydra.compose("train", list(overrides))


# ------------------------------------------------------------------ what stands for data and weights


@dataclass(frozen=True)
class Samples:
    """Stands for the loader of a run, and for its cache: latents, masks and embeddings of the right shapes."""

    config: RunConfig
    has_reference: bool

    @property
    def batch_size(self) -> int:
        return self.config.settings.batch_size

    def micro_batches(self, step: int) -> list[Batch]:
        config, count = self.config, self.batch_size
        resolutions = config.buckets.resolutions[::-1]
        side = resolutions[step % len(resolutions)] // 16
        seen, captions = config.settings.reference_resolution // 16, [CAPTION] * count
        return [
            Batch(
                latents=torch.zeros(count, 128, side, side),
                references=[torch.zeros(count, 128, seen, seen)] * self.has_reference,
                embeddings=self.embeddings(captions),
                captions=captions,
                indices=list(range(count)),
                positions=list(range(count)),
                mask=torch.ones(count, 1, side, side) if config.loss.unmasked_prior else None,
                rejected=torch.zeros(count, 128, side, side) if isinstance(config.loss, DPO) else None,
            )
        ]

    def embeddings(self, prompts: Sequence[str]) -> Tensor:
        config = self.config
        length = config.text_encoder.length or config.variant.text.length
        return torch.zeros(len(prompts), length, config.variant.transformer.text_width, dtype=config.precision.dtype)


def transformer_without_values(
    source: ModelSource, place: torch.device | str, precision: Precision, *, host: Sequence[str] = (), **_: Any
) -> Transformer:
    return empty_transformer(source.variant.transformer, precision, torch.device(place), host)


def autoencoder_without_values(source: ModelSource, place: torch.device, *_: Any) -> Autoencoder:
    with torch.device("meta"):
        model = Autoencoder(source.variant.autoencoder)
    return model.to_empty(device=place).eval().requires_grad_(False)


def save_zeros(wrapped: peft.PeftModel, folder: Path, **given: Any) -> None:
    """Save an adapter as `adapters.save` does, with zeros: the host reads nothing of a large tensor on the device."""
    layers = adapter_layers(wrapped).values()
    tensors = [tensor for layer in layers for tensor in layer_adapter_tensors(layer)]
    on_device = [tensor.data for tensor in tensors]
    for tensor in tensors:
        tensor.data = torch.zeros(tensor.shape, dtype=tensor.dtype)
    save(wrapped, folder, **given)
    for tensor, data in zip(tensors, on_device, strict=True):
        tensor.data = data


@contextmanager
def no_files() -> Iterator[None]:
    """Context manager in which models have no values, so that none are read, and blocks stream from little memory."""
    streaming = partial(offload, copier=RepeatedCopier)
    with ExitStack() as stack:
        for place, name, value in (
            ("train.stages.model", "load_transformer", transformer_without_values),
            ("train.stages.model", "load_autoencoder", autoencoder_without_values),
            ("train.stages.model", "tensor_files", lambda *_: None),
            ("train.stages.model", "caution", lambda _: ""),  # it looks for large values
            ("train.stages.model", "offload", streaming),
            ("flux2.pipeline", "load_transformer", transformer_without_values),
            ("flux2.pipeline", "offload", streaming),
            ("flux2.adapters", "save", save_zeros),
        ):
            stack.enter_context(mock.patch(f"{place}.{name}", value))
        yield


def save_lora(model: str, rank: int, folder: Path) -> None:
    """Write a LoRA of this rank for the model called `model`."""
    transformer = empty_transformer(VARIANTS[model].transformer, Precision(torch.bfloat16), CUDA)
    save_zeros(adapters.attach(transformer, rank=rank), folder, base=model)


# ------------------------------------------------------------------ running a case


@dataclass
class Peaks:
    """The peaks of each phase, allocated and reserved."""

    found: dict[str, tuple[int, int]] = field(default_factory=dict)

    @contextmanager
    def of(self, phase: str) -> Iterator[None]:
        torch.cuda.reset_peak_memory_stats(CUDA)
        yield
        now = torch.cuda.max_memory_allocated(CUDA), torch.cuda.max_memory_reserved(CUDA)
        before = self.found.get(phase, (0, 0))
        self.found[phase] = max(before[0], now[0]), max(before[1], now[1])


def train(config: RunConfig, samples: Samples, folder: Path) -> Peaks:
    """Return the peaks of some steps, each as in the loop of train/loop.py, and of a sample grid if there is one."""
    model = model_stage.load_model(config, RunLocation(folder))
    optimizer = model.build_optimizer(config)
    groups = config.timesteps, config.loss, config.weighting, config.preservation
    objective = Objective(config.settings.seed, *groups, None, config.target, config.guidance, config.autocast)
    sampler = model_stage.load_sampler(config, cast(Any, samples), model.peft_model)
    trainer = Trainer(
        settings=config.settings,
        processes=config.processes,
        peft_model=model.peft_model,
        optimizer=optimizer,
        learning_rate=LearningRate(optimizer, config.schedule, STEPS),
        evaluation_weights=EvaluationWeights(model.trained_parameters, optimizer, config.settings.ema_decay),
        objective=objective,
        loader=cast(Loader, samples),
        sample_names=[],
        checkpointer=cast(Any, None),
        metrics=cast(Any, None),
        folder=folder,
        sampler=sampler,
    )
    guard, peaks, parameters = trainer.update_guard(untrained=True), Peaks(), model.trained_parameters
    model.peft_model.train()
    for step in range(STEPS):
        with peaks.of("step"):
            losses = trainer.accumulate_gradients(model.peft_model, step)
        with peaks.of("update"):
            norm = clip(parameters, config.settings.max_grad_norm)
            skipped = guard.update(losses.total, norm)
        clear_gradients(parameters)
        trainer.evaluation_weights.update(skipped)
    if sampler is not None:
        with peaks.of("samples"), trainer.evaluation():
            sampler.rows(model.base.transformer)
    trainer.prefetcher.close()
    return peaks


def simulate(case: Case) -> dict[str, Any]:
    """Return predicted and simulated memory of the phases of a case, in GB."""
    with tempfile.TemporaryDirectory() as name, no_files():
        folder, overrides = Path(name), list(case.overrides)
        for i, word in enumerate(case.overrides):
            if found := SAVED.search(word):
                overrides[i] = SAVED.sub(str(folder), word)
                model = next(one for one in overrides if one.startswith("model=")).partition("=")[2]
                save_lora(model, int(found[1]), folder)
                free_memory(CUDA)
        config = load_config(composed(overrides))
        prediction = Planner(workload_of(config, on_gpu=True)).predict(choice_of(config.composed["memory"]))
        peaks = train(config, Samples(config, has_reference="dataset=pairs" in overrides), folder)
        free_memory(CUDA)
        before = torch.cuda.memory_allocated(CUDA)
        torch._C._cuda_clearCublasWorkspaces()
        workspace = before - torch.cuda.memory_allocated(CUDA)
    phases = {}
    for phase, (peak, reserved) in peaks.found.items():
        predicted = max(prediction.total(one) for one in prediction.phases if one in PARTS.get(phase, [phase]))
        gigabytes = predicted - LIBRARIES, peak - workspace, reserved
        phases[phase] = {
            **dict(zip(("predicted", "simulated", "reserved"), (one / 1e9 for one in gigabytes), strict=True)),
            "predicted / simulated": gigabytes[0] / gigabytes[1],
        }
    return {"overrides": list(case.overrides), "GB": phases}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="run only cases whose name contains this, e.g. 'dev, nf4'")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--case", action="store_true", help=argparse.SUPPRESS)  # in the process that runs them
    options = parser.parse_args()
    if options.case:
        device().simulated_gpu_answer_ones(1)
        prepare_hydra()
        for case in CASES:
            if options.only in case.name:
                print(json.dumps({case.name: simulate(case)}), flush=True)
                free_memory(CUDA)
        os._exit(0)  # the memory that stands for the host's is not worth unmapping
    result: dict[str, Any] = {
        "what": "steps of one image of 1024 px, rank 16, AdamW, with options of training; simulated",
        "hardware": "simulated GPU (tests/simulated_gpu)",
        "versions": {"torch": torch.__version__},
        "runs": json.loads(options.out.read_text())["runs"] if options.only and options.out.exists() else {},
    }
    command = [sys.executable, __file__, "--case", "--only", options.only]
    with subprocess.Popen(command, env=environment(gb=150, context_mb=0), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):
                found = json.loads(line)
                result["runs"] |= found
                print(line, end="", flush=True)
                write_result(options.out, result)
    if process.returncode:
        sys.exit(process.returncode)
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
