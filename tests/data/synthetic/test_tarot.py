"""The demonstration cards: the files are what the script draws, and they leave out what the demo tests."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.demo.draw import main
from data.synthetic.drawings import BACKGROUNDS, COLORS, INK, SHAPES
from data.synthetic.tarot import BAR, CARDS, GOLD, PARCHMENT, all_cards, card_caption, draw_card, roman

FOLDER = Path(__file__).resolve().parents[3] / "data" / "demo"
ROWS = [json.loads(line) for line in (FOLDER / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]


def test_the_script_redraws_the_files_in_the_repository(tmp_path):
    main(tmp_path)
    drawn = sorted(path.name for path in tmp_path.iterdir())
    assert drawn == sorted(path.name for path in FOLDER.iterdir() if path.suffix in (".png", ".jsonl"))
    assert (tmp_path / "metadata.jsonl").read_bytes() == (FOLDER / "metadata.jsonl").read_bytes()
    for row in ROWS:
        # Pixels and not bytes: another zlib may compress differently.
        stored, redrawn = (np.asarray(Image.open(folder / row["file_name"])) for folder in (FOLDER, tmp_path))
        assert stored.shape == (256, 256, 3)
        assert (stored == redrawn).all(), row["file_name"]


def test_there_are_twenty_four_different_cards_of_eight_subjects_and_six_colors():
    cards = all_cards()
    assert len({(shape, color) for shape, color, _ in cards}) == len(cards) == len(ROWS) == 24
    assert sorted(number for *_, number in cards) == list(range(1, 25))
    colors = [color for _, color, _ in cards]
    assert {color: colors.count(color) for color in set(colors)} == dict.fromkeys(
        ("red", "blue", "yellow", "purple", "white", "orange"), 4
    )


def test_six_subjects_and_four_colors_are_on_no_card():
    assert set(SHAPES) - set(CARDS) == {"fish", "tree", "heart", "wheel", "lantern", "bell"}
    assert set(COLORS) - {c for colors in CARDS.values() for c in colors} == {"green", "pink", "brown", "black"}


def test_captions_name_the_trigger_the_color_and_the_subject():
    texts = [row["text"] for row in ROWS]
    assert texts == [card_caption(shape, color) for shape, color, _ in all_cards()]
    assert texts[0] == "a trtcrd of a red cup, tarot style"
    assert "a trtcrd of an orange sun, tarot style" in texts


def test_files_are_small():
    assert sum((FOLDER / row["file_name"]).stat().st_size for row in ROWS) < 200_000


@pytest.mark.parametrize("pixels", [128, 256])
def test_a_card_has_gold_ink_panel_and_bar_where_they_belong(pixels):
    card = np.asarray(draw_card("cup", "red", 8, pixels))
    unit = pixels // 128
    column = [tuple(int(v) for v in card[y * unit, 20 * unit]) for y in (0, 8, 9, 11, 12, 25, 26, 28, 29)]
    assert column == [GOLD, GOLD, INK, INK, BAR, BAR, INK, INK, PARCHMENT]
    assert tuple(card[96 * unit, 20 * unit]) == PARCHMENT
    assert tuple(card[98 * unit, 20 * unit]) == INK
    assert tuple(card[102 * unit, 20 * unit]) == BAR
    assert (np.abs(card.astype(int) - COLORS["red"]).sum(2) == 0).sum() > 700 * unit**2


def test_parchment_is_no_background_of_the_drawings():
    assert min(np.linalg.norm(np.subtract(PARCHMENT, tint)) for tint in BACKGROUNDS.values()) > 45


def test_every_number_looks_different():
    bars = [np.asarray(draw_card("cup", "red", n, 128))[100:116, 12:116].tobytes() for n in range(1, 25)]
    assert len(set(bars)) == 24


def test_roman_numerals():
    numbers = (1, 4, 9, 14, 18, 24, 39)
    assert [roman(n) for n in numbers] == ["I", "IV", "IX", "XIV", "XVIII", "XXIV", "XXXIX"]
    with pytest.raises(ValueError, match="number=40 must be from 1 to 39"):
        roman(40)


def test_an_unknown_subject_or_color_is_refused():
    with pytest.raises(ValueError, match="color='teal' must be one of red"):
        draw_card("cup", "teal", 1)
    with pytest.raises(ValueError, match="shape='cat' must be one of cup"):
        draw_card("cat", "red", 1)
