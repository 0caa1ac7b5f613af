"""Find images of a dataset that look alike: `python -m train.pages.near_duplicates --into FILE --path FOLDER`

Each image is shrunk to 16 x 16 pixels, without regard to its aspect ratio. Two look alike if these differ by at most 10
of 255 (root mean square over pixels and channels) and correlate at 0.99 or more; nearly plain images, which correlate
by chance, if they differ by at most 2. So resized and recompressed copies, small changes of brightness and neighboring
frames of a video are found, and crops, mirror images and other views of a subject are not. Images that look alike the
same earlier one are a group. The images decide, not the cached latents, because a page shows pictures before training.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from data.files import user_path
from data.sources.images import BadPicture, Picture
from flux2.utils.json_files import read_json
from train.pages.datasets import Chosen, Library
from train.pages.thumbnails import stamp
from train.pages.workspace import Workspace
from train.utils.console import say, warn
from train.utils.files import write_whole
from train.utils.progress import ItemProgress
from train.utils.text import many

SIDE = 16
MOST_DIFFERENCE, LEAST_CORRELATION, SAME = 10.0, 0.99, 2.0
AT_ONCE = 256  # images that are compared at once with all groups
METHOD = (
    f"Each image is shrunk to {SIDE} x {SIDE} pixels. Two look alike if these differ by at most {MOST_DIFFERENCE:g} of "
    f"255 (root mean square) and correlate at {LEAST_CORRELATION:g} or more. Resized and recompressed copies and "
    "neighboring frames are found; crops, mirror images and other views of a subject are not."
)


@dataclass(frozen=True)
class LookAlikes:
    """What was found: groups of names, and the state of each image's file when it was compared."""

    groups: list[list[str]]
    stamps: dict[str, str]

    def group_of(self, pictures: Iterable[Picture]) -> tuple[dict[str, int], int]:
        """Return the number of the group, from 1, by name, and how many pictures were not compared as they are now."""
        now = {picture.name: stamp(picture) for picture in pictures}
        current = {name for name, state in now.items() if self.stamps.get(name) == state}
        groups = [[name for name in group if name in current] for group in self.groups]
        shown = [group for group in groups if len(group) > 1]
        return {name: i for i, group in enumerate(shown, 1) for name in group}, len(now) - len(current)


def fingerprint(picture: Picture) -> np.ndarray:
    """Return the shrunk image: (16 * 16 * 3,), 0 to 255. Raises BadPicture if it cannot be read."""
    small = picture.thumbnail(4 * SIDE).resize((SIDE, SIDE), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float32).ravel()


def alike(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return which of (N, D) fingerprints look like which of (M, D): (N, M)."""
    squares = (one**2).mean(1)[:, None] + (other**2).mean(1)[None] - 2 * one @ other.T / one.shape[1]
    centered = [part - part.mean(1, keepdims=True) for part in (one, other)]
    units = [part / np.maximum(np.linalg.norm(part, axis=1, keepdims=True), 1e-6) for part in centered]
    correlated = units[0] @ units[1].T >= LEAST_CORRELATION
    found: np.ndarray = ((squares <= MOST_DIFFERENCE**2) & correlated) | (squares <= SAME**2)
    return found


def groups_of(prints: np.ndarray) -> Iterator[list[int]]:
    """Yield the indices of fingerprints (N, D) that look like an earlier one, with that one, in groups."""
    groups: list[list[int]] = []
    for start in range(0, len(prints), AT_ONCE):
        part = prints[start : start + AT_ONCE]
        firsts = [group[0] for group in groups]
        before = alike(part, prints[firsts]) if firsts else np.zeros((len(part), 0), bool)
        within = alike(part, part)
        new: dict[int, list[int]] = {}  # groups by their first, an index into `part`
        for i in range(len(part)):
            if before[i].any():
                groups[int(before[i].argmax())].append(start + i)
            elif (same := next((first for first in new if within[first, i]), None)) is not None:
                new[same].append(start + i)
            else:
                new[i] = [start + i]
        groups += new.values()
    return (group for group in groups if len(group) > 1)


def find(pictures: Sequence[Picture]) -> LookAlikes:
    """Compare pictures. Those that cannot be read are left out with a warning."""
    prints, names, stamps = list[np.ndarray](), list[str](), dict[str, str]()
    with closing(ItemProgress("images")) as progress:
        for done, picture in enumerate(pictures, 1):
            now = stamp(picture)
            try:
                prints.append(fingerprint(picture))
                names.append(picture.name)
                stamps[picture.name] = now
            except BadPicture as error:
                warn(str(error))
            progress.update(done, len(pictures))
    groups = groups_of(np.stack(prints)) if prints else iter(())
    return LookAlikes([[names[i] for i in group] for group in groups], stamps)


def read_look_alikes(file: Path) -> LookAlikes | None:
    """Return what an earlier search wrote; None if there is none, or it cannot be read."""
    try:
        found = read_json(file)
        groups, stamps = found["groups"], found["stamps"]
        names = [name for group in groups for name in group]
        if all(isinstance(text, str) for text in (*names, *stamps, *stamps.values())):
            return LookAlikes([list(group) for group in groups], dict(stamps))
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        pass
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Search a dataset and write what is found."""
    parser = argparse.ArgumentParser(description="Find images of a dataset that look alike.")
    parser.add_argument("--into", type=user_path, required=True, metavar="FILE", help="file to write")
    parser.add_argument("--dataset", default="folder", help="choice of conf/dataset")
    parser.add_argument("--path", default="", help="dataset.path")
    parser.add_argument("--settings", default="", help='more settings, such as "dataset.recursive=true"')
    options = parser.parse_args(arguments)
    chosen = Chosen(options.dataset, options.path, options.settings)
    try:
        roots = [Path(place.resolve().anchor) for place in (Path.cwd(), user_path(options.path))]  # Windows has several
        opened = Library().read(Workspace(roots), chosen)
        found = find(list({place.sample.name: place.sample.target for place in opened.places}.values()))
        options.into.parent.mkdir(parents=True, exist_ok=True)
        write_whole(options.into, json.dumps({"groups": found.groups, "stamps": found.stamps}))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    alikes = sum(map(len, found.groups))
    say(f"{many(len(found.stamps), 'image')} compared: {alikes} look alike, in {many(len(found.groups), 'group')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
