"""The drawings: what is in the pictures, that captions and edits say so, and that held-out drawings stay out."""

import random
import re

import numpy as np
import pytest

from data.synthetic.captions import EDITS, caption, edit, plain_caption, plain_edit
from data.synthetic.drawings import BACKGROUNDS, COLORS, INK, SHAPES, SIZES, Drawing, all_drawings, draw, held_out

CUP = Drawing("cup", "red", "blue", "small")
KNOWN_WORDS = {*SHAPES, *COLORS, *BACKGROUNDS, *SIZES, *"a an the on of background style".split()}
KNOWN_WORDS |= {"drawing", "picture", "image", "card", "ink", "vintage", "tarot", "flat", "woodcut"}

PINNED_HELD_OUT = ["cup red blue", "cup orange purple", "cup green orange", "cup blue blue"]


def pixels(drawing: Drawing, **jitter: float) -> np.ndarray:
    return np.asarray(draw(drawing, 128, **jitter)).astype(int)


def subject_box(drawing: Drawing, **jitter: float) -> tuple[int, int, int, int]:
    different = (pixels(drawing, **jitter) != BACKGROUNDS[drawing.background]).any(2)
    ys, xs = np.nonzero(different)
    return int(xs.min()), int(ys.min()), int(xs.max()), int(ys.max())


def test_there_are_fourteen_shapes_ten_colors_eight_backgrounds_and_two_sizes_in_every_combination():
    assert (len(SHAPES), len(COLORS), len(BACKGROUNDS), len(SIZES)) == (14, 10, 8, 2)
    assert len(set(all_drawings())) == len(all_drawings()) == 14 * 10 * 8 * 2


@pytest.mark.parametrize(
    ("key", "value"), [("shape", "cat"), ("color", "teal"), ("background", "red"), ("size", "big")]
)
def test_an_unknown_name_is_refused_naming_the_key_the_value_and_what_is_accepted(key, value):
    names = {"shape": "cup", "color": "red", "background": "blue", "size": "small", key: value}
    with pytest.raises(ValueError, match=rf"'{value}'.*(cup|red|white|small)"):
        Drawing(**names)


def test_subject_colors_are_far_from_each_other_from_the_ink_and_from_the_background_of_the_same_name():
    colors = [*COLORS.values(), INK]
    distances = [np.linalg.norm(np.subtract(a, b)) for i, a in enumerate(colors) for b in colors[:i]]
    assert min(distances) > 70
    for name in COLORS.keys() & BACKGROUNDS.keys():
        assert np.linalg.norm(np.subtract(COLORS[name], BACKGROUNDS[name])) > 30


def test_backgrounds_can_be_told_apart():
    tints = list(BACKGROUNDS.values())
    assert min(np.linalg.norm(np.subtract(a, b)) for i, a in enumerate(tints) for b in tints[:i]) > 30


@pytest.mark.parametrize("shape", SHAPES)
def test_most_of_a_subject_is_its_color_with_dark_ink_and_the_border_is_pure_background(shape):
    picture = pixels(Drawing(shape, "green", "pink", "large"), dx=0.03, dy=-0.03, scale=1.06, angle=4)
    fill = (np.abs(picture - COLORS["green"]).sum(2) < 12).sum()
    ink = (np.abs(picture - INK).sum(2) < 12).sum()
    assert fill > 1300
    assert 400 < ink < fill * 1.2
    frame = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
    assert (frame == BACKGROUNDS["pink"]).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_subjects_have_about_the_size_asked_for(shape):
    for size, fraction in SIZES.items():
        x0, y0, x1, y1 = subject_box(Drawing(shape, "red", "blue", size))
        assert 0.95 < (max(x1 - x0, y1 - y0) + 1) / (128 * fraction) < 1.2
        assert min(x1 - x0, y1 - y0) > 0.5 * 128 * fraction


def test_shapes_differ_from_each_other_in_many_pixels():
    pictures = [pixels(Drawing(shape, "red", "blue", "large")) for shape in SHAPES]
    for i, a in enumerate(pictures):
        for b in pictures[:i]:
            assert (np.abs(a - b).sum(2) > 60).mean() > 0.10


def test_jitter_moves_scales_and_turns_the_subject():
    x0, y0, x1, y1 = subject_box(CUP)
    assert subject_box(CUP, dx=8 / 128, dy=-4 / 128) == (x0 + 8, y0 - 4, x1 + 8, y1 - 4)
    bx0, _, bx1, _ = subject_box(CUP, scale=1.5)
    assert (bx1 - bx0) / (x1 - x0) == pytest.approx(1.5, abs=0.1)
    sword = Drawing("sword", "red", "blue", "large")
    upright, lying = subject_box(sword), subject_box(sword, angle=90)
    assert upright[3] - upright[1] == pytest.approx(lying[2] - lying[0], abs=2)


def test_a_turn_is_clockwise():
    sword = Drawing("sword", "red", "blue", "large")
    tip = pixels(sword, angle=20)[:30]  # the rows of the sword's tip
    _, xs = np.nonzero((tip != BACKGROUNDS["blue"]).any(2))
    assert xs.mean() > 70


