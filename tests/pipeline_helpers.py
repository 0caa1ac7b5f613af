"""Small pipelines and pictures for them: what the tests of the pipeline share.

A test module says `pytest_plugins = ("pipeline_helpers",)` to get the fixture, and may import the rest before that:
PYTEST_DONT_REWRITE.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch
from PIL import Image

from flux2.pipeline import Pipeline
from flux2.quantization.precision import Precision
from flux2.weights.sources import ModelSource


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def pipeline(source: ModelSource, keep: bool = True) -> Pipeline:
    return Pipeline(source, torch.device("cpu"), Precision(), keep_text_encoder=keep)


def difference(ours: Sequence[Image.Image], others: Sequence[Image.Image]) -> int:
    """The largest difference of any pixel, of 255."""
    pairs = zip(ours, others, strict=True)
    return max(int(np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max()) for a, b in pairs)


@pytest.fixture
def pipe(model_folders: Callable[[str], Path]) -> Pipeline:
    return pipeline(ModelSource(helpers.VARIANTS["klein"], str(model_folders("klein"))))
