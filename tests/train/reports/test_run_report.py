import json
import re
from html import unescape

import pytest
from browser import CHROMIUM, NONE, Browser
from omegaconf import OmegaConf
from PIL import Image

from train.evaluation.distances import Nearest
from train.evaluation.recommend import recommend
from train.evaluation.results import Evaluation, Row
from train.reports import plots, run_report, slider
from train.reports.plots import Curve
from train.reports.slider import Cell, Shot
from train.validation.sample_grid import sample_grid, split_grid

pytest_plugins = ("train_helpers",)

EVIL = '<script>alert(1)</script>"&'
LONG = "/a/very/long/" + "path" * 60
TIMES = (0.2, 0.8)


@pytest.fixture
def run(tmp_path):
    """A run folder as training leaves it, without adapters."""
    config = {
        "name": "cards",
        "steps": 40,
        "validate_every": 10,
        "validation": {"held_out": 0, "times": list(TIMES)},
        "dataset": {"path": LONG, "captions": {"trigger": EVIL}},
        "tracker": {"api_key": "abcdefgh12345678"},
    }
    OmegaConf.save(OmegaConf.create(config), tmp_path / "config.yaml")
    lines, validated = [], []
    for step in range(0, 41):
        line = {"step": step}
        if step:
            line |= {"loss": 2 - step / 40, "lr": 1e-3, "grad_norm": 1.0, "images_per_second": 8.0}
            line |= {"peak_memory_gb": 1.5}
        if step % 10 == 0:
            losses = [[2 - step / 50 + at + i / 10 for at in TIMES] for i in range(3)]
            mean = sum(map(sum, losses)) / 6
            line |= {"validation_loss": mean, **{f"validation_loss/{at:g}": mean + at for at in TIMES}}
            validated.append({"step": step, "times": list(TIMES), "samples": list("abc"), "losses": losses})
        lines.append(line)
    for name, found in (("metrics.jsonl", lines), ("validation.jsonl", validated)):
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in found))
    for step in (20, 40):
        place = tmp_path / "checkpoints" / f"step_{step:06d}"
        place.mkdir(parents=True)
        (place / "state.json").write_text("{}")
    return tmp_path


def pictures(*colors, size=(96, 64)):
    return [Image.new("RGB", size, color) for color in colors]


@pytest.fixture
def made(run):
    """An evaluation of it: two prompts, the base and two checkpoints; one picture could not be computed."""
    files, place = {}, run / "evaluation"
    place.mkdir()
    for name, colors in {"base": ("red", "blue"), "step 20": ("green", "pink"), "step 40": ("white", None)}.items():
        files[name] = []
        for i, color in enumerate(colors):
            file = place / f"{name}_{i}.png"
            if color:
                pictures(color)[0].save(file)
            files[name].append(file if color else None)
    near = [Nearest(0, 0.1, 1.0, True), None]
    rows = [Row(name, None, 1.0, found, 0.5, 0.2, 0.3, near) for name, found in files.items()]
    own = tuple(float(i) for i in range(1, 10))
    names = [f"{i}.png" for i in range(9)]
    strengths = [Row("0", None, 0.0, files["base"], 0.5, 0, 0.3), Row("1", 40, 1.0, files["step 40"], 0.5, 0.2, 0.3)]
    evaluated = Evaluation(run, "latents", [EVIL, "a " + "long" * 80], [(0, 0), (1, 0)], rows, "step 40", strengths)
    evaluated.trained, evaluated.own, evaluated.pictures = names, own, dict(enumerate(pictures("grey")))
    return evaluated


def test_the_page_says_what_was_measured_masks_secrets_and_escapes_texts(run, made):
    text = run_report.write(run, made).read_text()
    assert "<script>alert" not in text
    assert text.count("<script>") == 1
    assert "abcdefgh12345678" not in text
    assert "api_key: '***'" in unescape(text)
    assert EVIL in unescape(text)
    assert "://" not in text
    words = " ".join(unescape(re.sub(r"<[^>]+>", " ", text)).split())
    assert re.search(r"Recommended, on 3 samples( and \d+ validations?)? alone, checkpoints/step_000040", words)
    assert "It rests on" not in words  # that is said by then
    assert "1.8000" in words  # the last validation loss: 2 - 0.8 + 0.5 + 0.1
    assert "nearer than 100% of the training pictures" in words
    assert "step 40 1 of 2" in words
    assert "8 (8 to 8)" in words


def test_pictures_before_and_after_stay_in_later_reports_of_the_same_adapter(run, made):
    (run / "adapter").mkdir()
    weights = run / "adapter" / "adapter_model.safetensors"
    weights.write_text("one")
    cell = Cell(EVIL, [Shot("base", *pictures("red")), Shot("adapter", *pictures("blue"), first=True)])
    first = run_report.write(run, pairs=[cell]).read_text()
    again = run_report.write(run, made).read_text()
    shown = slider.cells([cell])
    assert "Before and after</h2><p>Drag over a picture" in again
    assert again.count("Drag over a picture") == 1
    assert shown in first
    assert shown in again
    weights.write_text("trained for longer")
    assert "Before and after" not in run_report.of(run, made)


