"""Draw sample grids with the distilled twin of the model that trains: 4 steps instead of 50 with two predictions each.

An adapter of klein base 4B or 9B also works with klein 4B or 9B, which has the same layers. For each grid the twin is
read from its files or its quantized copy, gets the adapter as it is then, and is freed. Its blocks stream from host
memory, so that it needs little memory beside the model that trains.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import peft
import torch

from flux2 import adapters
from flux2.adapters.files import layer_pairs
from flux2.adapters.loading import attach_pairs
from flux2.adapters.tuners import adapter_layers
from flux2.layers.fused_lora import FROZEN
from flux2.models.transformer import Transformer
from flux2.models.variants import VARIANTS, Variant
from flux2.pipeline import Pipeline
from flux2.prompts.embeddings import free_memory
from flux2.quantization.precision import Precision
from flux2.weights.sources import ModelSource


def twins(variant: Variant) -> list[str]:
    """Return the names of the other models with the sizes and the text encoder of `variant`."""
    sizes = variant.transformer, variant.text, variant.autoencoder
    return [
        name
        for name, other in VARIANTS.items()
        if name != variant.name and (other.transformer, other.text, other.autoencoder) == sizes
    ]


@dataclass(frozen=True)
class Twin:
    """The model that draws the sample grids of a run. `peft_model` is the one that trains; `cache` as in `Pipeline`."""

    source: ModelSource
    peft_model: peft.PeftModel
    device: torch.device
    precision: Precision
    cache: Path | None = None

    @contextmanager
    def loaded(self) -> Iterator[Transformer]:
        """Context manager that yields the twin with the adapter of `peft_model` as it is now, and frees it."""
        streamed = 1.0 if self.device.type == "cuda" else 0
        pipeline = Pipeline(self.source, self.device, self.precision, False, streamed, self.cache)
        try:
            with tempfile.TemporaryDirectory() as folder:
                adapters.save(self.peft_model, Path(folder), base=self.source.variant.name)
                pipeline.load_adapter(folder)
            trained = self.peft_model.get_base_model()
            if any(FROZEN in layer.r for layer in adapter_layers(trained).values()):  # adapter.init_mode=frozen
                attach_pairs(pipeline.transformer, layer_pairs(trained, FROZEN), FROZEN)
            yield pipeline.transformer
        finally:
            del pipeline
            free_memory(self.device)
