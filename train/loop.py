"""The training loop, top to bottom.

Data, model and settings arrive ready (train/run.py makes them from the configuration); this file is what happens at a
step: read a batch, add noise, predict, compare, update, and every so often log, validate, sample and save.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import peft
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from data.loader import Loader
from data.sampler import derived_generator
from flux2 import adapters
from flux2.model import Transformer
from flux2.variants import Variant
from train import checkpoint
from train.loss import LogitNormal, Losses, Preservation, Uniform, add_noise, is_number, training_loss
from train.optim import Schedule, set_rate
from train.outofmemory import OutOfMemory, watched
from train.processes import OutOfStep, Processes
from train.resume import Place
from train.stopping import Interrupted, StopRequest, stop_requests
from train.tracking import Metrics, warn
from train.validate import FixedNoiseLoss, Sampler, check_count


@dataclass(frozen=True)
class LoopSettings:
    """The run-level numbers of conf/train.yaml that the loop reads. An interval of 0 is off."""

    seed: int = 0
    steps: int = 300
    gradient_accumulation: int = 1
    max_grad_norm: float = 1.0
    guidance: float | None = None
    log_every: int = 10
    checkpoint_every: int = 250
    sample_every: int = 250
    validate_every: int = 50

    def __post_init__(self) -> None:
        for key in ("seed", "log_every", "checkpoint_every", "sample_every", "validate_every"):
            check_count(key, getattr(self, key))
        if self.seed >= 2**63:
            raise ValueError(f"seed={self.seed!r} must be below 2 ** 63")
        for key in ("steps", "gradient_accumulation"):
            check_count(key, getattr(self, key), 1)
        if not is_number(self.max_grad_norm, low=0):
            raise ValueError(f"max_grad_norm={self.max_grad_norm!r} must be a number from 0 (0 is off)")
        if self.guidance is not None and not is_number(self.guidance, low=0):
            raise ValueError(f"guidance={self.guidance!r} must be a number from 0, or null")


class TrainingError(ValueError):
    """Training cannot go on; the message says what is saved and what to do."""


def peak_memory_gb(device: torch.device) -> float:
    """The most memory held so far: on the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


