"""The training loop, top to bottom.

Data, model and settings arrive ready (train/run.py makes them from the configuration); this file is what happens at a
step: read a batch, add noise, predict, compare, update, and every so often log, validate, sample and save.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from data.loader import Batch, Loader, onto
from data.sampler import derived_generator
from flux2 import adapters
from flux2.model import Transformer
from flux2.variants import Variant
from train import checkpoint
from train.ahead import Ahead
from train.checks import check_count
from train.ema import Shown
from train.guard import Guard, Reading, clip
from train.keeping import Keeper
from train.loss import Drawn, Losses, Noised, Preservation, add_noise, draw, is_number, training_loss
from train.optim import Schedule, rate_of, set_rate
from train.outofmemory import OutOfMemory, watched
from train.prior import ClassPictures
from train.processes import OutOfStep, Processes
from train.progress import Progress
from train.resume import Place
from train.speed import Clock, peak_memory_gb
from train.stopping import stop_requests
from train.timesteps import Uniform
from train.tracking import Metrics, warn
from train.validate import FixedNoiseLoss, Sampler
from train.weighting import Unweighted


@dataclass(frozen=True)
class LoopSettings:
    """The run-level numbers of conf/train.yaml that the loop reads. An interval of 0 is off."""

    seed: int = 0
    steps: int = 300
    gradient_accumulation: int = 1
    max_grad_norm: float = 1.0
    max_bad_steps: int = 5
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
        intervals = ("log_every", "checkpoint_every", "sample_every", "validate_every")
        for key in ("seed", *intervals):
            check_count(key, getattr(self, key))
        if self.seed >= 2**63:
            raise ValueError(f"seed={self.seed!r} must be below 2 ** 63")
        for key in ("steps", "gradient_accumulation", "max_bad_steps"):
            check_count(key, getattr(self, key), 1)
        self.rotation.check(self.checkpoint_every, self.validate_every)
        if not is_number(self.max_grad_norm, low=0):
            raise ValueError(f"max_grad_norm={self.max_grad_norm!r} must be a number from 0 (0 is off)")
        if not is_number(self.ema_decay, 0, 1) or self.ema_decay == 1:
            raise ValueError(f"ema_decay={self.ema_decay!r} must be a number from 0 (which is off) and below 1")
        if self.guidance is not None and not is_number(self.guidance, low=0):
            raise ValueError(f"guidance={self.guidance!r} must be a number from 0, or null")

    @property
    def rotation(self) -> checkpoint.Rotation:
        return checkpoint.Rotation(self.keep_last, self.keep_best, self.keep_every)


@dataclass
class Training:
    """What a run consists of. `run` is the loop; the rest are the things it does every so often.

    Attributes:
        base: what the adapter's files name as its base model.
        wrapped: PEFT's wrapper around the transformer.
        loader: gives this process's micro-batches of a step.
        names: of the samples that it loads.
        begin: called by the main process once the checkpoint was read, before anything is written.
        about: what else a checkpoint says about itself.
        shown: what is validated, sampled and saved of the adapter, if not what `optimizer` trains.
        plain: embeddings (T, D) of the prompts of `preservation`.
        prior: gives this process's micro-batches of class pictures of a step, if there are any.
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
    shown: Shown
    timesteps: Uniform
    weighting: Unweighted
    preservation: Preservation
    loader: Loader
    plain: dict[str, Tensor]
    place: Place
    metrics: Metrics
    begin: Callable[[], None] = lambda: None
    prior: ClassPictures | None = None
    names: Sequence[str] = ()
    about: dict[str, Any] = field(default_factory=dict)
    sampler: Sampler | None = None
    validate: FixedNoiseLoss | None = None
    autocast: torch.dtype | None = None
    keeper: Keeper = field(init=False)
    ahead: Ahead[list[tuple[Batch, Drawn]]] = field(init=False)

    @property
    def accelerator(self) -> Accelerator:
        return self.processes.accelerator

    @property
    def transformer(self) -> Transformer:
        return self.wrapped.get_base_model()

    def __post_init__(self) -> None:
        self.ahead = Ahead(self.prepare)
        self.keeper = Keeper(
            self.accelerator,
            self.place,
            self.wrapped,
            {"optimizer": self.optimizer, **self.shown.parts},
            self.shown.swapped,
            self.base,
            self.variant.licence,
            self.loader.sampler.global_batch,
            self.metrics,
            self.settings.rotation,
            self.about,
        )

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
            TrainingError: losses or their gradients are not finite, or the adapter cannot be written.
            Interrupted: after one of `stopping.SIGNALS`, with a checkpoint of the last whole step saved.

        To any other error a note is added that says what became of the last whole step.
        """
        settings, accelerator = self.settings, self.accelerator
        model = self.processes.wrap(self.wrapped)
        parameters = adapters.adapter_parameters(self.wrapped)
        rate = self.optimizer.param_groups[0]["lr"]
        keeper = self.keeper
        start, owed = keeper.load(), False
        if accelerator.is_main_process:
            checkpoint.tidy(self.place.folder)
            self.begin()
        guard = self.guard(fresh=start == 0)
        bar = Progress(settings.steps, start, shown=accelerator.is_main_process)
        with (
            closing(self.metrics),
            closing(self.ahead),
            closing(bar),
            stop_requests() as request,
            keeper.rescued(),
        ):
            keeper.whole = start
            self.wrapped.train()
            if start == 0:
                with bar.paused():
                    self.look(0, {})
            clock = Clock()
            for step in range(start, settings.steps):
                self.seed_layers(step)
                with watched(f"in the forward and backward of step {step + 1}", "step", accelerator.device):
                    losses = self.accumulate(model, step)
                norm = clip(parameters, settings.max_grad_norm)
                set_rate(self.optimizer, rate * self.schedule.factor(step, settings.steps))
                keeper.whole = None
                with watched(f"in the optimizer's update of step {step + 1}", "update", accelerator.device):
                    left_out = guard.update(losses.total, norm)
                self.optimizer.zero_grad(set_to_none=True)
                self.shown.update(left_out)

                keeper.whole = done = step + 1
                guard.send(step, losses.total, norm, request)
                owed = owed or self.is_due(settings.checkpoint_every, done)
                seen = owed or self.is_seen(done)
                readings = guard.receive(wait=seen)  # here alone the host waits for the device
                clock.steps += 1
                bar.update()
                self.log_skipped(readings)
                if seen:
                    with clock.paused(), bar.paused():
                        logged = self.is_due(settings.log_every, done)
                        values = self.values(losses, readings[-1], clock) if logged else {}
                        self.look(done, values)
                        if values:
                            bar.log(values)
                        if owed and not guard.row and done < settings.steps:  # after bad steps it is made up for
                            keeper.save(done)
                            owed = False
                if done < settings.steps and (number := guard.stop(request, readings)):
                    keeper.stop(done, number)
            guard.check_end()
            return self.finish()

    def guard(self, *, fresh: bool) -> Guard:
        """What makes the updates, and leaves out those that are not finite."""

        def samples(step: int) -> list[str]:
            classes = self.prior.samples(step) if self.prior else []
            return [*(self.names[index] for index in self.loader.sampler.batch(step)), *classes]

        return Guard(
            self.optimizer,
            self.accelerator,
            most=self.settings.max_bad_steps,
            fresh=fresh,
            samples=samples,
            last=lambda: self.keeper.last(advice=False),
        )

    def prepare(self, step: int) -> list[tuple[Batch, Drawn]]:
        """This process's micro-batches of a step, those of class pictures last, and what chance gives them."""
        settings, prior = self.settings, self.prior
        batches = [(batch, settings.seed) for batch in self.loader.micro_batches(step)]
        classes = [(batch, prior.seed) for batch in prior.micro_batches(step)] if prior else []
        return [(batch, draw(batch, self.timesteps, seed, step)) for batch, seed in [*batches, *classes]]

    def accumulate(self, model: nn.Module, step: int) -> Losses:
        """Gradients of one step, over its micro-batches and all processes; returns the mean losses of all."""
        prepared = self.ahead.get(step)
        own = self.settings.gradient_accumulation
        parts, priors = [], [torch.zeros((), device=self.accelerator.device)]
        for i, (cpu_batch, drawn) in enumerate(prepared):
            batch = cpu_batch.to(self.accelerator.device, torch.float32)
            prior = self.prior if i >= own else None
            noised = add_noise(batch, drawn)
            plain = None
            if self.preservation.active:
                held = batch.positions[: self.preservation.samples]
                chosen = self.preservation.choose(self.settings.seed, step, held)
                plain = onto(torch.stack([self.plain[prompt] for prompt in chosen]), batch.embeddings.device)
                plain = plain.to(batch.embeddings.dtype)
            if i == 0 and step + 1 < self.settings.steps:
                self.ahead.begin(step + 1)
            is_last = i == len(prepared) - 1  # only then do processes exchange gradients
            with nullcontext() if is_last else self.accelerator.no_sync(model):
                weight = prior.weight if prior else 1.0
                found = self.differentiate(model, noised, batch.embeddings, plain, weight, own)
            if prior:
                priors.append(prior.weight * found[1] / own)
            else:
                parts.append(found)
        self.processes.average_gradients(self.wrapped)
        mean = torch.cat([torch.stack(parts).mean(0), torch.stack(priors).sum()[None]])
        total, flow, preservation, prior_loss = self.accelerator.reduce(mean, "mean")
        return Losses(total + prior_loss, flow, preservation, prior_loss)

    def differentiate(
        self, model: nn.Module, noised: Noised, text: Tensor, plain: Tensor | None, weight: float, count: int
    ) -> Tensor:
        """Forward and backward of one of `count` micro-batches; returns its losses (3,), in the order of `Losses`.

        What the forward kept is freed when this returns.
        """
        with self.precision():
            weights = self.weighting(noised.times)
            losses = training_loss(model, noised, text, self.guidance, self.preservation.weight, plain, weights)
        self.accelerator.backward(losses.total * weight / count)
        return torch.stack([losses.total.detach(), losses.flow, losses.preservation])

    def precision(self) -> torch.autocast:
        """bfloat16 autocast if the base is in bfloat16; the adapter and the losses stay in float32."""
        return torch.autocast(
            self.accelerator.device.type, self.autocast or torch.bfloat16, enabled=self.autocast is not None
        )

    def seed_layers(self, step: int) -> None:
        """Seed what layers draw, which is dropout. (`torch.manual_seed` seeds all kinds of devices, in a ms.)"""
        generator = derived_generator(self.settings.seed, "layers", step, self.accelerator.process_index)
        seed = int(torch.randint(2**31, (), generator=generator))
        torch.default_generator.manual_seed(seed)
        if self.accelerator.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def values(self, losses: Losses, reading: Reading, clock: Clock) -> dict[str, float]:
        """What is logged of a step. Of one without an update, what of it is finite."""
        held = {"preservation_loss": losses.preservation.item()} if self.preservation.active else {}
        prior = {"prior_loss": losses.prior.item()} if self.prior and losses.prior is not None else {}
        numbers = {
            "loss": losses.flow.item(),
            **held,
            **prior,
            "lr": rate_of(self.optimizer),
            "grad_norm": reading.norm,
            "images_per_second": round(self.loader.sampler.global_batch * clock.take(), 4),
            "peak_memory_gb": round(peak_memory_gb(self.accelerator.device), 3),
        }
        if not reading.bad:
            return numbers
        return {key: value for key, value in numbers.items() if math.isfinite(value)} | {"skipped": 1}

    def log_skipped(self, readings: Sequence[Reading]) -> None:
        """Log the steps without an update that are not logged anyway."""
        for reading in readings:
            done = reading.step + 1
            if reading.bad and self.accelerator.is_main_process and not self.is_due(self.settings.log_every, done):
                self.metrics.log(done, skipped=1)

    def is_seen(self, done: int) -> bool:
        """Whether anything but training is done after `done` steps."""
        settings = self.settings
        intervals = (settings.log_every, settings.validate_every, settings.sample_every)
        return done == settings.steps or any(self.is_due(interval, done) for interval in intervals)

    def is_due(self, interval: int, done: int) -> bool:
        """Whether something is due after `done` steps: at its interval and at the end; never with an interval of 0."""
        return interval > 0 and (done % interval == 0 or done == self.settings.steps)

    def look(self, done: int, values: dict[str, float]) -> None:
        """After `done` steps: log `values`, validate and sample where it is due; off the clock.

        All processes validate and sample, each its share; the main one logs.
        """
        main, device = self.accelerator.is_main_process, self.accelerator.device
        if self.validate is not None and self.is_due(self.settings.validate_every, done):
            doing = watched(f"in the validation after step {done}", "validation", device)
            with doing, self.shown_alone(), self.precision():
                losses = self.validate(self.transformer, self.guidance)
            values = values | self.validate.report(losses)
            self.keeper.measured = done, values["validation_loss"]
            if main:
                self.metrics.validated(done, self.validate.record(losses))
        if values and main:
            self.metrics.log(done, **values)
        if self.sampler is not None and self.is_due(self.settings.sample_every, done):
            file = self.place.folder / "samples" / f"step_{done:06d}.png"
            with self.harmless(f"the sheet of pictures after step {done}"):
                with watched(f"while sampling after step {done}", "samples", device), self.shown_alone():
                    self.sampler.sheet(self.transformer, file, write=main)
                if main:
                    self.metrics.picture(done, file)

    @contextmanager
    def shown_alone(self) -> Iterator[None]:
        """Within this context the adapter is the one that is shown, and nothing is dropped out."""
        self.wrapped.eval()
        try:
            with self.shown.swapped():
                yield
        finally:
            self.wrapped.train()  # not before each step: to walk through the modules takes long beside a small model

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

    def finish(self) -> Path:
        """The last checkpoint and the finished adapter."""
        if self.settings.checkpoint_every:
            self.keeper.save(self.settings.steps)
        return self.keeper.finish(self.settings.steps)
