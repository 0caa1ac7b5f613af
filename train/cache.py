"""Fill the cache: `python train/cache.py +experiment=tarot [+prune=true]`.

Training also computes missing entries. This command prepares a dataset on a machine where the encoders fit (the text
encoder of dev needs 35 GB in bfloat16), so that training elsewhere loads neither. One encoder is in memory at a time;
each of several processes fills its share.

`+share=2/8` fills the second of eight shares, on one of eight machines with a disk that all of them can write.
`+prune=true` computes nothing and removes the entries that no sample of this configuration uses.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

if __name__ == "__main__":  # sys.path begins with the script's folder, whose modules would hide libraries
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from train.cli.start import start_command

    start_command()  # before the imports below: they take seconds, and --help needs none of them

from omegaconf import DictConfig, OmegaConf

from train.cli.app import command
from train.config.instantiate import to_plain
from train.encoding.prepare import remove_unused
from train.stages.class_data import class_cache_requests
from train.stages.data import cache_request, prepare_samples
from train.stages.memory import choose_text_encoder, load_config


def parse_share(share: object) -> tuple[int, int]:
    """Return "2/8" as (1, 8). Raise ValueError for anything that is not a share."""
    found = re.fullmatch(r"([1-9]\d{0,5})/([1-9]\d{0,5})", str(share))
    if found is None or int(found[1]) > int(found[2]):
        raise ValueError(f"share={share!r} must be I/N with I from 1 to N, such as 2/8: the second of eight shares")
    return int(found[1]) - 1, int(found[2])


def main(config: DictConfig) -> None:
    """Fill or prune the cache of one configuration."""
    given = to_plain(config)
    prunes = given.pop("prune", False)
    share = given.pop("share", "1/1")
    if not isinstance(prunes, bool):
        raise ValueError(f"prune={prunes!r} must be true or false")
    if prunes and share != "1/1":
        raise ValueError(f"share={share} has no effect with prune=true. Remove one of them")
    run = choose_text_encoder(load_config(OmegaConf.create(given)))
    if run.settings.cache_dir is None:
        raise ValueError("cache_dir=null stores nothing on disk, so there is nothing to fill or prune. Set a folder.")
    if not prunes:
        index, count = parse_share(share)
        if count > 1 and run.prior is not None and run.prior.dataset is None:
            raise ValueError(f"share={share}: class images are drawn by a start that fills everything. Remove it")
        prepare_samples(run, (index, count))
        what = f"share {share} of the cache" if count > 1 else "the cache"
        run.say(f"{what} in {run.settings.cache_dir} is complete")
    elif run.accelerator.is_main_process:
        request = cache_request(run)
        print(remove_unused(request, *class_cache_requests(run, request)))


if __name__ == "__main__":
    command(main)
