"""docs/data.md: every command of it composes, and opens a dataset of that kind."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import datasets
import huggingface_hub
import pytest
from data_helpers import encoded, keep_caches_in, lines, shard, square, table, write
from PIL import Image
from train_helpers import ROOT, compose

from train.cli.settings_file import with_settings_file
from train.config.instantiate import instantiate

TEXT = (ROOT / "docs" / "data.md").read_text()
COMMANDS: list[str] = re.findall(r"^\|.*\| `(dataset=.*)` \|$", TEXT, re.MULTILINE)
CAT = {"cat.png": square()}
CLEAR = encoded(Image.new("RGBA", (16, 16), (255, 0, 0, 128)))


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the page says that one has, by the names that it says, in the current folder; and a Hub with one dataset."""
    keep_caches_in(tmp_path / "datasets", monkeypatch)
    row, other = {"file_name": "cat.png", "text": "a cat"}, {"file": "cat.png", "prompt": "a cat"}
    write(tmp_path / "cats", {**CAT, "cat.txt": "a cat"})
    write(tmp_path / "tree", {f"deep/{name}": content for name, content in {**CAT, "cat.txt": "a cat"}.items()})
    write(tmp_path / "plain", CAT)  # type: ignore[arg-type]
    write(tmp_path / "described", {**CAT, "metadata.jsonl": lines(row)})
    write(tmp_path / "renamed", {**CAT, "metadata.jsonl": lines(other)})
    write(
        tmp_path / "references",
        {**CAT, "metadata.jsonl": lines(row | {"references": ["a.png", "a.png"]}), "a.png": CAT["cat.png"]},
    )
    write(tmp_path / "edits", {"source/x.png": square(), "target/x.png": square(), "target/x.txt": "light"})
    write(tmp_path / "poses", {f"{name}/x.png": square() for name in ("person", "pose", "target")})
    write(tmp_path / "poses", {"target/x.txt": "pose them"})
    write(tmp_path / "votes", {"chosen/x.png": square(), "rejected/x.png": square("blue"), "chosen/x.txt": "a cat"})
    write(tmp_path / "votes", {"source/x.png": square("green")})
    write(tmp_path / "sizes", {"large/x.png": square(), "small/x.png": square("blue"), "large/x.txt": "a cat"})
    write(tmp_path / "cutouts", {"cat.png": CLEAR, "cat.txt": "a cat"})
    write(tmp_path / "masked", {**CAT, "cat.txt": "a cat", "masks/cat.png": square("white")})
    write(tmp_path / "tags", {**CAT, "cat.txt": "felix, cat, chair, window, night"})
    write(tmp_path, {"list.jsonl": lines({"image": "cat.png", "caption": "a cat"})})
    (tmp_path / "shards").mkdir()
    for number in range(2):
        shard(tmp_path / f"shards/train-{number}.tar", {"0001.png": square(), "0001.txt": f"cat {number}"})
    shard(tmp_path / "described.tar", {"0001.png": square(), "0001.json": '{"caption": "a cat"}'})
    features = datasets.Features(image=datasets.Image(), caption=datasets.Value("string"))
    rows = {"image": [Image.new("RGB", (16, 16))], "caption": ["a cat"]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "saved")
    table(tmp_path / "cards.parquet")
    on_hub = table(tmp_path / "hub/t.parquet", after=[square()] * 3, before=[square()] * 3, text=["x", "y", "z"])
    load = datasets.load_dataset

    def load_dataset(path: str, *given: object, **named: object) -> object:
        if path != "someone/cards":
            return load(path, *given, **named)
        named.pop("revision")
        return load("parquet", data_files=str(on_hub), **named)

    class Api:
        def dataset_info(self, path: str, revision: str | None) -> object:
            return type("Info", (), {"sha": "c1"})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.chdir(tmp_path)


def opened(*overrides: str) -> list:
    from omegaconf import OmegaConf

    return list(instantiate("dataset", OmegaConf.to_container(compose(*overrides), resolve=True)["dataset"]))


@pytest.mark.usefixtures("mine")
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_page_opens_its_dataset(command: str) -> None:
    samples = opened(*shlex.split(command))
    assert samples
    asked: dict[str, Callable] = {
        "prompt=a photo of felix": lambda: {sample.caption for sample in samples} == {"a photo of felix"},
        "pairs": lambda: all(sample.references for sample in samples),
        "[person,pose]": lambda: [len(sample.references) for sample in samples] == [2],
        "[source]": lambda: [len(sample.references) for sample in samples] == [1],
        "path=references": lambda: [len(sample.references) for sample in samples] == [2],
        "reference_columns": lambda: all(len(sample.references) == 1 for sample in samples),
        "preference": lambda: all(sample.rejected is not None for sample in samples),
        "mask=": lambda: all(sample.mask is not None for sample in samples),
        "trigger": lambda: [sample.caption for sample in samples] == ["felix, a cat"],
        "shuffle_tags": lambda: len(samples[0].captions) > 4,
        "train-*.tar": lambda: len(samples) == 2,
        "mix": lambda: [round(sample.weight, 2) for sample in samples] == [2.8, 0.4, 0.4, 0.4],
    }
    assert [words for words, holds in asked.items() if words in command and not holds()] == []


def test_the_page_has_a_line_for_every_source_and_for_what_the_sources_have() -> None:
    assert len(COMMANDS) >= 20
    for name in ("folder", "pairs", "preference", "huggingface", "webdataset", "mix"):
        assert any(command.startswith(f"dataset={name} ") for command in COMMANDS)
    rows = [line for line in TEXT.splitlines() if line.startswith("|") and "`dataset=" in line.split("|")[2]]
    assert len(rows) == len(COMMANDS)


@pytest.mark.usefixtures("mine")
def test_the_files_of_settings_of_the_page_open_their_datasets(tmp_path: Path) -> None:
    one, several = re.findall(r"```yaml\n(# mine\.yaml.*?)```", TEXT, re.DOTALL)
    write(tmp_path, {"mine.yaml": several, "one.yaml": one, "my paintings (2024)/cat.png": square()})
    write(tmp_path, {"my paintings (2024)/cat.txt": "a cat"})
    assert [sample.caption for sample in opened(*with_settings_file(["config=one.yaml"]))] == ["felix, a cat"]
    samples = opened(*with_settings_file(["config=mine.yaml"]))
    assert [sample.caption for sample in samples][:2] == ["felix, a cat", "a red square"]
    assert [sample.weight for sample in samples] == [3.0, 1.0, 1.0, 1.0]


def test_every_setting_that_the_page_names_is_one() -> None:
    known = {
        key for name in ("folder", "pairs", "preference", "huggingface", "webdataset", "mix") for key in settings(name)
    }
    named = set(re.findall(r"dataset\.((?:captions\.)?[a-z_]+)", TEXT)) - {"sources"}
    assert {name for name in named if name.removeprefix("captions.") not in known} == set()
    assert len(named) > 15


def settings(name: str) -> list[str]:
    given = compose(f"dataset={name}").dataset
    return [*given.keys(), *(given.get("captions") or {}).keys()]