def test_holes_show_the_background():
    wheel = pixels(Drawing("wheel", "red", "green", "large"))
    gap = wheel[64 - 2 : 64 + 3, 64 + 23 : 64 + 28]
    assert (gap == BACKGROUNDS["green"]).all()


def test_drawing_is_deterministic_and_follows_pixels():
    assert (pixels(CUP) == pixels(CUP)).all()
    assert draw(CUP, 256).size == (256, 256)
    with pytest.raises(ValueError, match=r"\b4\b"):
        draw(CUP, 4)


def test_a_tenth_is_held_out_and_everything_appears_in_training():
    training = [drawing for drawing in all_drawings() if not held_out(drawing)]
    assert 0.08 < 1 - len(training) / len(all_drawings()) < 0.13
    assert {(d.shape, d.color) for d in training} == {(s, c) for s in SHAPES for c in COLORS}
    assert {(d.shape, d.background) for d in training} == {(s, b) for s in SHAPES for b in BACKGROUNDS}


def test_held_out_is_the_same_on_every_machine_and_for_both_sizes():
    first = [f"{d.shape} {d.color} {d.background}" for d in all_drawings() if held_out(d) and d.size == "small"][:4]
    assert first == PINNED_HELD_OUT
    for drawing in all_drawings():
        other = Drawing(drawing.shape, drawing.color, drawing.background, "small")
        assert held_out(drawing) == held_out(other)


def test_plain_captions_use_the_right_article():
    assert plain_caption(CUP) == "a small red cup on a blue background"
    assert plain_caption(Drawing("sun", "orange", "orange", "large")) == "a large orange sun on an orange background"


def test_two_fifths_of_the_captions_are_plain_and_a_quarter_holds_nonsense():
    rng = random.Random(0)
    drawings = rng.choices(all_drawings(), k=4000)
    captions = [caption(drawing, rng) for drawing in drawings]
    plain = np.mean([text == plain_caption(drawing) for text, drawing in zip(captions, drawings, strict=True)])
    nonsense = np.mean([not set(re.findall(r"\w+", text)) <= KNOWN_WORDS for text in captions])
    assert plain == pytest.approx(0.42, abs=0.03)
    assert nonsense == pytest.approx(0.25, abs=0.03)


def test_captions_are_short_grammatical_and_never_name_what_is_not_there():
    rng = random.Random(1)
    for drawing in rng.choices(all_drawings(), k=3000):
        text = caption(drawing, rng)
        words = re.findall(r"\w+", text)
        assert len(text.split()) <= 16
        assert drawing.shape in words
        assert not set(words) & (set(SHAPES) - {drawing.shape})
        assert not set(words) & (set(SIZES) - {drawing.size})
        assert not set(words) & ({*COLORS, *BACKGROUNDS} - {drawing.color, drawing.background})
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", text), text


def test_captions_vary_in_parts_order_and_articles():
    rng = random.Random(2)
    captions = {caption(CUP, rng) for _ in range(3000)}
    expected = ("a small cup", "the red cup", "red cup", "a red cup, small, blue background", "a drawing of a red cup")
    for text in (*expected, "on a blue background, a small red cup", "a small red cup, tarot style"):
        assert text in captions


def test_captions_depend_on_the_generator_only():
    assert [caption(CUP, random.Random(7)) for _ in range(3)] == [caption(CUP, random.Random(7))] * 3


@pytest.mark.parametrize(
    ("kind", "new", "instruction", "result"),
    [
        ("color", "orange", "make it orange", Drawing("cup", "orange", "blue", "small")),
        ("background", "yellow", "change the background to yellow", Drawing("cup", "red", "yellow", "small")),
        ("shape", "fish", "turn it into a fish", Drawing("fish", "red", "blue", "small")),
        ("size", "large", "make it large", Drawing("cup", "red", "blue", "large")),
    ],
)
def test_plain_edits_have_one_form_and_change_one_attribute(kind, new, instruction, result):
    assert plain_edit(CUP, kind, new) == (instruction, result)


def test_plain_edits_refuse_an_unknown_kind_and_no_change():
    with pytest.raises(ValueError, match=r"'angle'.*colou?r"):
        plain_edit(CUP, "angle", "red")
    with pytest.raises(ValueError, match="'red'"):
        plain_edit(CUP, "color", "red")
    with pytest.raises(ValueError, match="'teal'"):
        plain_edit(CUP, "color", "teal")


def test_edits_change_exactly_one_attribute_name_its_new_value_and_never_lead_to_a_held_out_drawing():
    rng = random.Random(3)
    seen = set()
    for drawing in rng.choices([d for d in all_drawings() if not held_out(d)], k=3000):
        instruction, result = edit(drawing, rng)
        changed = [key for key in EDITS if getattr(drawing, key) != getattr(result, key)]
        assert len(changed) == 1
        words = re.findall(r"\w+", instruction)
        assert getattr(result, changed[0]) in words
        assert ("background" in words) == (changed == ["background"])
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", instruction), instruction
        assert not held_out(result)
        seen.add(changed[0])
    assert seen == set(EDITS)
