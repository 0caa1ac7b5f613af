"""docs/inference.md and docs/troubleshooting.md: every command runs, on the embedded model, and predictions are."""

import json
import re
import shlex
import shutil
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from PIL import Image

import flux2
from flux2 import adapters
from flux2.doctor.arguments import arguments as doctor_arguments
from flux2.generate import command as generate
from flux2.generate.command import arguments
from flux2.models.variants import VARIANTS

ROOT = Path(__file__).resolve().parents[2]
PAGES = {name: (ROOT / "docs" / f"{name}.md").read_text() for name in ("inference", "troubleshooting")}
COMMANDS = [
    shlex.split(line)[3:]
    for text in PAGES.values()
    for line in re.findall(r"^python -m flux2\.generate .*$", text, re.MULTILINE)
]
SMALL = ("--steps", "1", "--width", "32", "--height", "32")
ROWS = re.findall(r"^\| (\d+) GB \| (\w+) \| (?:`(.*)`)? *\| ([\d.]+) GB \|$", PAGES["inference"], re.MULTILINE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages say that one has, by the names that they say."""
    made = tmp_path_factory.mktemp("docs")
    for name in ("lora", "other"):
        model = flux2.load("tiny", device="cpu").transformer
        wrapped = adapters.attach(model, rank=2)
        adapters.save(wrapped, made / name, base="tiny")
    for name in ("room", "cup"):
        Image.new("RGB", (64, 64), "red").save(made / f"{name}.png")
    Image.new("L", (64, 64), "white").save(made / "mask.png")
    (made / "many.jsonl").write_text(
        json.dumps({"prompt": "at night", "seed": 3, "images": ["room.png"], "out": "n.png"})
    )
    flux2.load("tiny", device="cpu").save_embeddings(made / "two.safetensors", ["a lighthouse", "a mill"])
    return made


def on_tiny(words: list[str]) -> list[str]:
    models = set(VARIANTS) - {"tiny"}
    return ["tiny" if word in models and words[i - 1] == "--model" else word for i, word in enumerate(words)]


@pytest.mark.parametrize("words", COMMANDS, ids=[" ".join(words)[:60] for words in COMMANDS])
def test_a_command_of_the_pages_runs(words, folder, tmp_path, monkeypatch, capsys) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    for option, file in pairwise(words):  # written on this page by another command
        if option in ("--out", "--save-embeddings"):
            Path(file).unlink(missing_ok=True)
    if "--from-image" in words:
        Path("cup.png").unlink()
        monkeypatch.setattr(sys, "argv", ["generate", "--prompt", "a cup", *SMALL, "--out", "cup.png"])
        assert generate.main() == 0
        capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["generate", "--device", "cpu", *on_tiny(words), *SMALL])
    if "--upsample" in words:
        assert generate.main() == 2
        assert "text encoder" in capsys.readouterr().err
        return
    assert generate.main() == 0
    files = capsys.readouterr().out.split()
    assert files
    assert all(Path(file).is_file() for file in files)


def test_the_commands_of_a_page_do_not_replace_each_others_files() -> None:
    for text in PAGES.values():
        written = re.findall(r"^python -m flux2\.generate .*--out (\S+)$", text, re.MULTILINE)
        assert written
        assert len(written) == len(set(written))


def test_there_is_a_command_for_each_section() -> None:
    assert len(COMMANDS) >= 20
    options = {word for words in COMMANDS for word in words if word.startswith("--")}
    for option in ("image", "adapter", "prompts", "from-image", "embeddings", "save-embeddings", "upsample"):
        assert f"--{option}" in options
    assert all(not any(word.endswith(":") for word in words) for words in COMMANDS)


def test_every_option_that_the_pages_name_is_one(capsys) -> None:
    for command in (arguments, doctor_arguments):
        with pytest.raises(SystemExit):
            command(["--help"])
    known = set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out))
    named = {option for text in PAGES.values() for option in re.findall(r"(?<![\w-])--[a-z][a-z-]*", text)}
    assert named <= known, named - known
    assert len(named) > 15


def test_links_of_the_pages_lead_somewhere() -> None:
    for text in PAGES.values():
        for target in re.findall(r"\]\(([^)#:]+)(?:#[\w-]+)?\)", text):
            assert (ROOT / "docs" / target).exists(), target


@pytest.mark.parametrize(
    ("card", "model", "options", "said"), ROWS, ids=[f"{row[0]} {row[1]} {row[2]}" for row in ROWS]
)
def test_what_the_table_predicts_is_predicted_and_fits(card, model, options, said) -> None:
    sys.path.insert(0, str(ROOT))
    from benchmarks.inference import Case, predict_memory
    from train.planner.gpus import usable

    given = vars(arguments(["--prompt", "x", *shlex.split(options.replace("`", ""))]))
    storage = None if given["precision"] is None else given["precision"]
    case = Case(int(card), storage, given["offload_blocks"], tiled=bool(given["tiled"]))
    total = sum(predict_memory(VARIANTS[model], case).values())
    assert f"{total / 1e9:.1f}" == said
    assert total <= usable(int(card))


def test_the_table_has_the_published_budgets() -> None:
    assert {row[0] for row in ROWS if row[1] == "dev"} >= {"24", "18", "8"}
    assert len(ROWS) == PAGES["inference"].partition("## What fits")[2].count(" GB |\n")
