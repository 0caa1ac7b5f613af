"""A value that Hydra cannot read is shown in the form that it can, ready to paste into a shell."""

import errno
import os
import re
import shlex

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from message_helpers import holds
from train_helpers import ROOT, refusal

from data.files import atomic_write
from train.cli.errors import check_no_switches, format_error, quoted_override

pytest_plugins = ("train_helpers",)

TEXTS = [
    "a photo of {caption}",
    "/data/猫",
    "/data/my cats (2024)",
    "it's a cat",
    'a "quoted" word',
    """it's "both" of them""",
    "C:\\cats (2024)\\",
    'a\\"b\\\\"c',
    "~/cats",
    "a = b",
    "50 % #1; really!",
    "a & b | c > d",
    "naïve",
    "a, b (c)",
]


def pasted(message):
    """What a shell makes of the form that a message ends with."""
    words = shlex.split(message[message.rindex("rite '") + 5 :])
    assert len(words) == 1, message
    return OverridesParser.create().parse_override(words[0])


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_is_shown_with_quotes_that_hydra_reads(text):
    message = refusal(f"dataset.path={text}")
    assert holds(message, "dataset.path=")
    assert pasted(message).value() == text


def test_the_items_of_a_list_and_the_choices_of_a_sweep_are_quoted_one_by_one():
    assert pasted(refusal("sample.prompts=[a fox (red), it's]")).value() == ["a fox (red)", "it's"]
    choices = OverridesParser.create().parse_override(
        shlex.split(quoted_override("name=猫, a (b)", sweep=True) or "")[0]
    )
    assert [choice.text for choice in choices.value().list] == ["猫", "a (b)"]


@pytest.mark.parametrize(
    "word",
    [
        "sample.references=[[a (b)],[c]]",
        "sample.prompts=['a, b', c (d)]",
        "x={a: (b)}",
        "steps=[1",
        "a (b)",
        "x=a\n(b)",
    ],
)
def test_what_is_not_clearly_a_text_gets_general_advice(word):
    assert quoted_override(word) is None
    if word != "steps=[1":
        return
    assert holds(refusal(word), "steps=[1 ... 'key=\"value\"'")


def test_a_text_with_a_comma_is_not_silently_a_sweep(run_command):
    message = run_command.refused("dataset=folder", "dataset.prompt=a cat, sitting")
    assert holds(message, "dataset.prompt=a cat, sitting ... -m")
    assert pasted(message).value() == "a cat, sitting"
    assert holds(run_command.refused("dataset=folder", "dataset.prompt=choice(a)"), "dataset.prompt=choice(a) ... -m")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--steps", "100"], "--steps: settings are written without dashes, as key=value. Write steps=100"),
        (["model=tiny", "--batch-size=4"], "--batch-size: ... Write batch_size=4"),
        (["-seed", "3", "model=tiny"], "-seed: ... Write seed=3"),
        (["--allow-changed-data", "steps=1"], "Write allow_changed_data=true"),
        (["--adapter.rank", "4"], "Write adapter.rank=4"),
        (["--optimizer.lrr", "1e-4"], "optimizer.lrr=1e-4 is not a setting; did you mean optimizer.lr?"),
        (["--hub.token", "abc"], "hub.token=*** is not a setting"),
    ],
)
def test_a_setting_with_dashes_is_answered_with_the_form_that_is_read(run_command, words, said):
    message = run_command.refused(*words)
    assert holds(message, said), message
    assert "abc" not in message


def test_the_switches_of_hydra_are_left_to_hydra():
    check_no_switches(["--cfg", "job", "-m", "steps=1,2", "--config-dir", ".", "--resolve", "--package=model"])


def test_configurations_of_the_launcher_are_no_setting():
    assert holds(refusal("accelerate=ddp"), "accelerate=ddp ... accelerate launch --config_file")


def test_a_secret_is_not_repeated():
    assert "hidden" not in refusal("+tracker.api_key=hidden (2)")


PAGES = [file for file in sorted((ROOT / "docs").glob("*.md")) if file.stem != "inference"]  # flux2.generate and Python


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.stem)
def test_every_setting_of_a_page_can_be_pasted(page):
    """Spans of code with a key and a value, and commands of train/."""
    text = page.read_text()
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    commands = [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if "train/" in line]
    checked = 0
    for code in [*commands, *(span for span in spans if re.match(r"'?\+?[a-z_.]+=\S", span))]:
        for word in shlex.split(code, comments=True):
            if re.match(r"[+~]?[a-z][a-z_.@]*=.", word) and not re.search(r"[A-Z]{2}|<|\.\.\.", word):
                try:
                    OverridesParser.create().parse_override(word)
                except HydraException as error:
                    pytest.fail(f"{word}: {error}")
                checked += 1
    assert checked or page.stem not in ("data", "training", "resuming", "README")


@pytest.mark.parametrize(
    ("code", "remedy"), [(errno.ENOSPC, "Make room"), (errno.EDQUOT, "quota"), (errno.EFBIG, "ulimit -f")]
)
def test_a_full_disk_is_one_line_with_the_file_and_what_to_do(code, remedy, tmp_path):
    with pytest.raises(OSError, match=f"{tmp_path}/a") as caught, atomic_write(tmp_path / "a"):
        raise OSError(code, os.strerror(code))
    message = format_error(caught.value)
    assert message.startswith(f"{tmp_path}/a cannot be written ({os.strerror(code)}). ")
    assert remedy in message
    assert "Errno" in format_error(FileNotFoundError(2, "No such file or directory", "/b"))
