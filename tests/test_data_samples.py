"""data.samples: what each source finds or complains of."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from unittest.mock import Mock

import datasets
import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from huggingface_hub.errors import GatedRepoError, HTTPError
from PIL import Image

from data.samples import Folder, HuggingFace

RED, WHITE = (255, 0, 0), (255, 255, 255)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def square(color: str = "red", mode: str = "RGB") -> bytes:
    return encoded(Image.new(mode, (4, 4), color))


# --- Folder


def write(folder: Path, **contents: str | bytes) -> Path:
    """Files by stem and suffix joined with an underscore: a_png=..., a_txt=..., metadata_jsonl=..."""
    folder.mkdir(exist_ok=True)
    for name, content in contents.items():
        path = folder / ".".join(name.rsplit("_", 1))
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def lines(*rows: dict) -> str:
    return "\n".join(json.dumps(row) for row in rows) + "\n"


def test_sidecar_captions_are_stripped_may_be_empty_and_come_in_order_of_names(tmp_path: Path) -> None:
    write(tmp_path, b_png=square("blue"), a_JPG=square(), c_webp=square())
    write(tmp_path, a_txt=" a red\n square \n", b_txt="\ufeffb", c_txt="")
    write(tmp_path, **{"._a_png": "macOS litter"}, notes_md="x")
    samples = Folder(str(tmp_path))
    assert [sample.caption for sample in samples] == ["a red\n square", "b", ""]
    assert [Path(sample.name).name for sample in samples] == ["a.JPG", "b.png", "c.webp"]
    assert samples[1].target.load().getpixel((0, 0)) == (0, 0, 255)
    assert samples[0].references == ()


def test_a_source_is_a_sequence(tmp_path: Path) -> None:
    samples = Folder(write(tmp_path, a_png=square(), a_txt="a", b_png=square(), b_txt="b"))
    assert len(samples) == 2
    assert samples[-1].caption == "b"
    assert [sample.caption for sample in samples[:5]] == ["a", "b"]
    with pytest.raises(IndexError):
        samples[2]


def test_metadata_gives_captions_and_references_in_the_order_of_its_lines(tmp_path: Path) -> None:
    rows: tuple[dict, ...] = (
        {"file_name": "b.png", "text": " second ", "before": "a.png", "extra": ["a.png", "b.png"], "unused": 3},
        {"file_name": "a.png", "text": "line\u2028separator", "before": None, "extra": []},
    )
    text = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    write(tmp_path, a_png=square("red"), b_png=square("blue"), metadata_jsonl=text)
    first, second = Folder(tmp_path, reference_columns=["before", "extra"])
    assert (first.caption, second.caption) == ("second", "line\u2028separator")
    assert [Path(p.name).name for p in (first.target, *first.references)] == ["b.png", "a.png", "a.png", "b.png"]
    assert second.references == ()
    assert Folder(tmp_path)[0].references == ()


def test_metadata_columns_can_be_renamed(tmp_path: Path) -> None:
    write(tmp_path, a_png=square(), metadata_jsonl=lines({"img": "a.png", "prompt": "hello"}))
    assert Folder(tmp_path, "prompt", "img")[0].caption == "hello"


def jsonl(text: str) -> Callable[[Path], Path]:
    return lambda folder: write(folder, a_png=square(), metadata_jsonl=text)


def dangling(folder: Path, name: str) -> Path:
    write(folder, b_png=square(), b_txt="")
    (folder / name).symlink_to(folder / "gone")
    return folder


GOOD = lines({"file_name": "a.png", "text": "x"})


@pytest.mark.parametrize(
    ("prepare", "arguments", "message"),
    [
        (lambda folder: folder / "gone", {}, "gone' does not exist"),
        (lambda folder: write(folder, a_txt="x") / "a.txt", {}, "a.txt' is not a folder"),
        (lambda folder: write(folder, a_txt="x"), {}, "holds no pictures .*.jpeg"),
        (lambda folder: write(folder, a_png=square(), a_txt=b"\xff\xfe\xff"), {}, "a.txt is not UTF-8"),
        (lambda folder: write(folder, a_heic=b"", b_png=square()), {}, "cannot read, convert them: a.heic"),
        (
            lambda folder: write(folder, a_png=square(), a_txt=""),
            {"caption_column": "t"},
            "metadata.jsonl does not exist",
        ),
        (jsonl(GOOD + "{oops\n"), {}, "metadata.jsonl line 2 is not JSON"),
        (jsonl(GOOD + "[1]\n"), {}, r"line 2 is '\[1\]': each line is one JSON object"),
        (jsonl(GOOD), {"caption_column": "caption"}, "line 1 has no column 'caption'; it has: file_name, text"),
        (jsonl(GOOD), {"reference_columns": ["before"]}, "line 1 has no column 'before'"),
        (jsonl(lines({"file_name": "a.png", "text": None})), {}, "line 1 holds None"),
        (jsonl(lines({"file_name": "b.png", "text": ""})), {}, "do not exist in .*: b.png"),
        (jsonl("\n"), {}, "metadata.jsonl is empty"),
        (
            jsonl(GOOD + '{"file_name": "a.png", "text": "a \\ud800"}'),
            {},
            r"line 2 holds 'a .*ud800': half of a character",
        ),
        (jsonl(lines({"file_name": "", "text": "x"})), {}, "line 1 has an empty file name"),
        (jsonl(lines({"file_name": "y" * 5000, "text": "x"})), {}, r"do not exist in .*: y{240}\.\.\.y{57}$"),
        (lambda folder: dangling(folder, "a.png"), {}, "links to files that do not exist, mend or remove them: a.png"),
        (lambda folder: dangling(folder, "a.txt"), {}, "links to files that do not exist, mend or remove them: a.txt"),
        (jsonl(GOOD), {"reference_columns": "before"}, "reference_columns='before' is str: a list"),
        (jsonl(GOOD), {"reference_columns": [3]}, "reference_columns=3 is int"),
        (jsonl(GOOD), {"caption_column": 5}, "caption_column=5 is int"),
        (jsonl(GOOD), {"image_column": ""}, "image_column=''"),
        (lambda _: None, {}, "dataset.path=None is NoneType"),
    ],
)
def test_a_mistake_in_a_folder_is_one_clear_error(
    tmp_path: Path, prepare: Callable, arguments: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Folder(prepare(tmp_path), **arguments)


def test_at_most_five_missing_captions_are_named(tmp_path: Path) -> None:
    write(tmp_path, **{f"{i}_png": square() for i in range(8)}, **{"3_txt": "x"})
    with pytest.raises(ValueError, match=r"no caption for 0.png, 1.png, 2.png, 4.png, 5.png and 2 more: write a .txt"):
        Folder(tmp_path)


def test_pictures_that_share_a_caption_or_are_named_twice_are_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write(tmp_path / "a", g_png=square(), g_jpg=encoded(Image.new("RGB", (4, 4)), "JPEG"), g_txt="x")
    assert len(Folder(write(folder, h_png=square(), h_txt=""))) == 3
    twice = lines(*[{"file_name": name, "text": "x"} for name in ("g.png", "h.png", "g.png")])
    assert len(Folder(write(folder, metadata_jsonl=twice))) == 3
    first, second = (record.getMessage() for record in caplog.records)
    assert first.endswith("2 pictures share their caption with another: g.jpg, g.png")
    assert "metadata.jsonl names 1 pictures on several lines" in second
    assert "g.png" in second


def test_the_error_of_a_file_names_its_path_and_no_stream(tmp_path: Path) -> None:
    (sample,) = Folder(write(tmp_path, a_png=b"no picture", a_txt=""))
    with pytest.raises(
        ValueError, match=r"a\.png cannot be read \(UnidentifiedImageError: cannot identify image file\)"
    ):
        sample.target.load()


# --- HuggingFace


@pytest.fixture(scope="module", autouse=True)
def quiet_hugging_face_caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keeps what `datasets` writes to this run's own folder."""
    logging.getLogger("datasets").setLevel(logging.ERROR)
    patch = pytest.MonkeyPatch()
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
    yield
    patch.undo()


