"""data.sources.tables and data.sources.open_table: rows of tables that are here or on the Hub, and what is complained
of.
"""

import hashlib
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import datasets
import huggingface_hub
import pyarrow
import pytest
from data_helpers import COLORS, color, keep_caches_in, lines, square, table, write
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from huggingface_hub.errors import GatedRepoError, HTTPError
from PIL import Image

from data.sources.base import BadData
from data.sources.tables import HuggingFace

RED, LIME, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)


@pytest.fixture(scope="module", autouse=True)
def quiet_hugging_face_caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keeps what `datasets` writes to this run's own folder."""
    logging.getLogger("datasets").setLevel(logging.ERROR)
    patch = pytest.MonkeyPatch()
    keep_caches_in(tmp_path_factory.mktemp("datasets"), patch)
    yield
    patch.undo()


def test_a_parquet_file_gives_pictures_captions_and_references(tmp_path: Path) -> None:
    path = table(tmp_path / "squares.parquet", before=[square("white"), None, square("black")])
    samples = HuggingFace(path, reference_columns=["before", "sources"])
    assert [sample.caption for sample in samples] == [f"a {color} square" for color in COLORS]
    assert [color(sample.target) for sample in samples] == [RED, LIME, BLUE]
    references = [[color(picture) for picture in sample.references] for sample in samples]
    assert references == [[WHITE, WHITE, BLACK], [], [BLACK]]
    assert samples[0].name == f"row 0 of {path}, column image"
    assert samples[0].references[2].name == f"row 0 of {path}, column sources[1]"
    assert samples[0].target.digest() == hashlib.sha256(square()).hexdigest()
    assert samples[0].target.size == (16, 16)


def test_a_slice_of_a_split_is_a_split(tmp_path: Path) -> None:
    samples = HuggingFace(str(table(tmp_path / "squares.parquet")), split="train[1:]")
    assert [sample.caption for sample in samples] == ["a lime square", "a blue square"]
    assert color(samples[0].target) == LIME


def test_a_folder_of_parquet_files_has_the_splits_of_their_names(tmp_path: Path) -> None:
    table(tmp_path / "train-00000-of-00002.parquet")
    table(tmp_path / "train-00001-of-00002.parquet")
    table(tmp_path / "test-00000-of-00001.parquet", caption=["x", "y", "z"])
    (tmp_path / "README.md").write_text("# Squares\n")
    assert len(HuggingFace(tmp_path)) == 6
    assert [sample.caption for sample in HuggingFace(tmp_path, split="test")] == ["x", "y", "z"]


def test_what_save_to_disk_wrote_is_read_without_decoding(tmp_path: Path) -> None:
    rows = {"image": [Image.new("RGB", (16, 16), color) for color in COLORS], "caption": list(COLORS)}
    features = datasets.Features(image=datasets.Image(), caption=datasets.Value("string"))
    saved = datasets.Dataset.from_dict(rows, features=features)
    saved.save_to_disk(tmp_path / "alone")
    datasets.DatasetDict(train=saved, test=saved.select([2])).save_to_disk(tmp_path / "splits")
    assert color(HuggingFace(tmp_path / "alone")[0].target) == RED
    (only,) = HuggingFace(tmp_path / "splits", split="test")
    assert (only.caption, color(only.target)) == ("blue", BLUE)
    with pytest.raises(ValueError, match=r"dataset\.path=.*split='val'.*train, test"):
        HuggingFace(tmp_path / "splits", split="val")


def test_a_column_of_paths_opens_files_beside_the_table(tmp_path: Path) -> None:
    write(tmp_path, {"pictures/a.png": square(), "b.png": square("blue"), "else/c.png": square("white")})
    images = ["pictures/a.png", str(tmp_path / "b.png"), "./b.png"]
    samples = HuggingFace(table(tmp_path / "t.parquet", image=images))
    assert [color(sample.target) for sample in samples] == [RED, BLUE, BLUE]
    path = table(tmp_path / "tables/t.parquet", image=["c.png"] * 3)
    assert color(HuggingFace(path, picture_folder=str(tmp_path / "else"))[2].target) == WHITE


