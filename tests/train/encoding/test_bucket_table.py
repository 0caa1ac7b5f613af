"""The table of buckets: what is printed before anything is encoded."""

import pytest
from cache_helpers import picture, plan

from data.buckets import Buckets
from data.cache import MemoryCache
from data.sources import Bad, Sample
from train.encoding.bucket_table import MOST_ROWS, show_buckets


def said(capsys: pytest.CaptureFixture[str], sizes, buckets: Buckets, bad=()) -> list[list[str]]:
    samples = [Sample(picture("red", size), ("",)) for size in sizes]
    show_buckets(plan(MemoryCache(), samples, buckets=buckets), buckets, bad)
    return [line.split() for line in capsys.readouterr().out.splitlines()]


def test_a_line_says_how_many_pictures_and_how_much_of_them_is_cut_off(capsys) -> None:
    sizes = [(64, 64), (128, 64), (160, 64), (40, 40)]
    words = said(capsys, sizes, Buckets(64, max_aspect=1.0), [Bad("a.png", "is empty")])
    assert "64 x 64 3 36.7 % 60.0 %".split() in words
    assert any("32 x 32 1 0.0 % 0.0 %" in (line := " ".join(row)) and "buckets.resolution" in line for row in words)
    assert "all 4 27.5 % 60.0 %".split() in words
    assert any("a.png is empty" in " ".join(row) for row in words)


def test_references_are_counted_and_shown_with_their_sizes(capsys) -> None:
    wide, tall = picture("red", (64, 32)), picture("blue", (32, 48))
    samples = [
        Sample(picture("lime", (64, 64), str(number)), ("",), references)
        for number, references in enumerate([(wide,), (wide,), (wide, tall), ()])
    ]
    show_buckets(plan(MemoryCache(), samples, buckets=Buckets(64)), Buckets(64), [])
    out = " ".join(capsys.readouterr().out.split())
    assert "samples with references: 3 of 4" in out
    assert "32 x 16 (2)" in out  # within 32 x 32 pixels
    assert "32 x 16 + 16 x 32 (1)" in out
    assert "none (1)" in out


def test_many_buckets_are_cut_short_with_the_rest_in_one_line(capsys) -> None:
    sizes = [(16 * side, 480) for side in range(15, 15 + MOST_ROWS + 5)]
    words = said(capsys, sizes, Buckets(1024, min_resolution=16))
    assert f"{6} more 6 0.0 % 0.0 %".split() in words
    assert f"all {MOST_ROWS + 5} 0.0 % 0.0 %".split() in words


def test_variants_are_told(capsys) -> None:
    assert "cached for each image: 3 crops, also mirrored".split() in said(
        capsys, [(64, 64)], Buckets(64, random_crops=3, flip=True)
    )
    assert "cached for each image: the center crop, also mirrored".split() in said(
        capsys, [(64, 64)], Buckets(64, flip=True)
    )
    assert "1 crop, with colors changed by up to 10%, turned by up to 2.5 degrees".split() in [
        words[-len("1 crop, with colors changed by up to 10%, turned by up to 2.5 degrees".split()) :]
        for words in said(capsys, [(64, 64)], Buckets(64, random_crops=1, color=0.1, rotation=2.5))
    ]
