"""Record the samples of a run, so that a resumed run can compare: a mark for every sample, and a digest of all marks.

A mark is a hash of cache keys, which are digests of content, and of captions, so no file is read. The marks are stored
in the run folder, the digest in every checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import xxhash

from data.cache.latents import LatentEntry
from data.sources.base import Sample
from flux2.utils.text import listed
from train.utils.files import write_whole

DATA_FILE = "data.json"
PIECE = 10_000  # texts that are written together
SHOWN = 5  # names in a message


@dataclass(frozen=True)
class TrainedData:
    """The samples of a run, in the order that draws depend on: names, and a mark of each one's content."""

    names: tuple[str, ...]
    marks: tuple[str, ...]

    @classmethod
    def from_samples(cls, samples: Iterable[Sample], entries: Iterable[LatentEntry]) -> TrainedData:
        """Hash of each sample: images with their crops, masks and references; captions; weight."""
        names, marks = [], []
        for sample, entry in zip(samples, entries, strict=True):
            keys = [[one.key, *one.reference_keys, one.mask_key] for one in entry.variants]
            keys += [[one.rejected_key] for one in entry.variants if one.rejected_key is not None]
            marks.append(xxhash.xxh3_64_hexdigest(json.dumps([keys, sample.captions, sample.weight]).encode()))
            names.append(sample.name)
        return cls(tuple(names), tuple(marks))

    @property
    def digest(self) -> str:
        return xxhash.xxh3_128_hexdigest("\n".join(self.marks).encode())

    def write(self, folder: Path) -> None:
        """Write the marks into a run folder. Raises ValueError if that fails."""
        pieces = ('{"names": [', _listed(self.names), '], "marks": [', _listed(self.marks), "]}")
        write_whole(folder / DATA_FILE, chain.from_iterable([one] if isinstance(one, str) else one for one in pieces))

    def difference(self, folder: Path, digest: str) -> str | None:
        """Return how the samples' content differs from the run's in `folder` with this `digest`; None if equal."""
        if digest == self.digest:
            return None
        try:
            stored = json.loads((folder / DATA_FILE).read_text(encoding="utf-8"))
            there = TrainedData(tuple(stored["names"]), tuple(stored["marks"]))
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            there = None
        if there is None or there.digest != digest:
            return "its samples differ"  # which ones is unknown
        was, now = (dict(zip(data.names, data.marks, strict=True)) for data in (there, self))
        changes: dict[str, Collection[str]] = {
            "changed": [name for name in now if name in was and was[name] != now[name]],
            "new": now.keys() - was.keys(),
            "gone": was.keys() - now.keys(),
        }
        parts = [f"{len(names)} {what} ({listed(names, SHOWN)})" for what, names in changes.items() if names]
        return f"of {len(there.names)} samples " + ", ".join(parts or ["all are the same, in another order"])


def _listed(texts: Sequence[str]) -> Iterator[str]:
    """Yield the items of a JSON list in pieces: the text of a million takes hundreds of megabytes."""
    for start in range(0, len(texts), PIECE):
        yield ", " * (start > 0) + json.dumps(texts[start : start + PIECE])[1:-1]
