"""`config=mine.yaml`: a file of settings is the command line that it stands for."""

import re
import shlex

import pytest
from message_helpers import holds
from omegaconf import OmegaConf
from train_helpers import ROOT, compose

from train.cli.settings_file import with_settings_file
from train.plan import main as plan
from train.stages.memory import load_config

pytest_plugins = ("train_helpers",)

MINE = """
experiment: style
model: tiny
dataset: folder
dataset.path: "my {paintings} (2024), it's"   # as it is, without quotes for a shell
dataset.captions:
  trigger: felix
  template: a photo, of {caption}
optimizer:
  lr: 2e-4
sample:
  prompts: [a house, "a fox, in the snow"]
  width: null
buckets.resolution: [128, 64]
buckets.flip: true
"""


@pytest.fixture
def mine(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(MINE)
    return file


def test_a_file_is_the_command_line_with_the_same_settings(mine):
    words = with_settings_file(["-m", f"config={mine}", "steps=7"])
    assert words[-2:] == ["-m", "steps=7"]
    found = compose(*(word for word in words if word != "-m"))
    settings = ["model=tiny", "dataset=folder", "optimizer.lr=2e-4", "buckets.resolution=[128,64]", "buckets.flip=true"]
    texts = ['dataset.path="my {paintings} (2024), it\'s"', 'dataset.captions.template="a photo, of {caption}"']
    texts += ["dataset.captions.trigger=felix", 'sample.prompts=["a house","a fox, in the snow"]', "sample.width=null"]
    assert found == compose("+experiment=style", *settings, *texts, "steps=7")
    assert found.optimizer.lr == 2e-4  # a number, as OmegaConf reads it
    assert found.dataset.captions.keys() == compose("dataset=folder").dataset.captions.keys()  # the others stay


def test_the_command_line_comes_last(mine):
    words = with_settings_file(["optimizer.lr=3", f"config={mine}", "+experiment=object", "dataset.captions.trigger=x"])
    assert "+experiment=style" not in words
    found = compose(*words)
    assert (found.optimizer.lr, found.name, found.dataset.captions.trigger) == (3, "object", "x")
    assert found.dataset.captions.template == "a photo, of {caption}"


def test_without_a_file_nothing_changes():
    words = ["-m", "steps=1,2", "--cfg", "job", "+dataset@dataset.sources.cats=folder"]
    assert with_settings_file(words) == words


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "does not exist. Give a YAML file of settings"),
        ("- steps", "must hold settings, one a line: steps: 500"),
        ("", "must hold settings"),
        ("3: 4", "must hold settings"),
        ("steps: [", "cannot be read"),
        ("a: &x [1]\nb: *x", "cannot be read ... alias"),
        ("defaults: [model]", "defaults is not read. Write the choice of a group as a line: model: dev"),
        ("steps: 1\nsteps: 2", "cannot be read ... duplicate key steps"),
        ("sample:\n  seed: 1\nsample.seed: 2", "sets sample.seed twice. Keep one of the lines"),
        ("sample.seed: 2\nsample:\n  seed: 1", "sets sample.seed twice"),
        ("dataset:\n  captions:\n    trigger: a\ndataset.captions.trigger: b", "sets dataset.captions.trigger twice"),
        ("dataset.captions.trigger: b\ndataset.captions: {trigger: a}", "sets dataset.captions twice"),
        ("config: other.yaml", "config is not read"),
        ("model: [tiny]", "model=['tiny'] must be the name of a choice"),
        ("optimizer:\n  lrr: 1", "optimizer.lrr=1 is not a setting; did you mean optimizer.lr?"),
        ("model: tinny", "model=tinny is not a choice; did you mean tiny?"),
    ],
)
def test_a_file_that_is_no_list_of_settings_is_one_message(run_command, tmp_path, text, said):
    file = tmp_path / "mine.yaml"
    if text is not None:
        file.write_text(text)
    message = run_command.refused(f"config={file}", task=load_config)
    assert holds(message, said), message


def test_one_file_is_read_and_not_a_folder(run_command, mine):
    assert holds(run_command.refused(f"config={mine}", f"config={mine}"), "config= ... only one file")
    assert holds(run_command.refused(f"config={mine.parent}"), "is a folder")


def test_a_run_from_a_file_can_be_repeated_and_resumed_without_it(run_command, small, mine, tmp_path):
    mine.write_text("steps: 2\nmax_grad_norm: 7e-1\nname: mine\nsample:\n  prompts: [a red cup]\n")
    run = tmp_path / "run"
    code, _, err = run_command(*small(f"output_dir={run}", "checkpoint_every=1"), f"config={mine}", "steps=3")
    assert code == 0, err
    kept = OmegaConf.load(run / "config.yaml")
    assert (kept.steps, kept.max_grad_norm, kept.name, kept.sample.prompts) == (3, 0.7, "mine", ["a red cup"])
    mine.unlink()
    words = shlex.split((run / "command.txt").read_text())[2:]
    assert "config=" not in " ".join(words)
    code, _, err = run_command(*words, "steps=4", f"resume={run}")
    assert code == 0, err
    assert OmegaConf.load(run / "config.yaml").max_grad_norm == 0.7


@pytest.mark.parametrize("page", ["README.md", "docs/data.md"])
def test_the_files_of_the_documentation_compose(page, tmp_path):
    text = (ROOT / page).read_text()
    found = re.findall(r"```yaml\n(# mine\.yaml.*?)```", text, re.DOTALL)
    assert found
    for one in found:
        file = tmp_path / "mine.yaml"
        file.write_text(one)
        assert compose(*with_settings_file([f"config={file}"])).dataset


def test_an_experiment_may_lie_in_another_folder(run_command, tmp_path):
    (tmp_path / "experiment").mkdir()
    text = "# @package _global_\ndefaults:\n  - override /model: tiny\nsteps: 13\ndevice: cpu\n"
    (tmp_path / "experiment" / "mine.yaml").write_text(text)
    code, out, err = run_command("--config-dir", str(tmp_path), "+experiment=mine", task=plan)
    assert code == 0, err
    assert "13 steps" in out


def test_other_commands_read_it_too(run_command, mine, pictures):
    mine.write_text(f"model: tiny\ndevice: cpu\ndataset: folder\ndataset.path: {pictures}\nsteps: 12\n")
    code, out, err = run_command(f"config={mine}", task=plan)
    assert code == 0, err
    assert "12 steps" in out
