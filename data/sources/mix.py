"""Several sources as one dataset, with a weight for each."""

import math
from collections.abc import Mapping
from dataclasses import replace

from data.sources.base import Source

LEAST = 1e-4  # repeats of a source, and its share of the largest one


class Mix(Source):
    """The samples of several sources, one source after the other, with weights.

    Args:
        sources: Source by name. Each has its own settings, such as captions and `max_bad`.
        repeats: Number of times a sample is trained per pass, by name of the source; 1 by default.
        shares: Share of the training for every source by name, whatever its size. Only their ratios matter.

    Raises ValueError for factors that are not positive numbers, unknown names, shares that omit a source, or both.
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        repeats: Mapping[str, float] | None = None,
        shares: Mapping[str, float] | None = None,
    ) -> None:
        if not isinstance(sources, Mapping) or not sources:
            raise ValueError(f"dataset.sources={sources!r} must name at least one source")
        for name, source in sources.items():
            if not isinstance(source, Source):
                raise ValueError(f"dataset.sources.{name} is {type(source).__name__}: it must be a dataset")
        if repeats and shares:
            raise ValueError("dataset.repeats and dataset.shares exclude each other. Set one of them")
        for key, given in (("repeats", repeats or {}), ("shares", shares or {})):
            if not isinstance(given, Mapping):
                raise ValueError(f"dataset.{key}={given!r} must map names of sources to numbers")
            for name, factor in given.items():
                if name not in sources:
                    raise ValueError(f"dataset.{key}.{name} is not a source. The sources are: {', '.join(sources)}")
                is_number = isinstance(factor, int | float) and not isinstance(factor, bool)
                if not is_number or not math.isfinite(factor) or factor <= 0:
                    raise ValueError(f"dataset.{key}.{name}={factor!r} must be a positive number")
            unit, of = (1.0, "") if key == "repeats" else (max(given.values(), default=1.0), " of the largest share")
            for name, factor in given.items():
                if not LEAST <= factor / unit <= 1 / LEAST:  # beyond, passes over the samples have no end
                    raise ValueError(f"dataset.{key}.{name}={factor!r} must be from {LEAST:g} to {1 / LEAST:g}{of}")
        if shares and (left := sources.keys() - shares.keys()):
            raise ValueError(f"dataset.shares omits {', '.join(sorted(left))}. Name every source")
        super().__init__(" and ".join(source.where for source in sources.values()))
        self.bad = [bad for source in sources.values() for bad in source.bad]
        self._sources, self._shares = dict(sources), dict(shares or {})
        self._weights = {name: float((repeats or {}).get(name, 1.0)) for name in sources}
        self._join()

    def _join(self) -> None:
        """Collect the samples that the sources have now, with their weights."""
        weights = self._weights
        if self._shares:
            each, total = sum(self._shares.values()), sum(map(len, self._sources.values()))
            weights = {
                name: self._shares[name] / each * total / max(len(source), 1)  # 0 if captions are still to be written
                for name, source in self._sources.items()
            }
        self._samples = [
            replace(sample, weight=sample.weight * weights[name])
            for name, source in self._sources.items()
            for sample in source
        ]

    def leave_out(self, reasons: Mapping[int, str]) -> None:
        """Skip bad samples in the source that each belongs to; the shares of the sources do not change."""
        before, start = len(self.bad), 0
        for source in self._sources.values():
            stop = start + len(source)
            own = {index - start: reason for index, reason in reasons.items() if start <= index < stop}
            if own:
                source.leave_out(own)
            start = stop
        self.bad = [bad for source in self._sources.values() for bad in source.bad]
        assert len(self.bad) == before + len(reasons)
        self._join()