@dataclass
class Training:
    """What a run consists of. `run` is the loop; the rest are the things it does every so often.

    Attributes:
        base: what the adapter's files name as its base model.
        wrapped: PEFT's wrapper around the transformer.
        loader: gives this process's micro-batches of a step.
        begin: called by the main process once the checkpoint was read, before anything is written.
        plain: embeddings (T, D) of the prompts of `preservation`.
        place: where the run writes, and what it goes on from.
        sampler, validate: None where nothing is sampled or validated.
        autocast: the dtype of matrix products if it is not that of the adapter.
    """

    settings: LoopSettings
    processes: Processes
    variant: Variant
    base: str
    wrapped: peft.PeftModel
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    timesteps: Uniform | LogitNormal
    preservation: Preservation
    loader: Loader
    plain: dict[str, Tensor]
    place: Place
    metrics: Metrics
    begin: Callable[[], None] = lambda: None
    sampler: Sampler | None = None
    validate: FixedNoiseLoss | None = None
    autocast: torch.dtype | None = None
    whole: int | None = field(default=None, init=False)  # finished steps; None while an update is under way
    saved: int | None = field(default=None, init=False)  # steps of the last checkpoint of this process

    @property
    def accelerator(self) -> Accelerator:
        return self.processes.accelerator

    @property
    def transformer(self) -> Transformer:
        return self.wrapped.get_base_model()

    @property
    def parts(self) -> dict[str, checkpoint.Stateful]:
        """What a checkpoint keeps beside the adapter; after it, they are restored in this order."""
        return {"optimizer": self.optimizer}

    @property
    def guidance(self) -> float | None:
        """The guidance value that the model is fed, if it takes one."""
        if not self.variant.transformer.guidance:
            return None
        given = self.settings.guidance
        return self.variant.training_guidance if given is None else given

    def run(self) -> Path:
        """Train to the last step; returns the folder of the finished adapter.

        Raises:
            TrainingError: the loss or its gradient is not finite, or the adapter cannot be written.
            Interrupted: after SIGINT, SIGTERM or SIGHUP, with a checkpoint of the last whole step saved.

        To any other error a note is added that says what became of the last whole step.
        """
        settings, accelerator = self.settings, self.accelerator
        model = self.processes.wrap(self.wrapped)
        parameters = adapters.adapter_parameters(self.wrapped)
        rate = self.optimizer.param_groups[0]["lr"]
        if self.place.checkpoint is not None:
            checkpoint.load(self.place.checkpoint, self.wrapped, self.parts)
        if accelerator.is_main_process:
            self.begin()
        start = self.place.step
        images = self.loader.sampler.global_batch
        average = 0.0
        bar = tqdm(
            total=settings.steps,
            initial=start,
            unit="step",
            disable=not accelerator.is_main_process,
            dynamic_ncols=True,
        )
        with closing(self.metrics), closing(self.loader), bar, stop_requests() as stop, self.rescued():
            self.whole = start
            if start == 0:
                self.look(0, {})
                bar.unpause()  # or the sheet would count as a part of the first step
            for step in range(start, settings.steps):
                began = time.perf_counter()
                self.wrapped.train()
                torch.manual_seed(int(torch.randint(2**31, (), generator=self.generator(step))))  # for LoRA dropout
                with watched(f"in the forward and backward of step {step + 1}", "step", accelerator.device):
                    losses = self.accumulate(model, step)
                clip = settings.max_grad_norm or float("inf")
                norm = nn.utils.clip_grad_norm_(parameters, clip)
                self.check_finite(step, losses, norm)
                set_rate(self.optimizer, rate * self.schedule.factor(step, settings.steps))
                self.whole = None
                with watched(f"in the optimizer's update of step {step + 1}", "update", accelerator.device):
                    self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)

                self.whole = done = step + 1
                values = self.values(losses, norm, images / (time.perf_counter() - began))
                average = values["loss"] if step == start else 0.95 * average + 0.05 * values["loss"]
                bar.set_postfix_str(f"loss {average:.4f}, {values['images_per_second']:.2f} images/s", refresh=False)
                bar.update()
                self.look(done, values if self.is_due(settings.log_every, done) else {})
                if done < settings.steps:
                    if self.is_due(settings.checkpoint_every, done):
                        self.save(done)
                    if self.must_stop(stop):
                        place = self.save(done)
                        saved = f"saved in {place}; go on with resume={self.place.folder}"
                        raise Interrupted(
                            f"stopped after step {done}, {saved if place else self.last()}", stop.number or 0
                        )
            return self.finish()

    def accumulate(self, model: nn.Module, step: int) -> Losses:
        """Gradients of one step, over its micro-batches and all processes; returns the mean losses of all."""
        batches = self.loader.micro_batches(step)
        parts = []
        for i, cpu_batch in enumerate(batches):
            batch = cpu_batch.to(self.accelerator.device, torch.float32)
            noised = add_noise(batch, self.timesteps, self.settings.seed, step)
            plain = None
            if self.preservation.active:
                held = batch.positions[: self.preservation.samples]
                chosen = self.preservation.choose(self.settings.seed, step, held)
                plain = torch.stack([self.plain[prompt] for prompt in chosen]).to(batch.embeddings)
            is_last = i == len(batches) - 1  # only then do processes exchange gradients
            with nullcontext() if is_last else self.accelerator.no_sync(model):
                with self.precision():
                    losses = training_loss(
                        model, noised, batch.embeddings, self.guidance, self.preservation.weight, plain
                    )
                self.accelerator.backward(losses.total / len(batches))
            parts.append(torch.stack([losses.total.detach(), losses.flow, losses.preservation]))
        self.processes.average_gradients(self.wrapped)
        total, flow, preservation = self.accelerator.reduce(torch.stack(parts).mean(0), "mean")
        return Losses(total, flow, preservation)

    def precision(self) -> torch.autocast:
        """bfloat16 autocast if the base is in bfloat16; the adapter and the losses stay in float32."""
        return torch.autocast(
            self.accelerator.device.type, self.autocast or torch.bfloat16, enabled=self.autocast is not None
        )

    def generator(self, step: int) -> torch.Generator:
        return derived_generator(self.settings.seed, "layers", step, self.accelerator.process_index)

    def check_finite(self, step: int, losses: Losses, norm: Tensor) -> None:
        if torch.isfinite(losses.total) and torch.isfinite(norm):
            return
        remedy = (
            "No update was made yet, so it is not the rate alone: try precision=fp32, and look at the model's files."
            if step == 0
            else f"What was learned may be ruined already: {self.last(advice=False)}. Start anew with a lower "
            "optimizer.lr, and if that does not help, with precision=fp32."
        )
        raise TrainingError(
            f"step {step + 1}: the loss is {losses.total.item():.4g} and its gradient's norm {norm.item():.4g}, which "
            f"is not finite. {remedy}"
        )

    def values(self, losses: Losses, norm: Tensor, images_per_second: float) -> dict[str, float]:
        held = {"preservation_loss": losses.preservation.item()} if self.preservation.active else {}
        return {
            "loss": losses.flow.item(),
            **held,
            "lr": self.optimizer.param_groups[0]["lr"],
            "grad_norm": norm.item(),
            "images_per_second": round(images_per_second, 4),
            "peak_memory_gb": round(peak_memory_gb(self.accelerator.device), 3),
        }

    def is_due(self, interval: int, done: int) -> bool:
        """Whether something is due after `done` steps: at its interval and at the end; never with an interval of 0."""
        return interval > 0 and (done % interval == 0 or done == self.settings.steps)

    def look(self, done: int, values: dict[str, float]) -> None:
        """After `done` steps: log `values`, validate and sample where it is due; off the clock.

        All processes validate and sample, each its share; the main one logs.
        """
        main = self.accelerator.is_main_process
        self.wrapped.eval()
        device = self.accelerator.device
        if self.validate is not None and self.is_due(self.settings.validate_every, done):
            with watched(f"in the validation after step {done}", "validation", device), self.precision():
                values = values | {"validation_loss": self.validate(self.transformer, self.guidance)}
        if values and main:
            self.metrics.log(done, **values)
        if self.sampler is not None and self.is_due(self.settings.sample_every, done):
            file = self.place.folder / "samples" / f"step_{done:06d}.png"
            with self.harmless(f"the sheet of pictures after step {done}"):
                with watched(f"while sampling after step {done}", "samples", device):
                    self.sampler.sheet(self.transformer, file, write=main)
                if main:
                    self.metrics.picture(done, file)

    @contextmanager
    def harmless(self, what: str) -> Iterator[None]:
        """Within this context what fails is a warning, but for memory that does not suffice."""
        try:
            yield
        except (OutOfMemory, OutOfStep):
            raise
        except Exception as error:  # a full disk, a picture library: no reason to lose the training
            if hasattr(error, "saved"):
                raise
            if self.accelerator.is_main_process:
                warn(f"{what} failed ({type(error).__name__}: {error}); training goes on")

    def must_stop(self, stop: StopRequest) -> bool:
        """Whether any process was asked to stop; all of them get the same answer."""
        return self.in_any_process(bool(stop))

    def in_any_process(self, flag: bool) -> bool:
        """Whether `flag` is set in any process."""
        flags = torch.tensor([float(flag)], device=self.accelerator.device)
        return bool(self.accelerator.reduce(flags, "sum").item())

    def save(self, done: int) -> Path | None:
        """Write the checkpoint of `done` steps, waiting for it in all processes; None, after a warning, if it fails."""
        failed = False
        if self.accelerator.is_main_process:
            try:
                self.write(done)
            except checkpoint.NotSaved as error:
                failed = True
                warn(str(error))
        return None if self.in_any_process(failed) else self.place.folder / "checkpoints" / f"step_{done:06d}"

    def write(self, done: int) -> Path:
        """Write the checkpoint of `done` steps. Called by the main process alone."""
        place = checkpoint.save(
            self.place.folder,
            done,
            self.wrapped,
            self.parts,
            base=self.base,
            licence=self.variant.licence,
            images_per_step=self.loader.sampler.global_batch,
        )
        self.saved = done
        return place

    @contextmanager
    def rescued(self) -> Iterator[None]:
        """Within this context an error has the last whole step saved, and a note that says so."""
        try:
            yield
        except Interrupted:
            raise
        except KeyboardInterrupt as error:
            raise Interrupted(f"stopped at once without saving; {self.last()}") from error
        except OutOfMemory as error:
            error.saved = self.rescue(self.whole)
            raise
        except Exception as error:
            if not isinstance(error, TrainingError) and not hasattr(error, "saved"):  # these say it themselves
                error.add_note(self.rescue(self.whole))
            raise

    def rescue(self, done: int | None) -> str:
        """Save the state of `done` steps after an error, if possible; says what became of it.

        Other processes may wait for this one somewhere else, so it waits for none of them. None: an update was under
        way, and there is no whole state.
        """
        self.optimizer.zero_grad(set_to_none=True)
        last = f"{self.last()[0].upper()}{self.last()[1:]}."
        if done is None or done == self.place.step:
            return last
        if not self.accelerator.is_main_process:
            return f"Process {self.accelerator.process_index} failed, and saves nothing. {last}"
        if done != self.saved:
            try:
                self.write(done)
            except (OSError, RuntimeError, MemoryError) as error:
                return f"The state after step {done} could not be saved ({error}). {last}"
        place = self.place.folder / "checkpoints" / f"step_{done:06d}"
        return f"The state after step {done} is saved in {place}; go on with resume={self.place.folder}."

    def last(self, *, advice: bool = True) -> str:
        """Which checkpoint is the last."""
        found = checkpoint.checkpoints(self.place.folder)
        place = found[-1] if found else self.place.checkpoint
        if place is None:
            return "no checkpoint was saved yet"
        return f"the last checkpoint is {place}" + (f"; go on with resume={place.parent.parent}" if advice else "")

    def finish(self) -> Path:
        """The last checkpoint and the finished adapter."""
        if self.settings.checkpoint_every:
            self.save(self.settings.steps)
        folder = self.place.folder / "adapter"
        if self.accelerator.is_main_process:
            try:
                adapters.save(self.wrapped, folder, base=self.base, licence=self.variant.licence)
            except checkpoint.NOT_WRITTEN as error:
                saved = self.rescue(self.settings.steps)
                raise TrainingError(
                    f"all {self.settings.steps} steps are done, but the adapter cannot be written to {folder} "
                    f"({error}). {saved} Make room there first."
                ) from error
        self.accelerator.wait_for_everyone()
        return folder
