"""train/demo.py: what the demo measures, how it judges that, and what it writes."""

import json
import sys
from dataclasses import replace

import pytest
from demo_helpers import check_demo, check_miss, run_demo, short_settings
from message_helpers import holds
from PIL import Image
from train_helpers import ROOT, compose, execute, refusal

from data.sources import Folder
from data.synthetic import drawings
from data.synthetic.drawings import Drawing, draw
from data.synthetic.tarot import draw_card
from flux2.models.variants import VARIANTS
from flux2.pipeline import load
from train import demo
from train.demo import COLORS, SHOWN, SUBJECTS, are_identical, judge, score_pictures, share_moved
from train.stages.memory import load_config
from train.utils.progress import ItemProgress

pytest_plugins = ("train_helpers",)

GOOD = {
    "style_moved": 0.95,
    "plain_style_moved": 0.05,
    "subjects_right_before": 0.5,
    "subjects_right": 0.9,
    "plain_subjects_right_before": 1.0,
    "plain_subjects_right": 0.95,
    "base_unchanged": 1.0,
}


# ------------------------------------------------------------------ the measures


def test_the_way_to_the_cards_is_measured_from_the_base():
    assert share_moved(before=150, after=150, cards=10) == 0
    assert share_moved(before=150, after=10, cards=10) == 1
    assert share_moved(before=150, after=80, cards=10) == 0.5
    assert share_moved(before=150, after=164, cards=10) == pytest.approx(-0.1)
    assert share_moved(before=10, after=10, cards=10) == 0


