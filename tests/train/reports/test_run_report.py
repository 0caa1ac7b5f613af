import json
import re
from base64 import b64decode
from html import unescape
from io import BytesIO

import pytest
from browser import CHROMIUM, NONE, Browser
from message_helpers import holds
from omegaconf import OmegaConf
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from train_helpers import ask_to_stop

from train.evaluate import write_grid
from train.evaluation.distances import Nearest
from train.evaluation.findings import find_problems
from train.evaluation.recommend import recommend
from train.evaluation.results import Evaluation, Row
from train.reports import plots, run_report
from train.reports import run_pictures as pictures
from train.reports.plots import Curve
from train.utils.signals import Interrupted
from train.validation.sample_grid import LAYOUT, sample_grid, split_grid

pytest_plugins = ("train_helpers",)

EVIL = "<script>alert(1)</script>\"&'"
LONG = "/a/very/long/" + "path" * 60
TIMES = (0.2, 0.8)


def write_lines(file, lines):
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def read_lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


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
    write_lines(tmp_path / "metrics.jsonl", lines)
    write_lines(tmp_path / "validation.jsonl", validated)
    for step in (20, 40):
        place = tmp_path / "checkpoints" / f"step_{step:06d}"
        place.mkdir(parents=True)
        (place / "state.json").write_text("{}")
    return tmp_path


def images(*colors, size=(96, 64)):
    return [Image.new("RGB", size, color) for color in colors]


@pytest.fixture
def made(run):
    """An evaluation of it: two prompts, the base and two checkpoints; one image could not be computed."""
    files, place = {}, run / "evaluation"
    place.mkdir()
    for name, colors in {"base": ("red", "blue"), "step 20": ("green", "pink"), "step 40": ("white", None)}.items():
        files[name] = [place / f"{name}_{i}.png" if color else None for i, color in enumerate(colors)]
        for file, color in zip(files[name], colors, strict=True):
            if color:
                images(color)[0].save(file)
    near = [Nearest(0, 0.1, 1.0, True), None]
    rows = [Row(name, None, 1.0, found, 0.5, 0.2, 0.3, near) for name, found in files.items()]
    strengths = [Row("0", None, 0.0, files["base"], 0.5, 0, 0.3), Row("1", 40, 1.0, files["step 40"], 0.5, 0.2, 0.3)]
    evaluated = Evaluation(run, "latents", [EVIL, "a " + "long" * 80], [(0, 0), (1, 0)], rows, "step 40", strengths)
    evaluated.trained, evaluated.own = [f"{i}.png" for i in range(9)], tuple(float(i) for i in range(1, 10))
    evaluated.pictures = dict(enumerate(images("grey")))
    return evaluated


def texts(page):
    """The texts of a page, without tags and scripts, and without line breaks."""
    page = re.sub(r"<(script|style)>.*?</\1>", "", page, flags=re.DOTALL)
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", page)).split())


def test_the_page_says_what_was_measured_masks_secrets_and_escapes_texts(run, made):
    made.prompts[1] += " of abcd hf_" + "Qz7" * 11 + "x"
    text = run_report.write(run, [made]).read_text()
    assert "<script>alert" not in text
    assert text.count("<script>") == 1
    assert "abcdefgh12345678" not in text
    assert "hf_Qz7" not in text
    assert "api_key: '***'" in unescape(text)
    assert EVIL in unescape(text)
    words = texts(text)
    assert "Recommended, on 3 samples alone, checkpoints/step_000040" in words
    assert "It rests on" not in words  # the line above says that already
    for found in ("step 40 1.8000", "nearer than 100% of the training images", "step 40 1 of 2", "8 (8 to 8)"):
        assert found in words  # 1.8 is the last validation loss: 2 - 0.8 + 0.5 + 0.1
    assert "Each of the 9 training images is 5.000 from its nearest other (median; 1.000 to 9.000)" in words


def test_the_first_batch_is_in_the_report(run):
    assert "The first batch" not in run_report.write(run).read_text()
    Image.new("RGB", (1596, 900), "red").save(run / "first_batch.png")
    text = run_report.write(run).read_text()
    assert "The first batch, as trained" in text
    content = re.search(r'src="data:image/jpeg;base64,([^"]+)" alt="the first training samples', text)[1]
    assert Image.open(BytesIO(b64decode(content))).size == (1596, 900)
    (run / "first_batch.png").write_bytes(b"\x89PNG\r\n\x1a\n half")
    assert "The first batch" not in run_report.write(run).read_text()


def test_nothing_is_fetched_by_the_page(run):
    text = run_report.render(run)
    assert "default-src 'none'; img-src data:" in text
    assert "://" not in re.sub(r"<script>.*</script>", "", text, flags=re.DOTALL)
    assert "Copyright (c) 2022 Leon Sorokin" in text  # whose license asks for this in every copy


