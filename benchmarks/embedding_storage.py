"""Measure how compact storage of embeddings changes the loss.

    python benchmarks/embedding_storage.py

On the embedded model and the 24 cards of the demo, for each `embedding_storage`: the bytes of one embedding, the loss
of every card at fixed noise and timesteps (`train.validation.loss.FixedNoiseLoss`), and the losses of a short training
run. For comparison, the same loss with the caption of another card.

The text encoder of the embedded model is small and lacks the outliers of the large ones. The scale per group of numbers
(data/cache/embeddings.py) is there for these, so this benchmark does not test it.
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

import torch
from torch import nn

from benchmarks.common import RESULTS, environment, integer_type, write_result
from benchmarks.demo_training import load_demo, train_demo
from data.cache import MemoryCache
from data.cache.embeddings import EmbeddingPlan
from flux2.models.variants import VARIANTS
from flux2.weights.loading import load_transformer
from train.config.settings import STORAGES
from train.stages.data import prepare_samples
from train.validation.loss import FixedNoiseLoss, Validated


def card_losses(storage: str, cache: str) -> tuple[list[float], list[float], int]:
    """Return the loss of every card, its loss with the caption of another card, and the bytes of a cached embedding."""
    run = load_demo("device=cpu", f"embedding_storage={storage}", f"cache_dir={cache}")
    data = prepare_samples(run)
    samples, prepared = data.samples, data.cached
    model = load_transformer(run.source, precision=run.precision)
    if storage.startswith("projected"):
        model.txt_in = nn.Identity()
    captions = [sample.caption for sample in samples]
    swapped = [captions[-1], *captions[:-1]]

    def losses_with(captions: list[str]) -> list[float]:
        names = [sample.name for sample in samples]
        parts = zip(names, prepared.entries, captions, prepared.contents, strict=True)
        validated = [Validated(*part) for part in parts]
        return FixedNoiseLoss(prepared, validated, seed=0)(model, run.guidance).mean(1).tolist()

    return losses_with(captions), losses_with(swapped), prepared.cache.path(prepared.prompts[""]).stat().st_size


def training_losses(storage: str, cache: str, folder: Path, steps: int) -> list[float]:
    """Train the demo and return the loss of each step."""
    folders = (f"cache_dir={cache}", f"output_dir={folder}")
    run = train_demo("device=cpu", f"embedding_storage={storage}", f"steps={steps}", "log_every=1", *folders)
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def relative_changes(losses: list[float], full: list[float]) -> dict[str, float]:
    """Return the change relative to the losses with full embeddings.

    `of_the_mean` is the change of the mean; `mean_size` and `largest` are of the absolute changes of single losses.
    """
    compact, reference = (torch.tensor(values, dtype=torch.float64) for values in (losses, full))
    change = (compact / reference - 1).abs()
    return {
        "of_the_mean": (compact.mean() / reference.mean() - 1).item(),
        "mean_size": change.mean().item(),
        "largest": change.max().item(),
    }


def dev_megabytes(storage: str) -> float:
    """Return the size of one caption of dev, in bfloat16 unless it is stored in 8 bits."""
    config = VARIANTS["dev"].transformer
    width = config.hidden if storage.startswith("projected") else config.text_width
    return EmbeddingPlan(MemoryCache(), {}, storage.endswith("fp8")).size(512, width, torch.bfloat16) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=integer_type(1), default=60, help="steps of each training run")
    parser.add_argument("--out", type=Path, default=RESULTS / "embedding_storage.json")
    options = parser.parse_args()
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        cache = f"{folder}/cache"
        full, full_training = [], []
        for storage in STORAGES:
            losses, swapped, size = card_losses(storage, cache)
            training = training_losses(storage, cache, Path(folder) / storage, options.steps)
            if storage == "full":
                full, full_training = losses, training
            rows[storage] = {
                "bytes_of_a_tiny_caption": size,
                "megabytes_of_a_dev_caption": dev_megabytes(storage),
                "loss": sum(losses) / len(losses),
                "change_of_the_loss": relative_changes(losses, full),
                "change_with_a_wrong_caption": relative_changes(swapped, full),
                "change_of_training_losses": relative_changes(training, full_training),
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
