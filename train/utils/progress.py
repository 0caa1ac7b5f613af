"""How far training is: a bar on a terminal, and a line for each logged step where nobody watches."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TextIO

from tqdm import tqdm

SECONDS = 20.0  # between lines of `ItemProgress` where nobody watches
WINDOW = 50  # steps that the speed is a mean over
FORMAT = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"


class Progress:
    """Counts steps, and shows loss, seconds a step, the time that is left, and memory.

    The time of a step is that of training alone: validation, sample grids and checkpoints are `paused`. They come on
    top of the time that is left.

    Args:
        total, start: steps in all, and those that were done before.
        shown: whether this process shows anything.
        stream: where to; by default the error stream.
        clock: seconds.
    """

    def __init__(
        self,
        total: int,
        start: int = 0,
        *,
        shown: bool = True,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.total, self.done, self.shown, self.clock = total, start, shown, clock
        self.stream = sys.stderr if stream is None else stream
        self.is_bar = shown and self.stream.isatty()
        self._bar = tqdm(
            total=total,
            initial=start,
            disable=not self.is_bar,
            file=self.stream,
            dynamic_ncols=True,
            bar_format=FORMAT,
        )
        self._told = ""
        self._began = self._since = clock()
        self._worked = 0.0
        self._marks: deque[float] = deque([0.0], maxlen=WINDOW + 1)  # time worked at the end of each step

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within this context no time is counted."""
        self._worked += self.clock() - self._since
        try:
            yield
        finally:
            self._since = self.clock()

    @property
    def seconds(self) -> float | None:
        """Of a step, over the last ones; None before the first."""
        steps = len(self._marks) - 1
        return (self._marks[-1] - self._marks[0]) / steps if steps else None

    def update(self) -> None:
        """A step is finished."""
        now = self.clock()
        self._worked, self._since = self._worked + now - self._since, now
        self._marks.append(self._worked)
        self.done += 1
        if self.is_bar:
            self._bar.set_postfix_str(self.text(), refresh=False)
            self._bar.update()

    def log(self, values: Mapping[str, float]) -> None:
        """Show what was logged of the last step: `loss`, left out where it is not finite, and `peak_memory_gb`."""
        loss, memory = values.get("loss"), values.get("peak_memory_gb")
        told = "loss not finite" if loss is None else f"loss {loss:.4f}"
        self._told = told if memory is None else f"{told}, {memory:.1f} GB"
        if self.shown and not self.is_bar:
            elapsed = tqdm.format_interval(self.clock() - self._began)
            print(f"{self.done}/{self.total} [{elapsed}, {self.text()}]", file=self.stream, flush=True)

    def text(self) -> str:
        """Speed, what is left, and what was logged last."""
        parts = []
        if self.seconds is not None:
            left = tqdm.format_interval((self.total - self.done) * self.seconds)
            digits = 2 if self.seconds >= 0.1 else 4
            parts = [f"{self.seconds:.{digits}f} s/step", f"{left} left"]
        return ", ".join([*parts, self._told] if self._told else parts)

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()


class ItemProgress:
    """Counts what is computed before training: a bar on a terminal, which goes when it is closed, and elsewhere a line
    every `SECONDS`, and one at the end of what took as long.

    Args:
        what: is counted, as `pictures encoded`.
        shown, stream, clock: as of `Progress`.
    """

    def __init__(
        self,
        what: str,
        *,
        shown: bool = True,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.what, self.shown, self.clock = what, shown, clock
        self.stream = sys.stderr if stream is None else stream
        self.is_bar = shown and self.stream.isatty()
        self._bar: tqdm | None = None
        self._began = self._said = clock()

    def update(self, done: int, total: int, note: str = "") -> None:
        """So many of all are done; `note` goes along."""
        if self.is_bar:
            if self._bar is None:
                self._bar = tqdm(total=total, unit=f" {self.what}", file=self.stream, dynamic_ncols=True, leave=False)
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(done - self._bar.n)
            return
        now = self.clock()
        ends = done == total and self._said > self._began
        if self.shown and (ends or now - self._said >= SECONDS):
            self._said, elapsed = now, now - self._began
            left = "" if done == total else f", {tqdm.format_interval(elapsed * (total - done) / done)} left"
            more = f", {note}" if note else ""
            took = tqdm.format_interval(elapsed)
            print(f"{self.what}: {done}/{total} [{took}{left}{more}]", file=self.stream, flush=True)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
