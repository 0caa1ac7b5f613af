"""The base class of datasets: a sequence of `Sample`, checked as a whole before training.

A source finds its samples when it is constructed. It reads every image header and prepares every caption, so all
errors of a dataset are known within seconds and not one by one over hours of encoding. It decodes no pixels: errors
that only a decoder finds are added to the same list later, by `Source.leave_out`.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, overload

from data.buckets import PIXELS_PER_LATENT
from data.checks import check_flag, check_int, check_text
from data.memory import in_parts, without_collection
from data.sources.captions import Captions
from data.sources.images import KNOWN_FILES, BadPicture, Picture, printable, shorten

MAX_REFERENCES = 10  # as many as the published models were trained with
ALPHA = "alpha"
LOSS_WEIGHTS = (1e-6, 1e6)  # with less a dataset trains nothing, and with more nothing else does
UNUSED_COLUMNS = "columns of images, which dataset.reference_columns or dataset.mask can name"
REPLACED = "captions, because dataset.prompt replaces all of them"
INSTEAD = ", or set dataset.prompt, which is used instead of all captions"
SHOWN = 20  # names in a message about what is not used
AT_ONCE = 1000  # samples whose images are looked up together
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Sample:
    """One training example: an image, and the images that it is an edit of."""

    target: Picture
    captions: tuple[str, ...]  # at least one, stripped, may be empty; of several, one is drawn at each step
    references: tuple[Picture, ...] = ()  # in the order in which the caption counts them
    weight: float = 1.0  # frequency relative to other samples; 3.0 is three times in every pass over the data
    mask: Picture | None = None  # loss weight of the target's pixels, white 1 and black 0; None: 1 everywhere
    resolution: int | None = None  # one of the buckets' that it is trained at; None: the largest that it fills
    loss_weight: float = 1.0  # factor of its loss
    rejected: Picture | None = None  # the image of its size that the target is preferred over

    @property
    def name(self) -> str:
        return self.target.name

    @property
    def caption(self) -> str:
        """The first caption."""
        return self.captions[0]

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """All its images: target, references, mask, rejected."""
        return (self.target, *self.references, *(other for other in (self.mask, self.rejected) if other is not None))


class Bad(NamedTuple):
    """Name of a sample that cannot be used, and the reason."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{shorten(self.name)} {printable(self.reason)}"


class CaptionPlace(NamedTuple):
    """A sample, and the file in which its captions are written, or belong if there are none yet."""

    sample: Sample  # without captions if none are written
    file: Path | None = None  # a text file, or the metadata that names the image; None: a table, an archive, a prompt
    line: int | None = None  # of the metadata, from 1; None for a text file
    row: Mapping[str, Any] = {}  # that line as it was read
    column: str = ""  # of the metadata, for captions
    written: tuple[str, ...] = ()  # its captions as they are in the file, without what `Captions` makes of them
    reason: str = ""  # why the sample is bad, if it is


# while this is a list, sources that are opened add all samples to it that they check; those that lack nothing but a
# caption then do not count as bad
CAPTION_PLACES: ContextVar[list[CaptionPlace] | None] = ContextVar("CAPTION_PLACES", default=None)
UNWRITTEN = ("-",)  # captions with which a sample is checked that has none yet


def caption_texts(value: object, allow_empty: bool = False) -> list[str]:
    """Return a text or a list of texts as a list; with `allow_empty`, null and the empty list are the empty text.

    Raise ValueError with the bare reason for anything else.
    """
    texts: list[Any] = value if isinstance(value, list) else [value]
    if allow_empty:
        texts = ["" if text is None else text for text in texts] or [""]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"has the caption {shorten(repr(value))}: it must be text")
    return texts


class BadData(ValueError):  # noqa: N818
    """A dataset has more bad samples than `max_bad` allows. The message lists every one of them, which are `bad`."""

    def __init__(self, message: str, bad: Sequence[Bad] = ()) -> None:
        super().__init__(message)
        self.bad = list(bad)