def test_images_before_and_after_stay_in_later_reports_of_the_same_adapter(run, made):
    (run / "adapter").mkdir()
    weights = run / "adapter" / "adapter_model.safetensors"
    weights.write_text("one")
    first = run_report.write(run, pairs=[(EVIL, *images("red", "blue"))]).read_text()
    again = run_report.write(run, [made]).read_text()
    for text in (first, again):
        assert "Before and after" in text
        assert text.count("Drag over an image") == 1
        assert text.count('data-name="adapter"') == 1
    assert re.findall(r'data-name="adapter".*', first) == re.findall(r'data-name="adapter".*', again)
    weights.write_text("trained for longer")
    assert "Before and after" not in run_report.render(run, [made])


def test_what_a_recommendation_rests_on_is_said_once_and_only_of_one(run):
    lines = read_lines(run / "validation.jsonl")
    more = [line | {"samples": list("abcdef"), "losses": 2 * line["losses"]} for line in lines]
    write_lines(run / "validation.jsonl", more)
    assert run_report.render(run).count("It rests on 6 samples: too few to be sure") == 1
    for place in (run / "checkpoints").iterdir():
        (place / "state.json").unlink()
    assert "It rests on" not in run_report.render(run)


def test_a_validation_loss_that_is_not_finite_is_named_and_never_chosen(run):
    file = run / "validation.jsonl"
    lines = read_lines(file)
    lines[2]["losses"][0][0] = float("nan")  # after step 20, before the lowest
    write_lines(file, lines)
    file.write_text(file.read_text() + '{"step": 50, "lo')
    assert "the validation loss was not finite after step 20" in find_problems(run)
    found = recommend(run)
    assert found.checkpoint.name == "step_000040"
    assert any(holds(line, "1 ... not finite ... step 20") for line in found.lines)
    assert not any("nan" in line for line in found.lines)
    lines[4]["losses"][0][0] = float("inf")
    lines[2]["losses"][0][0] = 0.1
    write_lines(file, lines)
    assert recommend(run).checkpoint.name == "step_000020"


def test_a_run_that_got_worse_is_said_to_have_with_its_numbers(run):
    assert find_problems(run) == []
    for name in ("metrics.jsonl", "validation.jsonl"):
        lines = read_lines(run / name)
        backwards = [line | {"step": same["step"]} for line, same in zip(reversed(lines), lines, strict=True)]
        write_lines(run / name, [*backwards, *([{"step": 41, "skipped": 1}] if name == "metrics.jsonl" else [])])
    skipped, training, validation = find_problems(run)
    assert skipped.startswith("1 logged steps made no update")
    assert training.startswith("the training loss rose: from 1.113 to 1.863")
    assert "higher than the base's beyond the noise: 2.6 against 1.8 (+44.4 %)" in validation
    assert "optimizer.lr" in validation
    assert 'class="box bad"' in run_report.render(run)


def test_the_command_is_kept_without_secrets_and_where_it_is_resumed(run):
    run_report.note_command(run, ["+experiment=demo", "output_dir=x", "tracker.api_key=abcdefgh12345678"], 2)
    run_report.note_command(run, ["steps=80", f"resume={run}"], resumed=True)
    first, second = (run / "command.txt").read_text().splitlines()
    assert first == "accelerate launch --num_processes 2 train/run.py +experiment=demo 'tracker.api_key=***'"
    assert second == f"python train/run.py steps=80 resume={run}"
    assert "+experiment=demo" in run_report.render(run)


def test_a_sample_grid_says_where_its_images_are_and_the_report_shows_them_one_by_one(run):
    prompts = ["a red cup", "the fox", EVIL, "four", "five"]
    (run / "samples").mkdir()

    def save(step, colors, prompts):
        page, info = sample_grid([images(*colors)], prompts), PngInfo()
        info.add_itxt(LAYOUT, json.dumps({"prompts": prompts, "boxes": page.info["boxes"]}))
        page.save(run / "samples" / f"step_{step:06d}.png", pnginfo=info)

    colors = ["red", "green", "blue", "white", "black"]
    save(0, ["red"] * 5, prompts)
    save(40, colors, prompts)
    parts = split_grid(Image.open(run / "samples" / "step_000040.png"))
    assert [prompt for prompt, _ in parts] == prompts
    for (_, image), wanted in zip(parts, images(*colors), strict=True):
        assert image.getcolors() == [(image.width * image.height, wanted.getpixel((0, 0)))]
    text = run_report.render(run)
    assert (
        text.count('<figure class="cell"') == text.count('data-name="step 40"') == text.count('data-name="base"') == 5
    )
    save(20, ["red"] * 2, ["another", "the fox"])  # from before a resume with other prompts
    Image.new("RGB", (64, 64)).save(run / "samples" / "step_000030.png")  # which says nothing of its layout
    (run / "samples" / "step_000031.png").write_bytes(b"\x89PNG half")
    text = run_report.render(run)
    assert [text.count(f'data-name="step {step}"') for step in (40, 20, 30, 31)] == [5, 1, 0, 0]