def test_what_a_recommendation_rests_on_is_said_once_and_only_of_one(run):
    file = run / "validation.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    more = [line | {"samples": list("abcdef"), "losses": 2 * line["losses"]} for line in lines]
    file.write_text("".join(json.dumps(line) + "\n" for line in more))
    assert run_report.of(run).count("It rests on 6 samples: too few to be sure") == 1
    for place in (run / "checkpoints").iterdir():
        (place / "state.json").unlink()
    assert "It rests on" not in run_report.of(run)


def test_a_validation_loss_that_is_not_finite_is_named_and_never_chosen(run):
    file = run / "validation.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines[2]["losses"][0][0] = float("nan")  # after step 20, before the lowest
    file.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 50, "lo')
    assert "the validation loss was not finite after step 20" in run_report.stands_out(run)
    found = recommend(run)
    assert found.checkpoint is not None
    assert found.checkpoint.name == "step_000040"
    assert "  and 1 whose loss was not finite (step 20)" in found.lines
    assert not any("nan" in line for line in found.lines)
    lines[4]["losses"][0][0] = float("inf")
    lines[2]["losses"][0][0] = 0.1
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert recommend(run).checkpoint.name == "step_000020"


def test_a_run_that_got_worse_is_said_to_have_with_its_numbers(run):
    assert run_report.stands_out(run) == []
    for name in ("metrics.jsonl", "validation.jsonl"):
        lines = [json.loads(line) for line in (run / name).read_text().splitlines()]
        steps = [line["step"] for line in lines]
        backwards = [{**line, "step": step} for line, step in zip(reversed(lines), steps, strict=True)]
        (run / name).write_text("".join(json.dumps(line) + "\n" for line in backwards))
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "skipped": 1}\n')
    skipped, training, validation = run_report.stands_out(run)
    assert skipped.startswith("1 logged steps made no update")
    assert training.startswith("the training loss rose: from 1.113 to 1.863")
    assert "higher than the base's beyond the noise: 2.6 against 1.8 (+44.4 %)" in validation
    assert "learning rate may be too high" in validation


def test_the_command_is_kept_without_secrets_and_where_it_goes_on(run):
    run_report.note_command(run, ["+experiment=demo", "output_dir=x", "tracker.api_key=abcdefgh12345678"], 2)
    run_report.note_command(run, ["steps=80", f"resume={run}"], goes_on=True)
    first, second = (run / "command.txt").read_text().splitlines()
    assert first == "accelerate launch --num_processes 2 train/run.py +experiment=demo 'tracker.api_key=***'"
    assert second == f"accelerate launch train/run.py steps=80 resume={run}"
    assert "+experiment=demo" in run_report.of(run)


def test_a_grid_says_where_its_pictures_are_and_the_report_shows_them_one_by_one(run):
    prompts = ["a red cup", "the fox", EVIL, "four", "five"]
    (run / "samples").mkdir()
    for step, colors in ((0, ["red"] * 5), (40, ["red", "green", "blue", "white", "black"])):
        page = sample_grid([pictures(*colors)], prompts)
        shown = cut_of(page, prompts)
        assert [name for name, _ in shown] == prompts
        assert [picture.getcolors() for _, picture in shown] == [
            [(picture.width * picture.height, wanted.getpixel((0, 0)))]
            for (_, picture), wanted in zip(shown, pictures(*colors), strict=True)
        ]
        save(page, prompts, run / "samples" / f"step_{step:06d}.png")
    text = run_report.of(run)
    assert text.count('<figure class="cell"') == 5
    assert text.count('data-name="step 40"') == 5
    Image.new("RGB", (64, 64)).save(run / "samples" / "step_000020.png")  # of before: no layout
    assert run_report.of(run).count('<figure class="cell"') == 1


def save(page, prompts, file):
    from PIL.PngImagePlugin import PngInfo

    from train.validation.sample_grid import LAYOUT

    info = PngInfo()
    info.add_itxt(LAYOUT, json.dumps({"prompts": prompts, "boxes": page.info["boxes"]}))
    page.save(file, pnginfo=info)


def cut_of(page, prompts):
    from train.validation.sample_grid import LAYOUT

    page.info[LAYOUT] = json.dumps({"prompts": prompts, "boxes": page.info["boxes"]})
    return split_grid(page)


def test_training_writes_a_report_and_its_failure_is_a_warning(train, monkeypatch, capsys):
    folder = train("one", "sample.prompts=[a red cup]", "sample.steps=1", "sample_every=4", "validate_every=4")
    text = (folder / "report.html").read_text()
    assert 'data-name="base"' in text
    assert 'data-name="step 4"' in text
    monkeypatch.setattr(run_report, "of", lambda *arguments, **more: 1 / 0)
    folder = train("two")
    assert (folder / "adapter" / "adapter_model.safetensors").exists()
    assert "report.html could not be written (ZeroDivisionError" in capsys.readouterr().err