class Source(Sequence[Sample]):
    """A list of samples in a fixed order, and `bad`, those that were skipped.

    A subclass finds its samples, with captions as they were written, and passes them to `_take`, which checks and
    prepares them.

    Args:
        where: Name of the dataset in messages.
        mask: "alpha" uses each target's alpha channel as its mask; the subclass reads any other name (`_mask_name`).
        first_frame: Train on the first frame of an animated image, which otherwise counts as bad.
        max_bad: Number of bad samples that are skipped; more of them are an error.
        prompt: One caption for all images, instead of any others; the subclass reads it.
        loss_weight: Factor of the loss of every sample.
    """

    def __init__(
        self,
        where: str,
        captions: Captions | None = None,
        mask: str | None = None,
        first_frame: bool = False,
        max_bad: int = 0,
        prompt: str | None = None,
        loss_weight: float = 1.0,
    ) -> None:
        if captions is not None and not isinstance(captions, Captions):
            raise ValueError(f"dataset.captions={captions!r} must be made by data.sources.captions.Captions, or null")
        if mask is not None:
            check_text("dataset.mask", mask)
        check_flag("dataset.first_frame", first_frame)
        low, high = LOSS_WEIGHTS
        is_number = isinstance(loss_weight, int | float) and not isinstance(loss_weight, bool)
        if not is_number or not low <= loss_weight <= high:
            raise ValueError(f"dataset.loss_weight={loss_weight!r} must be a number from {low:g} to {high:g}")
        self.where, self.max_bad, self.bad = where, check_int("dataset.max_bad", max_bad, 0), list[Bad]()
        self._preparation, self._first_frame = captions or Captions(), first_frame
        self._alpha, self._mask_name = mask == ALPHA, None if mask == ALPHA else mask
        self._prompt = None if prompt is None else check_text("dataset.prompt", prompt)
        self._loss_weight = float(loss_weight)
        self._known, self._places, self._uncaptioned = KNOWN_FILES.get(), CAPTION_PLACES.get(), 0
        self._samples: list[Sample] = []
        self._notes: dict[str, list[str]] = {}

    @property
    def allow_empty(self) -> bool:
        """Whether an empty caption is allowed."""
        return self._preparation.allow_empty

    def __len__(self) -> int:
        return len(self._samples)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Sample, ...]: ...
    def __getitem__(self, index: int | slice) -> Sample | tuple[Sample, ...]:
        chosen = self._samples[index]
        return chosen if isinstance(chosen, Sample) else tuple(chosen)

    def repeat_at(self, resolutions: Callable[[int, int], Sequence[int]]) -> None:
        """Repeat each sample for each resolution that `resolutions` returns for the size of its image, if any."""
        self._samples = [
            replace(sample, resolution=resolution)
            for sample in self._samples
            for resolution in resolutions(*sample.target.size) or (None,)
        ]

    def leave_out(self, reasons: Mapping[int, str]) -> None:
        """Skip samples that cannot be decoded, given as index: reason. Raise BadData if more than `max_bad` are bad."""
        found = (Bad(self._samples[index].name, reason) for index, reason in sorted(reasons.items()))
        self.bad = list(dict.fromkeys([*self.bad, *found]))  # one image may be several samples
        self._samples = [sample for index, sample in enumerate(self._samples) if index not in reasons]
        self._check_bad(list(reasons))

    @without_collection()
    def _take(self, found: Iterable[Sample | Bad | CaptionPlace], hint: str = "") -> None:
        """Check, prepare and keep the samples found. Raise BadData as `leave_out` does, and, with `hint`, for none."""
        seen = set()
        for one in self._recalled(found):
            if isinstance(one, Bad):
                self.bad.append(one)
                continue
            sample = one.sample if isinstance(one, CaptionPlace) else one
            same = (sample.name, sample.captions, tuple(picture.name for picture in sample.references))
            if same in seen:
                self.bad.append(Bad(sample.name, "is a duplicate, with the same caption and references"))
                continue
            seen.add(same)
            prepared, reason = sample, ""
            try:
                prepared = self._prepared(sample if sample.captions else replace(sample, captions=UNWRITTEN))
                if sample.captions:
                    self._samples.append(prepared)
                else:
                    prepared = replace(prepared, captions=())
                    self._uncaptioned += 1
            except BadPicture as error:
                reason = f"{'' if error.name == sample.name else f'has {error.name}, which '}{error.reason}"
                self.bad.append(Bad(sample.name, reason))
            except ValueError as error:
                reason = str(error)
                self.bad.append(Bad(sample.name, reason))
            if self._places is not None:
                place = one if isinstance(one, CaptionPlace) else CaptionPlace(sample)
                self._places.append(place._replace(sample=prepared, written=sample.captions, reason=reason))
        for kind, names in self._notes.items():
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            shown = ", ".join(map(shorten, names[:SHOWN]))
            log.warning("%s: %s (%d): %s%s", self.where, kind, len(names), shown, more)
        if not self._samples and not self.bad and not self._uncaptioned:
            raise BadData(f"{self.where} has no samples{hint}")
        self._check_bad(self.bad)

    def _recalled(self, found: Iterable[Sample | Bad | CaptionPlace]) -> Iterator[Sample | Bad | CaptionPlace]:
        """Yield the same, with what earlier starts know of the images."""
        for part in in_parts(found, AT_ONCE):
            if self._known is not None:
                samples = (one.sample if isinstance(one, CaptionPlace) else one for one in part)
                found_here = (sample for sample in samples if isinstance(sample, Sample))
                self._known.recall(picture for sample in found_here for picture in sample.pictures)
            yield from part

    def _without_caption(self, sample: Sample, place: str) -> Bad | CaptionPlace:
        """Return a sample that has no caption file; `place` says where a caption could be."""
        if self._places is None:
            return Bad(sample.name, f"has no caption: write {place}{INSTEAD}")
        return CaptionPlace(sample, Path(sample.name).with_suffix(".txt"))

    def _in_file(self, sample: Sample | Bad, *where: Any) -> Sample | Bad | CaptionPlace:
        """Return a sample, where places are collected with the file of its captions and line, row and column in it."""
        if self._places is None or self._prompt is not None or isinstance(sample, Bad):
            return sample
        return CaptionPlace(sample, Path(where[0]), *where[1:])

    def _note_unused(self, kind: str, *names: str) -> None:
        """Note what a dataset has and does not train; `_take` logs it."""
        self._note(f"not used: {kind}", *names)

    def _note(self, what: str, *names: str) -> None:
        if names:
            self._notes.setdefault(what, []).extend(names)

    def _note_captions(self, texts: Mapping[str, Sequence[str]], lone: Sequence[str]) -> None:
        """Note the caption files that are not used: with `prompt` all, otherwise those without an image."""
        if self._prompt is None:
            self._note_unused("captions without an image of their name", *lone)
        else:
            self._note_unused(REPLACED, *(path for files in texts.values() for path in files))

    def _check_pictures(self, sample: Sample) -> None:
        """Raise ValueError with the bare reason if an image but the mask, by its header, cannot be trained on."""
        if len(sample.references) > MAX_REFERENCES:
            raise ValueError(f"has {len(sample.references)} references: at most {MAX_REFERENCES} are allowed")
        for picture in (sample.target, *sample.references, *([] if sample.rejected is None else [sample.rejected])):
            try:
                picture.name.encode()
            except UnicodeEncodeError as error:  # it would be found when the name is stored, after hours of encoding
                raise BadPicture(picture.name, "has a name that is not UTF-8: rename it") from error
            self._check_header(picture)
        if copies := [picture.name for picture in sample.references if picture.is_same_file(sample.target)]:
            raise ValueError(f"is its own reference, {copies[0]}, which teaches copying: name another image")

    def _prepared(self, sample: Sample) -> Sample:
        """Return the sample with its final captions and mask. Raise ValueError with the bare reason if it is bad."""
        self._check_pictures(sample)
        mask = sample.mask
        if self._alpha:
            mask = sample.target.transparency() if sample.target.header.transparent else None
        elif mask is not None:
            self._check_header(mask)
            if mask.size != sample.target.size:
                sizes = " x ".join(map(str, mask.size)), " x ".join(map(str, sample.target.size))
                raise ValueError(f"has the mask {mask.name} of {sizes[0]} pixels for an image of {sizes[1]}")
        captions = self._preparation.prepare(sample.captions)
        if captions == sample.captions and mask is sample.mask and sample.loss_weight == self._loss_weight:
            return sample
        return replace(sample, captions=captions, mask=mask, loss_weight=self._loss_weight)

    def _check_header(self, picture: Picture) -> None:
        """Raise BadPicture if the header shows that the image cannot be trained on."""
        header = picture.header
        if min(header.size) < PIXELS_PER_LATENT:
            size = " x ".join(map(str, header.size))
            raise BadPicture(picture.name, f"has {size} pixels: each side must have at least {PIXELS_PER_LATENT}")
        if header.animated and not self._first_frame:
            raise BadPicture(picture.name, "has several frames: set dataset.first_frame=true to use the first one")
        if header.mode in ("I", "F"):
            reason = f"has mode {header.mode}, which has no defined white: save it with 8 or 16 bits per channel"
            raise BadPicture(picture.name, reason)

    def _check_bad(self, new: Sequence[object]) -> None:
        """Raise BadData if there are too many bad samples or no good ones; log a warning if `new` ones are skipped."""
        listed = "".join(f"\n  {bad}" for bad in self.bad)
        count = len(self) + self._uncaptioned + len(self.bad)
        share = f"{len(self.bad)} of {count} samples of {self.where}"
        if len(self.bad) > self.max_bad:
            skip = f"or remove them, or skip them with dataset.max_bad={len(self.bad)} (now {self.max_bad})"
            remedy = skip if self._samples or self._uncaptioned else "them: there is no other sample to train on"
            raise BadData(f"{share} cannot be used:{listed}\nFix {remedy}", self.bad)
        if not self._samples and not self._uncaptioned:
            raise BadData(f"{self.where} has no sample that can be used:{listed}", self.bad)
        if new:
            log.warning("%s are skipped:%s", share, listed)
