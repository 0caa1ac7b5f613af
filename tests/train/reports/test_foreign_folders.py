"""Pages and lines of a run or a sweep from someone else: whatever is in its files, there is no script, no control
character on the terminal, and no error but one that names a file."""

import base64
import hashlib
import itertools
import json
import os
import re
from html.parser import HTMLParser

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from train import sweep
from train.evaluation.findings import find_problems
from train.evaluation.recommend import recommend_or_warn
from train.reports import run_report
from train.sweeps.records import read_jobs, record
from train.sweeps.table import render_page
from train.utils.console import say, warn
from train.validation.sample_grid import LAYOUT, sample_grids, split_grid

pytest_plugins = ("train_helpers",)

SCRIPT = "\"'><script>alert(1)</script><img src=x onerror=alert(1)>{{ 7123*7127 }}\x1b]52;c;x\x07\u202e"
LONG = 10**400
VALUES = [SCRIPT, LONG, -LONG, 1e308, True, None, [], {}, [SCRIPT], {"a": SCRIPT}, float("nan"), -1, 0, "\ud800"]


class Elements(HTMLParser):
    """Collects the elements of a page with their attributes, and the scripts."""

    def __init__(self, page):
        super().__init__()
        self.found, self.scripts, self.in_script = [], [], False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        self.in_script = tag == "script"

    def handle_endtag(self, tag):
        self.in_script = False

    def handle_data(self, data):
        if self.in_script:
            self.scripts.append(data)


def check_page(page):
    """No element, attribute or script of the page is one that a text from outside made."""
    elements = Elements(page)
    names = {name for _, attributes in elements.found for name in attributes}
    assert not {name for name in names if name.startswith("on")}
    assert all(attributes.get("src", "data:").startswith("data:") for _, attributes in elements.found)
    assert not any(":" in (attributes.get("href") or "") for _, attributes in elements.found)
    (policy,) = [
        attributes["content"]
        for tag, attributes in elements.found
        if tag == "meta" and "content" in attributes and "default-src" in attributes["content"]
    ]
    assert "unsafe-inline" not in policy.partition("script-src")[2]
    hashes = [base64.b64encode(hashlib.sha256(one.encode()).digest()).decode() for one in elements.scripts]
    assert re.findall(r"'sha256-([^']+)'", policy) == hashes
    assert "alert(1)" not in "".join(elements.scripts)
    assert str(7123 * 7127) not in page


def write(folder, name, content):
    folder.mkdir(parents=True, exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / name).write_bytes(text.encode(errors="surrogatepass"))


def config(**changes):
    return {"name": "cards", "steps": 40, "validation": {"times": [0.5]}, "sample": {"prompts": ["a"]}} | changes


def lines(values):
    return "".join(json.dumps(value) + "\n" for value in values)


FILES = {
    "config.yaml": [config(**{key: value}) for key in ("name", "validation", "sample", "dataset") for value in VALUES],
    "job.json": [{key: value} for key in ("steps", "status", "error", "overrides") for value in VALUES]
    + [
        {"overrides": [SCRIPT, "no sign", f"{SCRIPT}={SCRIPT}"], "status": "done", "steps": 3},
        "[" * 99_999,
        "null",
        "{",
    ],
    "metrics.jsonl": [
        lines([{"step": 0, key: value}, {"step": 2, key: 1.0}, {"step": value, key: 1.0}, {"step": 1, key: 0}])
        for key in (
            "loss",
            "validation_loss",
            "validation_loss/0.5",
            f"validation_loss/{SCRIPT}",
            "lr",
            "skipped",
            "step",
        )
        for value in VALUES
    ]
    + ["[" * 99_999, lines([[], 1, None, SCRIPT])],
    "validation.jsonl": [
        lines(
            {"step": step, "times": [0.5], "samples": ["a", SCRIPT], "losses": [[1.0], [2.0]], key: value}
            for step in (0, 1)
        )
        for key in ("losses", "samples", "times", "step")
        for value in (*VALUES, [[LONG], [1]], [[1e308], [1e308]], [[], []], [[0], [0]], [["x"], [1]], [[1], [1], [1]])
    ]
    + ["[" * 99_999],
    "command.txt": [SCRIPT, "\ud800"],
    "before_after/pictures.json": [{"adapter": None, "labels": value} for value in VALUES] + ["[" * 99_999, "[]"],
}
CASES = [(name, content) for name, contents in FILES.items() for content in contents]


