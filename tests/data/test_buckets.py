"""data.buckets: which sizes there are, which one a picture gets, and that fitting neither distorts nor pads."""

import re

import pytest
from PIL import Image, ImageChops, ImageOps, ImageStat

from data.buckets import MIDDLE, Buckets, Cut, fit, fit_mask, fit_reference, lost, reference_size, turned

FIRST_CROPS = [500, 874, 243]


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
        ({"resolution": 500}, r"resolution=500\b.*\b16\b"),
        ({"resolution": 528, "step": 64}, r"resolution=528\b.*\b64\b"),
        ({"resolution": 512, "step": 8}, r"step=8\b.*\b16\b"),
        ({"resolution": 0}, "resolution=0"),
        ({"resolution": "512"}, "resolution='512'"),
        ({"resolution": 512, "max_aspect": 0.5}, "max_aspect=0.5"),
        ({"resolution": 512, "max_aspect": "2"}, "max_aspect='2'"),
        ({"resolution": []}, r"resolution=\[\]"),
        ({"resolution": [512, 512]}, r"resolution=\[512, 512\]"),
        ({"resolution": [512, 500]}, r"resolution=500\b.*\b16\b"),
        ({"resolution": 512, "upscale": "no"}, "upscale='no'"),
        ({"resolution": 512, "flip": 1}, "flip=1"),
        ({"resolution": 512, "random_crops": -1}, "random_crops=-1"),
        ({"resolution": 512, "random_crops": 1_000_000_000}, "random_crops=1000000000.*1000"),
        ({"resolution": 512, "random_crops": True}, "random_crops=True"),
        ({"resolution": 512, "color": 0.1}, r"color=0\.1 has no effect without random_crops"),
        ({"resolution": 512, "rotation": 3}, "rotation=3 has no effect without random_crops"),
        ({"resolution": 512, "color": 0.6, "random_crops": 1}, r"color=0\.6 must be a number from 0 to 0\.5"),
        ({"resolution": 512, "rotation": -1, "random_crops": 1}, "rotation=-1 must be a number from 0 to 20"),
        ({"resolution": 512, "rotation": True, "random_crops": 1}, "rotation=True"),
        ({"resolution": 512, "each_resolution": True}, "each_resolution=true has no effect with one resolution, 512"),
        ({"resolution": [512, 256], "each_resolution": 1}, "each_resolution=1"),
        ({"resolution": [512, 256], "min_resolution": 257}, r"min_resolution=257\b.*\b256\b"),
        ({"resolution": 512, "min_resolution": 64, "upscale": True}, "min_resolution=64.*upscale"),
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


def test_a_picture_has_a_bucket_at_each_resolution_that_it_fills() -> None:
    buckets = Buckets([64, 256, 128])
    assert buckets.filled(1000, 1000) == (256, 128, 64)
    assert buckets.filled(250, 140) == (128, 64)
    assert buckets.filled(40, 40) == ()
    assert [buckets.assign(1000, 1000, side) for side in (None, 256, 128)] == [(256, 256), (256, 256), (128, 128)]
    assert buckets.assign(250, 140, 64) == buckets.nearest(250, 140, 64)


def test_a_picture_goes_to_the_largest_resolution_that_it_fills() -> None:
    buckets = Buckets([64, 256, 128])
    assert buckets.resolutions == (256, 128, 64)
    assert buckets.assign(300, 300) == (256, 256)
    assert buckets.assign(256, 256) == (256, 256)
    assert buckets.assign(255, 256) == (128, 128)
    assert buckets.assign(200, 120) == (160, 96)
    assert buckets.assign(100, 60) == (80, 48)
    assert set(buckets.sizes) == {size for side in (64, 128, 256) for size in Buckets(side).sizes}