def test_a_picture_that_the_library_refers_to_is_opened_beside_the_table_and_where_it_downloads(tmp_path: Path) -> None:
    downloads = Path(datasets.config.HF_DATASETS_CACHE) / "downloads"
    write(tmp_path, {"data/a.png": square(), "secret.png": square()})
    write(downloads, {"b.png": square("blue")})
    paths = ["a.png", str(downloads / "b.png"), str(tmp_path / "secret.png")]
    images = [{"bytes": None, "path": path} for path in paths]
    samples = HuggingFace(table(tmp_path / "data/t.parquet", image=images), max_bad=1)
    assert [color(sample.target) for sample in samples] == [RED, BLUE]
    (bad,) = samples.bad
    assert re.search(rf"'{tmp_path}/secret\.png'.* {tmp_path}/data\b.*dataset\.picture_folder", bad.reason)


def test_a_column_of_paths_on_the_hub_needs_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, {"a.png": square("blue")})
    rows = datasets.Dataset.from_dict({"image": ["a.png"], "caption": ["x"]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)
    with pytest.raises(ValueError, match=r"'image'.*a/b\b.*dataset\.picture_folder"):
        HuggingFace("a/b")
    assert color(HuggingFace("a/b", picture_folder=str(tmp_path))[0].target) == BLUE


def test_what_is_wrong_with_the_pictures_of_rows_is_listed_by_row(tmp_path: Path) -> None:
    write(tmp_path, {"secret.png": square(), "data/a.png": square()})
    images = ["gone.png", "../secret.png", None, "a.png", str(tmp_path / "secret.png")]
    rows = [{"image": image, "caption": "x", "references": ["a.png", "../secret.png"]} for image in images]
    path = write(tmp_path / "data", {"t.jsonl": lines(*rows)}) / "t.jsonl"
    with pytest.raises(BadData) as caught:
        HuggingFace(path)
    listed = str(caught.value).splitlines()
    assert re.search(rf"\b5 of 5 samples\b.* {path}\b", listed[0])
    outside = rf"{tmp_path / 'data'}\b.*dataset\.picture_folder"
    wanted = [
        "(exist|found)",
        rf"'\.\./secret\.png'.*{outside}",
        "null",
        rf"row 3 of {path}, column references\[1\].*'\.\./secret\.png'.*{outside}",
        rf"'{tmp_path}/secret\.png'.*{outside}",
    ]
    for row, (line, reason) in enumerate(zip(listed[1:6], wanted, strict=True)):
        assert re.search(rf"row {row} of {path}, column image\b.*{reason}", line)


@pytest.mark.parametrize("ending", ["json", "jsonl", "arrow", "csv"])
def test_other_kinds_of_files_are_tables_too(tmp_path: Path, ending: str) -> None:
    write(tmp_path, {"a.png": square(), "b.png": square("blue")})
    rows = [
        {"image": "a.png", "caption": "x", "references": ["b.png", "b.png"]},
        {"image": "b.png", "caption": "y", "references": []},
    ]
    file = tmp_path / f"t.{ending}"
    if ending == "arrow":
        content = pyarrow.Table.from_pylist(rows)
        with pyarrow.OSFile(str(file), "wb") as sink, pyarrow.ipc.new_stream(sink, content.schema) as writer:
            writer.write_table(content)
    elif ending == "csv":
        file.write_text("image,caption,references\na.png,x,b.png\nb.png,y,\n")
    else:
        file.write_text(json.dumps(rows) if ending == "json" else lines(*rows))
    samples = HuggingFace(file)
    assert [(sample.caption, color(sample.target)) for sample in samples] == [("x", RED), ("y", BLUE)]
    assert [len(sample.references) for sample in samples] == ([1, 0] if ending == "csv" else [2, 0])
    with pytest.raises(BadData, match=r"row 0 of .* is its own reference"):
        HuggingFace(file, reference_columns=["references", "image"])


def test_a_list_without_any_reference_is_none(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": square(), "t.jsonl": lines({"image": "a.png", "caption": "x", "references": []})})
    assert HuggingFace(tmp_path / "t.jsonl")[0].references == ()


def test_captions_may_be_a_list_or_one_prompt_for_all(tmp_path: Path) -> None:
    path = table(tmp_path / "t.parquet", caption=[["one", "two"], ["three"], ["four", "four"]])
    assert [sample.captions for sample in HuggingFace(path)] == [("one", "two"), ("three",), ("four",)]
    assert {sample.caption for sample in HuggingFace(path, prompt="a square", caption_column="none")} == {"a square"}


def test_masks_may_be_a_column_or_the_transparency(tmp_path: Path) -> None:
    clear = square("#ff000080", mode="RGBA")
    path = table(tmp_path / "t.parquet", image=[clear, square(), clear], mask=[square("white"), None, square("black")])
    assert [sample.mask and color(sample.mask) for sample in HuggingFace(path, mask="mask")] == [WHITE, None, BLACK]
    assert [sample.mask and color(sample.mask) for sample in HuggingFace(path, mask="alpha")] == [
        (128, 128, 128),
        None,
        (128, 128, 128),
    ]


def test_a_limit_takes_the_first_rows(tmp_path: Path) -> None:
    path = table(tmp_path / "t.parquet")
    assert [sample.caption for sample in HuggingFace(path, limit=2)] == ["a red square", "a lime square"]
    assert len(HuggingFace(path, limit=9)) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "test"}, r"split='test'.*\['train'\]"),
        ({"image_column": "img"}, "image_column='img'.* image, caption, sources, number"),
        ({"caption_column": "text"}, "caption_column='text'.* image, caption"),
        ({"reference_columns": ["before"]}, "reference_columns='before'.* image, caption"),
        ({"image_column": "number"}, "image_column='number'.* int64"),
        ({"image_column": "sources"}, "image_column='sources'.* list"),
        ({"mask": "cutout"}, "mask='cutout'.* image, caption"),
        ({"mask": "number"}, "mask='number'.* int64"),
        ({"limit": 0}, r"limit=0\b"),
        ({"streaming": "yes"}, "streaming='yes'"),
        ({"picture_folder": "."}, r"picture_folder='\.'"),
        ({"prompt": 3}, r"prompt=3\b"),
        ({"caption_column": "number"}, "caption_column='number'.* int64"),
        ({"reference_columns": "sources"}, "reference_columns='sources'"),
        ({"revision": "main"}, "revision='main'.*Hub"),
        ({"subset": 3}, r"subset=3\b"),
        ({"split": None}, r"split=None\b"),
    ],
)
def test_a_mistaken_argument_is_one_clear_error(tmp_path: Path, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HuggingFace(table(tmp_path / "squares.parquet"), **arguments)


def test_a_row_without_a_caption_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"row 1 of .*'caption'.*null"):
        HuggingFace(table(tmp_path / "t.parquet", caption=["x", None, "z"]))


