"""data.buckets: which sizes there are, which one a picture gets, and that fitting neither distorts nor pads."""

import pytest
from PIL import Image, ImageChops

from data.buckets import Buckets, fit, fit_reference, reference_size


@pytest.mark.parametrize(("resolution", "step"), [(64, 16), (512, 16), (1024, 64)])
def test_every_bucket_keeps_to_the_area_the_step_and_the_aspect(resolution: int, step: int) -> None:
    sizes = Buckets(resolution, step, max_aspect=2.0).sizes
    assert len(set(sizes)) == len(sizes) > 1
    for width, height in sizes:
        assert width % step == height % step == 0
        assert max(width, height) <= 2 * min(width, height)
        assert width * height <= resolution**2 < (max(width, height) + step) * min(width, height)
        assert (height, width) in sizes


def test_a_square_picture_gets_the_resolution_exactly() -> None:
    for resolution in range(16, 1041, 16):
        assert Buckets(resolution).assign(1100, 1100) == (resolution, resolution)


def test_a_picture_gets_the_bucket_of_the_nearest_aspect() -> None:
    buckets = Buckets(64, upscale=True)
    assert buckets.sizes == ((80, 48), (64, 64), (48, 80))
    assert buckets.assign(1600, 1000) == (80, 48)
    assert buckets.assign(1000, 1600) == (48, 80)
    # sqrt(80/48) = 1.29 is half way from the square in logarithms; half way in plain ratios would be 1.33.
    assert buckets.assign(1280, 1000) == (64, 64)
    assert buckets.assign(1300, 1000) == (80, 48)
    assert buckets.assign(1000, 1300) == (48, 80)
    assert buckets.assign(9000, 10) == (80, 48)


def test_max_aspect_one_leaves_only_the_square() -> None:
    assert Buckets(512, max_aspect=1.0).sizes == ((512, 512),)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"resolution": 500}, "resolution=500 .* multiple of 16"),
        ({"resolution": 528, "step": 64}, "resolution=528 .* multiple of 64"),
        ({"resolution": 512, "step": 8}, "step=8 .* multiple of 16"),
        ({"resolution": 0}, "resolution=0"),
        ({"resolution": "512"}, "resolution='512'"),
        ({"resolution": 512, "max_aspect": 0.5}, "max_aspect=0.5"),
        ({"resolution": 512, "max_aspect": "2"}, "max_aspect='2'"),
    ],
)
def test_a_wrong_argument_is_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Buckets(**arguments)


def test_fit_is_resizing_to_cover_and_cutting_out_the_middle() -> None:
    picture = Image.effect_noise((96, 32), 80).convert("RGB")
    expected = picture.resize((48, 16), Image.Resampling.LANCZOS).crop((16, 0, 32, 16))
    difference = ImageChops.difference(fit(picture, (16, 16)), expected)
    assert difference.size == (16, 16)
    assert max(high for _, high in difference.getextrema()) <= 1  # type: ignore[misc]


def test_fit_enlarges_a_small_picture_and_leaves_one_of_the_right_size_as_it_is() -> None:
    picture = Image.effect_noise((48, 32), 50).convert("RGB")
    assert fit(picture, (48, 32)).tobytes() == picture.tobytes()
    assert fit(picture, (64, 64)).size == (64, 64)


@pytest.mark.parametrize(
    ("size", "limit", "expected"),
    [
        ((640, 480), 1024**2, (640, 480)),
        ((650, 490), 1024**2, (640, 480)),  # floored, not enlarged
        ((2048, 2048), 1024**2, (1024, 1024)),
        ((4096, 1024), 1024**2, (2048, 512)),
        ((1200, 5), 1024**2, (1200, 16)),
    ],
)
def test_a_reference_keeps_its_shape_within_the_limit(size: tuple[int, int], limit: int, expected: tuple) -> None:
    assert reference_size(*size, limit) == expected


def test_a_capped_reference_loses_no_latent_to_rounding() -> None:
    for side in range(1025, 9000, 7):
        assert reference_size(side, side, 1024**2) == (1024, 1024)


def test_a_reference_limit_below_one_latent_is_refused() -> None:
    with pytest.raises(ValueError, match="max_pixels=255"):
        reference_size(100, 100, 255)


def test_a_reference_is_cropped_in_the_middle_and_not_scaled_when_it_fits():
    image = Image.effect_noise((37, 70), 90).convert("RGB")
    cut = fit_reference(image, 10_000)
    assert cut.size == reference_size(37, 70, 10_000) == (32, 64)
    assert cut.tobytes() == image.crop((2, 3, 34, 67)).tobytes()


def test_a_reference_that_is_too_large_is_shrunk_to_its_reference_size():
    assert fit_reference(Image.new("RGB", (640, 320)), 128**2).size == reference_size(640, 320, 128**2) == (176, 80)
