"""Write the checkpoints of a run and its final adapter, also after errors and requests to stop."""

from __future__ import annotations

import shutil
import signal
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import peft
import torch
from accelerate import Accelerator

from flux2 import adapters
from train.checkpoints import checkpoint
from train.checkpoints.resume import RunLocation
from train.checkpoints.resume_command import how_to_resume
from train.checkpoints.rotation import Rotation
from train.optim.ema import EvaluationWeights
from train.optim.update_guard import TrainingError
from train.tracking.metrics import Metrics
from train.utils.console import warn, warn_unsaved
from train.utils.memory import OutOfMemory
from train.utils.signals import Interrupted, Stopped


@dataclass
class Checkpointer:
    """Saves the state of a run."""

    accelerator: Accelerator
    location: RunLocation  # where the run writes, and the checkpoint that it resumes
    peft_model: peft.PeftModel
    optimizer: torch.optim.Optimizer
    evaluation_weights: EvaluationWeights  # the weights of the adapter that are saved for use
    base: str  # name of the base model, for the adapter's files
    license: str  # of the base model
    images_per_step: int
    metrics: Metrics
    rotation: Rotation
    extra_state: Mapping[str, Any]  # additional content of each checkpoint's state file
    completed_steps: int | None = field(default=None, init=False)  # None during the update: the state is inconsistent
    saved: int | None = field(default=None, init=False)  # steps of the last checkpoint in this run's own folder
    # metrics of the last step whose validation did not end, so that they are not in metrics.jsonl; None without such a
    # step. A new run begins with the validation of step 0.
    unlogged: dict[str, float] | None = field(default_factory=dict, init=False)
    measured: tuple[int, float] | None = field(default=None, init=False)  # step and value of the last validation

    @property
    def parts(self) -> dict[str, checkpoint.Stateful]:
        """Training state in addition to the adapter; restored after it, in this order."""
        return {"optimizer": self.optimizer, **self.evaluation_weights.parts}

    def load(self) -> int:
        """Restore the state that the run resumes and remove what a killed run left; return the finished steps."""
        step = 0
        if self.location.checkpoint is not None:
            state = checkpoint.load(self.location.checkpoint, self.peft_model, self.parts)
            step, self.unlogged = state["step"], state.get("unlogged")
            self.saved = step if self.location.origin == self.location.folder else None
        if self.accelerator.is_main_process:
            checkpoint.remove_incomplete(self.location.folder)
        return step

    def logged_steps(self, done: int) -> int:
        """Return the steps of `done` ones whose metrics are complete."""
        return done if self.unlogged is None else done - 1

    def note_logged(self, done: int, values: Mapping[str, float]) -> None:
        """Note that the metrics of step `done` are `values`, and logged."""
        self.unlogged = None
        if "validation_loss" in values:
            self.measured = done, values["validation_loss"]

    def path_of(self, done: int) -> Path:
        return self.location.folder / "checkpoints" / f"step_{done:06d}"

    def save(self, done: int) -> Path | None:
        """Write the checkpoint of `done` steps while all processes wait; warn and return None if that fails."""
        failed = torch.zeros(1, device=self.accelerator.device)
        if self.accelerator.is_main_process:
            try:
                self.write(done)
            except checkpoint.NotSaved as error:
                failed += 1
                warn_unsaved(str(error))
        return None if self.accelerator.reduce(failed, "sum").item() else self.path_of(done)

    def write(self, done: int) -> None:
        """Write the checkpoint of `done` steps, if missing, and delete old ones. Call on the main process only."""
        if done == self.saved:
            return
        if not self.is_finite():
            place = self.path_of(done)
            raise checkpoint.NotSaved(f"{place} is not written: the adapter is not finite after {done} steps")
        state = {"images_per_step": self.images_per_step, **self.extra_state}
        if self.measured is not None and self.measured[0] == done:
            state["validation_loss"] = self.measured[1]
        if self.unlogged is not None:
            state["unlogged"] = self.unlogged
        if (tracker_id := getattr(self.metrics.tracker, "run_id", None)) is not None:  # a tracker may be a user's own
            state["tracker_id"] = tracker_id
        run, names = self.location.folder, {"base": self.base, "license": self.license}
        with self.evaluation_weights.swapped():
            place = checkpoint.save(run, done, self.peft_model, self.parts, **names, **state)
        self.saved = done
        self.rotation.prune(place, warn)

    def save_to_temporary_folder(self) -> str:
        """Write the adapter to a temporary folder when its own disk is full; return a sentence that says where."""
        place = None
        try:
            place = Path(tempfile.mkdtemp(prefix="flux2-lora-"))
            with self.evaluation_weights.swapped():
                adapters.save(self.peft_model, place / "adapter", base=self.base, license=self.license)
        except checkpoint.FILE_ERRORS as error:
            if place is not None:
                shutil.rmtree(place, ignore_errors=True)
            return f"A temporary folder cannot be written either ({str(error).rstrip('.')}). "
        return f"It is kept in {place / 'adapter'}: move it to a safe place. "

    def is_finite(self) -> bool:
        """Return whether the adapter is finite: no loss has yet shown what the last update did to it."""
        return all(bool(torch.isfinite(one).all()) for one in adapters.adapter_parameters(self.peft_model))

    def save_and_raise_interrupted(self, done: int, number: int) -> NoReturn:
        """Save the state of `done` steps after a stop signal, and raise Interrupted."""
        place = self.save(done)
        saved = f"saved in {place}; {how_to_resume(self.location.folder)}" if place else self.last_checkpoint()
        raise Interrupted(f"stopped by {signal.Signals(number).name} after step {done}, {saved}", number)

    @contextmanager
    def rescue_on_error(self, start: int) -> Iterator[None]:
        """Context manager that saves the last finished step when an error ends training after `start` steps."""
        self.completed_steps = start
        try:
            yield
        except Interrupted:
            raise
        except KeyboardInterrupt as error:
            number = error.number if isinstance(error, Stopped) else signal.SIGINT
            raise Interrupted(f"stopped at once without saving; {self.last_checkpoint()}", number) from error
        except OutOfMemory as error:
            error.saved = self.rescue(self.completed_steps)
            raise
        except Exception as error:
            if not isinstance(error, TrainingError) and not hasattr(error, "saved"):  # these contain the note already
                error.add_note(self.rescue(self.completed_steps))
            raise

    def rescue(self, done: int | None) -> str:
        """Save the state of `done` steps after an error, without waiting for other processes; return what was saved."""
        for parameter in adapters.adapter_parameters(self.peft_model):
            parameter.grad = None
        last = self.last_checkpoint()
        last = last[0].upper() + last[1:]
        if done is None or done == self.location.step:
            return last
        if not self.accelerator.is_main_process:
            return f"Process {self.accelerator.process_index} failed and saves nothing. {last}"
        try:
            self.write(done)
        except (OSError, RuntimeError, MemoryError) as error:
            return f"The state after step {done} could not be saved ({error}). {last}"
        return f"The state after step {done} is saved in {self.path_of(done)}; {how_to_resume(self.location.folder)}"

    def last_checkpoint(self, *, advice: bool = True) -> str:
        """Return a clause that names the last checkpoint."""
        found = checkpoint.checkpoints(self.location.folder)
        place = found[-1] if found else self.location.checkpoint
        if place is None:
            return "no checkpoint was saved yet"
        return f"the last checkpoint is {place}" + (f"; {how_to_resume(place.parent.parent)}" if advice else "")

    def finish(self, steps: int) -> Path:
        """Write the finished adapter; return its folder. Raises TrainingError if that fails or it is not finite."""
        folder = self.location.folder / "adapter"
        if not self.is_finite():
            raise TrainingError(
                f"the adapter is not finite after {steps} steps: its last update corrupted it. Restart with a lower "
                f"optimizer.lr; {self.last_checkpoint()}"
            )
        if self.accelerator.is_main_process:
            try:
                with self.evaluation_weights.swapped():
                    adapters.save(self.peft_model, folder, base=self.base, license=self.license)
            except checkpoint.FILE_ERRORS as error:
                reason = str(error).rstrip(".")
                done = f"all {steps} steps are done, but the adapter cannot be written to {folder} ({reason})."
                rescued = self.rescue(steps)
                copy = "" if self.saved == steps else self.save_to_temporary_folder()
                raise TrainingError(f"{done} {copy}Make room there first. {rescued}") from error
        self.accelerator.wait_for_everyone()
        return folder
