"""What `python -m flux2.generate` shows while it works: a bar on a terminal, and a line a picture where nobody watches.

All of it goes to the error stream; the output stream has the names of the files alone.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TextIO

from tqdm import tqdm

CLEAR = "\r\x1b[K"  # of a terminal: away with what the line shows


class Screen:
    """Of `steps` sampling steps in all. Closes itself at the end of a `with`.

    Args:
        stream: where to; by default the error stream.
        clock: seconds.
    """

    def __init__(
        self, steps: int, stream: TextIO | None = None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.steps, self.clock = steps, clock
        self.stream = sys.stderr if stream is None else stream
        self.is_bar = self.stream.isatty()
        self._bar: tqdm | None = None
        self._since = clock()

    def __enter__(self) -> Screen:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._clear()

    def status(self, text: str) -> None:
        """What is done now; a terminal shows it until something else is."""
        if self.is_bar:
            print(f"{CLEAR}{text} ...", end="\r", file=self.stream, flush=True)

    def begin(self) -> None:
        """The first picture begins."""
        self._clear()
        self._since = self.clock()
        if self.is_bar:
            self._bar = tqdm(total=self.steps, unit="step", leave=False, file=self.stream, dynamic_ncols=True)

    def step(self) -> None:
        if self._bar is not None:
            self._bar.update()

    @contextmanager
    def picture_done(self, text: str) -> Iterator[None]:
        """A picture is written: within this context its name can be printed, and a bar does not stand in its way."""
        now = self.clock()
        seconds, self._since = now - self._since, now
        if self._bar is not None:
            self._bar.clear()
        else:
            print(f"{text} in {seconds:.1f} s", file=self.stream, flush=True)
        try:
            yield
        finally:
            if self._bar is not None:
                self._bar.refresh()

    def _clear(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        elif self.is_bar:
            print(CLEAR, end="", file=self.stream, flush=True)
