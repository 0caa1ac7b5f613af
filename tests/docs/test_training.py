"""docs/training.md: every choice is there, is one, and what is said to be the default is."""

import re
import shlex

import pytest
from omegaconf import OmegaConf
from train_helpers import CONF, ROOT, compose

from train.stages.memory import load_config

TEXT = (ROOT / "docs" / "training.md").read_text()
GROUPS = ("timesteps", "target", "loss", "weighting", "preservation", "optimizer", "schedule")
LINES = re.findall(r"^python train/run\.py .*$", TEXT.replace("\\\n", ""), re.MULTILINE)
COMMANDS = [shlex.split(line)[2:] for line in LINES]


@pytest.mark.parametrize("group", GROUPS)
def test_its_table_has_every_choice_and_the_default_first(group):
    listed = re.findall(rf"^\| `{group}=(\w+)` \|", TEXT, re.MULTILINE)
    assert set(listed) == {file.stem for file in (CONF / group).glob("[!_]*.yaml")}
    usual = {name: choice for entry in OmegaConf.load(CONF / "train.yaml").defaults for name, choice in _items(entry)}
    assert listed[0] == usual[group]


def _items(entry):
    return [(str(key), value) for key, value in entry.items()] if hasattr(entry, "items") else []


@pytest.mark.parametrize("words", COMMANDS, ids=["slider", "given", "drawn"])
def test_its_commands_are_accepted(words):
    run = load_config(compose(*words, "device=cpu", "memory=default"))
    assert (run.prior is None) == ("+experiment=slider" in words)
    assert run.prior is None or run.prior.draws == (run.prior.dataset is None)


def test_its_settings_are_settings():
    for group in GROUPS:
        for key in set(re.findall(rf"`{group}\.(\w+)", TEXT)):
            owners = [choice.stem for choice in (CONF / group).glob("*.yaml") if f"\n{key}:" in choice.read_text()]
            assert owners, f"{group}.{key}"


def test_a_rate_that_others_are_given_works_by_its_name():
    named = re.search(r"`(optimizer\._target_=\S+ .*?)`", TEXT)
    assert load_config(compose(*named[1].split(), "device=cpu")).make_optimizer.func.__name__ == "RAdam"
