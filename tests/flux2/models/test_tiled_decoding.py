"""flux2.models.tiled_decoding: the decoder's own pixels, wherever the stripes are cut, computed a few rows at a
time.
"""

import helpers
import pytest
import torch
from torch import Tensor, nn

import flux2
from flux2 import pipeline
from flux2.models import tiled_decoding
from flux2.weights.loading import load_autoencoder
from flux2.weights.sources import model_source


def latents(height: int, width: int) -> Tensor:
    return torch.randn(1, 128, height, width, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("elements", [1, 3_000, 3_500, 4_100, 5_000, 7_000, 1 << 24])
@pytest.mark.parametrize("size", [(1, 1), (2, 5), (5, 3)])
@torch.no_grad()
def test_the_pixels_are_the_decoders(size: tuple[int, int], elements: int) -> None:
    """The group norms of this model have random weights, and see all of the picture."""
    model, _ = helpers.autoencoders()
    z = latents(*size)
    assert helpers.relative_error(tiled_decoding.decode(model, z, elements), model.decode(z)) <= 2e-6


@torch.no_grad()
def test_the_embedded_models_pixels_are_the_decoders() -> None:
    model = load_autoencoder(model_source("tiny"))
    z = latents(20, 13)
    whole, striped = model.decode(z), tiled_decoding.decode(model, z, 50_000)
    assert (whole - striped).abs().max() <= 1e-5


@torch.no_grad()
def test_what_is_computed_at_once_is_a_stripe(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest input of any convolution behind the middle."""
    model, _ = helpers.autoencoders()
    seen: list[int] = []
    plain = tiled_decoding.convolve

    def watched(conv: nn.Conv2d, x: Tensor, *rows: int) -> tuple[Tensor, int, int]:
        seen.append(x.shape[2])
        return plain(conv, x, *rows)

    monkeypatch.setattr(tiled_decoding, "convolve", watched)
    pixels = tiled_decoding.decode(model, latents(8, 4), 1)
    assert pixels.shape[2] == 128
    # eight rows, the halo, and one more on each side of an upsampled map
    assert max(seen) == 8 + 2 * tiled_decoding.HALO + 2


def test_several_pictures_are_refused() -> None:
    model, _ = helpers.autoencoders()
    with pytest.raises(ValueError, match=r"\b2 images\b"):
        tiled_decoding.decode(model, latents(2, 2).expand(2, -1, -1, -1))


@pytest.mark.parametrize(("tiled", "used"), [(None, False), (True, True), (False, False)])
def test_small_pictures_are_decoded_whole_unless_stripes_are_asked_for(
    tiled: bool | None, used: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    plain = tiled_decoding.decode
    monkeypatch.setattr(tiled_decoding, "decode", lambda *given: calls.append(1) or plain(*given))
    pipe = flux2.load("tiny", device="cpu", tiled=tiled)
    pipe.generate("a red cup", steps=1, width=32, height=32)
    assert bool(calls) is used


def test_large_pictures_are_decoded_in_stripes(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    plain = tiled_decoding.decode
    monkeypatch.setattr(tiled_decoding, "decode", lambda *given: calls.append(1) or plain(*given))
    monkeypatch.setattr(pipeline, "TILED_PIXELS", 48 * 32)
    pipe = flux2.load("tiny", device="cpu")
    pipe.generate("a red cup", steps=1, width=48, height=32)
    assert not calls
    pipe.generate("a red cup", steps=1, width=48, height=48)
    assert calls


def test_another_value_of_tiled_is_an_error() -> None:
    with pytest.raises(ValueError, match="tiled='yes'"):
        flux2.load("tiny", tiled="yes")  # type: ignore[arg-type]