COLORS = ("red", "lime", "blue")


def table(path: Path, **more: list) -> Path:
    columns = {
        "image": [square(color) for color in COLORS],
        "caption": [f" a {color} square " for color in COLORS],
        "sources": [[{"bytes": square("white"), "path": None}, {"bytes": square("black"), "path": None}], [], None],
        "number": [1, 2, 3],
    }
    path.parent.mkdir(exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns | more), path)
    return path


def test_a_parquet_file_gives_pictures_captions_and_references(tmp_path: Path) -> None:
    path = table(tmp_path / "squares.parquet", before=[square("white"), None, square("black")])
    samples = HuggingFace(path, reference_columns=["before", "sources"])
    assert [sample.caption for sample in samples] == [f"a {color} square" for color in COLORS]
    assert [sample.target.load().getpixel((0, 0)) for sample in samples] == [RED, (0, 255, 0), (0, 0, 255)]
    black = (0, 0, 0)
    references = [[picture.load().getpixel((0, 0)) for picture in sample.references] for sample in samples]
    assert references == [[WHITE, WHITE, black], [], [black]]
    assert samples[0].name == f"row 0 of {path}, column image"
    assert samples[0].references[2].name == f"row 0 of {path}, column sources[1]"
    assert samples[0].target.digest() == hashlib.sha256(square()).hexdigest()
    assert samples[0].target.size == (4, 4)


def test_a_slice_of_a_split_is_a_split(tmp_path: Path) -> None:
    samples = HuggingFace(str(table(tmp_path / "squares.parquet")), split="train[1:]")
    assert [sample.caption for sample in samples] == ["a lime square", "a blue square"]
    assert samples[0].target.load().getpixel((0, 0)) == (0, 255, 0)


