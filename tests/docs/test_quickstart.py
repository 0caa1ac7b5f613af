"""docs/quickstart.ipynb runs from the first cell to the last, and shows what it says."""

import ast
import contextlib
import io
import json
import re
import shlex
import subprocess

import pytest
from PIL import Image

from data.synthetic import probe
from train.config.paths import CONFIG

NOTEBOOK = CONFIG.parent / "docs" / "quickstart.ipynb"
CELLS = json.loads(NOTEBOOK.read_text())["cells"]


def code(cell: dict) -> str:
    return "".join(cell["source"])


def run(cell: dict, names: dict) -> tuple[object, str]:
    """Run a cell as Jupyter does, lines with `!` in a shell; return the value of its last line, and what it printed."""
    lines, said = code(cell).split("\n"), io.StringIO()
    if lines[0].startswith("!"):
        (line,) = lines
        words = [re.sub(r"\{(.+?)\}", lambda found: str(eval(found[1], names)), word) for word in shlex.split(line[1:])]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return None, done.stdout
    tree = ast.parse(code(cell))
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    with contextlib.redirect_stdout(said):
        exec(compile(tree, "cell", "exec"), names)
        value = None if last is None else eval(compile(ast.Expression(last.value), "cell", "eval"), names)
    return value, said.getvalue()


def test_the_notebook_has_ten_cells_of_code_and_keeps_no_outputs():
    cells = [cell for cell in CELLS if cell["cell_type"] == "code"]
    assert len(cells) == 10
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    assert max(len(line) for cell in CELLS for line in code(cell).split("\n")) <= 120


@pytest.mark.slow
def test_every_cell_runs_and_the_images_are_those_of_a_trained_adapter(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.chdir", lambda folder: None)  # what it reads is linked below; what it writes stays here
    for name in ("data", "train", "flux2", "conf"):
        (tmp_path / name).symlink_to(CONFIG.parent / name)
    names, shown, said = {"__name__": "__main__"}, [], ""
    for cell in CELLS:
        if cell["cell_type"] == "code":
            value, text = run(cell, names)
            said += text
            shown += [value] if isinstance(value, Image.Image) else []
    assert len(shown) == 5
    assert '"text": "a trtcrd' in said
    losses = [float(line.split()[1]) for line in said.split("\n") if re.fullmatch(r"\d+ \d\.\d+", line)]
    assert len(losses) >= 3
    assert losses[-1] < 0.6 * losses[0]
    assert (names["RUN"] / "comfyui.safetensors").is_file()
    styles = [probe.style_distance(image) for image in (names["before"][0], *names["steps"], names["after"][0])]
    assert styles[-1] < 0.5 * styles[0], styles  # the cards' frame and parchment
    plain, changed = names["before"][1], names["after"][1]
    assert probe.read(changed).shape == probe.read(plain).shape == "cup"
