"""Progress of training and encoding: a bar on a terminal, lines in a log."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import TextIO

from tqdm import tqdm

from flux2.utils.terminal import show_title
from train.utils.console import PHASES

SECONDS = 20.0  # between lines of `ItemProgress` in a log
WINDOW = 50  # steps in the mean of the speed
FORMAT = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"


@dataclass
class Progress:
    """Counts steps, and shows loss, seconds per step, remaining time and memory.

    The time of a step is that of training alone: validation, sample grids and checkpoints are `paused`. They come on
    top of the time that is left.
    """

    total: int
    done: int = 0
    shown: bool = True  # whether this process shows anything
    stream: TextIO = field(default_factory=lambda: sys.stderr)
    clock: Callable[[], float] = perf_counter  # returns seconds

    def __post_init__(self) -> None:
        self.is_bar = self.shown and self.stream.isatty()
        if self.shown:
            show_title("training", self.stream)
        count = {"total": self.total, "initial": self.done}
        self._bar = tqdm(**count, disable=not self.is_bar, file=self.stream, dynamic_ncols=True, bar_format=FORMAT)
        self._logged = ""
        self._began = self._since = self.clock()
        self._worked = 0.0
        self._marks: deque[float] = deque([0.0], maxlen=WINDOW + 1)  # time worked at the end of each step

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Context manager that does not count the time."""
        self._worked += self.clock() - self._since
        try:
            yield
        finally:
            self._since = self.clock()

    @property
    def seconds(self) -> float | None:
        """Mean seconds of the last steps; None before the first."""
        steps = len(self._marks) - 1
        return (self._marks[-1] - self._marks[0]) / steps if steps else None

    def update(self) -> None:
        """Count a finished step."""
        now = self.clock()
        self._worked, self._since = self._worked + now - self._since, now
        self._marks.append(self._worked)
        self.done += 1
        if self.is_bar:
            self._bar.set_postfix_str(self.text(), refresh=False)
            self._bar.update()

    def log(self, values: Mapping[str, float]) -> None:
        """Show the logged `loss`, which is absent if it is not finite, and the peak memory of each device."""
        loss, memory = values.get("loss"), [f"{values[key]:.1f}" for key in values if key.startswith("peak_memory_gb")]
        text = "loss not finite" if loss is None else f"loss {loss:.4f}"
        self._logged = f"{text}, {' + '.join(memory)} GB" if memory else text
        if self.shown and not self.is_bar:
            elapsed = tqdm.format_interval(self.clock() - self._began)
            print(f"{self.done}/{self.total} [{elapsed}, {self.text()}]", file=self.stream, flush=True)

    def show(self, text: str) -> None:
        """Show what is done between two steps; in a log, nothing."""
        if self.is_bar:
            self._bar.set_postfix_str(text)

    def text(self) -> str:
        """Return speed, remaining time, and the values that were logged last."""
        parts = []
        if self.seconds is not None:
            left = tqdm.format_interval((self.total - self.done) * self.seconds)
            digits = 2 if self.seconds >= 0.1 else 4
            parts = [f"{self.seconds:.{digits}f} s/step", f"{left} left"]
        return ", ".join([*parts, self._logged] if self._logged else parts)

    def close(self) -> None:
        """End the bar and leave it on the terminal, and record the times of the two phases."""
        PHASES["training"] = self._worked
        PHASES["validation and saving"] = self.clock() - self._began - self._worked
        if self.is_bar:
            self._bar.set_postfix_str(self.text())
        self._bar.close()


@dataclass
class ItemProgress:
    """Counts items: a bar on a terminal that `close` removes, or lines in a log every `SECONDS` and then at the end."""

    what: str  # name of the items, such as `pictures encoded`
    shown: bool = True
    stream: TextIO = field(default_factory=lambda: sys.stderr)
    clock: Callable[[], float] = perf_counter

    def __post_init__(self) -> None:
        self.is_bar = self.shown and self.stream.isatty()
        self._bar: tqdm | None = None
        self._began = self._printed = self.clock()

    def update(self, done: int, total: int, note: str = "") -> None:
        """Show that `done` of `total` items are done, with a note."""
        if self.is_bar:
            if self._bar is None:
                self._bar = tqdm(total=total, unit=f" {self.what}", file=self.stream, dynamic_ncols=True, leave=False)
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(done - self._bar.n)
            return
        now = self.clock()
        ends = done == total and self._printed > self._began
        if self.shown and (ends or now - self._printed >= SECONDS):
            self._printed, elapsed = now, now - self._began
            left = "" if done == total else f", {tqdm.format_interval(elapsed * (total - done) / done)} left"
            more = f", {note}" if note else ""
            took = tqdm.format_interval(elapsed)
            print(f"{self.what}: {done}/{total} [{took}{left}{more}]", file=self.stream, flush=True)

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()
