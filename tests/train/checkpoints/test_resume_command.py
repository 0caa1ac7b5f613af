"""The command that a run kept, read back for resuming. What it refuses: tests/train/pages/test_run_actions.py."""

import os
import shlex

from train.checkpoints.resume_command import words_from_record
from train.utils.redact import masked_command


def test_a_recorded_command_gives_the_settings_of_the_run_without_those_of_one_start():
    command = "accelerate launch --num_processes 8 train/run.py +experiment=x 'a=[1, 2]' resume=auto output_dir=o"
    assert words_from_record(command, "") == (8, ["+experiment=x", "a=[1, 2]"])
    assert words_from_record("python train/run.py", "") == (1, [])


def test_a_path_below_the_home_folder_is_what_the_run_was_given():
    home = os.path.expanduser("~")
    words = [f"model.path={home}/models/a b", f"x=['{home}/one',{home}/two]", "dataset.path=~/typed/so"]
    recorded = f"python train/run.py {masked_command(words)}"
    assert home not in recorded
    config = f"path: {home}/models/a b\nx:\n- {home}/one\n- {home}/two\ndataset: ~/typed/so\n"
    assert words_from_record(recorded, config) == (1, words)
    assert words_from_record(recorded, "")[1] == shlex.split(recorded)[2:]
