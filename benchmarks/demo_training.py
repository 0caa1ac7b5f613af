"""Train the demo (conf/experiment/demo.yaml) inside a benchmark."""

from __future__ import annotations

from pathlib import Path

import hydra
from omegaconf import DictConfig

import train.run
from train.config.paths import CONFIG
from train.config.run_config import RunConfig
from train.stages.memory import load_config
from train.stages.run_folder import claim_run_folder

STEPS_ONLY = ("sample_every=0", "validate_every=0", "checkpoint_every=0")


def compose_demo(*overrides: str) -> DictConfig:
    """Return the configuration of the demo with these overrides."""
    with hydra.initialize_config_dir(str(CONFIG), version_base="1.3"):
        return hydra.compose("train", ["+experiment=demo", *overrides])


def load_demo(*overrides: str) -> RunConfig:
    """Return the checked configuration of the demo with these overrides."""
    return load_config(compose_demo(*overrides))


def train_demo(*overrides: str) -> Path:
    """Train the demo without sample grids, validation and checkpoints. Return the run folder."""
    config = load_demo(*STEPS_ONLY, *overrides)
    with claim_run_folder(config) as location:
        adapter, _ = train.run.train(config, location)
    return adapter.parent
