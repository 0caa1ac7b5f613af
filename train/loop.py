"""The training loop, top to bottom.

train/run.py prepares data, model and settings. Each step reads a batch, adds noise, predicts, computes the loss and
updates the adapter; at intervals it logs, validates, samples and saves.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import peft
import torch
from torch import Tensor, nn

from data.loader import Loader
from data.sampler import derived_generator
from flux2.adapters import adapter_parameters
from train.checkpoints.checkpointer import Checkpointer
from train.config.settings import LoopSettings
from train.distributed.processes import Processes, ProcessesDiverged
from train.objective.loss import Losses
from train.objective.objective import MicroBatch, Objective
from train.optim.ema import EvaluationWeights
from train.optim.schedules import LearningRate
from train.optim.update_guard import Reading, UpdateGuard, clip
from train.tracking.metrics import Metrics
from train.utils.console import warn
from train.utils.memory import OutOfMemory, explain_oom
from train.utils.prefetch import Prefetcher
from train.utils.progress import Progress
from train.utils.signals import stop_requests
from train.utils.throughput import Clock, peak_memory_gb
from train.validation.loss import FixedNoiseLoss
from train.validation.samples import Sampler


@dataclass
class Trainer:
    """Everything a run trains with. `run` is the loop.

    Attributes:
        peft_model: PEFT's wrapper around the transformer.
        weights: The adapter's weights that are validated, sampled and saved: the trained ones or their average.
    """

    settings: LoopSettings
    processes: Processes
    peft_model: peft.PeftModel
    optimizer: torch.optim.Optimizer
    learning_rate: LearningRate
    weights: EvaluationWeights
    objective: Objective
    loader: Loader
    sample_names: Sequence[str]
    checkpointer: Checkpointer
    metrics: Metrics
    folder: Path
    validator: FixedNoiseLoss | None = None
    sampler: Sampler | None = None

    def __post_init__(self) -> None:
        self.accelerator = self.processes.accelerator
        self.is_main, self.device = self.accelerator.is_main_process, self.accelerator.device
        self.prefetcher: Prefetcher[list[MicroBatch]] = Prefetcher(
            lambda step: self.objective.micro_batches(self.loader, step)
        )

    def run(self, start: int) -> Path:
        """Train from `start` finished steps to the last; return the folder of the finished adapter.

        Raises:
            TrainingError: Losses or gradients are not finite, or the adapter cannot be written.
            Interrupted: A stop signal arrived; a checkpoint of the last finished step is saved.
        """
        settings, checkpointer, is_due = self.settings, self.checkpointer, self.settings.is_due
        model = self.processes.wrap(self.peft_model)
        parameters = adapter_parameters(self.peft_model)
        guard = self.update_guard(untrained=start == 0)
        progress = Progress(settings.steps, start, shown=self.is_main)
        with (
            closing(self.metrics),
            closing(self.prefetcher),
            closing(progress),
            stop_requests() as stop_request,
            checkpointer.rescue_on_error(start),
        ):
            self.peft_model.train()
            if start == 0:
                with progress.paused():
                    self.validate_and_sample(0, {})
            clock, checkpoint_pending = Clock(), False
            for step in range(start, settings.steps):
                done = step + 1

                # 1. Gradients of one step, over its micro-batches and all processes.
                self.seed_dropout(step)
                with explain_oom(f"in the forward and backward of step {done}", "step", self.device):
                    losses = self.accumulate_gradients(model, step)

                # 2. Clip, set the learning rate, and update unless loss or gradient is not finite.
                norm = clip(parameters, settings.max_grad_norm)
                self.learning_rate.set(step)
                checkpointer.completed_steps = None
                with explain_oom(f"in the optimizer's update of step {done}", "update", self.device):
                    skipped = guard.update(losses.total, norm)  # a tensor: the host does not wait for it
                self.optimizer.zero_grad(set_to_none=True)
                self.weights.update(skipped)
                checkpointer.completed_steps = done

                # 3. At intervals: log, validate, sample, save. Only here does the host wait for the device.
                guard.send(step, losses.total, norm, stop_request)
                checkpoint_pending = checkpoint_pending or is_due("checkpoint_every", done)
                needs_host_sync = checkpoint_pending or self.needs_host_sync(done)
                readings = guard.receive(wait=needs_host_sync)
                clock.steps += 1
                progress.update()
                self.log_skipped_steps(readings)
                if needs_host_sync:
                    with clock.paused(), progress.paused():
                        values = self.values(losses, readings[-1], clock) if is_due("log_every", done) else {}
                        self.validate_and_sample(done, values)
                        if values:
                            progress.log(values)
                        # not while updates are being skipped: the checkpoint is saved after the next good step
                        if checkpoint_pending and not guard.skipped and done < settings.steps:
                            checkpointer.save(done)
                            checkpoint_pending = False

                # 4. Stop if a signal asked for it, in all processes at the same step.
                if done < settings.steps and (number := guard.stop(stop_request, readings)):
                    checkpointer.stop(done, number)
            guard.check_end()
            if settings.checkpoint_every:
                checkpointer.save(settings.steps)
            return checkpointer.finish(settings.steps)

    def update_guard(self, *, untrained: bool) -> UpdateGuard:
        """Return what makes the updates, and skips those that are not finite."""

        def names(step: int) -> list[str]:
            class_images = self.objective.prior.samples(step) if self.objective.prior else []
            return [self.sample_names[index] for index in self.loader.sampler.batch(step)] + class_images

        return UpdateGuard(
            self.optimizer,
            self.accelerator,
            max_nonfinite_steps=self.settings.max_nonfinite_steps,
            is_untrained=untrained,
            sample_names=names,
            last_checkpoint=lambda: self.checkpointer.last_checkpoint(advice=False),
        )

    def accumulate_gradients(self, model: nn.Module, step: int) -> Losses:
        """Accumulate the gradients of one step over its micro-batches and all processes; return the mean losses."""
        micro_batches = self.prefetcher.get(step)
        count, samples = self.settings.gradient_accumulation, list[Tensor]()  # (total, flow, preservation) of each
        prior_losses = [torch.zeros((), device=self.device)]
        for i, micro_batch in enumerate(micro_batches):
            inputs = self.objective.prepare(micro_batch, step, self.device)
            if i == 0 and step + 1 < self.settings.steps:
                self.prefetcher.begin(step + 1)
            is_last = i == len(micro_batches) - 1  # only then do processes exchange gradients
            with nullcontext() if is_last else self.accelerator.no_sync(model):
                losses = self.objective.losses(model, inputs)
                self.accelerator.backward(losses.total * micro_batch.weight / count)
            if micro_batch.is_prior:
                prior_losses.append(micro_batch.weight * losses.flow / count)
            else:
                samples.append(torch.stack([losses.total.detach(), losses.flow, losses.preservation]))
            del inputs, losses  # what the forward kept is freed before the next one
        self.processes.average_gradients(self.peft_model)
        mean = torch.cat([torch.stack(samples).mean(0), torch.stack(prior_losses).sum()[None]])
        total, flow, preservation, prior = self.accelerator.reduce(mean, "mean")
        return Losses(total + prior, flow, preservation, prior)

    def seed_dropout(self, step: int) -> None:
        """Seed what layers draw, which is dropout. (`torch.manual_seed` seeds every kind of device, in a ms.)"""
        generator = derived_generator(self.settings.seed, "layers", step, self.accelerator.process_index)
        seed = int(torch.randint(2**31, (), generator=generator))
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def values(self, losses: Losses, reading: Reading, clock: Clock) -> dict[str, float]:
        """Return what is logged of a step; of one without an update, only what is finite."""
        numbers = {"loss": losses.flow.item()}
        if self.objective.preservation.active:
            numbers["preservation_loss"] = losses.preservation.item()
        if self.objective.prior and losses.prior is not None:
            numbers["prior_loss"] = losses.prior.item()
        numbers |= {
            "lr": self.learning_rate.value,
            "grad_norm": reading.norm,
            "images_per_second": round(self.loader.sampler.global_batch * clock.take(), 4),
            "peak_memory_gb": round(peak_memory_gb(self.device), 3),
        }
        if not reading.bad:
            return numbers
        return {key: value for key, value in numbers.items() if math.isfinite(value)} | {"skipped": 1}

    def log_skipped_steps(self, readings: Sequence[Reading]) -> None:
        """Log the steps without an update that are not logged anyway."""
        for reading in readings:
            done = reading.step + 1
            if reading.bad and self.is_main and not self.settings.is_due("log_every", done):
                self.metrics.log(done, skipped=1)

    def needs_host_sync(self, done: int) -> bool:
        """Whether anything but training follows the first `done` steps."""
        keys = ("log_every", "validate_every", "sample_every")
        return done == self.settings.steps or any(self.settings.is_due(key, done) for key in keys)

    def validate_and_sample(self, done: int, values: dict[str, float]) -> None:
        """After `done` steps, log `values`, and validate and sample where that is due; every process does its share."""
        if self.validator is not None and self.settings.is_due("validate_every", done):
            watching = explain_oom(f"in the validation after step {done}", "validation", self.device)
            with watching, self.evaluation(), self.objective.autocast(self.device):
                losses = self.validator(self.peft_model.get_base_model(), self.objective.guidance)
            values = values | self.validator.report(losses)
            self.checkpointer.measured = done, values["validation_loss"]
            if self.is_main:
                self.metrics.validated(done, self.validator.record(losses))
        if values and self.is_main:
            self.metrics.log(done, **values)
        if self.sampler is not None and self.settings.is_due("sample_every", done):
            file = self.folder / "samples" / f"step_{done:06d}.png"
            try:
                with explain_oom(f"while sampling after step {done}", "samples", self.device), self.evaluation():
                    self.sampler.write_grid(self.peft_model.get_base_model(), file, write=self.is_main)
                if self.is_main:
                    self.metrics.picture(done, file)
            except (OutOfMemory, ProcessesDiverged):
                raise
            except Exception as error:  # a full disk, an image library: no reason to lose the training
                if self.is_main:
                    warn(f"sampling after step {done} failed ({type(error).__name__}: {error}); training continues")

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Context manager in which the adapter has its evaluation weights and no dropout."""
        self.peft_model.eval()
        try:
            with self.weights.swapped():
                yield
        finally:
            self.peft_model.train()  # here and not before each step: walking the modules is slow for a small model