def test_pictures_are_the_same_only_bit_for_bit():
    one = [Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")]
    other = [picture.copy() for picture in one]
    assert are_identical(one, other)
    other[1].putpixel((7, 7), (0, 0, 254))
    assert not are_identical(one, other)


def test_cards_and_plain_drawings_are_looked_at_for_style_subject_and_color():
    cards = score_pictures(
        [draw_card("cup", "red", 3), draw_card("star", "blue", 4)], [("red", "cup"), ("red", "star")]
    )
    assert cards.pop("style_distance") < 5
    assert cards == {"subject": 1.0, "color": 0.5, "both": 0.5}
    plain = score_pictures([draw(Drawing("cup", "red", "blue", "large"))], [("red", "cup")])
    assert plain["style_distance"] > 100
    assert (plain["subject"], plain["color"], plain["both"]) == (1.0, 1.0, 1.0)
    fish = score_pictures([draw(Drawing("cup", "red", "blue", "large"))], [("red", "fish")])
    assert fish == plain | {"subject": 0, "both": 0}


def test_what_is_asked_for_is_on_no_card_and_the_probe_knows_it():
    captions = [sample.caption for sample in Folder(ROOT / "data" / "demo")]
    assert not any(f" {word} " in caption or f" {word}," in caption for word in SUBJECTS for caption in captions)
    assert not any(f" {word} " in caption for word in COLORS for caption in captions)
    assert set(SUBJECTS) <= set(drawings.SHAPES)
    assert set(COLORS) <= set(drawings.COLORS)
    pairs = {f"{color} {subject}" for color in COLORS for subject in SUBJECTS}
    assert set(SHOWN) <= pairs
    for color in COLORS:  # a clean drawing of each counts as right
        for subject in SUBJECTS:
            assert score_pictures([draw(Drawing(subject, color, "blue", "large"))], [(color, subject)])["both"] == 1


def test_everything_good_is_judged_so_in_every_sentence():
    assert [sentence[:3] for sentence in judge(GOOD)] == ["yes"] * 5


@pytest.mark.parametrize(
    ("key", "bad", "sentence"),
    [
        ("style_moved", 0.89, 0),
        ("subjects_right", 0.79, 1),
        ("plain_style_moved", 0.21, 2),
        ("plain_subjects_right", 0.79, 3),
        ("base_unchanged", 0.0, 4),
    ],
)
def test_what_missed_its_threshold_is_judged_so_with_its_number(key, bad, sentence):
    check_miss(judge, GOOD, key, bad, sentence)


def test_an_adapter_that_learned_nothing_is_said_to_have_learned_nothing():
    first = judge(GOOD | {"style_moved": share_moved(150, 150, 10), "plain_style_moved": share_moved(120, 120, 10)})[0]
    assert first.startswith("NO ")
    assert " 0% " in first


# ------------------------------------------------------------------ the command


@pytest.fixture
def short(monkeypatch, tmp_path, cache_folder):
    """The settings of the demo with few steps and four prompts, each sampled in two steps."""
    monkeypatch.setattr(demo, "SUBJECTS", ("heart", "fish"))
    monkeypatch.setattr(demo, "COLORS", ("green", "pink"))
    monkeypatch.setattr(demo, "SHOWN", ("green fish", "pink heart"))
    monkeypatch.setattr(demo, "PICTURES", 1)
    monkeypatch.setitem(VARIANTS, "tiny", replace(VARIANTS["tiny"], steps=2))
    return [*short_settings("demo", tmp_path / "run", cache_folder), "model.resolution=64"]


def test_the_demo_writes_its_grid_and_all_its_numbers(short, run_command, tmp_path):
    run = tmp_path / "run"
    report, out = run_demo(run_command, short, demo.main, run / "demo.json")
    check_demo(run, report, out, judge, columns=2)
    assert report.keys() >= GOOD.keys() | {"training_seconds", "style_distance_of_the_cards", "cards_before"}
    assert report["cards_before"].keys() == {"style_distance", "subject", "color", "both"}
    assert report["style_moved"] == pytest.approx(
        share_moved(
            report["cards_before"]["style_distance"],
            report["cards_after"]["style_distance"],
            report["style_distance_of_the_cards"],
        )
    )


@pytest.mark.slow
def test_the_demo_of_an_adapter_that_learns_nothing_says_so(short, run_command, tmp_path):
    settings = [*short, "optimizer.lr=1e-12", "steps=1"]
    report, out = run_demo(run_command, settings, demo.main, tmp_path / "run" / "demo.json")
    assert report["style_moved"] == report["plain_style_moved"] == 0
    assert report["cards_before"] == report["cards_after"]
    assert judge(report)[0] in out


def test_the_demo_is_for_the_embedded_model(small):
    assert holds(refusal(*small(), task=demo.main), "model=small_dev ... train/run.py")


def test_pictures_are_counted_while_they_are_drawn(monkeypatch):
    pipe, told = load("tiny"), []
    count = ItemProgress("pictures", shown=False)
    monkeypatch.setattr(count, "update", lambda done, total: told.append((done, total)))
    monkeypatch.setattr(demo, "BATCH", 2)
    prompts = ["a red cup", "a blue fox", "a green key"]
    drawn = demo.draw(pipe, prompts, count, 4, 9)
    assert len(drawn) == 3
    assert told == sorted(told)
    assert told[0][0] >= 4
    assert told[-1] == (7, 9)
    assert are_identical(drawn, pipe.generate(prompts, batch_size=2))


def test_a_folder_that_cannot_be_written_is_said_before_pictures_are_made(short, monkeypatch, tmp_path):
    (tmp_path / "run").touch()

    def refuse(*args, **kwargs):
        raise AssertionError("pictures are made")

    monkeypatch.setattr(demo, "Pipeline", refuse)
    message = refusal(*short, "schedule.warmup_steps=0", task=demo.main)
    assert holds(message, f"{tmp_path / 'run'} ... File exists")


@pytest.mark.slow
def test_the_demo_learns_the_style_keeps_subjects_and_leaves_plain_prompts_alone(tmp_path):
    run = tmp_path / "run"
    done = execute([sys.executable, "train/demo.py", f"output_dir={run}"], timeout=3600)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((run / "demo.json").read_text())
    assert report["style_moved"] >= 0.9
    assert report["subjects_right"] >= 0.8
    assert report["plain_style_moved"] <= 0.2
    assert report["plain_subjects_right"] >= 0.8
    assert report["base_unchanged"] == 1.0
    assert len(judge(report)) == 5
    assert Image.open(run / "grid.png").width > 1000


@pytest.mark.slow
def test_the_demos_adapter_without_its_preservation_changes_plain_prompts(tmp_path):
    """What the experiment's preservation is for: without it the measure sees the style leak."""
    run = tmp_path / "run"
    done = execute(
        [sys.executable, "train/demo.py", "preservation=none", "steps=400", f"output_dir={run}"], timeout=3600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((run / "demo.json").read_text())
    assert report["style_moved"] >= 0.8
    assert report["plain_style_moved"] > 0.2


def test_the_demos_settings_are_those_of_its_experiment():
    run = load_config(compose("+experiment=demo"))
    assert run.variant.name == "tiny"
    assert run.preservation.active
    assert len(run.instantiate("dataset")) == 24
