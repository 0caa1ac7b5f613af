"""Fill the cache: `accelerate launch train/cache.py +experiment=tarot [+prune=true]`.

Training also computes missing entries. This command prepares a dataset on a machine where the encoders fit (the text
encoder of dev needs 35 GB in bfloat16), so that training elsewhere loads neither. One encoder is in memory at a time;
each of several processes fills its share.

`+prune=true` computes nothing and removes the entries that no sample of this configuration uses.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # sys.path begins with the script's folder, whose modules would hide libraries
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from train.cli.start import start_command

    start_command()  # before the imports below: they take seconds, and --help needs none of them

from omegaconf import DictConfig, OmegaConf

from train.cli.app import command
from train.encoding.prepare import remove_unused
from train.stages.class_data import class_cache_requests
from train.stages.data import cache_request, prepare_samples
from train.stages.memory import load_config


def main(config: DictConfig) -> None:
    """Fill or prune the cache of one configuration."""
    given = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    prunes = given.pop("prune", False)
    if not isinstance(prunes, bool):
        raise ValueError(f"prune={prunes!r} must be true or false")
    run = load_config(OmegaConf.create(given))
    if not prunes:
        prepare_samples(run)
        run.say(f"the cache in {run.settings.cache_dir} is complete")
    elif run.accelerator.is_main_process:
        request = cache_request(run)
        print(remove_unused(request, *class_cache_requests(run, request)))


if __name__ == "__main__":
    command(main)
