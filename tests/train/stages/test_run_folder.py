"""Where a run writes: `~` is the home folder in every path of a configuration."""

import shutil
from pathlib import Path

import pytest
from train_helpers import ROOT

pytest_plugins = ("train_helpers",)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The home folder; the current folder is another one, empty."""
    for name in ("home", "here"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "home"


def test_a_tilde_is_the_home_folder_in_every_path(run_command, small, pictures, home):
    shutil.copytree(pictures, home / "pictures")
    paths = [
        'output_dir="~/runs/x"',
        'cache_dir="~/cache"',
        'quantized_cache_dir="~/copies"',
        'dataset.path="~/pictures"',
        'sample.references=["~/pictures/0.png"]',
        'preservation.folder="~/classes"',
    ]
    drawn = ["preservation=prior", "preservation.prompts=[a fox]", "preservation.count=1", "preservation.steps=1"]
    grids = ["sample_every=2", "sample.prompts=[a fox]", "sample.steps=1"]
    settings = [*small(*drawn, *paths), *grids]
    code, _, err = run_command(*settings, "steps=1", "checkpoint_every=1")
    assert code == 0, err
    assert {path.name for path in home.iterdir()} >= {"runs", "cache", "classes"}
    assert (home / "runs" / "x" / "adapter").is_dir()
    code, out, err = run_command(
        *[word for word in settings if not word.startswith("output_dir")], "steps=2", 'resume="~/runs/x"'
    )
    assert code == 0, err
    assert "resuming from" in out
    assert list(Path.cwd().iterdir()) == []


def test_a_sweep_writes_into_the_home_folder_too(run_command, small, home):
    code, _, err = run_command("-m", *small('output_dir="~/sweep"', "steps=1"), "adapter.rank=2,4")
    assert code == 0, err
    assert {"0", "1", "sweep.html"} <= {path.name for path in (home / "sweep").iterdir()}
    assert list(Path.cwd().iterdir()) == []


def test_the_name_of_an_unknown_user_is_a_name(run_command, small, home):
    code, _, err = run_command(*small('output_dir="~nobody_of_this_name/x"', "steps=1"))
    assert code == 0, err
    assert (Path.cwd() / "~nobody_of_this_name" / "x" / "adapter").is_dir()
    message = run_command.refused(*small('resume="~nobody_of_this_name/y"'))
    assert "resume=" in message


def test_one_function_expands_paths():
    """`Path.expanduser` raises for the name of an unknown user, and a path that nothing expands makes a folder `~`."""
    found = [file for file in (ROOT / "train").rglob("*.py") if ".expanduser()" in file.read_text()]
    assert found == []
