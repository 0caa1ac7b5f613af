"""data.sources.tables: a CSV is read as it is written, where pandas has rules of its own."""

from pathlib import Path

import datasets
import pytest
from data_helpers import COLORS, keep_caches_in, square, write

from data.sources.base import BadData
from data.sources.captions import Captions
from data.sources.open_table import open_table
from data.sources.tables import HuggingFace

WORDS = ["NA", "None", "null", "nan", "N/A", "#N/A", "NULL", "NaN", "<NA>"]


@pytest.fixture(autouse=True)
def _table_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    keep_caches_in(tmp_path_factory.mktemp("datasets"), monkeypatch)


def csv_file(folder: Path, text: str, name: str = "t.csv") -> Path:
    write(folder, {f"{color}.png": square(color) for color in COLORS})
    return write(folder, {name: text}) / name


def test_words_that_pandas_takes_for_null_are_captions(tmp_path: Path) -> None:
    file = csv_file(tmp_path, "image,caption\n" + "".join(f"red.png,{word}\n" for word in WORDS))
    assert [sample.caption for sample in HuggingFace(file)] == WORDS
    with pytest.raises(ValueError, match=r"CSV cannot be streamed.*dataset\.streaming"):
        HuggingFace(file, streaming=True)


def test_an_empty_cell_is_null(tmp_path: Path) -> None:
    file = csv_file(tmp_path, 'image,caption,references\nred.png,,\nlime.png,"",blue.png\nblue.png,None,\n')
    with pytest.raises(BadData, match=r"(?s)2 of 3 samples.*row 0 of .*: null.*row 1 of .*: null"):
        HuggingFace(file)
    samples = HuggingFace(file, captions=Captions(allow_empty=True))
    assert [sample.caption for sample in samples] == ["", "", "None"]
    assert [len(sample.references) for sample in samples] == [0, 1, 0]


def test_a_folder_is_read_as_its_files_are(tmp_path: Path) -> None:
    csv_file(tmp_path, "image,caption\nred.png,None\n", "train-0.csv")
    csv_file(tmp_path, "image,caption\nlime.png,NA\n", "train-1.csv")
    assert [sample.caption for sample in HuggingFace(tmp_path)] == ["None", "NA"]
    write(tmp_path, {"notes.json": '{"a": 1}'})  # of which the library reads none, as most files are tables of CSV
    assert [sample.caption for sample in HuggingFace(tmp_path)] == ["None", "NA"]
    csv_file(tmp_path, "image,caption\nlime.png,NA,1\n", "dogs.csv")  # of no split
    assert len(HuggingFace(tmp_path)) == 2
    csv_file(tmp_path / "images", "image,caption\nlime.png,NA\n")  # the library reads most of the files
    with pytest.raises(ValueError, match=r"'caption' is not a column.*: image$"):
        HuggingFace(tmp_path / "images")


def test_a_csv_of_the_hub_is_read_likewise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = csv_file(tmp_path, "image,caption\nred.png,None\n")
    load = datasets.load_dataset

    def load_dataset(path: str, subset: str | None, revision: str | None, **named: object) -> object:
        assert (path, subset, revision) == ("a/b", None, None)
        return load("csv", data_files=str(file), **named)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert [sample.caption for sample in HuggingFace("a/b", picture_folder=str(tmp_path))] == ["None"]
    for text, match in {
        "image,caption\nred.png,x,y\n": "more cells",
        "image,caption,caption\nred.png,x,y\n": "twice",
    }.items():
        file = csv_file(tmp_path, text, f"{match[:4]}.csv")
        with pytest.raises(ValueError, match=rf"'a/b'.*{match}.*local copy"):
            HuggingFace("a/b", picture_folder=str(tmp_path))


REFUSED = {
    "a column twice": ("image,caption,caption\nred.png,a,b\n", r"t\.csv has the column 'caption' twice"),
    "a cell more": ("image,caption\nred.png,lime.png,a dog\n", r"t\.csv has 2 columns, and 3 cells in its first row"),
    "a comma in a text": ("image,caption\nred.png,a dog, sitting\n", "quote texts with commas"),
    "a comma at the end": ("image,caption\nred.png,a dog,\nlime.png,a cat,\n", "3 cells in its first row"),
    "a cell more in the first row only": ("image,caption\nred.png,a dog,x\nlime.png,a cat\n", "3 cells"),
    "a cell more in a later row": (
        "image,caption\nred.png,a dog\nlime.png,a cat,x\n",
        "Expected 2 fields in line 3, saw 3",
    ),
}


@pytest.mark.parametrize(("text", "message"), REFUSED.values(), ids=REFUSED)
def test_a_table_that_would_be_shifted_is_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        HuggingFace(csv_file(tmp_path, text))


def test_what_only_looks_like_it_is_read(tmp_path: Path) -> None:
    text = '\ufeff\n \nimage,caption,v1,v1.1\n\n"red.png","a dog, ""sitting""\non a bed",1,2\nlime.png,short\n'
    samples = HuggingFace(csv_file(tmp_path, text))
    assert [sample.caption for sample in samples] == ['a dog, "sitting"\non a bed', "short"]


@pytest.mark.parametrize(
    ("settings", "text"),
    [("sep: ';'", "image;text\nx.png;a, b\n"), ("names: [image, text]", "x.png,a\nx.png,a\n")],
)
def test_a_table_is_read_as_its_readme_says(settings: str, text: str, tmp_path: Path) -> None:
    configs = f"configs:\n- config_name: default\n  data_files: a.csv\n  {settings}\n"
    (tmp_path / "README.md").write_text(f"---\n{configs}---\n")
    (tmp_path / "a.csv").write_text(text)
    assert open_table(str(tmp_path), "train", None, None).column_names == ["image", "text"]