def test_training_writes_a_report_and_its_failure_is_a_warning(train, monkeypatch, capsys):
    folder = train("one", "sample.prompts=[a red cup]", "sample.steps=1", "sample_every=4", "validate_every=4")
    text = (folder / "report.html").read_text()
    assert 'data-name="base"' in text
    assert 'data-name="step 4"' in text
    monkeypatch.setattr(run_report, "render", lambda *arguments: 1 / 0)
    assert run_report.write_or_warn(folder) is None
    assert "report.html could not be written (ZeroDivisionError" in capsys.readouterr().err


def test_the_report_is_rewritten_at_validations_and_when_the_run_is_stopped(train, at_step, monkeypatch, tmp_path):
    monkeypatch.setattr(run_report, "LIVE_SECONDS", 0.0)
    monkeypatch.setattr(run_report, "LIVE_SHARE", 1e9)
    page, seen = tmp_path / "run" / "report.html", []
    settings = ["steps=4", "validate_every=2", "checkpoint_every=0", "validation.held_out=2"]

    def stop():
        seen.append(texts(page.read_text()))
        ask_to_stop()()

    at_step(2, stop)
    with pytest.raises(Interrupted):
        train("run", *settings)
    during, stopped = seen[0], texts(page.read_text())
    assert "after step 2 of 4" in during
    assert "after step 3 of 4" in stopped
    assert "o checkpoint is recommended" not in during  # it is too early
    train("run", *settings, "resume=auto")
    finished = texts(page.read_text())
    assert "Written at the end of training" in finished
    (page.parent / "command.txt").write_text("python train/run.py model=tiny\n")
    summary = run_report.RunSummary.read(page.parent)
    assert (summary.command, summary.progress) == ("python train/run.py model=tiny", "")
    assert "No checkpoint is recommended" in finished


def test_a_report_during_training_takes_a_small_share_of_the_time(run, monkeypatch):
    now, written = [100.0], []

    def write(folder):
        written.append(now[0])
        now[0] += 3.0  # seconds that it takes
        return folder

    monkeypatch.setattr(run_report, "write_or_warn", write)
    live = run_report.LiveReport(run, clock=lambda: now[0])
    while now[0] < 300:
        live.update()
        now[0] += 1.0
    assert written == [110.0, 173.0, 236.0, 299.0]  # 3 of 63 seconds
    monkeypatch.setattr(run_report, "write_or_warn", lambda folder: written.append("failed"))
    now[0] += 1000
    live.update()
    now[0] += 1000
    live.update()
    assert written[4:] == ["failed"]


def test_an_evaluation_of_edits_shows_what_is_edited(run, made):
    made.edited = [*images("yellow"), None]
    first, second = pictures.evaluation_cells([made], ["run"])
    assert [shot.name for shot in first.shots] == ["base", "step 20", "step 40", "reference"]
    assert first.shots[-1].image.getpixel((0, 0)) == (255, 255, 0)
    assert [shot.name for shot in second.shots] == ["base", "step 20", "step 40"]
    write_grid(made, run / "grid.png")
    with_reference = Image.open(run / "grid.png")
    colors = {color for _, color in with_reference.getcolors(1 << 20)}
    assert (255, 255, 0) in colors
    made.edited = []
    write_grid(made, run / "grid.png")
    assert Image.open(run / "grid.png").height < with_reference.height