def test_an_empty_table_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    features = datasets.Features(image=datasets.Image(), caption=datasets.Value("string"))
    empty = datasets.Dataset.from_dict({"image": [], "caption": []}, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: empty)
    with pytest.raises(ValueError, match=r"'train'.*a/b\b"):
        HuggingFace("a/b")


@pytest.mark.parametrize("path", ["gone.parquet", "./gone", "/gone/away", "~/gone-away", "a/b/c"])
def test_a_local_path_that_does_not_exist_is_not_looked_for_on_the_hub(path: str) -> None:
    with pytest.raises(ValueError, match=rf"dataset\.path='{path}'.*\.parquet"):
        HuggingFace(path)


def test_a_folder_without_parquet_files_says_what_is_accepted(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": square(), "a.txt": "x", "metadata.jsonl": "{}"})
    with pytest.raises(ValueError, match=r"\.parquet, \.arrow, \.json.*dataset=folder"):
        HuggingFace(tmp_path)


def test_a_damaged_parquet_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"bad\.parquet'.*split='train'.*Parquet"):
        HuggingFace(write(tmp_path, {"bad.parquet": b"nonsense"}) / "bad.parquet")


def test_a_hub_id_that_cannot_be_reached_is_one_error_with_the_local_alternative(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"'someone/squares'.*dataset\.path=/path/to/file\.parquet"):
        HuggingFace("someone/squares")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (DatasetNotFoundError("It doesn't exist or cannot be accessed."), "datasets/a/b.*`hf auth login`"),
        (GatedRepoError("gated", response=Mock(headers={})), "datasets/a/b.*`hf auth login`"),
        (HTTPError("timed out"), r"'a/b'.*timed out.*dataset\.path="),
        (DatasetGenerationError("bad row"), "path='a/b'.*split='train'.*bad row"),
    ],
)
def test_what_goes_wrong_on_the_hub_has_a_remedy(
    monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(ValueError, match=message) as caught:
        HuggingFace("a/b")
    assert caught.value.__cause__ is error