@pytest.mark.parametrize("step", [16, 64])
def test_no_picture_is_enlarged_and_none_has_more_pixels_than_asked_for(step: int) -> None:
    buckets = Buckets(512, step)
    for width in range(128, 1400, 53):
        for height in range(128, 1400, 37):
            size = buckets.assign(width, height)
            if size is None:
                assert (width // step * step) * (height // step * step) < 2 * 128**2
                continue
            assert size[0] <= width
            assert size[1] <= height
            assert size[0] % step == size[1] % step == 0
            assert max(size) <= 2 * min(size)
            assert 128**2 <= size[0] * size[1] <= 512**2


def test_a_picture_that_fills_no_bucket_keeps_its_own_size_to_the_grid() -> None:
    assert Buckets(1024).assign(700, 500) == (688, 496)
    assert Buckets(1024).assign(2000, 300) == (576, 288)  # max_aspect
    assert Buckets(1024, step=64).assign(700, 500) == (640, 448)


def test_too_small_a_picture_has_no_bucket_and_is_told_why() -> None:
    buckets = Buckets(1024)
    assert buckets.assign(256, 256) == (256, 256)
    assert buckets.assign(255, 256) is None
    assert buckets.assign(3, 3) is None
    assert re.search(r"255 x 256 pixels.*buckets\.min_resolution.* 256", buckets.too_small(255, 256))
    assert Buckets(1024, min_resolution=100).assign(255, 256) == (240, 256)
    assert Buckets(1024, upscale=True).assign(3, 3) == (1024, 1024)
    assert Buckets([1024, 512], upscale=True).assign(700, 700) == (512, 512)
    assert Buckets([1024, 512], upscale=True).assign(30, 30) == (512, 512)


def test_crops_are_drawn_by_content_and_move_along_what_is_cut_off() -> None:
    buckets = Buckets(64, random_crops=20)
    cuts = buckets.cuts((200, 100), (64, 64), "ab")
    assert cuts == buckets.cuts((200, 100), (64, 64), "ab") != buckets.cuts((200, 100), (64, 64), "cd")
    assert {cut.at[1] for cut in cuts} == {500}
    assert len({cut.at[0] for cut in cuts}) > 15
    assert all(0 <= cut.at[0] <= 1000 for cut in cuts)
    assert {cut.at[0] for cut in buckets.cuts((100, 200), (64, 64), "ab")} == {500}
    assert set(buckets.cuts((100, 100), (64, 64), "ab")) == {MIDDLE}  # nothing is cut off
    # Fixed: a cache filled yesterday must be found.
    assert [cut.at[0] for cut in cuts[:3]] == FIRST_CROPS


def test_every_crop_is_there_mirrored_too() -> None:
    assert Buckets(64, flip=True).cuts((80, 80), (64, 64), "ab") == (MIDDLE, Cut(mirrored=True))
    cuts = Buckets(64, random_crops=3, flip=True).cuts((200, 100), (64, 64), "ab")
    assert [cut.at for cut in cuts[:3]] == [cut.at for cut in cuts[3:]]
    assert [cut.mirrored for cut in cuts] == [False] * 3 + [True] * 3


def test_colors_and_angles_of_crops_are_drawn_by_content_within_their_limits() -> None:
    buckets = Buckets(64, random_crops=200, color=0.1, rotation=3)
    cuts = buckets.cuts((100, 100), (64, 64), "ab")
    assert cuts == buckets.cuts((100, 100), (64, 64), "ab") != buckets.cuts((100, 100), (64, 64), "cd")
    for part in range(3):
        factors = sorted(cut.light[part] for cut in cuts)
        assert 900 <= factors[0] < 910
        assert 1090 < factors[-1] <= 1100
        assert 980 < sum(factors) / 200 < 1020
    assert len({cut.light[0] - cut.light[1] for cut in cuts}) > 50  # each is drawn for itself
    angles = sorted(cut.turned for cut in cuts)
    assert -300 <= angles[0] < -280
    assert 280 < angles[-1] <= 300
    crops = Buckets(64, random_crops=200).cuts((200, 100), (64, 64), "ab")
    both = buckets.cuts((200, 100), (64, 64), "ab")
    assert [cut.at for cut in both] == [cut.at for cut in crops]
    assert both[0].recipe.keys() == {"at", "light", "turned"} - ({"at"} if both[0].at == (500, 500) else set())


def test_colors_of_a_crop_are_changed_by_their_factors() -> None:
    picture = Image.effect_noise((64, 64), 60).convert("RGB")
    red = ImageChops.multiply(picture, Image.new("RGB", picture.size, (255, 128, 64)))
    gray = ImageStat.Stat(red.convert("L")).mean[0]

    def mean(cut: Cut) -> list[float]:
        return ImageStat.Stat(fit(red, (64, 64), cut)).mean

    plain = mean(MIDDLE)
    assert mean(Cut(light=(900, 1000, 1000))) == pytest.approx([0.9 * value for value in plain], abs=0.6)
    assert mean(Cut(light=(1000, 800, 1000))) == pytest.approx([gray + 0.8 * (one - gray) for one in plain], abs=0.8)
    assert mean(Cut(light=(1000, 1000, 1200)))[0] > plain[0] + 3
    assert mean(Cut(light=(1000, 1000, 500)))[2] > plain[2] + 10


@pytest.mark.parametrize("size", [(480, 480), (800, 400), (300, 650)])
@pytest.mark.parametrize("degrees", [-20.0, -0.5, 3.0])
def test_a_turned_picture_has_no_corner_from_outside_and_its_aspect(size: tuple[int, int], degrees: float) -> None:
    white = fit(Image.new("RGB", size, "white"), (48, 48), Cut(turned=round(100 * degrees)))
    assert white.getextrema() == ((255, 255),) * 3
    inner = turned(Image.new("RGB", size, "white"), degrees)
    assert inner.width / inner.height == pytest.approx(size[0] / size[1], rel=0.03)
    shares = {-20.0: 0.5, -0.5: 0.97, 3.0: 0.8}
    assert inner.width / size[0] > shares[degrees]


def test_a_picture_is_turned_counterclockwise_and_so_is_its_mask() -> None:
    left = Image.new("L", (128, 128), 0)
    left.paste(255, (64, 0, 128, 128))  # the right half is white: turned, its edge leans to the left at the top
    found = fit(left.convert("RGB"), (128, 128), Cut(turned=1000))
    edges = [next(x for x in range(128) if found.getpixel((x, y))[0] > 128) for y in (8, 120)]
    assert edges[0] < 64 < edges[1]
    mask = fit_mask(left, (128, 128), Cut(turned=1000, light=(500, 500, 500)))
    assert mask.tobytes() == fit_mask(left, (128, 128), Cut(turned=1000)).tobytes()
    assert mask.getpixel((7, 7)) == 255


def test_a_cut_is_a_part_of_the_picture_and_adds_to_a_key_only_if_it_is_not_the_middle() -> None:
    picture = Image.effect_noise((96, 32), 80).convert("RGB")
    small = picture.resize((48, 16), Image.Resampling.LANCZOS)
    for at, left in ((0, 0), (1000, 32), (250, 8)):
        difference = ImageChops.difference(fit(picture, (16, 16), Cut((at, 500))), small.crop((left, 0, left + 16, 16)))
        assert max(high for _, high in difference.getextrema()) <= 1  # type: ignore[misc]
    mirrored = fit(picture, (16, 16), Cut((0, 500), mirrored=True))
    assert ImageOps.mirror(mirrored).tobytes() == fit(picture, (16, 16), Cut((0, 500))).tobytes()
    assert MIDDLE.recipe == {}
    assert Cut((0, 500), mirrored=True).recipe == {"at": (0, 500), "mirrored": True}


def test_a_mask_is_cut_as_its_picture_and_averaged_over_latents() -> None:
    mask = Image.new("L", (64, 32), 0)
    mask.paste(255, (0, 0, 24, 32))
    assert list(fit_mask(mask, (64, 32)).get_flattened_data()) == [255, 128, 0, 0] * 2
    assert list(fit_mask(mask, (64, 32), Cut(mirrored=True)).get_flattened_data()) == [0, 0, 128, 255] * 2
    assert list(fit_mask(mask, (32, 32), Cut((1000, 500))).get_flattened_data()) == [0, 0] * 2


def test_what_is_cut_off_is_a_share_of_the_area() -> None:
    assert lost((100, 100), (64, 64)) == 0
    assert lost((200, 100), (64, 64)) == lost((100, 200), (64, 64)) == 0.5
    assert lost((400, 300), (64, 64)) == 0.25


def test_a_mirrored_reference_is_the_mirror_of_it() -> None:
    picture = Image.effect_noise((37, 70), 90).convert("RGB")
    assert ImageOps.mirror(fit_reference(picture, 10_000, mirrored=True)).tobytes() == (
        fit_reference(picture, 10_000).tobytes()
    )