def test_runs_are_shown_with_the_settings_in_which_they_differ(run, made, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    for name in ("config.yaml", "metrics.jsonl", "validation.jsonl"):
        (other / name).write_text((run / name).read_text().replace("steps: 40", "steps: 41"))
    second = Evaluation(other, "latents", made.prompts, made.columns, made.rows, "step 40")
    text = run_report.render(run, [made, second])
    differences = texts(text).partition("Settings that differ")[2].partition("How to repeat it")[0]
    assert differences.split()[-3:] == ["steps", "40", "41"]
    assert text.count(f'data-name="cards/{other.name}: base"') == 0  # it is the same image
    assert text.count(f'data-name="cards/{other.name}: step 20"') == 2
    curves = [json.loads(unescape(found))["series"] for found in re.findall("data-chart='(.*?)'", text)]
    assert [[one["color"] for one in series] for series in curves] == [[0, 0, 1, 1], [0, 1]]


def test_smoothing_has_no_bias_at_its_start():
    assert plots.smooth([(1, 2.0), (2, 2.0), (3, 2.0)]) == [(1, pytest.approx(2)), (2, pytest.approx(2)), (3, 2.0)]
    assert plots.smooth([(1, 0.0), (2, 1.0)])[1][1] == pytest.approx(0.1 / 0.19)


def test_a_chart_is_logarithmic_where_values_span_decades_and_skips_what_is_not_finite():
    found = plots.chart("loss", [Curve("x", [(0, 1.0), (1, float("nan")), (2, 1000.0)])])
    assert found["caption"] == "loss (logarithmic)"
    assert found["data"]["logarithmic"]
    assert found["data"]["series"][0]["steps"] == [0, 2]
    assert plots.chart("loss", [Curve("", [(0, float("inf"))])]) is None
    (series,) = plots.chart("loss", [Curve("x", [(i, float(i)) for i in range(5000)])])["data"]["series"]
    assert 300 < len(series["steps"]) <= plots.MAX_POINTS
    assert series["steps"][-1] == 4999


@pytest.mark.skipif(CHROMIUM is None, reason=NONE)
def test_the_page_works_in_a_browser_without_network_by_mouse_touch_and_keys_and_on_a_phone(run, made, tmp_path):
    page = run_report.write(run, [made], pairs=[("before and after", *images("red", "blue"))])
    clip = "getComputedStyle(document.querySelector('.compare .after')).clipPath"
    box = "(e => [e.left, e.top, e.width, e.height])(document.querySelector('{}').getBoundingClientRect())"
    see = "document.querySelector('{}').scrollIntoView({{block: 'center'}})"
    with Browser(tmp_path / "profile") as browser:
        browser.size(1280, 900)
        browser.open(page)
        assert browser.js("document.querySelectorAll('.compare').length") == 1 + 2 + 1  # the last has only one image
        assert browser.js(clip) == "inset(0px 0px 0px 50%)"

        browser.js(see.format(".compare"))
        left, top, width, height = browser.js(box.format(".compare"))
        browser.mouse("mousePressed", left + width * 0.25, top + height / 2)
        assert browser.js(clip) == "inset(0px 0px 0px 25%)"
        browser.mouse("mouseMoved", left + width * 0.8, top + height / 2)
        browser.mouse("mouseReleased", left + width * 0.8, top + height / 2)
        assert browser.js(clip) == "inset(0px 0px 0px 80%)"
        browser.mouse("mouseMoved", left + width * 0.1, top + height / 2)
        assert browser.js(clip) == "inset(0px 0px 0px 80%)"  # the mouse was released
        browser.key("ArrowLeft", 37)
        assert browser.js(clip) == "inset(0px 0px 0px 79%)"
        browser.key("Home", 36)
        assert browser.js(clip) in ("inset(0px)", "inset(0px 0px 0px 0%)")

        second = "document.querySelectorAll('.cell')[1]"
        name = f"{second}.querySelector('.names span:last-child').textContent"
        assert browser.js(name) == "step 40"
        browser.js(f"{second}.querySelector('button[data-name=\"step 20\"]').click()")
        assert browser.js(name) == "step 20"
        chosen = f"{second}.querySelector('button[data-name=\"step 20\"] img').src"
        assert browser.js(f"{second}.querySelector('.after').src == {chosen}")

        # a chart shows the values under the mouse
        browser.js(see.format(".u-over"))
        left, top, width, height = browser.js(box.format(".u-over"))
        browser.mouse("mouseMoved", left + width - 1, top + height / 2)
        values = "[...document.querySelector('.u-legend').querySelectorAll('td')].map(e => e.textContent)"
        assert browser.js(values) == ["40", "1", "1.21"]  # step, loss, smoothed loss

        browser.size(375, 812, phone=True)
        browser.events.clear()
        browser.open(page)
        assert browser.js("document.documentElement.scrollWidth") <= 375
        browser.js("document.querySelectorAll('details').forEach(e => e.open = true)")
        assert browser.js("document.documentElement.scrollWidth") <= 375
        assert browser.js("[...document.querySelectorAll('canvas')].every(e => e.clientWidth > 250)")
        browser.js(see.format(".compare"))
        left, top, width, height = browser.js(box.format(".compare"))
        browser.touch("touchStart", (left + width * 0.3, top + height / 2))
        browser.touch("touchMove", (left + width * 0.6, top + height / 2))
        browser.touch("touchEnd")
        assert 55 <= float(browser.js(clip).split()[-1].rstrip("%)")) <= 65
        assert browser.js("[...document.images].every(i => i.alt && i.complete && i.naturalWidth > 0)")
        assert browser.requested == []
        assert browser.complaints == []
