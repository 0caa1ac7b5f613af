"""data.cache.latents: which entries pictures need, cut in every variant, and what becomes of pictures that cannot be
used.
"""

import os
import re
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from cache_helpers import picture, plan, refuse
from PIL import Image, ImageOps
from torch import Tensor

from data.buckets import Buckets, Cut, fit, fit_reference
from data.cache import Cache
from data.cache.image_digests import Digests
from data.cache.latents import plan_latents
from data.sources import Sample
from data.sources.images import Picture, file_picture

NOISE = np.random.default_rng(0)


def noise(size: tuple[int, int], mode: str = "RGB", name: str = "noise") -> Picture:
    channels = len(Image.new(mode, (1, 1)).getbands())
    values = NOISE.integers(0, 256, (size[1], size[0], channels), dtype=np.uint8)
    stream = BytesIO()
    Image.fromarray(values.squeeze()).save(stream, "PNG")
    return Picture(name, lambda: BytesIO(stream.getvalue()))


def broken(name: str = "broken", size: tuple[int, int] = (64, 64)) -> Picture:
    """A picture whose header can be read and whose pixels cannot."""
    content = noise(size).open().read()
    return Picture(name, lambda: BytesIO(content[: len(content) // 2]))


def averages(images: list[Image.Image]) -> Tensor:
    """A stand-in autoencoder: in each latent, the mean red of its pixels."""
    (image,) = images
    red = torch.from_numpy(np.array(image.getchannel("R").reduce(16))).float()
    return red.expand(1, 128, *red.shape)


def stored(cache: Cache, key: str, name: str = "latents") -> Tensor:
    return cache.get(key)[name]


def test_every_variant_is_an_entry_cut_as_it_says(tmp_path: Path) -> None:
    cache, target = Cache(tmp_path), noise((200, 100))
    buckets = Buckets(64, max_aspect=1.0, random_crops=3, flip=True)
    planned = plan(cache, [Sample(target, ("",))], buckets=buckets)
    (entry,) = planned.entries
    assert len(entry.variants) == 6
    assert planned.missing == len({variant.key for variant in entry.variants}) == 6
    assert {variant.bucket for variant in entry.variants} == {((64, 64), ())}
    planned.fill(averages)
    cuts = buckets.cuts((200, 100), (64, 64), target.digest())
    for variant, cut in zip(entry.variants, cuts, strict=True):
        assert torch.equal(stored(cache, variant.key), averages([fit(target.load(), (64, 64), cut)])[0])
    middle = plan(cache, [Sample(target, ("",))], buckets=Buckets(64, max_aspect=1.0))
    assert middle.entries[0].key not in entry.keys


def test_crops_that_are_equal_share_an_entry_and_the_middle_keeps_its_own(tmp_path: Path) -> None:
    cache, square = Cache(tmp_path), [Sample(noise((64, 64)), ("",))]
    plan(cache, square, buckets=Buckets(64)).fill(averages)
    variants = plan(cache, square, buckets=Buckets(64, random_crops=4))
    assert len(variants.entries[0].variants) == 4
    assert variants.missing == 0  # nothing is cut off, so all are the middle
    assert plan(cache, square, buckets=Buckets(64, flip=True)).missing == 1


def test_references_are_mirrored_with_their_picture_and_not_cropped(tmp_path: Path) -> None:
    cache, target, reference = Cache(tmp_path), noise((200, 100)), noise((50, 40))
    samples = [Sample(target, ("",), (reference,)), Sample(noise((200, 100)), ("",))]
    planned = plan(cache, samples, buckets=Buckets(64, max_aspect=1.0, random_crops=3, flip=True))
    edit, plain = planned.entries
    assert (len(edit.variants), len(plain.variants), planned.middles) == (2, 6, 1)
    planned.fill(averages)
    for variant, mirrored in zip(edit.variants, (False, True), strict=True):
        image = fit(target.load(), (64, 64), Cut(mirrored=mirrored))
        assert torch.equal(stored(cache, variant.key), averages([image])[0])
        image = fit_reference(reference.load(), 32 * 32, mirrored)
        assert torch.equal(stored(cache, variant.reference_keys[0]), averages([image])[0])


def test_random_crops_of_which_no_sample_can_have_any_are_refused(tmp_path: Path) -> None:
    samples = [Sample(noise((64, 64)), ("",), (noise((32, 32)),))]
    with pytest.raises(ValueError, match=r"buckets\.random_crops=2\b.*references"):
        plan(Cache(tmp_path), samples, buckets=Buckets(64, random_crops=2))


def test_crops_of_other_colors_share_a_mask_and_turned_ones_do_not(tmp_path: Path) -> None:
    samples = [Sample(noise((64, 64)), ("",), mask=noise((64, 64), "L"))]
    for settings, masks in (({"color": 0.2}, 1), ({"rotation": 5}, 3)):
        planned = plan(Cache(tmp_path), samples, buckets=Buckets(64, random_crops=3, **settings))
        variants = planned.entries[0].variants
        assert len({variant.key for variant in variants}) == 3
        assert len({variant.mask_key for variant in variants}) == masks


def test_a_mask_is_stored_at_latent_size_cut_with_its_picture_and_needs_no_encoder(tmp_path: Path) -> None:
    cache, mask = Cache(tmp_path), noise((200, 100), "L")
    samples = [Sample(noise((200, 100)), ("",), mask=mask), Sample(noise((64, 64)), ("",))]
    buckets = Buckets(64, max_aspect=1.0, random_crops=2, flip=True)
    planned = plan(cache, samples, buckets=buckets)
    planned.fill(averages)
    masked, plain = planned.entries
    assert plain.mask_key is None
    cuts = buckets.cuts((200, 100), (64, 64), samples[0].target.digest())
    for variant, cut in zip(masked.variants, cuts, strict=True):
        assert variant.mask_key is not None
        found = stored(cache, variant.mask_key, "mask")
        expected = np.array(fit(mask.load_mask(), (64, 64), cut).reduce(16))
        assert (found.dtype, found.shape) == (torch.uint8, (1, 4, 4))
        assert np.array_equal(found[0].numpy(), expected)
    another = [Sample(samples[0].target, ("",), mask=noise((200, 100), "L")), samples[1]]
    changed = plan(cache, another, buckets=buckets)
    assert changed.missing == 4
    changed.fill(refuse)


def test_a_mask_that_cannot_be_used_makes_its_sample_bad(tmp_path: Path) -> None:
    black = BytesIO()
    Image.new("L", (64, 64)).save(black, "PNG")
    samples = [
        Sample(picture("red", (64, 64)), ("",), mask=noise((64, 48), "L", "m")),
        Sample(picture("red", (64, 64)), ("",), mask=Picture("b", lambda: BytesIO(black.getvalue()))),
    ]
    planned = plan(Cache(tmp_path), samples)
    ((index, reason),) = planned.bad.items()
    assert index == 0
    assert re.search(r"\bm\b.*mask.*64 x 48.*64 x 64", reason)
    (error,) = planned.fill(averages).values()
    assert error.name == "b"
    assert re.search("mask.*black", str(error))


def test_pictures_that_are_too_small_or_unreadable_are_listed_and_not_planned(tmp_path: Path) -> None:
    garbage = Picture("garbage", lambda: BytesIO(b"no picture"))
    samples = [
        Sample(noise((64, 64)), ("",)),
        Sample(noise((15, 64)), ("",)),
        Sample(garbage, ("",)),
        Sample(noise((64, 64)), ("",), (noise((32, 32)), garbage)),
    ]
    planned = plan(Cache(tmp_path), samples, buckets=Buckets(64))
    assert len(planned.entries) == planned.missing == 1
    assert list(planned.bad) == [1, 2, 3]
    assert re.search(r"15 x 64 pixels.*buckets\.step.*\b16\b", planned.bad[1])
    assert "formats PNG" in planned.bad[2]
    assert "garbage" not in planned.bad[2]
    assert re.search("garbage.*formats PNG", planned.bad[3])


def test_pictures_that_cannot_be_decoded_are_all_found_and_their_samples_left_out(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    bad, good = broken("bad reference", (32, 32)), noise((64, 64))
    samples = [
        Sample(broken("first"), ("",)),
        Sample(noise((64, 64)), ("",), (good,)),
        Sample(noise((64, 64)), ("",), (good, bad)),
        Sample(noise((64, 64)), ("",)),
    ]
    planned = plan(cache, samples)
    found = planned.fill(averages)
    assert [error.name for error in found.values()] == ["first", "bad reference"]
    rest = planned.without(found)
    assert rest.entries == (planned.entries[1], planned.entries[3])
    assert rest.missing == 0
    assert list(rest.bad) == [0, 2]
    assert "bad reference" not in rest.bad[0]
    assert "bad reference" in rest.bad[2]
    assert planned.missing == 2, "the next start tries them again"


def test_a_picture_that_is_transparent_everywhere_makes_its_sample_bad(tmp_path: Path) -> None:
    content = BytesIO()
    Image.new("RGBA", (64, 64), (255, 0, 0, 0)).save(content, "PNG")
    clear, good = Picture("clear", lambda: BytesIO(content.getvalue())), noise((64, 64))
    samples = [Sample(clear, ("",)), Sample(good, ("",), (clear,)), Sample(good, ("",), mask=clear)]
    samples.append(Sample(good, ("",)))
    planned = plan(Cache(tmp_path), samples)
    rest = planned.without(planned.fill(averages))
    assert len(rest.entries) == 1
    assert rest.bad[0].startswith("is transparent everywhere")
    assert all(rest.bad[at].startswith("has clear, which is transparent everywhere") for at in (1, 2))


def test_a_changed_picture_recomputes_itself_alone(tmp_path: Path) -> None:
    def draw(name: str, age: float) -> Picture:
        (tmp_path / "pictures").mkdir(exist_ok=True)
        file = tmp_path / "pictures" / name
        file.write_bytes(noise((64, 64)).open().read())
        os.utime(file, (age, age))
        return file_picture(file)

    def planned():  # as at the next start
        index = Digests(tmp_path / "index.sqlite")
        samples = [Sample(file_picture(tmp_path / "pictures" / f"{i}.png"), ("",)) for i in range(4)]
        found = plan_latents(cache, samples, Buckets(64), "vae", 64**2, index)
        index.save()
        return found

    cache = Cache(tmp_path / "cache")
    for number in range(4):
        draw(f"{number}.png", 1000.0)
    planned().fill(averages)
    assert planned().missing == 0
    draw("2.png", 2000.0)
    again, seen = planned(), []

    def watched(images: list[Image.Image]) -> Tensor:
        seen.append(images[0])
        return averages(images)

    again.fill(watched)
    assert [image.tobytes() for image in seen] == [file_picture(tmp_path / "pictures" / "2.png").load().tobytes()]
    draw("2.png", 3000.0)
    os.utime(tmp_path / "pictures" / "1.png")  # touched, and not changed
    assert planned().lacking == [planned().entries[2].key]


def test_what_is_decoded_is_what_was_planned(tmp_path: Path) -> None:
    """Or a picture that is changed meanwhile, and back again later, would leave its latents under the other's name."""
    file, other = tmp_path / "a.png", noise((64, 64), name="other")
    file.write_bytes(noise((64, 64)).open().read())
    cache = Cache(tmp_path / "cache")
    planned = plan_latents(cache, [Sample(file_picture(file), ("",))], Buckets(64), "vae", 64**2)
    file.write_bytes(other.open().read())
    (error,) = planned.fill(averages).values()
    assert re.search(rf"{file}\b.*change", str(error))
    assert planned.missing == 1


def test_a_mask_that_is_black_in_what_is_trained_makes_its_sample_bad(tmp_path: Path) -> None:
    content = BytesIO()
    mask = Image.new("L", (192, 64))
    mask.paste(255, (0, 0, 20, 64))  # cut off, as the middle is trained
    mask.save(content, "PNG")
    sample = Sample(picture("red", (192, 64)), ("",), mask=Picture("m", lambda: BytesIO(content.getvalue())))
    planned = plan(Cache(tmp_path), [sample], buckets=Buckets(64, max_aspect=1.0))
    (error,) = planned.fill(averages).values()
    assert re.search(r"\bm\b.*black", str(error))


def test_the_table_counts_pictures_and_what_is_cut_off(tmp_path: Path) -> None:
    sizes = [(64, 64), (128, 64), (90, 70), (200, 100), (40, 50)]
    planned = plan(Cache(tmp_path), [Sample(noise(size), ("",)) for size in sizes], buckets=Buckets(64, max_aspect=1.0))
    rows = {size: (row.pictures, row.own, round(row.lost, 4), row.most) for size, row in planned.table.items()}
    square = round(0.5 + 2 / 9 + 0.5, 4)
    assert rows == {(64, 64): (4, False, square, 0.5), (32, 32): (1, True, 0.2, pytest.approx(0.2))}


def test_mirroring_is_the_mirror_image() -> None:
    image = noise((64, 64)).load()
    assert ImageOps.mirror(image).tobytes() == fit(image, (64, 64), Cut(mirrored=True)).tobytes()


def test_images_that_are_enlarged_are_counted_without_their_masks(tmp_path: Path, caplog) -> None:
    samples = [Sample(noise((64, 64), name=f"{i}.png"), ("",), mask=noise((64, 64), "L", f"m{i}.png")) for i in (0, 1)]
    plan(Cache(tmp_path), samples, buckets=Buckets(128, upscale=True))
    (record,) = caplog.records
    assert record.getMessage().startswith("2 of 2 images")
    assert "0.png, 64 x 64" in record.getMessage()
