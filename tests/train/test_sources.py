"""Training on the embedded model from every source, with data that is written for real; and from bad data."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import pyarrow
import pytest
from data_helpers import encoded, keep_caches_in, lines, shard, write
from message_helpers import holds
from train_helpers import CAPTIONS, compose, draw_picture, refusal, run_training
from train_helpers import lines as metrics

from data.loader import Batch, Loader
from train.encoding.prepare import prepare as fill_caches

pytest_plugins = ("train_helpers",)

# three samples with 0, 1 and 3 references of different sizes
TARGETS = {f"{number}.png": encoded(draw_picture(number, (48, 48))) for number in range(3)}
SIZES = [(48, 32), (32, 32), (64, 48)]
REFERENCES = {f"before/{number}.png": encoded(draw_picture(10 + number, SIZES[number])) for number in range(3)}
NAMES: list[list[str]] = [[], ["before/1.png"], ["before/0.png", "before/2.png", "before/1.png"]]
ROWS = [{"file_name": f"{number}.png", "text": CAPTIONS[number], "references": NAMES[number]} for number in range(3)]

Source = Callable[[Path], list[str]]


def cells(names: list[str]) -> list[dict]:
    return [{"bytes": (TARGETS | REFERENCES)[name], "path": None} for name in names]


def rows_of_bytes() -> dict[str, list]:
    return {
        "image": [cells([row["file_name"]])[0] for row in ROWS],
        "caption": [row["text"] for row in ROWS],
        "references": [cells(row["references"]) for row in ROWS],
    }


def jsonl(folder: Path) -> list[str]:
    write(folder, TARGETS | REFERENCES | {"metadata.jsonl": lines(*ROWS)})
    return ["dataset=folder", f"dataset.path={folder}"]


def csv(folder: Path) -> list[str]:
    cell = {name: json.dumps(row["references"]).replace('"', '""') for name, row in zip("abc", ROWS, strict=True)}
    text = "".join(f'{row["file_name"]},{row["text"]},"{cell[name]}"\n' for name, row in zip("abc", ROWS, strict=True))
    write(folder, TARGETS | REFERENCES | {"metadata.csv": f"file_name,text,references\n{text}"})
    return ["dataset=folder", f"dataset.path={folder}"]


def parquet(folder: Path) -> list[str]:
    pyarrow.parquet.write_table(pyarrow.table(rows_of_bytes()), write(folder, {"x": ""}) / "t.parquet")
    return ["dataset=huggingface", f"dataset.path={folder}/t.parquet"]


def stream(folder: Path) -> list[str]:
    return [*parquet(folder), "dataset.streaming=true", "dataset.limit=3"]


def arrow(folder: Path) -> list[str]:
    table = pyarrow.table(rows_of_bytes())
    write(folder, {"x": ""})
    with pyarrow.OSFile(f"{folder}/t.arrow", "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return ["dataset=huggingface", f"dataset.path={folder}/t.arrow"]


def json_list(folder: Path) -> list[str]:
    write(folder, TARGETS | REFERENCES | {"t.json": json.dumps(ROWS)})
    columns = ["dataset.image_column=file_name", "dataset.caption_column=text"]
    return ["dataset=huggingface", f"dataset.path={folder}/t.json", *columns]


def saved(folder: Path) -> list[str]:
    image = datasets.Image()
    features = datasets.Features(image=image, caption=datasets.Value("string"), references=[image])
    datasets.Dataset.from_dict(rows_of_bytes(), features=features).save_to_disk(folder)
    return ["dataset=huggingface", f"dataset.path={folder}"]


def tar(folder: Path) -> list[str]:
    files: dict[str, str | bytes] = {}
    for number, row in enumerate(ROWS):
        files |= {f"{number}.png": TARGETS[str(row["file_name"])], f"{number}.txt": str(row["text"])}
        files |= {f"{number}.ref{place}.png": REFERENCES[name] for place, name in enumerate(row["references"])}
    write(folder, {"x": ""})
    shard(folder / "s-0.tar", {name: content for name, content in files.items() if not name.startswith("2")})
    shard(folder / "s-1.tar", {name: content for name, content in files.items() if name.startswith("2")})
    return ["dataset=webdataset", f"dataset.path={folder}"]


def pairs(folder: Path) -> list[str]:
    for row in ROWS:
        stem = str(row["file_name"])[:-4]
        write(folder, {f"target/{stem}.png": TARGETS[f"{stem}.png"], f"target/{stem}.txt": str(row["text"])})
        write(folder, {f"s{place}/{stem}.png": REFERENCES[name] for place, name in enumerate(row["references"])})
    return [
        "dataset=pairs",
        f"dataset.path={folder}",
        "dataset.reference_folders=[s0,s1,s2]",
        "dataset.incomplete=true",
    ]


def mix(folder: Path) -> list[str]:
    """A source for each sample."""
    given = ["dataset=mix"]
    for number, row in enumerate(ROWS):
        write(folder / str(number), TARGETS | REFERENCES | {"metadata.jsonl": lines(row)})
        name = f"dataset.sources.of_{number}"
        given += [f"+dataset@{name}=folder", f"{name}.path={folder}/{number}"]
    return given


SOURCES = [jsonl, csv, parquet, stream, arrow, json_list, saved, tar, pairs, mix]


@pytest.fixture(autouse=True)
def quiet_hugging_face_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logging.getLogger("datasets").setLevel(logging.ERROR)
    keep_caches_in(tmp_path / "datasets", monkeypatch)


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[Batch]:
    """What the loader gave."""
    given: list[Batch] = []
    original = Loader.micro_batches

    def recorded(self: Loader, step: int) -> list[Batch]:
        given.extend(original(self, step))
        return given[-self.gradient_accumulation :]

    monkeypatch.setattr(Loader, "micro_batches", recorded)
    return given


def trained(tmp_path: Path, cache: Path, *settings: str) -> list[float]:
    """The losses of three steps on the embedded model: each of three samples once."""
    small = [
        "model=tiny",
        "model.resolution=48",
        "reference_resolution=64",
        "steps=3",
        "batch_size=1",
        "adapter.rank=2",
        "optimizer.lr=1e-2",
    ]
    intervals = ["log_every=1", "checkpoint_every=0", "sample_every=0", "validate_every=0"]
    run = f"output_dir={tmp_path / 'run'}"
    folder = run_training(compose(*small, *intervals, f"cache_dir={cache}", run, *settings)).parent
    return [line["loss"] for line in metrics(folder) if "loss" in line]


expected: list[float] = []


@pytest.mark.parametrize("source", SOURCES, ids=[source.__name__ for source in SOURCES])
def test_every_source_of_the_same_samples_trains_the_same_steps(
    tmp_path: Path, cache_folder: Path, batches: list[Batch], source: Source
) -> None:
    settings = source(tmp_path / "data")
    losses = trained(tmp_path, cache_folder, *settings)
    assert sorted(len(batch.references) for batch in batches[:3]) == [0, 1, 3]
    assert sorted(caption for batch in batches[:3] for caption in batch.captions) == sorted(CAPTIONS[:3])
    (most,) = (batch for batch in batches[:3] if len(batch.references) == 3)
    sizes = [(16 * reference.shape[-1], 16 * reference.shape[-2]) for reference in most.references]
    assert sizes == [SIZES[0], SIZES[2], SIZES[1]]
    assert len(losses) == 3
    if not expected:
        expected.extend(losses)
    assert losses == expected


def test_a_folder_with_captions_beside_the_pictures_trains(
    tmp_path: Path, cache_folder: Path, batches: list[Batch]
) -> None:
    write(tmp_path / "data", TARGETS | {f"{number}.txt": CAPTIONS[number] for number in range(3)})
    losses = trained(tmp_path, cache_folder, "dataset=folder", f"dataset.path={tmp_path}/data")
    assert len(losses) == 3
    assert {caption for batch in batches for caption in batch.captions} == set(CAPTIONS[:3])
    assert all(not batch.references for batch in batches)


def test_what_captions_and_masks_ask_for_reaches_the_batches(
    tmp_path: Path, cache_folder: Path, batches: list[Batch]
) -> None:
    """Cut-outs with tags in one folder, three times as often as solid pictures in another."""
    clear = draw_picture(0, (48, 48)).convert("RGBA")
    clear.paste((0, 0, 0, 0), (0, 0, 16, 48))  # the left third
    write(tmp_path / "cut", {"a.png": encoded(clear), "a.txt": "a, red, cup, blue, fox"})
    write(tmp_path / "solid", {"b.png": TARGETS["1.png"], "b.txt": "the small card"})
    cut, solid = "dataset.sources.cut", "dataset.sources.solid"
    named = [f"+dataset@{cut}=folder", f"{cut}.path={tmp_path}/cut", f"+dataset@{solid}=folder"]
    tags = [f"{cut}.mask=alpha", f"{cut}.captions.shuffle_tags=3", f"{cut}.captions.keep_tags=1"]
    weights = [f"{solid}.path={tmp_path}/solid", "dataset.repeats={cut: 3}", "steps=8"]
    trained(tmp_path, cache_folder, "dataset=mix", *named, *tags, *weights)
    seen = batches[:8]
    cuts = [batch for batch in seen if batch.mask is not None and batch.mask.min() < 0.5]
    assert [len(cuts), len(seen) - len(cuts)] == [6, 2]
    mask = cuts[0].mask
    assert mask is not None
    assert [round(float(value), 1) for value in mask[0, 0, 0]] == [0.0, 1.0, 1.0]
    captions = {caption for batch in cuts for caption in batch.captions}
    assert len(captions) > 1
    assert all(caption.startswith("a, ") and len(caption.split(", ")) == 5 for caption in captions)


# --- bad data


@pytest.fixture
def nothing_encoded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fails if the caches are filled."""
    called: list[object] = []
    monkeypatch.setattr("train.stages.data.prepare", lambda *given: called.append(given) or fill_caches(*given))
    yield
    assert called == []


