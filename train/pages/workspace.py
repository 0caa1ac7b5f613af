"""The folders that the studio may read and write, and the runs in them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data.files import user_path
from flux2.utils.text import listed
from train.checkpoints.checkpoint import CONFIG_FILE
from train.utils.files import short_path

DEPTH = 4  # folders below an opened one in which runs are looked for
SKIPPED = {"checkpoints", "samples", "adapter", "cache", "node_modules", "site-packages"}  # hold no runs


class Refused(ValueError):  # noqa: N818
    """A path that the studio does not read or write: it is outside of the opened folders."""


@dataclass(frozen=True)
class Workspace:
    """The opened folders, absolute and without links, and the folder that new runs are written to."""

    folders: Sequence[Path]
    outputs: Path = field(default_factory=lambda: Path("outputs").resolve())

    def resolve(self, path: str | Path) -> Path:
        """Return a path that a request gave, absolute and without links.

        Raises Refused if it is outside of the opened folders, whether it exists or not.
        """
        try:
            found = user_path(str(path)).resolve()
        except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a null byte
            raise Refused(f"{str(path)!r} is no path ({error})") from error
        if not any(found.is_relative_to(folder) for folder in (*self.folders, self.outputs)):
            opened = listed([str(folder) for folder in self.folders])
            words = " ".join([*map(str, self.folders[1:]), str(path)])  # the first is the current one
            raise Refused(
                f"{path} is outside of the opened folders ({opened}). To open it, end the studio with Ctrl-C and start "
                f'it again: make studio FOLDERS="{words}", or python train/studio.py {words}'
            )
        return found

    def check(self, value: str) -> None:
        """Raise Refused for a path in the value of a setting that is outside of the opened folders."""
        for word in re.split(r"[\[\],\s'\"]+", value):
            # on Windows an anchor may be C: or a server
            if Path(word).anchor or word.startswith(("~", ".")) or Path(word).exists():
                self.resolve(word)

    def show(self, path: Path) -> str:
        """Return a path as one types it in the folder where the studio was started."""
        return str(short_path(path))

    def runs(self) -> list[Path]:
        """Return the run folders in the opened folders, the newest first."""
        found = {run for folder in dict.fromkeys((self.outputs, *self.folders)) for run in find_runs(folder, DEPTH)}
        return sorted(found, key=started, reverse=True)


def find_runs(folder: Path, depth: int) -> Iterator[Path]:
    """Yield the run folders in `folder`, that is those with the configuration of a run; not those inside of one."""
    try:
        entries = list(os.scandir(folder))
    except OSError:  # it disappeared, or cannot be read
        return
    if any(entry.name == CONFIG_FILE and entry.is_file() for entry in entries):
        yield folder
        return
    for entry in entries if depth else ():
        if entry.name not in SKIPPED and not entry.name.startswith(".") and entry.is_dir(follow_symlinks=False):
            yield from find_runs(folder / entry.name, depth - 1)


def started(run: Path) -> float:
    """Return the time at which a run wrote its configuration; 0 if it disappeared."""
    try:
        return (run / CONFIG_FILE).stat().st_mtime
    except OSError:
        return 0.0
