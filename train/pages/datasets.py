"""A dataset as training reads it: its samples and where their captions are, buckets, and what is wrong with it.

The configuration is composed and the source is made as in a run, so problems have the words in which a run reports
them. What is known of the headers of images is kept, so that reading a folder again takes a fraction of the time.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache as memoized
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data.buckets import Buckets
from data.cache.image_digests import settled_stamp, stamp_of
from data.files import user_path
from data.sources import Bad, Captions, Sample, Source
from data.sources.base import CAPTION_PLACES, BadData, CaptionPlace
from data.sources.images import KNOWN_FILES, FileOpener, Header, Picture
from data.sources.open_table import is_local
from flux2.utils.text import split_words
from train.config.instantiate import check_own_targets, instantiate, parse_settings
from train.pages import settings
from train.pages.settings import SettingError
from train.pages.workspace import Workspace

ALL = 10**9  # bad samples that are skipped, so that all are known
MOST_HEADERS = 500_000
RECENT = 4  # datasets that are kept as they were read
SOURCE_OF_MIX = re.compile(r"\+dataset@(dataset\.sources\.\w+)=(\w+)")
PLACES = re.compile(r"(path|folders?|mask)$")  # settings that may name a file or a folder


@dataclass(frozen=True)
class Chosen:
    """A choice of conf/dataset, its path, further settings as they are typed, and the training resolution."""

    dataset: str = "folder"
    path: str = ""
    settings: str = ""
    resolution: str = ""

    @property
    def words(self) -> list[str]:
        """The overrides of the dataset. Raises SettingError, with the field, for what is no setting."""
        if self.dataset not in settings.choices("dataset"):
            known = ", ".join(settings.choices("dataset"))
            raise SettingError(f"dataset={self.dataset!r} is not one of {known}", "dataset")
        words = [f"dataset={self.dataset}"]
        if self.path.strip():
            words.append(settings.override("dataset.path", self.path.strip()))
        try:
            return [*words, *map(_checked, split_words(self.settings))]
        except SettingError as error:
            raise SettingError(str(error), "settings") from error
        except ValueError as error:
            raise SettingError(f"settings={self.settings!r} cannot be read ({error})", "settings") from error

    @property
    def sizes(self) -> list[str]:
        """The overrides of the training resolution."""
        given = self.resolution.replace(",", " ").split()
        if not given:
            return []
        if not all(re.fullmatch(r"[1-9]\d{0,4}", side) for side in given):
            raise SettingError(
                f"resolution={self.resolution!r} must be a side in pixels, such as 1024, or several", "resolution"
            )
        sides = given[0] if len(given) == 1 else f"[{','.join(given)}]"
        return [f"buckets.resolution={sides}", f"reference_resolution={max(map(int, given))}"]


def _checked(word: str) -> str:
    """Return an override as it is given to Hydra. Raises SettingError for what is no setting of a dataset."""
    mixed = SOURCE_OF_MIX.fullmatch(word)
    if mixed and mixed[2] in settings.choices("dataset"):
        return word
    name, equals, value = word.partition("=")
    if not equals or name.partition(".")[0] not in ("dataset", "buckets", "reference_resolution"):
        raise SettingError(f"{word!r} is no setting of dataset or buckets, such as dataset.recursive=true", "settings")
    return settings.override(name, value)


@dataclass
class OpenedDataset:
    """A dataset as it was read."""

    chosen: Chosen
    places: list[CaptionPlace]  # of all samples that were checked, with the reasons of bad ones
    bad: list[Bad]  # samples that training cannot use, in its words
    later: list[Bad]  # further ones, which training reports when it gets to their dataset or their sizes
    problem: str  # the message with which training would stop; empty if it would not
    notes: list[str]  # what training would warn of
    buckets: Buckets
    reference_pixels: int
    captions: Captions
    keys: dict[str, int] = field(default_factory=dict)  # index of each place

    def __post_init__(self) -> None:
        self.keys = {key_of(place): index for index, place in enumerate(self.places)}

    @cached_property
    def pictures(self) -> dict[str, Picture]:
        """All images by name."""
        return {picture.name: picture for place in self.places for picture in place.sample.pictures}

    @cached_property
    def reasons(self) -> dict[str, str]:
        """The reasons of bad samples by name."""
        return {bad.name: bad.reason for bad in (*self.later, *self.bad)}

    @property
    def unwritten(self) -> list[CaptionPlace]:
        """The places of samples that lack nothing but a caption."""
        return [place for place in self.places if not place.written and not place.reason]


def key_of(place: CaptionPlace) -> str:
    """Return a short name of a place, the same when the dataset is read again."""
    text = f"{place.sample.name}\0{place.file}\0{place.line}"
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:20]


class KnownHeaders:
    """Headers of image files, which hold while the files look the same; and listings of archives, likewise."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, Any], tuple[str, Any]] = {}

    def recall(self, pictures: Iterable[Picture]) -> None:
        """Give pictures their headers if these are known and their files have not changed since."""
        for picture in pictures:
            if isinstance(picture.open, FileOpener) and not picture.alpha:
                stamp, header = self._known.get(picture.open.place, ("", None))
                if stamp and stamp == stamp_of(picture.open.path)[0]:
                    assert isinstance(header, Header)
                    picture.remember(header, None)

    def keep(self, pictures: Iterable[Picture]) -> None:
        """Keep the headers of pictures, which were read just now."""
        if len(self._known) > MOST_HEADERS:
            self._known.clear()
        for picture in pictures:
            if isinstance(picture.open, FileOpener) and not picture.alpha:
                place = picture.open.place
                if place not in self._known and (stamp := settled_stamp(place[0])):
                    self._known[place] = stamp, picture.header

    def listing(self, path: str, read: Callable[[], Any]) -> Any:
        """Return what `read` returns, kept while the file looks the same."""
        stamp, found = self._known.get((path, None), ("", None))
        if not stamp or stamp != settled_stamp(path):
            stamp, found = settled_stamp(path), read()
            if stamp:
                self._known[path, None] = stamp, found
        return found


