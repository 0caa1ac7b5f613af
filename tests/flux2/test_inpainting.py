"""Inpainting and image to image: diffusers' latents at every step, and what is outside of the mask stays."""

from typing import Any

import helpers
import numpy as np
import pytest
import torch
from diffusers import Flux2KleinInpaintPipeline
from diffusers.image_processor import VaeImageProcessor
from PIL import Image, ImageDraw
from pipeline_helpers import difference, picture
from torch import Tensor

import flux2
from data.synthetic.drawings import COLORS, Drawing, draw
from flux2.models.inpainting import Inpainting, computed_size, crop_region
from flux2.pipeline import Pipeline
from flux2.sampling import first_step

pytest_plugins = ("pipeline_helpers",)

IMAGE, REFERENCE = picture(64, 48), picture(32, 48, 1)


def mask(size: tuple[int, int], box: tuple[int, int, int, int], level: int = 255) -> Image.Image:
    """White inside of `box`, both ends included."""
    made = Image.new("L", size)
    ImageDraw.Draw(made).rectangle(box, fill=level)
    return made


MASK = mask((64, 48), (9, 5, 40, 30))


@pytest.mark.parametrize("strength", [0.3, 0.8, 1.0])
@pytest.mark.parametrize(("references", "guidance"), [([], 4.0), ([REFERENCE], 1.0)])
def test_the_latents_of_every_step_are_diffusers(
    strength: float, references: list[Image.Image], guidance: float, pipe: Pipeline
) -> None:
    text, theirs, ours = helpers.TEXTS["klein"], list[Tensor](), list[Tensor]()

    def keep(_pipe: Any, _step: int, _time: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
        theirs.append(given["latents"])
        return {}

    made = Flux2KleinInpaintPipeline(**helpers.reference_parts("klein"), is_distilled=False)
    made.set_progress_bar_config(disable=True)
    wanted = made(
        prompt=["a cup", "a fox"],
        image=IMAGE,
        mask_image=MASK,
        image_reference=references[0] if references else None,
        strength=strength,
        generator=[torch.Generator().manual_seed(seed) for seed in (7, 8)],
        num_inference_steps=6,
        guidance_scale=guidance,
        max_sequence_length=text.length,
        text_encoder_out_layers=text.layers,
        callback_on_step_end=keep,
    ).images
    images = pipe.generate(
        ["a cup", "a fox"],
        references=[IMAGE, *references],
        mask=MASK,
        strength=strength,
        seed=7,
        steps=6,
        guidance=guidance,
        progress=ours.append,
    )
    assert len(ours) == len(theirs) == 6 - first_step(6, strength)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    inside = MASK.getbbox()
    assert difference([image.crop(inside) for image in images], [image.crop(inside) for image in wanted]) <= 2
    assert difference(images[:1], images[1:]) > 20


def test_what_is_outside_of_the_mask_stays_bit_for_bit(pipe: Pipeline) -> None:
    """Of an image whose sides are no multiples of 16, whole and cropped."""
    image, where = picture(85, 70, 3), mask((85, 70), (60, 10, 84, 40))
    made = []
    for options in ({}, {"mask_crop": 4}, {"mask_crop": 0, "width": 64, "height": 64}):
        (result,) = pipe.generate("a cup", references=[image], mask=where, steps=2, **options)
        assert result.size == (85, 70)
        changed = np.asarray(result) != np.asarray(image)
        assert not changed[np.asarray(where) == 0].any()
        assert changed[np.asarray(where) > 0].any(-1).mean() > 0.9
        made.append(result)
    assert min(difference([made[i]], [made[j]]) for i, j in ((0, 1), (1, 2))) > 10


def test_gray_in_the_mask_mixes_the_image_and_the_result() -> None:
    image, result = Image.new("RGB", (32, 32), (200, 0, 0)), Image.new("RGB", (32, 32), (0, 100, 0))
    inpainting = Inpainting.from_arguments([image], mask((32, 32), (0, 0, 15, 31), 192))
    assert inpainting is not None
    assert inpainting.paste(result).getpixel((3, 3)) == (49, 75, 0)
    assert inpainting.paste(result).getpixel((20, 3)) == (200, 0, 0)
    whole = inpainting.token_mask()
    assert whole is not None
    assert whole.tolist() == [[[[1, 0], [1, 0]]]]


def test_strength_alone_starts_from_the_noisy_image_and_keeps_more_of_it_the_less_it_is(pipe: Pipeline) -> None:
    distances, steps = [], []
    decoded = np.asarray(IMAGE, dtype=float)
    for strength in (0.2, 0.6, 1.0):
        seen: list[Tensor] = []
        (result,) = pipe.generate(
            "a cup", references=[IMAGE], strength=strength, steps=5, guidance=1.0, progress=seen.append
        )
        assert result.size == IMAGE.size
        distances.append(np.abs(np.asarray(result, dtype=float) - decoded).mean())
        steps.append(len(seen))
    assert steps == [1, 3, 5]
    assert distances == sorted(distances)
    edited = pipe.generate("a cup", references=[IMAGE], steps=5, guidance=1.0)
    assert difference(edited, [result]) == 0, "at full strength it is the edit of a reference"


@pytest.mark.parametrize(
    ("steps", "strength", "first"),
    [(50, 0.8, 10), (4, 0.8, 0), (4, 0.75, 1), (4, 0.01, 3), (10, 1.0, 0), (4, 1e-300, 3)],
)
def test_the_first_step_is_diffusers_and_leaves_one_step(steps: int, strength: float, first: int) -> None:
    assert first_step(steps, strength) == first


def test_the_embedded_model_repaints_the_masked_half() -> None:
    """The upper half of a red cup stays red; the lower one becomes green, by the prompt."""
    pipe = flux2.load("tiny", device="cpu")
    cup = draw(Drawing("cup", "red", "white", "large"))
    where = mask(cup.size, (0, 64, 127, 127))
    (result,) = pipe.generate(
        "a large green cup on a white background", references=[cup], mask=where, steps=8, mask_crop=128
    )

    def share(half: tuple[int, int, int, int], color: str) -> float:
        levels = np.asarray(result.crop(half), dtype=float)
        drawn = np.asarray(cup.crop(half), dtype=float)
        of_the_cup = np.abs(drawn - COLORS["red"]).sum(-1) < 60
        return float((np.abs(levels - COLORS[color]).sum(-1) < 120)[of_the_cup].mean())

    assert share((0, 0, 128, 64), "red") == 1
    assert share((0, 64, 128, 128), "green") > 0.7


# ------------------------------------------------------------------ regions and sizes


@pytest.mark.parametrize("margin", [0, 10, 300])
@pytest.mark.parametrize(
    "box", [(3, 4, 20, 60), (100, 90, 159, 95), (0, 0, 159, 119), (70, 50, 71, 51), (80, 0, 90, 119)]
)
@pytest.mark.parametrize("size", [(160, 112), (64, 128), (128, 128)])
def test_a_cropped_region_is_diffusers(box: tuple[int, int, int, int], margin: int, size: tuple[int, int]) -> None:
    """To a pixel, by rounding; where diffusers' leaves the image or the mask, ours does not."""
    where = mask((160, 120), box)
    ours = crop_region(where, margin, size)
    theirs = VaeImageProcessor.get_crop_region(where, *size, pad=margin)
    assert np.abs(np.subtract(ours, theirs)).max() <= 1
    assert min(ours) >= 0
    assert ours[2] <= 160
    assert ours[3] <= 120
    assert ours[0] <= box[0] < box[2] < ours[2]
    assert ours[1] <= box[1] < box[3] < ours[3]


@pytest.mark.parametrize(
    ("image", "given", "wanted"),
    [
        ((85, 70), (None, None), (80, 64)),
        ((3000, 2000), (None, None), (1248, 832)),
        ((3000, 2000), (768, None), (768, 512)),
        ((3000, 2000), (None, 512), (768, 512)),
        ((160, 1600), (None, 16), (16, 16)),
        ((100, 100), (512, 512), (512, 512)),
    ],
)
def test_a_size_follows_from_the_image_and_what_is_given(
    image: tuple[int, int], given: tuple[Any, Any], wanted: tuple[int, int]
) -> None:
    assert computed_size(image, *given) == wanted


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask": MASK}, r"mask needs the image.*first reference"),
        ({"strength": 0.5}, r"strength=0\.5 needs the image.*first reference"),
        ({"references": [IMAGE], "mask_crop": 3}, r"mask_crop=3 has no effect without mask"),
        ({"references": [IMAGE], "strength": 0}, r"strength=0 must be above 0 and at most 1"),
        ({"references": [IMAGE], "strength": 1.5}, r"strength=1\.5 must be above 0 and at most 1"),
        ({"references": [IMAGE], "strength": "1"}, r"strength='1' must be a number"),
        ({"references": [IMAGE], "mask": MASK, "mask_crop": -1}, r"mask_crop=-1 must be an integer"),
        ({"references": [IMAGE], "mask": "m.png"}, r"mask='m\.png' of type str must be an image"),
        ({"references": [REFERENCE], "mask": MASK}, r"mask has 64 x 48 pixels and its image 32 x 48"),
        ({"references": [IMAGE], "mask": Image.new("L", (64, 48), 127)}, r"black everywhere"),
        ({"references": [IMAGE], "strength": 1, "width": 64, "height": 128}, r"width=64, height=128 .* 64 x 48"),
        ({"references": [picture(64, 8)], "strength": 1}, r"64 x 8 pixels is too small"),
    ],
)
def test_what_cannot_be_repainted_is_refused_before_anything_is_loaded(
    options: dict[str, Any], message: str, pipe: Pipeline
) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        pipe.generate("a cup", **options)
    assert pipe.prompts.encoder is None
    assert "transformer" not in vars(pipe)


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_what_is_transparent_in_a_mask_is_not_repainted(mode: str) -> None:
    painted = mask((64, 48), (8, 8, 31, 31))
    layer = Image.new(mode, (64, 48))
    layer.paste(Image.new(mode, (64, 48), "white"), mask=painted)
    found = Inpainting.from_arguments([IMAGE], layer)
    assert found is not None
    assert found.mask is not None
    assert found.mask.tobytes() == painted.tobytes()


@pytest.mark.parametrize("size", [(1360, 768), (1920, 1080), (144, 96)])
def test_a_region_of_any_size_can_be_computed(size: tuple[int, int]) -> None:
    for width in (1, 7, 22, 40):
        where = mask(size, (60, 40, 59 + width, 40 + width // 2))
        found = Inpainting.from_arguments([picture(*size)], where, mask_crop=0)
        assert found is not None
        left, top, right, bottom = found.box
        assert left <= 60 <= 59 + width < right
        assert min(right - left, bottom - top) >= min(found.size) / 16
