"""Blind choices between pictures: which of two was picked, kept in a file, and how sure the count is.

A comparison is a set of checkpoints, and its file is outputs/studio/choices/<digest of their names>.json. Each pair of
checkpoints is shown once for each prompt and seed that both drew, in a random order. A picture that was judged twice
would count twice without telling more, so what was shown is not shown again.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from math import comb
from pathlib import Path
from typing import Any, Literal

from flux2.utils.json_files import read_json
from train.utils.checks import is_count
from train.utils.files import write_whole
from train.utils.text import many

MOST_BYTES = 16 << 20
SURE = 0.05  # a count as uneven as this or more is called more than chance
SIDES = ("left", "right", "neither")

Side = Literal["left", "right", "neither"]
Place = tuple[str, str, int]  # where the pictures are from (sample grids or an evaluation), prompt, seed


@dataclass(frozen=True)
class ShownPair:
    """Two pictures of one place: `left` and `right` are positions in the comparison's entries."""

    place: Place
    left: int
    right: int
    picked: str = ""  # one of SIDES; empty until it is


@dataclass(frozen=True)
class Comparison:
    """The entries of a comparison, and what was shown; the last pair may still be open."""

    entries: tuple[str, ...]
    shown: tuple[ShownPair, ...] = field(default=())

    @property
    def open_pair(self) -> ShownPair | None:
        return self.shown[-1] if self.shown and not self.shown[-1].picked else None

    @property
    def answered(self) -> int:
        return sum(bool(pair.picked) for pair in self.shown)

    def with_next(self, places: Mapping[int, set[Place]], chance: random.Random) -> Comparison:
        """Return it with an open pair, or with none if all were shown; `places` are those of each entry."""
        if (pair := self.open_pair) is not None:
            if pair.place in places[pair.left] & places[pair.right]:
                return self
            self = replace(self, shown=self.shown[:-1])  # its pictures were removed meanwhile
        counts = dict.fromkeys(combinations(range(len(self.entries)), 2), 0)
        done = set()
        for pair in self.shown:
            key = (min(pair.left, pair.right), max(pair.left, pair.right))
            counts[key] += 1
            done.add((key, pair.place[1:]))  # a sample grid and an evaluation draw the same picture
        left = [
            (key, place) for key in counts for place in places[key[0]] & places[key[1]] if (key, place[1:]) not in done
        ]
        if not left:
            return self
        fewest = min(counts[key] for key, _ in left)
        key, place = chance.choice(sorted(one for one in left if counts[one[0]] == fewest))
        first, second = chance.sample(key, 2)
        return replace(self, shown=(*self.shown, ShownPair(place, first, second)))

    def picked(self, number: int, side: Side) -> Comparison:
        """Return it with the answer to pair `number`. Raises ValueError if that is not the open one."""
        if self.open_pair is None or number != len(self.shown):
            raise ValueError("this pair was answered already, for example in another window. Ask for the next one")
        return replace(self, shown=(*self.shown[:-1], replace(self.shown[-1], picked=side)))

    def tally(self) -> list[tuple[int, int, int, int, int]]:
        """Return (one, other, picks of one, picks of other, neither) for each pair of entries that was shown."""
        found = []
        for one, other in combinations(range(len(self.entries)), 2):
            pairs = [pair for pair in self.shown if pair.picked and {pair.left, pair.right} == {one, other}]
            taken = [{"left": pair.left, "right": pair.right}.get(pair.picked) for pair in pairs]
            if pairs:
                found.append((one, other, taken.count(one), taken.count(other), taken.count(None)))
        return found


def chance_of(one: int, other: int) -> float:
    """Return how often `one` against `other`, or a more uneven count, comes up if both are picked equally often.

    This is the two-sided sign test: a binomial distribution with probability 1/2.
    """
    total, most = one + other, max(one, other)
    return min(1.0, 2 * sum(comb(total, k) for k in range(most, total + 1)) / 2**total)


def statement(name: str, other: str, picks: int, others: int, neither: int) -> str:
    """Return the count of a pair, and how sure it is, as sentences."""
    total = picks + others
    if picks < others:
        name, other, picks, others = other, name, others, picks
    ties = f", and neither {many(neither, 'time')}" if neither else ""
    if not total:
        return f"{name} and {other}: neither was picked {many(neither, 'time')}. This says nothing yet."
    count = f"{name} was picked {picks} of {many(total, 'time')} against {other}{ties}."
    chance = chance_of(picks, others)
    often = f"{chance:.0%}" if chance >= 0.01 else "less than 1%"
    sure = "This is more than chance explains." if chance <= SURE else "This may well be chance."
    return f"{count} If both were equally good, a count as uneven would come up in {often} of such series. {sure}"


def comparison_name(entries: Sequence[str]) -> str:
    """Return the name of a comparison's file, without suffix."""
    return hashlib.sha256("\n".join(sorted(entries)).encode(errors="surrogateescape")).hexdigest()[:16]


def pair_of(values: Any, entries: int) -> ShownPair:
    """Return a pair in a file. Raises ValueError or KeyError if it is none."""
    source, prompt, seed = values["place"]
    left, right, picked = values["left"], values["right"], values["picked"]
    is_pair = all(is_count(one) and one < entries for one in (left, right)) and left != right
    if not is_pair or not isinstance(source, str) or not isinstance(prompt, str) or not is_count(seed):
        raise ValueError("a pair is none of its entries")
    if picked not in ("", *SIDES):
        raise ValueError(f"{picked!r} is no answer")
    return ShownPair((source, prompt, seed), left, right, picked)


def read_comparison(file: Path) -> Comparison | None:
    """Return the comparison in a file; None if there is none. Raises ValueError, naming the file, if it is damaged."""
    if not file.exists():
        return None
    found = read_json(file, MOST_BYTES)
    try:
        entries = tuple(found["entries"])
        if len(entries) < 2 or not all(isinstance(entry, str) for entry in entries):
            raise ValueError("it has no entries")
        return Comparison(entries, tuple(pair_of(values, len(entries)) for values in found["shown"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} holds no blind choices ({error}). Delete it to start them again") from error


def write_comparison(file: Path, comparison: Comparison) -> None:
    """Write a comparison atomically."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, json.dumps(asdict(comparison), indent=1) + "\n")