@contextmanager
def warnings_of_data() -> Iterator[list[str]]:
    """Context manager that collects what the packages of data/ log in this thread."""
    found, thread = list[str](), threading.get_ident()

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.thread == thread:
                found.append(record.getMessage())

    handler, logger = Collector(logging.WARNING), logging.getLogger("data")
    logger.addHandler(handler)
    try:
        yield found
    finally:
        logger.removeHandler(handler)


def check_places(workspace: Workspace, group: Mapping[str, Any], base: Path | None = None) -> None:
    """Raise Refused if a setting of a dataset names a place outside of the opened folders."""
    own = group.get("path")
    base = user_path(own) if isinstance(own, str) else base
    if isinstance(own, str) and str(group.get("_target_")).endswith("HuggingFace") and not is_local(own):
        raise SettingError(f"dataset.path={own!r} is not on this machine. Give a file or folder with the data", "path")
    for key, value in group.items():
        if isinstance(value, Mapping):
            check_places(workspace, value, base)
        elif PLACES.search(key):
            for name in value if isinstance(value, list) else [value]:
                if isinstance(name, str):
                    workspace.resolve(name if key in ("path", "picture_folder") or base is None else base / name)


def check_folders(workspace: Workspace, places: Iterable[CaptionPlace]) -> None:
    """Raise Refused if images or captions are outside of the opened folders, to where a link may lead."""
    places = list(places)
    opened = (place.sample.target.open for place in places)
    for folder in {os.path.dirname(one.path) for one in opened if isinstance(one, FileOpener)}:
        workspace.resolve(folder or ".")
    for file in {place.file for place in places if place.file is not None}:  # each may be a link
        workspace.resolve(file)


def check_files(workspace: Workspace, group: Any) -> int:
    """Raise Refused if a dataset reads outside of the opened folders; return the number of its samples.

    What is wrong with its samples is left to those who train them.
    """
    if not isinstance(group, dict):
        raise SettingError(f"dataset={group!r} must be a group of settings", "dataset")
    check_own_targets("dataset", group)
    check_places(workspace, group)
    places = list[CaptionPlace]()
    token = CAPTION_PLACES.set(places)
    try:
        with warnings_of_data(), suppress(BadData):
            instantiate("dataset", skipping_all(group))
    finally:
        CAPTION_PLACES.reset(token)
    check_folders(workspace, places)
    for picture in (picture for place in places for picture in place.sample.pictures):
        if isinstance(picture.open, FileOpener):
            workspace.resolve(picture.open.path)
    return len(places)