def test_a_folder_of_parquet_files_has_the_splits_of_their_names(tmp_path: Path) -> None:
    table(tmp_path / "train-00000-of-00002.parquet")
    table(tmp_path / "train-00001-of-00002.parquet")
    table(tmp_path / "test-00000-of-00001.parquet", caption=["x", "y", "z"])
    (tmp_path / "README.md").write_text("# Squares\n")
    assert len(HuggingFace(tmp_path)) == 6
    assert [sample.caption for sample in HuggingFace(tmp_path, split="test")] == ["x", "y", "z"]


def test_what_save_to_disk_wrote_is_read_without_decoding(tmp_path: Path) -> None:
    rows = {"image": [Image.new("RGB", (4, 4), color) for color in COLORS], "caption": list(COLORS)}
    features = datasets.Features(image=datasets.Image(), caption=datasets.Value("string"))
    saved = datasets.Dataset.from_dict(rows, features=features)
    saved.save_to_disk(tmp_path / "alone")
    datasets.DatasetDict(train=saved, test=saved.select([2])).save_to_disk(tmp_path / "splits")
    assert HuggingFace(tmp_path / "alone")[0].target.load().getpixel((1, 1)) == RED
    (only,) = HuggingFace(tmp_path / "splits", split="test")
    assert (only.caption, only.target.load().getpixel((1, 1))) == ("blue", (0, 0, 255))
    with pytest.raises(ValueError, match="split='val' cannot be read: no such split; it has: train, test"):
        HuggingFace(tmp_path / "splits", split="val")


def test_a_column_of_paths_opens_the_files(tmp_path: Path) -> None:
    folder = write(tmp_path / "pictures", a_png=square())
    path = table(tmp_path / "t.parquet", image=[str(folder / "a.png"), str(folder / "gone.png"), None])
    samples = HuggingFace(path)
    assert samples[0].target.load().getpixel((0, 0)) == RED
    with pytest.raises(ValueError, match=r"row 1 of .*t.parquet, column image cannot be read .*gone.png"):
        _ = samples[1].target.size
    with pytest.raises(ValueError, match=r"row 2 of .*t.parquet, column image cannot be read .*null"):
        samples[2].target.digest()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "test"}, r"split='test' cannot be read: .*\['train'\]"),
        ({"image_column": "img"}, "image_column='img' is not a column .* has: image, caption, sources, number"),
        ({"caption_column": "text"}, "caption_column='text' is not a column .* has: image, caption"),
        ({"reference_columns": ["before"]}, "reference_columns='before' is not a column"),
        (
            {"image_column": "number"},
            "image_column='number' .* holds int64: pictures, encoded bytes, or paths expected",
        ),
        ({"image_column": "sources"}, "image_column='sources' .* holds list"),
        ({"caption_column": "number"}, "caption_column='number' .* holds int64: text expected"),
        ({"reference_columns": "sources"}, "reference_columns='sources' is str"),
        ({"revision": "main"}, "revision='main'.* for a Hub id"),
        ({"subset": 3}, "subset=3 is int"),
        ({"split": None}, "split=None"),
    ],
)
def test_a_mistaken_argument_is_one_clear_error(tmp_path: Path, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HuggingFace(table(tmp_path / "squares.parquet"), **arguments)


def test_a_row_without_a_caption_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"row 1 of .* has no 'caption'"):
        HuggingFace(table(tmp_path / "t.parquet", caption=["x", None, "z"]))


def test_an_empty_table_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    features = datasets.Features(image=datasets.Image(), caption=datasets.Value("string"))
    empty = datasets.Dataset.from_dict({"image": [], "caption": []}, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: empty)
    with pytest.raises(ValueError, match="split 'train' of a/b is empty"):
        HuggingFace("a/b")


@pytest.mark.parametrize("path", ["gone.parquet", "./gone", "/gone/away", "~/gone-away", "a/b/c"])
def test_a_local_path_that_does_not_exist_is_not_looked_for_on_the_hub(path: str) -> None:
    with pytest.raises(ValueError, match=f"dataset.path='{path}' does not exist"):
        HuggingFace(path)


def test_a_folder_without_parquet_files_says_what_is_accepted(tmp_path: Path) -> None:
    write(tmp_path, a_png=square(), a_txt="x")
    with pytest.raises(ValueError, match=r"neither a .parquet file.* use data.samples.Folder"):
        HuggingFace(tmp_path)


def test_a_damaged_parquet_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"bad.parquet', split='train' cannot be read: .*Parquet"):
        HuggingFace(write(tmp_path, bad_parquet=b"nonsense") / "bad.parquet")


def test_a_hub_id_that_cannot_be_reached_is_one_error_with_the_local_alternative(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"'someone/squares' could not be reached .*path=/path/to/file\.parquet, or"):
        HuggingFace("someone/squares")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (DatasetNotFoundError("It doesn't exist or cannot be accessed."), "datasets/a/b and run `hf auth login`"),
        (GatedRepoError("gated", response=Mock(headers={})), "datasets/a/b and run `hf auth login`"),
        (HTTPError("timed out"), r"'a/b' could not be reached on the Hub \(timed out\); a local copy works too"),
        (DatasetGenerationError("bad row"), "path='a/b', split='train' cannot be read: bad row"),
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
