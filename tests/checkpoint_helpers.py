"""Run folders as training leaves them, without any tensors: what tests of checkpoints and of resuming share."""

import json
from pathlib import Path

import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file

from flux2.adapters.files import PEFT_FILE
from train.checkpoints import checkpoint
from train.checkpoints.resume import NewRun, find

CONFIG = {
    "name": "a",
    "steps": 10,
    "seed": 0,
    "batch_size": 4,
    "gradient_accumulation": 1,
    "model": {"name": "tiny", "path": None},
    "adapter": {"rank": 4, "targets": ["x", "y"]},
    "dataset": {"path": "data/demo"},
    "sample": {"prompts": []},
}
IMAGES = 4
ANEW = "resume=auto ... nothing to resume"  # of the line that says so


def changed(**groups):
    """CONFIG with some keys of groups (or run-level keys) set."""
    config = json.loads(json.dumps(CONFIG))
    for key, value in groups.items():
        config[key] = {**config[key], **value} if isinstance(value, dict) else value
    return config


def make_run(folder: Path, *steps: int, finished: bool = False, config=CONFIG, images: int = IMAGES) -> Path:
    """A run folder as training leaves it, without any tensors."""
    folder.mkdir(parents=True)
    OmegaConf.save(OmegaConf.create(config), folder / "config.yaml")
    for step in steps:
        place = folder / "checkpoints" / f"step_{step:06d}"
        place.mkdir(parents=True)
        torch.save({"state": {}, "param_groups": []}, place / "optimizer.pt")
        (place / "adapter").mkdir()
        save_file({}, place / "adapter" / PEFT_FILE)
        checkpoint.seal(place, {"step": step, "base": "tiny", "images_per_step": images})
    if finished:
        (folder / "adapter").mkdir()
        (folder / "adapter" / PEFT_FILE).touch()
    return folder


def look(resume, fresh, config=CONFIG, images=IMAGES, chosen=False, say=print):
    return find(resume, NewRun(fresh, config, images, chosen, say))


def damage(file, how):
    if how == "missing":
        file.unlink()
    elif how == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    else:  # of the same length, which only the checksum sees
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
