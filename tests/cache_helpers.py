"""Samples made in memory and stand-ins for encoders: what the tests of the cache share."""

from io import BytesIO
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from data.buckets import Buckets
from data.cache import Cache
from data.cache.latents import LatentPlan, plan_latents
from data.sources import Sample
from data.sources.images import Picture


def picture(color: str, size: tuple[int, int] = (40, 40), name: str | None = None) -> Picture:
    """One color all over."""
    stream = BytesIO()
    Image.new("RGB", size, color).save(stream, "PNG")
    return Picture(name or color, lambda: BytesIO(stream.getvalue()))


def encode_images(images: list[Image.Image]) -> Tensor:
    """A stand-in autoencoder whose latents hold the mean color of a picture."""
    assert len(images) == 1
    width, height = images[0].size
    red, green, blue = images[0].resize((1, 1)).getpixel((0, 0))  # type: ignore[misc]
    value = red / 255 + green / 10 + blue / 3
    return torch.full((1, 128, height // 16, width // 16), value, dtype=torch.bfloat16)


def encode_prompts(prompts: list[str]) -> Tensor:
    assert len(prompts) == 1
    return torch.full((1, 4, 6), float(len(prompts[0])))


def refuse(_: list) -> Tensor:
    raise AssertionError("the encoder was called though nothing is missing")


def files(cache: Cache) -> list[Path]:
    return [path for path in cache.folder.rglob("*") if path.is_file()] if cache.folder.exists() else []


SAMPLES = [
    Sample(picture("red"), ("a",), (picture("blue", (100, 50)),)),
    Sample(picture("lime"), ("b",)),
    Sample(picture("white", (80, 48)), ("c",)),
]


def plan(cache: Cache, samples: list[Sample] = SAMPLES, **changes: object) -> LatentPlan:
    arguments = {"buckets": Buckets(64, upscale=True), "encoder_id": "vae", "reference_max_pixels": 32 * 32} | changes
    return plan_latents(cache, samples, **arguments)  # type: ignore[arg-type]
