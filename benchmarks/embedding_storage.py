"""Embeddings in less space: what that does to the loss.

    python benchmarks/embedding_storage.py

On the embedded model and the demo's 24 cards, for each way to store embeddings: the bytes of one, the loss at fixed
noise and times of every card (`train.validation.loss.FixedNoiseLoss`), and the losses of a short training. Beside them,
for scale, the same loss with every card under another's caption: what is lost when the caption is wrong altogether.

The embedded model's text encoder is small, and does not have the outliers that the large ones have; groups with a scale
of their own are there for those (data/cache/embeddings.py), and are not tested by this.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    import flux2  # noqa: F401  before torch: it sets how long threads spin

import argparse
import json
import tempfile
from typing import Any

import hydra
import torch
from torch import nn

from benchmarks.common import environment, write_result
from data.cache import MemoryCache
from data.cache.embeddings import EmbeddingPlan
from flux2.models.variants import VARIANTS
from flux2.weights.loading import load_transformer
from train.config.paths import CONFIG
from train.config.run_config import RunConfig
from train.config.settings import STORAGES
from train.run import train
from train.stages.data import prepare_samples
from train.stages.memory import load_config
from train.stages.run_folder import claim_run_folder
from train.validation.loss import FixedNoiseLoss, Validated

RESULT = Path(__file__).parent / "results" / "embedding_storage.json"


def configured(*overrides: str) -> RunConfig:
    with hydra.initialize_config_dir(str(CONFIG), version_base="1.3"):
        return load_config(hydra.compose("train", ["+experiment=demo", "device=cpu", *overrides]))


def losses(storage: str, cache: str) -> tuple[list[float], list[float], int]:
    """Of every card: its loss, and its loss under another's caption; and the bytes of an embedding's file."""
    run = configured(f"embedding_storage={storage}", f"cache_dir={cache}")
    data = prepare_samples(run)
    samples, prepared = data.samples, data.cached
    model = load_transformer(run.source, precision=run.precision)
    if storage.startswith("projected"):
        model.txt_in = nn.Identity()
    captions = [sample.caption for sample in samples]
    swapped = [captions[-1], *captions[:-1]]

    def each(given: list[str]) -> list[float]:
        names = [sample.name for sample in samples]
        parts = zip(names, prepared.entries, given, prepared.contents, strict=True)
        chosen = [Validated(*part) for part in parts]
        return FixedNoiseLoss(prepared, chosen, seed=0)(model, run.guidance).mean(1).tolist()

    return each(captions), each(swapped), prepared.cache.path(prepared.prompts[""]).stat().st_size


def trained(storage: str, cache: str, folder: Path, steps: int) -> list[float]:
    """The losses of a training, step by step."""
    run = configured(
        *(f"embedding_storage={storage}", f"cache_dir={cache}", f"output_dir={folder}", f"steps={steps}"),
        *("log_every=1", "sample_every=0", "validate_every=0", "checkpoint_every=0"),
    )
    with claim_run_folder(run) as location:
        file = train(run, location)[0].parent / "metrics.jsonl"
    return [json.loads(line)["loss"] for line in file.read_text().splitlines()]


def changes(found: list[float], full: list[float]) -> dict[str, float]:
    """Relative to the loss with full embeddings: of the mean, and of the single values their size."""
    one, other = torch.tensor(found, dtype=torch.float64), torch.tensor(full, dtype=torch.float64)
    apart = (one / other - 1).abs()
    return {
        "of_the_mean": (one.mean() / other.mean() - 1).item(),
        "mean_size": apart.mean().item(),
        "largest": apart.max().item(),
    }


def megabytes_of_dev(storage: str) -> float:
    """One caption of dev, in bfloat16 where it is not in 8 bits."""
    config = VARIANTS["dev"].transformer
    width = config.hidden if storage.startswith("projected") else config.text_width
    return EmbeddingPlan(MemoryCache(), {}, storage.endswith("fp8")).size(512, width, torch.bfloat16) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=60, help="of the training")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        cache = f"{place}/cache"
        full, full_training = [], []
        for storage in STORAGES:
            found, swapped, size = losses(storage, cache)
            training = trained(storage, cache, Path(place) / storage, options.steps)
            if storage == "full":
                full, full_training = found, training
            rows[storage] = {
                "bytes_of_a_tiny_caption": size,
                "megabytes_of_a_dev_caption": megabytes_of_dev(storage),
                "loss": sum(found) / len(found),
                "change_of_the_loss": changes(found, full),
                "change_with_a_wrong_caption": changes(swapped, full),
                "change_of_training_losses": changes(training, full_training),
            }
            print(storage, json.dumps(rows[storage]), flush=True)
    result = {
        "what": "loss of the embedded model with embeddings stored in less space, relative to full ones in float32",
        "cards": len(full),
        "training_steps": options.steps,
        "storages": rows,
        **environment(),
    }
    write_result(options.out, result)


if __name__ == "__main__":
    main()
