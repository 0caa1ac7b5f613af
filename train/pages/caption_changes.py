"""Changes of many captions of a dataset: a trigger word in front, and one text for another.

What would change is shown first, with a digest of it. It is done only if it is still the same then.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from data.sources.base import CaptionPlace
from data.sources.captions import with_trigger
from train.pages.datasets import OpenedDataset
from train.pages.workspace import Workspace
from train.utils.caption_files import Change, change_captions, is_writable, state_of
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
        """Write all, file by file, and return how many. Raises ValueError at the first file that cannot be written."""
        files: dict[str, list[Change]] = {}
        for change in self.changes:
            files.setdefault(str(change.place.file), []).append(change)
        done = 0
        for file, changes in files.items():
            try:
                workspace.resolve(file)
                change_captions(changes)
            except (ValueError, OSError) as error:
                raise ValueError(
                    f"{many(done, 'caption')} of {len(self.changes):,} are changed, and no more: {error}"
                ) from error
            done += len(changes)
        return done


def changes_of(opened: OpenedDataset, change: Callable[[str], str]) -> Changes:
    """Return what a function of a caption changes. Raises ValueError for captions that training could not use."""
    found, fixed = list[Change](), 0
    for place in opened.places:
        after = tuple(change(text.rstrip("\n")) for text in place.written)
        if after == tuple(text.rstrip("\n") for text in place.written):
            continue
        if not is_writable(place):
            fixed += 1
            continue
        check(opened, place, after)
        found.append(Change(place, after))
    return Changes(found, fixed)


def check(opened: OpenedDataset, place: CaptionPlace, captions: Sequence[str]) -> None:
    """Raise ValueError if training could not use these captions."""
    try:
        opened.captions.prepare(captions)
    except ValueError as error:
        raise ValueError(f"nothing is written: {place.sample.name} then {error}") from error


def insertions(opened: OpenedDataset, trigger: str) -> Changes:
    """Return the changes that put a trigger word in front of each caption without it."""
    return changes_of(opened, lambda text: with_trigger(text.strip(), trigger))


def replacements(opened: OpenedDataset, find: str, by: str) -> Changes:
    """Return the changes that put one text in place of another, everywhere, with upper and lower case as given."""
    return changes_of(opened, lambda text: text.replace(find, by))