def test_runs_are_shown_with_the_settings_in_which_they_differ(run, made, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    for name in ("config.yaml", "metrics.jsonl", "validation.jsonl"):
        (other / name).write_text((run / name).read_text().replace("steps: 40", "steps: 41"))
    second = Evaluation(other, "latents", made.prompts, made.columns, made.rows, "step 40")
    text = run_report.of(run, made, [second])
    assert '<th scope="row"><code>steps</code></th><td><code>40</code></td><td><code>41</code></td>' in text
    assert '<th scope="row"><code>name</code>' not in text
    assert text.count('class="c1"') >= 2  # a second curve in each plot of losses


# ------------------------------------------------------------------ plots


def test_smoothing_has_no_bias_at_its_start():
    assert plots.smoothed([(1, 2.0), (2, 2.0), (3, 2.0)]) == [(1, pytest.approx(2)), (2, pytest.approx(2)), (3, 2.0)]
    assert plots.smoothed([(1, 0.0), (2, 1.0)])[1][1] == pytest.approx(0.1 / 0.19)


def test_a_plot_is_logarithmic_where_values_span_decades_and_skips_what_is_not_finite():
    text = plots.plot("loss", [Curve(EVIL, [(0, 1.0), (1, float("nan")), (2, 1000.0)], 0)])
    assert "(logarithmic)" in text
    assert "nan" not in text
    assert "<script>" not in text
    assert plots.plot("loss", [Curve("", [(0, float("inf"))], 0)]) == ""
    many = plots.plot("loss", [Curve("x", [(i, float(i)) for i in range(5000)], 0)])
    assert many.count("L") < plots.MOST_POINTS + 10


# ------------------------------------------------------------------ the browser


@pytest.mark.skipif(CHROMIUM is None, reason=NONE)
def test_the_page_works_in_a_browser_without_network_by_mouse_touch_and_keys_and_on_a_phone(run, made, tmp_path):
    big = [Cell("before and after", [Shot("base", *pictures("red")), Shot("adapter", *pictures("blue"))])]
    page = run_report.write(run, made, pairs=big)
    clip = "getComputedStyle(document.querySelector('.compare .after')).clipPath"
    box = "(e => [e.left, e.top, e.width, e.height])(document.querySelector('.compare').getBoundingClientRect())"
    see = "document.querySelector('.compare').scrollIntoView({block: 'center'})"
    with Browser(tmp_path / "profile") as browser:
        browser.size(1280, 900)
        browser.open(page)
        assert browser.js("document.querySelectorAll('.compare').length") == 1 + 2 + 1  # the last has a picture alone
        assert browser.js(clip) == "inset(0px 0px 0px 50%)"

        browser.js(see)
        left, top, width, height = browser.js(box)
        browser.mouse("mousePressed", left + width * 0.25, top + height / 2)
        assert browser.js(clip) == "inset(0px 0px 0px 25%)"
        browser.mouse("mouseMoved", left + width * 0.8, top + height / 2)
        browser.mouse("mouseReleased", left + width * 0.8, top + height / 2)
        assert browser.js(clip) == "inset(0px 0px 0px 80%)"
        browser.mouse("mouseMoved", left + width * 0.1, top + height / 2)
        assert browser.js(clip) == "inset(0px 0px 0px 80%)"  # it was let go
        browser.key("ArrowLeft", 37)
        assert browser.js(clip) == "inset(0px 0px 0px 79%)"
        browser.key("Home", 36)
        assert browser.js(clip) == "inset(0px)" or browser.js(clip) == "inset(0px 0px 0px 0%)"

        second = "document.querySelectorAll('.cell')[1]"
        assert browser.js(f"{second}.querySelector('.names span:last-child').textContent") == "step 40"
        browser.js(f"{second}.querySelector('button[data-name=\"step 20\"]').click()")
        assert browser.js(f"{second}.querySelector('.names span:last-child').textContent") == "step 20"
        assert browser.js(
            f"{second}.querySelector('.after').src == {second}.querySelector('button[data-name=\"step 20\"] img').src"
        )

        browser.size(375, 812, phone=True)
        browser.events.clear()
        browser.open(page)
        assert browser.js("document.documentElement.scrollWidth") <= 375
        browser.js("document.querySelectorAll('details').forEach(e => e.open = true)")
        assert browser.js("document.documentElement.scrollWidth") <= 375
        browser.js(see)
        left, top, width, height = browser.js(box)
        browser.touch("touchStart", (left + width * 0.3, top + height / 2))
        browser.touch("touchMove", (left + width * 0.6, top + height / 2))
        browser.touch("touchEnd")
        assert 55 <= float(browser.js(clip).split()[-1].rstrip("%)")) <= 65
        assert browser.js("[...document.images].every(i => i.alt && i.complete && i.naturalWidth > 0)")
        assert browser.requested == []
        assert browser.complaints == []


def test_the_policy_of_the_page_lets_nothing_be_fetched(run):
    assert "default-src 'none'; img-src data:" in run_report.of(run)
    assert slider.cells([]) == ""