@pytest.mark.usefixtures("nothing_encoded")
def test_bad_samples_are_one_message_with_a_line_for_each(tmp_path: Path, run_command: Callable) -> None:
    write(tmp_path / "data", TARGETS | {f"bad{number}.png": b"" for number in range(7)})
    given = ["dataset=folder", f"dataset.path={tmp_path}/data", "dataset.prompt=x", f"output_dir={tmp_path}/run"]
    code, out, err = run_command(*given, "model=tiny", "dataset.max_bad=6", f"cache_dir={tmp_path}/cache")
    assert code == 2
    said = [line for line in err.splitlines() if line.strip()]
    assert holds(said[0], f"error: ... 7 of 10 samples ... {tmp_path}/data")
    assert all(holds(said[1 + i], f"{tmp_path}/data/bad{i}.png ... empty") for i in range(7))
    assert holds("".join(said[8:]), "dataset.max_bad=7")
    assert "Traceback" not in out + err


def test_a_misspelt_setting_of_captions_names_the_right_one() -> None:
    assert holds(refusal("dataset.captions.triger=x"), "dataset.captions.triger=x ... dataset.captions.trigger?")
    assert holds(refusal("dataset=huggingfase"), "dataset=huggingfase ... did you mean huggingface?")
    assert "_common" not in refusal("dataset=qqq")
