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
from flux2.adapters.loading import scaled
from flux2.utils.device import seed_devices
from train.checkpoints.checkpointer import Checkpointer
from train.config.settings import LoopSettings
from train.distributed.processes import Processes
from train.objective.objective import Losses, MicroBatch, Objective
from train.optim.ema import EvaluationWeights
from train.optim.schedules import LearningRate
from train.optim.update_guard import Reading, UpdateGuard, clear_gradients, clip
from train.reports.run_report import LiveReport
from train.tracking.metrics import Metrics
from train.utils.console import warn
from train.utils.memory import explain_oom
from train.utils.prefetch import Prefetcher
from train.utils.progress import Progress
from train.utils.signals import sample_requests, stop_requests
from train.utils.throughput import Clock
from train.validation.loss import FixedNoiseLoss
from train.validation.samples import Sampler


@dataclass
class Trainer:
    """Everything a run trains with. `run` is the loop.

    Attributes:
        peft_model: PEFT's wrapper around the transformer.
        evaluation_weights: The weights that are validated, sampled and saved: the trained ones or their average.
    """

    settings: LoopSettings
    processes: Processes
    peft_model: peft.PeftModel
    optimizer: torch.optim.Optimizer
    learning_rate: LearningRate
    evaluation_weights: EvaluationWeights
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
        self.devices = [self.device, *dict.fromkeys(self.peft_model.get_base_model().devices.values())]
        self.report = LiveReport(self.folder)
        self.prefetcher: Prefetcher[list[MicroBatch]] = Prefetcher(
            lambda step: self.objective.micro_batches(self.loader, step)
        )

    def run(self, first_step: int) -> Path:
        """Train from `first_step`, counted from 0, to the last; return the folder of the finished adapter.

        Raises:
            TrainingError: Losses or gradients are not finite, or the adapter cannot be written.
            Interrupted: A stop signal arrived; a checkpoint of the last finished step is saved.
        """
        settings, checkpointer, is_due = self.settings, self.checkpointer, self.settings.is_due
        model = self.processes.wrap(self.peft_model)
        parameters = adapter_parameters(self.peft_model)
        guard = self.update_guard(untrained=first_step == 0)
        progress = self.progress = Progress(settings.steps, first_step, shown=self.is_main)
        with (
            stop_requests() as stop_request,  # also while trackers finish, which may wait for a network
            sample_requests(self.folder / "sample") as sample_request,
            closing(self.metrics),
            closing(self.prefetcher),
            closing(progress),
            checkpointer.rescue_on_error(first_step),
        ):
            self.peft_model.train()
            if checkpointer.unlogged is not None:  # the base, or the step whose logging an error ended
                with progress.paused():
                    self.validate_and_sample(first_step, checkpointer.unlogged)
            clock, checkpoint_pending, sample_pending = Clock(self.devices), False, False
            for step in range(first_step, settings.steps):
                steps_done = step + 1  # once this step is finished

                # 1. Gradients of one step, over its micro-batches and all processes.
                self.seed_dropout(step)
                with explain_oom(f"in the forward and backward of step {steps_done}", "step", self.device):
                    losses = self.accumulate_gradients(model, step)

                # 2. Clip, set the learning rate, and update unless loss or gradient is not finite.
                norm = clip(parameters, settings.max_grad_norm)
                self.learning_rate.set(step)
                checkpointer.completed_steps = None
                with explain_oom(f"in the optimizer's update of step {steps_done}", "update", self.device):
                    skipped = guard.update(losses.total, norm)  # with a fused optimizer, the host does not wait
                clear_gradients(parameters)
                self.evaluation_weights.update(skipped)
                checkpointer.completed_steps = steps_done

                # 3. At intervals: log, validate, sample, save. With a fused optimizer, the host waits only here.
                guard.queue_reading(step, losses.total, norm, stop_request, sample_request.take())
                checkpoint_pending = checkpoint_pending or is_due("checkpoint_every", steps_done)
                needs_host_sync = checkpoint_pending or sample_pending or self.needs_host_sync(steps_done)
                readings = guard.read_finished_steps(wait=needs_host_sync)
                clock.images += self.loader.sampler.size(step)
                progress.update()
                self.log_skipped_steps(readings)
                if needs_host_sync:
                    with clock.paused(), progress.paused():
                        values = self.values(losses, readings[-1], clock) if is_due("log_every", steps_done) else {}
                        self.validate_and_sample(steps_done, values, sample_now=sample_pending)
                        if values:
                            progress.log(values)
                        # not while updates are being skipped: the checkpoint is saved after the next good step
                        if checkpoint_pending and not guard.skipped and steps_done < settings.steps:
                            progress.show("writing a checkpoint")
                            checkpointer.save(steps_done)
                            checkpoint_pending = False
                sample_pending = any(reading.sample for reading in readings)  # drawn after the next step

                # 4. Stop if a signal asked for it, in all processes at the same step.
                if steps_done < settings.steps and (number := guard.find_stop_signal(stop_request, readings)):
                    checkpointer.save_and_raise_interrupted(steps_done, number)
            guard.raise_if_last_steps_skipped()
            if settings.checkpoint_every:
                checkpointer.save(settings.steps)
            return checkpointer.finish(settings.steps)

    def update_guard(self, *, untrained: bool) -> UpdateGuard:
        """Return the guard that updates the adapter, and skips updates that are not finite."""

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
        count, rows = self.settings.gradient_accumulation, list[Tensor]()  # (total, flow, preservation ...), weighted
        prior_losses = [torch.zeros((), device=self.device)]
        for i, micro_batch in enumerate(micro_batches):
            inputs = self.objective.prepare(micro_batch, self.device)
            if i == 0 and step + 1 < self.settings.steps:
                self.prefetcher.begin(step + 1)
            is_last = i == len(micro_batches) - 1  # DDP averages gradients then; for a sharded base, see below
            scale = scaled(self.peft_model, inputs.scale) if inputs.scale != 1 else nullcontext()
            with nullcontext() if is_last else self.accelerator.no_sync(model), scale:  # which recomputation sees too
                losses = self.objective.losses(model, inputs)
                self.accelerator.backward(losses.total * micro_batch.weight / count)
            if micro_batch.is_prior:
                prior_losses.append(micro_batch.weight * losses.flow / count)
            else:
                parts = [losses.total.detach(), losses.flow, losses.preservation, *losses.preference]
                rows.append(micro_batch.weight * torch.stack(parts))
            del inputs, losses  # what the forward kept is freed before the next one
        self.processes.average_gradients(self.peft_model)
        mean = torch.cat([torch.stack(rows).sum(0) / count, torch.stack(prior_losses).sum()[None]])
        total, flow, preservation, *preference, prior = self.accelerator.reduce(mean, "mean")
        return Losses(total + prior, flow, preservation, prior, preference)

    def seed_dropout(self, step: int) -> None:
        """Seed the dropout of layers, per process."""
        generator = derived_generator(self.settings.seed, "layers", step, self.accelerator.process_index)
        seed_devices(int(torch.randint(2**31, (), generator=generator)), self.devices)

    def values(self, losses: Losses, reading: Reading, clock: Clock) -> dict[str, float]:
        """Return the metrics to log for a step; for a step without an update, only the finite ones."""
        numbers = self.objective.metrics(losses) | {
            "lr": self.learning_rate.value,
            "grad_norm": reading.norm,
            "images_per_second": round(clock.take(), 4),
            **clock.peak_memory(),
        }
        finite = {key: value for key, value in numbers.items() if math.isfinite(value)}
        return finite | {"skipped": 1} if reading.bad else numbers

    def log_skipped_steps(self, readings: Sequence[Reading]) -> None:
        """Log skipped steps that `log_every` does not log."""
        for reading in readings:
            if reading.bad and self.is_main and not self.settings.is_due("log_every", reading.step + 1):
                self.metrics.log(reading.step + 1, skipped=1)

    def needs_host_sync(self, steps_done: int) -> bool:
        """Return whether the loop logs, validates, samples or ends after `steps_done` steps."""
        keys = ("log_every", "validate_every", "sample_every")
        return steps_done == self.settings.steps or any(self.settings.is_due(key, steps_done) for key in keys)

    def validate_and_sample(self, steps_done: int, values: dict[str, float], *, sample_now: bool = False) -> None:
        """Log `values`, and validate and sample if due after `steps_done` steps; each process does its share."""
        self.checkpointer.unlogged = values
        if self.validator is not None and self.settings.is_due("validate_every", steps_done):
            self.progress.show("validating")
            oom_context = explain_oom(f"in the validation after step {steps_done}", "validation", self.device)
            with oom_context, self.evaluation(), self.objective.autocast(self.device):
                losses = self.validator(self.peft_model.get_base_model(), self.objective.guidance)
            values = values | self.validator.report(losses)
            if self.is_main:
                self.metrics.validated(steps_done, self.validator.record(losses))
        if values and self.is_main:
            self.metrics.log(steps_done, **values)
        self.checkpointer.note_logged(steps_done, values)
        if self.sampler is not None and (sample_now or self.settings.is_due("sample_every", steps_done)):
            self.progress.show("drawing a sample grid")
            file = self.folder / "samples" / f"step_{steps_done:06d}.png"
            with explain_oom(f"while sampling after step {steps_done}", "samples", self.device), self.evaluation():
                written = self.sampler.write_or_warn(self.peft_model.get_base_model(), file, write=self.is_main)
            if written and self.is_main:
                self.metrics.picture(steps_done, file)
        elif sample_now and self.is_main:
            warn("a sample grid was asked for, but this run has none: set sample.prompts or captions, and sample_every")
        if "validation_loss" in values and self.is_main and 0 < steps_done < self.settings.steps:
            self.report.update()

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Context manager in which the adapter has its evaluation weights and no dropout."""
        self.peft_model.eval()
        try:
            with self.evaluation_weights.swapped():
                yield
        finally:
            self.peft_model.train()  # here and not before each step: walking the modules is slow for a small model
