"""What a source of training data is: a sequence of `Sample`, checked as a whole before anything is trained.

A source finds its samples when it is constructed. Every picture's header is read then and every caption prepared, so
that what is wrong with a dataset is known in seconds, all of it, and not one by one over hours of encoding. Pixels are
not decoded: what only a decoder can find out comes to the same list later, through `Source.leave_out`.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, overload

from data.buckets import PIXELS_PER_LATENT
from data.checks import check_flag, check_int, checked_text
from data.sources.captions import Captions
from data.sources.images import BadPicture, Picture, shortened

MAX_REFERENCES = 10  # what the published models were trained with
ALPHA = "alpha"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sample:
    """One example: the picture to learn and the pictures it is an edit of.

    Attributes:
        target: the picture to learn.
        captions: at least one, stripped, may be empty; with several, which one is trained is drawn each time.
        references: the pictures that the target is an edit of, in the order that the caption counts them.
        weight: how often it is trained relative to others; 3.0 is three times in every pass over the data.
        mask: where the target counts, white wholly and black not at all, as large as the target; None: everywhere.
    """

    target: Picture
    captions: tuple[str, ...]
    references: tuple[Picture, ...] = ()
    weight: float = 1.0
    mask: Picture | None = None

    @property
    def name(self) -> str:
        return self.target.name

    @property
    def caption(self) -> str:
        """The first of its captions."""
        return self.captions[0]


class Bad(NamedTuple):
    """A sample that cannot be used: what it is called, and why."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{shortened(self.name)} {self.reason}"


class BadData(ValueError):  # noqa: N818
    """More of a dataset cannot be used than is allowed. The message has a line for each bad sample."""


class Source(Sequence[Sample]):
    """A list of samples in a fixed order.

    A subclass finds its samples, with captions as they were written, and hands them to `_take`, which checks and
    prepares them. What all sources accept:

    Args:
        where: what the dataset is called in messages.
        captions: what is done to captions.
        mask: "alpha" makes each target's transparency its mask; any other name is the subclass's to read.
        first_frame: train on the first frame of an animated picture, which otherwise counts as bad.
        max_bad: so many samples may be bad, and are left out; with more, none is trained.

    Attributes:
        bad: what was left out.
    """

    def __init__(
        self, where: str, captions: Captions | None, mask: str | None, first_frame: bool, max_bad: int
    ) -> None:
        if captions is not None and not isinstance(captions, Captions):
            raise ValueError(f"dataset.captions={captions!r} must be made by data.sources.captions.Captions, or null")
        if mask is not None:
            checked_text("dataset.mask", mask)
        check_flag("dataset.first_frame", first_frame)
        self.where, self.max_bad, self.bad = where, check_int("dataset.max_bad", max_bad, 0), list[Bad]()
        self._preparation, self._mask, self._first_frame = captions or Captions(), mask, first_frame
        self._samples: list[Sample] = []

    def __len__(self) -> int:
        return len(self._samples)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Sample, ...]: ...
    def __getitem__(self, index: int | slice) -> Sample | tuple[Sample, ...]:
        chosen = self._samples[index]
        return chosen if isinstance(chosen, Sample) else tuple(chosen)

    def leave_out(self, reasons: Mapping[int, str]) -> None:
        """Takes samples out whose pictures turned out to be damaged when they were decoded: reasons by index.

        Raises BadData, with the whole list, if there are more than `max_bad` in all.
        """
        self.bad += [Bad(self._samples[index].name, reason) for index, reason in sorted(reasons.items())]
        self._samples = [sample for index, sample in enumerate(self._samples) if index not in reasons]
        self._check_bad(list(reasons))

    def _take(self, found: Iterable[Sample | Bad], hint: str = "") -> None:
        """Prepares and keeps what is good of the samples found. Raises BadData as `leave_out`, and if none is left.

        `hint` says what to look at if nothing was found at all.
        """
        seen = set()
        for sample in found:
            if isinstance(sample, Bad):
                self.bad.append(sample)
                continue
            same = (sample.name, sample.captions, tuple(picture.name for picture in sample.references))
            if same in seen:
                self.bad.append(Bad(sample.name, "is there twice, with the same caption and references"))
                continue
            seen.add(same)
            try:
                self._samples.append(self._prepared(sample))
            except BadPicture as error:
                what = "" if error.name == sample.name else f"has {error.name}, which "
                self.bad.append(Bad(sample.name, f"{what}{error.reason}"))
            except ValueError as error:
                self.bad.append(Bad(sample.name, str(error)))
        if not self._samples and not self.bad:
            raise BadData(f"{self.where} has no samples{hint}")
        self._check_bad(self.bad)

    def _prepared(self, sample: Sample) -> Sample:
        """The sample with its final captions and mask. ValueError, which says only the reason, if it is bad."""
        if len(sample.references) > MAX_REFERENCES:
            raise ValueError(f"has {len(sample.references)} references: at most {MAX_REFERENCES} are possible")
        for picture in (sample.target, *sample.references):
            self._check_header(picture)
        mask = sample.mask
        if self._mask == ALPHA:
            mask = sample.target.transparency() if sample.target.header.transparent else None
        elif mask is not None:
            self._check_header(mask)
            if mask.size != sample.target.size:
                sizes = " x ".join(map(str, mask.size)), " x ".join(map(str, sample.target.size))
                raise ValueError(f"has the mask {mask.name} of {sizes[0]} pixels for a picture of {sizes[1]}")
        return replace(sample, captions=self._preparation.prepare(sample.captions), mask=mask)

    def _check_header(self, picture: Picture) -> None:
        """BadPicture if what its header says cannot be trained on."""
        header = picture.header
        if min(header.size) < PIXELS_PER_LATENT:
            size = " x ".join(map(str, header.size))
            raise BadPicture(picture.name, f"has {size} pixels: a side must have {PIXELS_PER_LATENT} or more")
        if header.animated and not self._first_frame:
            raise BadPicture(picture.name, "has several frames: dataset.first_frame=true takes the first of them")
        if header.mode in ("I", "F"):
            reason = f"has mode {header.mode}, which has no defined white: save it with 8 or 16 bits a channel"
            raise BadPicture(picture.name, reason)

    def _check_bad(self, new: Sequence[object]) -> None:
        """BadData if there is too much, or nothing else; a warning if `new` are left out."""
        total = len(self) + len(self.bad)
        listed = "".join(f"\n  {bad}" for bad in self.bad)
        of = f"{len(self.bad)} of {total} samples of {self.where}"
        if len(self.bad) > self.max_bad:
            raise BadData(
                f"{of} cannot be used:{listed}\nMend or remove them, or train without them: "
                f"dataset.max_bad={len(self.bad)} (now {self.max_bad})"
            )
        if not self._samples:
            raise BadData(f"{self.where} has no sample that can be used:{listed}")
        if new:
            log.warning("%s are left out:%s", of, listed)
