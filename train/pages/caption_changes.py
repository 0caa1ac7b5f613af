"""Changes of many captions of a dataset: a trigger word in front, and one text for another.

What would change is shown first, with a digest of it. It is done only if it is still the same then.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from data.sources.captions import with_trigger
from train.pages.datasets import OpenedDataset
from train.pages.workspace import Workspace
from train.utils.caption_files import Change, change_captions, is_writable, state_of
from train.utils.files import reason
from train.utils.text import many


@dataclass(frozen=True)
class Changes:
    """What changes, and how many captions would but are not in files that are written here."""

    changes: Sequence[Change]
    fixed: int

    @property
    def state(self) -> str:
        """A digest of the captions as they are and as they would be."""
        content = [[state_of(change.place), change.captions] for change in self.changes]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]

    def apply(self, workspace: Workspace) -> int:
        """Write all and return how many. Raises ValueError, before anything is written, if a file cannot be.

        Files that change between that check and their turn stop it halfway, which the error says.
        """
        files: dict[str, list[Change]] = {}
        for change in self.changes:
            files.setdefault(str(change.place.file), []).append(change)
        done = 0
        for changes in files.values():
            try:
                write(workspace, changes, only_check=True)
            except ValueError as error:
                raise ValueError(f"nothing is written: {error}") from error
        for changes in files.values():
            try:
                write(workspace, changes)
            except ValueError as error:
                raise ValueError(
                    f"{many(done, 'caption')} of {len(self.changes):,} are changed, and no more: {error}"
                ) from error
            done += len(changes)
        return done


def changes_of(opened: OpenedDataset, change: Callable[[str], str]) -> Changes:
    """Return what a function of a caption changes; of samples that share a caption, once."""
    found, fixed = dict[tuple[str, int | None], Change](), 0
    for place in opened.places:
        before = tuple(text.rstrip("\n") for text in place.written)
        after = tuple(map(change, before))
        if after != before and is_writable(place):
            found.setdefault((str(place.file), place.line), Change(place, after))
        elif after != before:
            fixed += 1
    return Changes(list(found.values()), fixed)


def check(opened: OpenedDataset, changes: Sequence[Change]) -> None:
    """Raise ValueError if training could not use the captions that are to be written."""
    for place, captions in changes:
        try:
            opened.captions.prepare(captions)
        except ValueError as error:
            raise ValueError(f"nothing is written: {place.sample.name} then {error}") from error


def write(workspace: Workspace, changes: Sequence[Change], *, only_check: bool = False) -> None:
    """Write captions of one file, or only check that they can be.

    Raises ValueError if that is not possible, Refused for a file that is elsewhere.
    """
    file = changes[0].place.file
    workspace.resolve(str(file))
    try:
        change_captions(changes, write=not only_check)
    except OSError as error:
        raise ValueError(f"{file} cannot be written ({reason(error)})") from error


def insertions(opened: OpenedDataset, trigger: str) -> Changes:
    """Return the changes that put a trigger word in front of each caption without it."""

    def change(text: str) -> str:
        return text if with_trigger(text, trigger) == text else with_trigger(text.strip(), trigger)

    return changes_of(opened, change)


def replacements(opened: OpenedDataset, find: str, by: str) -> Changes:
    """Return the changes that put one text in place of another, everywhere, with upper and lower case as given."""
    return changes_of(opened, lambda text: text.replace(find, by))
