"""train/demo_edit.py: what the demo of edits measures, how it judges that, and what it writes."""

import json
import sys
from dataclasses import replace

import pytest
from demo_helpers import check_demo, check_miss, run_demo, short_settings
from message_helpers import holds
from PIL import Image
from train_helpers import ROOT, compose, execute, refusal

from data.synthetic.drawings import Drawing, draw
from data.synthetic.recognize import difference
from data.synthetic.spotlight import INSTRUCTION, SHOWN, new_drawings, spotlight
from flux2.models.variants import VARIANTS
from flux2.pipeline import load
from train import demo_edit
from train.demo_edit import edit_sources, judge, others, plain_edits, shares
from train.stages.memory import load_config

pytest_plugins = ("train_helpers",)

GOOD = {
    "edits_right_before": 0.0,
    "edits_right": 0.9,
    "moved": 0.85,
    "shuffled_right": 0.0,
    "shuffled_follow": 0.9,
    "plain_right_before": 0.95,
    "plain_right": 0.9,
    "base_unchanged": 1.0,
}
CUP, FISH = Drawing("cup", "red", "blue", "large"), Drawing("fish", "pink", "grey", "small")


# ------------------------------------------------------------------ the measures


def test_pictures_are_right_in_all_that_the_reference_shows_and_in_their_light():
    pictures = [spotlight(draw(CUP)), draw(CUP), spotlight(draw(replace(CUP, color="green")))]
    assert shares(pictures, [CUP] * 3, lit=True) == pytest.approx(
        {"shape": 1, "color": 2 / 3, "background": 1, "size": 1, "light": 2 / 3, "all": 1 / 3}
    )
    assert shares(pictures[:2], [CUP, CUP], lit=False)["all"] == 0.5
    for key in ("shape", "background", "size"):
        found = shares([draw(FISH)], [replace(CUP, **{key: getattr(FISH, key)})], lit=False)
        assert (found[key], found["all"]) == (1, 0)


def test_another_reference_shows_another_subject_and_each_is_taken_once():
    for drawings in (new_drawings(), list(SHOWN)):
        indices = others(drawings)
        assert sorted(indices) == list(range(len(drawings)))
        assert all(drawing.shape != drawings[i].shape for drawing, i in zip(drawings, indices, strict=True))


def test_plain_edits_change_color_and_background_in_turn_and_name_no_trigger():
    drawings = new_drawings()
    edits = plain_edits(drawings)
    for i, (drawing, (instruction, result)) in enumerate(zip(drawings, edits, strict=True)):
        kind = "background" if i % 2 else "color"
        assert result == replace(drawing, **{kind: getattr(result, kind)})
        assert getattr(result, kind) != getattr(drawing, kind)
        assert getattr(result, kind) in instruction
        assert "sptlgt" not in instruction
    assert len({instruction for instruction, _ in edits}) > 10


def test_everything_good_is_judged_so_in_every_sentence():
    assert [sentence[:3] for sentence in judge(GOOD)] == ["yes"] * 4


@pytest.mark.parametrize(
    ("key", "bad", "sentence"),
    [
        ("edits_right", 0.79, 0),
        ("edits_right_before", 0.11, 0),
        ("shuffled_follow", 0.79, 1),
        ("shuffled_right", 0.11, 1),
        ("plain_right", 0.84, 2),
        ("base_unchanged", 0.0, 3),
    ],
)
def test_what_missed_its_threshold_is_judged_so_with_its_number(key, bad, sentence):
    check_miss(judge, GOOD, key, bad, sentence)


# ------------------------------------------------------------------ the command


@pytest.fixture
def short(monkeypatch, tmp_path, cache_folder):
    """The settings of the demo with few steps and four pictures, each sampled in two steps."""
    monkeypatch.setattr(demo_edit, "new_drawings", lambda: list(SHOWN))
    monkeypatch.setitem(VARIANTS, "tiny", replace(VARIANTS["tiny"], steps=2))
    return short_settings("demo_edit", tmp_path / "run", cache_folder)


def test_a_picture_is_an_edit_of_its_own_source_with_its_own_seed(short):
    pipe = load("tiny", device="cpu")
    sources = [draw(CUP), draw(FISH), draw(CUP)]
    pictures = edit_sources(pipe, sources, ["make it blue", "make it green", "make it blue"])
    for i, source in enumerate(sources):
        (alone,) = pipe.generate(["make it blue", "make it green", "make it blue"][i], references=[source], seed=i)
        assert difference(pictures[i], alone) < 0.5
    assert difference(pictures[0], pictures[1]) > 20
    assert pictures[0].tobytes() != pictures[2].tobytes()


@pytest.mark.slow  # train/demo.py runs in the fast set
def test_the_demo_writes_its_grid_and_all_its_numbers(short, run_command, tmp_path):
    run = tmp_path / "run"
    report, out = run_demo(run_command, short, demo_edit.main, run / "demo_edit.json")
    check_demo(run, report, out, judge, columns=4)
    assert report.keys() >= GOOD.keys() | {"training_seconds", "distance", "before", "after", "shuffled_given"}
    assert report["edits_right_before"] == report["before"]["all"]
    assert report["moved"] == pytest.approx(1 - report["distance"] / report["distance_before"])
    assert f"-m flux2.generate --adapter {run / 'adapter'} --image data/demo_edit_new/pink_fish.png" in out
    assert (ROOT / "data/demo_edit_new/pink_fish.png").is_file()


@pytest.mark.slow
def test_the_demo_of_an_adapter_that_learns_nothing_says_so(short, run_command, tmp_path):
    settings = [*short, "optimizer.lr=1e-12", "steps=1"]
    report, out = run_demo(run_command, settings, demo_edit.main, tmp_path / "run" / "demo_edit.json")
    assert report["moved"] == 0
    assert report["before"] == report["after"]
    assert report["plain_before"] == report["plain_after"]
    assert [sentence[:3] for sentence in judge(report)[:2]] == ["NO "] * 2
    assert all(sentence in out for sentence in judge(report))


def test_the_demo_is_for_the_embedded_model(small):
    assert holds(refusal(*small(), task=demo_edit.main), "model=small_dev ... train/run.py")


def test_the_demos_settings_are_those_of_its_experiment():
    run = load_config(compose("+experiment=demo_edit"))
    assert run.variant.name == "tiny"
    assert run.preservation.active
    assert not any("sptlgt" in prompt for prompt in run.preservation.prompts)
    dataset = run.instantiate("dataset")
    assert {sample.captions for sample in dataset} == {(INSTRUCTION,)}
    assert all(len(sample.references) == 1 for sample in dataset)
    names = {f"{drawing.color}_{drawing.shape}" for drawing in SHOWN}
    assert {file.removeprefix("data/demo_edit_new/").removesuffix(".png") for file in run.sample.files} == names
    assert [len(files) for files in run.sample.edits] == [1] * len(run.sample.prompts)


@pytest.mark.slow
def test_the_demo_learns_the_edit_from_the_reference_and_leaves_plain_edits_alone(tmp_path):
    run = tmp_path / "run"
    done = execute([sys.executable, "train/demo_edit.py", f"output_dir={run}"], timeout=3600)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((run / "demo_edit.json").read_text())
    assert report["edits_right"] >= 0.8
    assert report["edits_right_before"] <= 0.1
    assert report["shuffled_follow"] >= 0.8
    assert report["shuffled_right"] <= 0.1
    assert report["plain_right"] >= report["plain_right_before"] - 0.1
    assert report["base_unchanged"] == 1.0
    assert Image.open(run / "grid.png").width > 1000
