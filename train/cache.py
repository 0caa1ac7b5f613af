"""Fill the caches: `accelerate launch train/cache.py +experiment=tarot [+prune=true]`.

Training does this by itself for whatever is missing. As a command it prepares a dataset where the encoders fit (the
text encoder of dev needs 35 GB in bfloat16), so that training elsewhere loads neither of them. One encoder is in memory
at a time; with several processes each fills its share.

With `+prune=true` it computes nothing, and removes what no sample of this configuration uses.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # a script's own folder comes first in sys.path, and ours would hide libraries
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from train.cli.start import start

    start()

from omegaconf import DictConfig, OmegaConf

from train.cli.app import command
from train.encoding.prepare import remove_unused
from train.stages.class_data import class_cache_requests
from train.stages.data import cache_request, prepare_samples
from train.stages.memory import load_config


def main(config: DictConfig) -> None:
    """Fill the caches of one configuration, or prune them."""
    given = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    prunes = given.pop("prune", False)
    if not isinstance(prunes, bool):
        raise ValueError(f"prune={prunes!r} must be true or false")
    run = load_config(OmegaConf.create(given))
    if not prunes:
        prepare_samples(run)
        run.say(f"the caches in {run.settings.cache_dir} are complete")
    elif run.accelerator.is_main_process:
        request = cache_request(run)
        print(remove_unused(request, *class_cache_requests(run, request)))


if __name__ == "__main__":
    command(main)