def error_of(folder):
    """The message of the report's ValueError; None if it could be written."""
    try:
        find_problems(folder)
        run_report.write(folder)
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", FILES)
def test_no_file_of_a_folder_makes_a_script_or_a_traceback(name, tmp_path, capsys):
    for number, content in enumerate(FILES[name]):
        folder = tmp_path / str(number)
        write(folder, "config.yaml", config())
        place, _, last = name.rpartition("/")
        write(folder / place, last, content)
        recommend_or_warn(folder)
        said = error_of(folder)
        assert said is None or str(folder) in said, (content, said)
        if said is None:
            check_page((folder / "report.html").read_text())
    check_page(render_page(tmp_path, read_jobs(tmp_path)))
    if name in ("job.json", "config.yaml"):
        assert sweep.main([str(tmp_path)]) == 0
        printed = capsys.readouterr()
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", printed.out + printed.err)


def test_a_job_has_the_values_that_jobs_have(tmp_path):
    good = {"overrides": ["a=1"], "status": "failed", "steps": 3, "error": "x"}
    write(tmp_path, "job.json", good | {"other": 1})
    assert record(tmp_path) == good
    for key, value in itertools.product(good, [SCRIPT, LONG, True, None, {}, [1], -1]):
        write(tmp_path, "job.json", good | {key: value})
        kept = record(tmp_path)
        assert kept == (
            good | {key: value} if key == "error" and value == SCRIPT else {k: v for k, v in good.items() if k != key}
        )


def test_sample_grids_are_named_as_training_names_them_and_no_larger_than_they_are(tmp_path):
    samples = tmp_path / "samples"
    samples.mkdir()
    layouts = {
        0: {"prompts": ["a"], "boxes": [[0, 0, 10**9, 10**9]]},
        1: {"prompts": ["a"] * 5000, "boxes": [[0, 0, 32, 32]] * 5000},
        2: {"prompts": ["a"], "boxes": [[-4, 0, 4, 4]]},
        3: {"prompts": ["a"], "boxes": [[0, 0, float("inf"), LONG]]},
        4: {"prompts": [SCRIPT], "boxes": [[0, 0, 16, 16]]},
    }
    for step, layout in layouts.items():
        info = PngInfo()
        info.add_text(LAYOUT, json.dumps(layout))
        Image.new("RGB", (32, 32)).save(samples / f"step_{step:06d}.png", pnginfo=info)
    for name in ("step_x.png", "step_.png", "step_1e5.png", "step_'><script>.png", f"step_{'9' * 200}.png"):
        (samples / name).write_bytes(b"")
    os.mkfifo(samples / "step_000009.png")
    assert sorted(sample_grids(tmp_path)) == [*layouts, 9]
    for step, file in sample_grids(tmp_path).items():
        if step < 9:
            with Image.open(file) as grid:
                grid.load()
                assert [image.size for _, image in split_grid(grid)] == ([(16, 16)] if step == 4 else [])
    info = {LAYOUT: "[" * 99_999}
    deep = Image.new("RGB", (8, 8))
    deep.info.update(info)
    assert split_grid(deep) == []
    write(tmp_path, "config.yaml", config())
    run_report.write(tmp_path)
    check_page((tmp_path / "report.html").read_text())


def test_names_from_outside_reach_the_terminal_without_control_characters(capsys):
    name = "a\x1b[2J\x1b]0;x\x07\x9b\r\u202e\udcff猫.png"
    say(f"skipped {name}\nand more")
    warn(f"left out: {name}")
    printed = capsys.readouterr()
    shown = r"a\x1b[2J\x1b]0;x\x07\x9b\r\u202e\udcff猫.png"
    assert printed.out == f"skipped {shown}\nand more\n"
    assert printed.err == f"warning: left out: {shown}\n".replace(r"\r", " ")
