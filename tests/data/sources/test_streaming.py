"""data.sources.streaming: a stream becomes a local table once, whatever is asked for again later."""

import errno
import logging
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import datasets
import huggingface_hub
import pytest
from data_helpers import color, keep_caches_in, lines, shard, square, table, write
from huggingface_hub.errors import OfflineModeIsEnabled
from PIL import Image

import data.sources.streaming
from data.sources.tables import HuggingFace

RED, LIME = (255, 0, 0), (0, 255, 0)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    logging.getLogger("datasets").setLevel(logging.ERROR)
    keep_caches_in(tmp_path / "cache", monkeypatch)
    return tmp_path / "cache"


@pytest.fixture
def rows_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each row that is taken from a stream."""
    read: list[int] = []
    take = data.sources.streaming.islice

    def counted(rows: Iterator, limit: int | None) -> Iterator:
        for row in take(rows, limit):
            read.append(1)
            yield row

    monkeypatch.setattr(
        data.sources.streaming, "islice", lambda rows, limit: counted(rows, limit) if limit != 100 else take(rows, 100)
    )
    return read


def test_a_stream_gives_its_first_rows_as_the_table_does_and_is_read_once(tmp_path: Path, rows_read: list) -> None:
    path = table(tmp_path / "t.parquet")
    plain = HuggingFace(path, limit=2, reference_columns=["sources"])
    streamed = HuggingFace(path, limit=2, reference_columns=["sources"], streaming=True)
    assert len(rows_read) == 2
    assert [sample.captions for sample in streamed] == [sample.captions for sample in plain]
    assert [sample.target.digest() for sample in streamed] == [sample.target.digest() for sample in plain]
    assert [len(sample.references) for sample in streamed] == [2, 0]
    assert color(streamed[1].target) == LIME
    assert len(HuggingFace(path, limit=2, streaming=True)) == 2
    assert len(rows_read) == 2
    assert len(HuggingFace(path, streaming=True)) == 3  # another recipe
    assert len(rows_read) == 5


def test_a_table_that_changed_is_streamed_again(tmp_path: Path, rows_read: list) -> None:
    path = table(tmp_path / "t.parquet")
    HuggingFace(path, streaming=True)
    table(path, caption=["one", "two", "three and more"])
    assert [sample.caption for sample in HuggingFace(path, streaming=True)] == ["one", "two", "three and more"]
    assert len(rows_read) == 6


def test_pictures_of_a_stream_are_kept_as_they_were_encoded(tmp_path: Path) -> None:
    rows = {"image": [Image.new("RGB", (16, 16), "red")], "caption": ["x"], "references": [[]]}
    features = datasets.Features(
        image=datasets.Image(), caption=datasets.Value("string"), references=[datasets.Image()]
    )
    source = datasets.Dataset.from_dict(rows, features=features)
    source.to_parquet(str(tmp_path / "t.parquet"))
    (sample,) = HuggingFace(tmp_path / "t.parquet", streaming=True)
    assert color(sample.target) == RED
    assert sample.target.digest() == HuggingFace(tmp_path / "t.parquet")[0].target.digest()


def test_paths_in_a_streamed_table_begin_beside_it(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": square(), "t.jsonl": lines({"image": "a.png", "caption": "x"})})
    assert color(HuggingFace(tmp_path / "t.jsonl", streaming=True)[0].target) == RED


def test_what_was_being_written_when_it_was_killed_is_not_read(tmp_path: Path, cache: Path) -> None:
    path = table(tmp_path / "t.parquet")
    HuggingFace(path, streaming=True)
    (file,) = cache.glob("flux2-lora/*/*.arrow")
    file.rename(file.with_suffix(".tmp")).write_bytes(b"half")
    assert len(HuggingFace(path, streaming=True)) == 3


def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Mock:
    """A Hub whose only dataset is a/b, a parquet file; its commit can be set, None is no network."""
    api, load = Mock(commit="c1"), datasets.load_dataset
    path = table(tmp_path / "hub/t.parquet")

    def info(name: str, revision: str | None) -> Mock:
        if api.commit is None:
            raise OfflineModeIsEnabled("no network")
        return Mock(sha=api.commit)

    def load_dataset(name: str, subset: str | None, split: str, revision: str | None, streaming: bool) -> object:
        if api.commit is None:
            raise ConnectionError("no network")
        assert (name, subset, revision) == ("a/b", None, None)
        return load("parquet", data_files=str(path), split=split, streaming=streaming)

    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: Mock(dataset_info=info))
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return api


def test_a_hub_dataset_is_streamed_again_for_a_new_commit_and_read_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows_read: list, caplog: pytest.LogCaptureFixture
) -> None:
    api = hub(monkeypatch, tmp_path)
    assert len(HuggingFace("a/b", streaming=True, limit=2)) == 2
    assert len(HuggingFace("a/b", streaming=True, limit=2)) == len(rows_read) == 2
    api.commit = "c2"
    assert len(HuggingFace("a/b", streaming=True, limit=2)) == 2
    assert len(rows_read) == 4
    api.commit = None
    assert len(HuggingFace("a/b", streaming=True, limit=2)) == 2
    assert len(rows_read) == 4
    assert "a/b" in caplog.text
    with pytest.raises(ValueError, match=r"'a/b'.*Hub"):
        HuggingFace("a/b", streaming=True, limit=1)


def test_shards_of_tar_files_can_be_streamed_by_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = shard(tmp_path / "s.tar", {"1.png": square(), "1.txt": "x", "2.png": square("lime"), "2.txt": "y"})
    assert tarfile.is_tarfile(path)
    load = datasets.load_dataset
    hub(monkeypatch, tmp_path)
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda *_, **__: load("webdataset", data_files=str(path), split="train", streaming=True),
    )
    samples = HuggingFace("a/b", streaming=True, image_column="png", caption_column="txt")
    assert [(sample.caption, color(sample.target)) for sample in samples] == [("x", RED), ("y", LIME)]


@pytest.mark.parametrize(
    ("prepare", "arguments", "message"),
    [
        (lambda folder: table(folder / "t.parquet"), {"split": "train[:2]"}, r"split='train\[:2\]'.*dataset\.limit"),
        (lambda folder: table(folder / "t.parquet"), {"split": "test"}, "split='test'.*train"),
        (lambda folder: table(folder / "t.parquet"), {"caption_column": "x"}, "caption_column='x'.*image, caption"),
        (
            lambda folder: write(folder, {"t.parquet": "no"}) / "t.parquet",
            {},
            r"t\.parquet'.*split='train'",
        ),
        (
            lambda folder: write(folder, {"t.jsonl": ""}) / "t.jsonl",
            {},
            r"t\.jsonl'.*split='train'.*no rows",
        ),
    ],
)
def test_what_cannot_be_streamed_is_one_clear_error(
    tmp_path: Path, cache: Path, prepare: object, arguments: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        HuggingFace(prepare(tmp_path), streaming=True, **arguments)  # type: ignore[operator]


def test_what_is_saved_to_disk_needs_no_stream(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"image": ["x"], "caption": ["y"]}).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"save_to_disk.*dataset\.streaming"):
        HuggingFace(tmp_path / "saved", streaming=True)


def test_pictures_that_lie_elsewhere_are_in_no_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = {"bytes": None, "path": "hf://datasets/a/b/a.png"}
    table(tmp_path / "t.parquet", image=[image] * 3)
    with pytest.raises(ValueError, match=r"t\.parquet.*dataset\.streaming"):
        HuggingFace(tmp_path / "t.parquet", streaming=True)


def test_a_full_disk_is_not_an_unreadable_table(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(data.sources.streaming, "_write", full)
    with pytest.raises(OSError, match=rf"No space left on device: '{cache}\S+\.arrow'"):
        HuggingFace(table(tmp_path / "t.parquet"), streaming=True)