def skipping_all(group: Any) -> Any:
    """Return the group `dataset` with any number of bad samples allowed, also in the datasets that it mixes."""
    if not isinstance(group, Mapping):
        return group
    return {key: ALL if key == "max_bad" else skipping_all(value) for key, value in group.items()}


class Library:
    """Datasets as they were read last."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # one is read at a time
        self._recent: OrderedDict[tuple[Any, ...], OpenedDataset] = OrderedDict()
        self._headers = KnownHeaders()

    def recent(self, workspace: Workspace, chosen: Chosen) -> OpenedDataset:
        """Return a dataset as it was read last, or else read it."""
        with self._lock:
            return self._recent.get((*workspace.folders, chosen)) or self.read(workspace, chosen)

    def read(self, workspace: Workspace, chosen: Chosen) -> OpenedDataset:
        """Return a dataset as it is now. Raises ValueError if it cannot be read, Refused if it is elsewhere."""
        with self._lock:
            found, key = self._read(workspace, chosen), (*workspace.folders, chosen)
            self._recent[key] = found
            self._recent.move_to_end(key)
            while len(self._recent) > RECENT:
                self._recent.popitem(last=False)
        return found

    def _read(self, workspace: Workspace, chosen: Chosen) -> OpenedDataset:
        config = settings.compose([*chosen.sizes, *chosen.words])
        try:
            group, sizes = (
                OmegaConf.to_container(config[key], resolve=True, throw_on_missing=True)
                for key in ("dataset", "buckets")
            )
            pixels = int(config.reference_resolution) ** 2
        except (OmegaConfBaseException, ValueError) as error:
            raise settings.error_of(error, chosen.words) from error
        assert isinstance(group, dict)
        assert isinstance(sizes, dict)
        check_own_targets("dataset", group)
        check_places(workspace, group)
        buckets: Buckets = parse_settings("buckets", sizes, Buckets)
        captions = group.get("captions")
        preparation = instantiate("dataset.captions", captions) if isinstance(captions, Mapping) else Captions()
        places, found, small = list[CaptionPlace](), list[Bad](), too_small(buckets)
        token, known = CAPTION_PLACES.set(places), KNOWN_FILES.set(self._headers)
        try:
            with warnings_of_data() as notes:
                try:
                    found = instantiate("dataset", skipping_all(group)).bad
                except BadData as error:
                    found = error.bad
                    if not places:
                        raise
            CAPTION_PLACES.set(None)
            check_folders(workspace, places)
            good = [place for place in places if not place.reason]
            self._headers.keep(picture for place in good for picture in place.sample.pictures)
            found += [Bad(place.sample.name, reason) for place in good if (reason := small(place.sample))]
            bad, problem = list[Bad](), ""
            if found or any(not place.written for place in good):
                bad, problem, notes = as_training(group, small)
        finally:
            CAPTION_PLACES.reset(token)
            KNOWN_FILES.reset(known)
        named = {one.name for one in bad}
        later = [one for one in found if one.name not in named]
        return OpenedDataset(chosen, places, bad, later, problem, notes, buckets, pixels, preparation)


def too_small(buckets: Buckets) -> Callable[[Sample], str]:
    """Return a function that returns why a sample has no bucket, empty if it has one."""

    @memoized  # most images share few sizes
    def reason(width: int, height: int) -> str:
        return "" if buckets.assign(width, height) else buckets.too_small(width, height)

    return lambda sample: reason(*sample.target.size)


def as_training(group: Mapping[str, Any], small: Callable[[Sample], str]) -> tuple[list[Bad], str, list[str]]:
    """Return the bad samples of a dataset, the message with which training stops at them, and what it warns of."""
    with warnings_of_data() as notes:
        try:
            source: Source = instantiate("dataset", group)
            source.leave_out({i: reason for i, sample in enumerate(source) if (reason := small(sample))})
            return source.bad, "", notes
        except BadData as error:
            return error.bad, str(error), notes
