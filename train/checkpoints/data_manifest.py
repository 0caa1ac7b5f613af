"""What a run trains on, in a form that a later start can compare: a mark for every sample, a digest of them all.

A mark is made of cache keys, which are digests of content, and of captions, so it costs no reading. Marks are kept once
in the run folder, the digest in every checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash

from data.cache.latents import LatentEntry
from train.utils.files import write_whole

DATA_FILE = "data.json"
SHOWN = 5  # names in a message


@dataclass(frozen=True)
class TrainedData:
    """The samples of a run in their order, which the draws go by: names, and a mark of each one's content."""

    names: tuple[str, ...]
    marks: tuple[str, ...]

    @classmethod
    def of(
        cls,
        names: Sequence[str],
        entries: Sequence[LatentEntry],
        captions: Sequence[Sequence[str]],
        weights: Sequence[float],
    ) -> TrainedData:
        """Of each sample: pictures with their cuts, masks and references; captions; weight."""
        marks = []
        for entry, texts, weight in zip(entries, captions, weights, strict=True):
            keys = [[one.key, *one.reference_keys, one.mask_key] for one in entry.variants]
            marks.append(xxhash.xxh3_64_hexdigest(json.dumps([keys, list(texts), weight]).encode()))
        return cls(tuple(names), tuple(marks))

    def beside(self, other: TrainedData | None) -> TrainedData:
        """These samples and then the others, if any."""
        return self if other is None else TrainedData(self.names + other.names, self.marks + other.marks)

    @property
    def digest(self) -> str:
        return xxhash.xxh3_128_hexdigest("\n".join(self.marks).encode())

    def write(self, folder: Path) -> None:
        """Keep the marks in a run folder. Raises ValueError if it cannot be written."""
        write_whole(folder / DATA_FILE, json.dumps({"names": self.names, "marks": self.marks}))

    def difference(self, folder: Path, digest: str) -> str | None:
        """What is other in these samples than in those of the run in `folder`, whose digest was `digest`; None if
        nothing is. A sample may have another name: it is the content that is learned."""
        if digest == self.digest:
            return None
        try:
            kept = json.loads((folder / DATA_FILE).read_text())
            there = TrainedData(tuple(kept["names"]), tuple(kept["marks"]))
        except (OSError, ValueError, KeyError, TypeError):
            return "its samples are others"  # and which, is not known
        if there.digest != digest:
            return "its samples are others"
        was, now = (dict(zip(data.names, data.marks, strict=True)) for data in (there, self))
        changed = [name for name in now if name in was and was[name] != now[name]]
        said = [
            f"{len(found)} {what} ({', '.join(found[:SHOWN])}{', ...' if len(found) > SHOWN else ''})"
            for found, what in (
                (changed, "changed"),
                ([name for name in now if name not in was], "new"),
                ([name for name in was if name not in now], "gone"),
            )
            if found
        ]
        return f"of {len(there.names)} samples " + ", ".join(said or ["all are there, in another order"])
