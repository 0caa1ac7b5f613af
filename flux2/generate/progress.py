"""Progress of `python -m flux2.generate`: a bar on a terminal, otherwise one line per image.

Everything goes to stderr; stdout has only the names of the files.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from tqdm import tqdm

CLEAR = "\r\x1b[K"  # clears the line of a terminal


class Screen:
    """Shows progress over `steps` sampling steps, by default on stderr, until `close`."""

    def __init__(
        self, steps: int, stream: TextIO | None = None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.steps, self.clock = steps, clock
        self.stream = sys.stderr if stream is None else stream
        self.is_bar = self.stream.isatty()
        self._bar: tqdm | None = None
        self._since = clock()

    def status(self, text: str) -> None:
        """Show the current activity on a terminal, until the next output."""
        if self.is_bar:
            print(f"{CLEAR}{text} ...", end="\r", file=self.stream, flush=True)

    def begin(self) -> None:
        """Start the bar before the first image."""
        self.close()
        self._since = self.clock()
        if self.is_bar:
            self._bar = tqdm(total=self.steps, unit="step", leave=False, file=self.stream, dynamic_ncols=True)

    def step(self) -> None:
        if self._bar is not None:
            self._bar.update()

    @contextmanager
    def image_done(self, text: str) -> Iterator[None]:
        """Context manager, for a complete image, in which its name can be printed without disturbing the bar."""
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

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        elif self.is_bar:
            print(CLEAR, end="", file=self.stream, flush=True)
