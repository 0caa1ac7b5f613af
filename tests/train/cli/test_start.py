"""A plan is the same with light imports."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


def start(*arguments):
    """The modules that a command imports, and what it prints."""
    command = [sys.executable, "-X", "importtime", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    return {line.rpartition("|")[2].strip() for line in lines}, done.stdout


@pytest.mark.slow
def test_a_plan_with_light_imports_is_the_same(capfd):
    options = ["model=tiny", "optimizer=adamw", "+card=24"]
    imported, out = start("train/plan.py", *options)
    assert "peft" in imported
    heavy = ("transformers.models", "datasets", "wandb", "bitsandbytes.backends", "torch._inductor.lowering")
    assert not [name for name in imported if name.startswith(heavy)]

    from train_helpers import compose

    from train import plan

    capfd.readouterr()
    plan.main(compose(*options))
    assert capfd.readouterr().out == out
