"""The sheet of the first batch: the pixels and captions that are trained, in their order, and nothing of it changes."""

import random
import shutil

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont
from train_helpers import adapter, compose, draw_picture, lines, pixels, same_tensors

from data.buckets import fit, fit_reference
from data.cache.latents import Work
from data.sources.images import BadPicture
from train.checkpoints.checkpoint import CONFIG_FILE
from train.config.run_config import RunConfig
from train.encoding.prepare import CacheRequest
from train.reports import batch_sheet
from train.reports.batch_sheet import DIM, FIRST_BATCH, GRAY, WIDTH, broken, missing_letters, with_mask
from train.stages import first_batch
from train.stages.first_batch import MOST, SECONDS, plan_first_batch

pytest_plugins = ("train_helpers",)

CROPS = ["buckets.random_crops=2", "buckets.flip=true", "dataset.captions.trigger=ohwx", "caption_dropout=0.5"]
BATCH = ["batch_size=2", "gradient_accumulation=2", "steps=2", "dataset.captions.split_lines=true"]


@pytest.fixture
def sheets(monkeypatch):
    """The cards and the page of every sheet that is drawn."""
    found = []
    draw = batch_sheet.batch_sheet

    def keep(cards, *rest):
        found.append((cards, draw(cards, *rest)))
        return found[-1][1]

    monkeypatch.setattr(first_batch, "batch_sheet", keep)
    return found


@pytest.fixture
def masked(pictures, tmp_path):
    """The small pictures with two captions each, and masks: the left half does not count."""
    folder = tmp_path / "masked"
    shutil.copytree(pictures, folder)
    (folder / "masks").mkdir()
    for file in folder.glob("*.png"):
        size = Image.open(file).size
        mask = Image.new("L", size, 0)
        mask.paste(255, (size[0] // 2, 0, *size))
        mask.save(folder / "masks" / file.name)
        file.with_suffix(".txt").write_text(f"{file.with_suffix('.txt').read_text()}\nthe small cup")
    return folder


@pytest.fixture
def pairs(tmp_path):
    """Two edits of one picture each, which is smaller than its target."""
    for folder in ("source", "target"):
        (tmp_path / "pairs" / folder).mkdir(parents=True)
    for i in range(2):
        draw_picture(i, (48, 32)).save(tmp_path / "pairs" / "source" / f"{i}.png")
        draw_picture(9 - i, (48, 48)).save(tmp_path / "pairs" / "target" / f"{i}.png")
        (tmp_path / "pairs" / "target" / f"{i}.txt").write_text("a red cup")
    return tmp_path / "pairs"


def cells(sheet, number):
    """The images of a card, as large as they are trained."""
    found = [np.asarray(sheet.crop(box)) for box in sheet.info["boxes"][number]]
    return [cell[:: max(cell.shape) // 48, :: max(cell.shape) // 48] for cell in found]


def config_of(*overrides):
    return RunConfig(compose(*overrides))


def test_the_sheet_shows_the_pixels_masks_and_captions_that_are_trained_in_their_order(
    train, masked, batches, sheets, monkeypatch, small
):
    encoded, load = [], CacheRequest.load_autoencoder

    def loading(request, device):
        encode = load(request, device)

        def keep(images):
            encoded.append((images[0].copy(), encode(images)))
            return encoded[-1][1]

        return keep

    monkeypatch.setattr(CacheRequest, "load_autoencoder", loading)
    settings = [*CROPS, *BATCH, f"dataset.path={masked}", "dataset.mask=masks", "cache_dir=null"]
    run = train("run", *settings)
    (cards, sheet), *others = sheets
    assert not others
    first = batches[:2]
    assert len(cards) == 8
    captions = [caption for batch in first for caption in batch.captions]
    assert [card.captions for card in cards[:4]] == [[text or "(no caption: dropped)"] for text in captions]
    assert "" in captions
    assert any(text.startswith("ohwx, ") for text in captions)
    assert [card.facts[0] for card in cards] == ["step 1"] * 4 + ["step 2"] * 4
    trained = [(batch.latents[i], batch.mask[i, 0]) for batch in first for i in range(2)]
    for number, (latents, mask) in enumerate(trained):
        image = next(image for image, found in encoded if torch.equal(found[0].cpu(), latents.cpu()))
        assert (cells(sheet, number)[0] == pixels(with_mask(image, mask.numpy()))).all()
    assert any("mirrored" in fact for card in cards for fact in card.facts)
    with Image.open(run / FIRST_BATCH) as written:
        assert written.width <= WIDTH
        assert (np.asarray(written) == np.asarray(sheet)).all()

    # the same sheet before a run, without encoding anything
    monkeypatch.setattr(CacheRequest, "load_autoencoder", None)
    monkeypatch.setattr(CacheRequest, "load_text_encoder", None)
    planned = plan_first_batch(config_of(*small(*settings))).sheet()
    assert (np.asarray(planned) == np.asarray(sheet)).all()


def test_a_mask_covers_what_does_not_count(monkeypatch):
    image = Image.new("RGB", (32, 16), (200, 100, 0))
    seen = np.asarray(with_mask(image, np.array([[0.0, 1.0]])))
    assert (seen[:, 16:] == (200, 100, 0)).all()
    assert (seen[:, :16] == np.rint(DIM * np.array((200, 100, 0)) + (1 - DIM) * np.array(GRAY))).all()


def test_what_the_loss_makes_of_a_mask_is_shown(small, masked, sheets):
    mask = [f"dataset.path={masked}", "dataset.mask=masks"]
    plan_first_batch(config_of(*small(*mask, "loss.unmasked_weight=0.5"))).sheet()
    plan_first_batch(config_of(*small(*mask, "loss.unmasked_probability=0.999999"))).sheet()
    (weighted, sheet), (unmasked, plain) = sheets
    assert "mask: 67% of the image counts (weights 0.5 to 1)" in weighted[0].facts
    assert "mask: not used in this step, as drawn (loss.unmasked_probability)" in unmasked[0].facts
    assert (cells(sheet, 0)[0] != cells(plain, 0)[0]).any()


def test_references_are_next_to_what_they_become(small, pairs, sheets):
    settings = ["dataset=pairs", f"dataset.path={pairs}", "reference_resolution=32"]
    plan_first_batch(config_of(*small(*settings))).sheet()
    cards, sheet = sheets[0]
    for number, card in enumerate(cards):
        assert [tile.label for tile in card.tiles] == ["trained, 48 x 48", "reference 1, 32 x 16"]
        target, reference = (Image.open(pairs / folder / card.name) for folder in ("target", "source"))
        assert (cells(sheet, number)[0] == pixels(fit(target, (48, 48)))).all()
        shown = np.asarray(sheet.crop(sheet.info["boxes"][number][1]))
        assert (shown[::12, ::12] == pixels(fit_reference(reference, 32**2))).all()
    plan_first_batch(config_of(*small(*settings, "reference_dropout=1"))).sheet()
    assert [len(card.tiles) for card in sheets[1][0]] == [1] * len(cards)
    assert "references: left out in this step, as drawn (reference_dropout)" in sheets[1][0][0].facts


@pytest.mark.parametrize(
    ("settings", "labels"),
    [(["loss=dpo"], ["preferred", "rejected"]), (["target=slider_images"], ["scale 1", "scale -1"])],
)
def test_both_images_of_a_pair_are_shown(small, pairs, sheets, settings, labels):
    for old, new in (("source", "rejected"), ("target", "chosen")):
        (pairs / old).rename(pairs / new)
    for file in (pairs / "rejected").glob("*.png"):
        Image.open(file).resize((48, 48)).save(file)
    plan_first_batch(config_of(*small("dataset=preference", f"dataset.path={pairs}", *settings))).sheet()
    cards, sheet = sheets[0]
    assert [tile.label for tile in cards[0].tiles] == [f"{label}, 48 x 48" for label in labels]
    files = [pairs / folder / cards[0].name for folder in ("chosen", "rejected")]
    assert all((cell == pixels(Image.open(file))).all() for cell, file in zip(cells(sheet, 0), files, strict=True))


def test_a_slider_names_the_prompts_that_it_trains_with(small, sheets):
    settings = ["target=slider", 'target.positive="old {caption}"', 'target.negative="new {caption}"', "steps=1"]
    plan_first_batch(config_of(*small(*settings))).sheet()
    positive, negative, trained = sheets[0][0][0].captions
    caption = trained.removeprefix("trained: ")
    assert (positive, negative) == (f"positive: old {caption}", f"negative: new {caption}")


def test_class_images_are_shown_with_the_samples(small, pairs, sheets):
    classes = ["preservation=prior", "+dataset@preservation.dataset=folder"]
    classes += [f"preservation.dataset.path={pairs / 'target'}", "steps=1"]
    plan_first_batch(config_of(*small(*classes))).sheet()
    assert [card.facts[0] for card in sheets[0][0]] == ["step 1"] * 2 + ["step 1, class image"] * 2
    drawn = plan_first_batch(config_of(*small("preservation=prior", "preservation.prompts=[a fox]")))
    assert "the base draws before training" in drawn.notes[0]


def test_held_out_samples_are_not_on_it(small):
    first = plan_first_batch(config_of(*small("validation.held_out=4", "steps=100", "batch_size=1")))
    assert len({sample.name for sample in first.shown}) == 2
    assert len(plan_first_batch(config_of(*small("batch_size=20"))).drawn) == MOST


def test_it_changes_no_number_and_no_random_state(train, small, reference, monkeypatch):
    dropout = ["adapter.dropout=0.5", "caption_dropout=0.5"]
    with_sheet = reference(*dropout)
    assert (with_sheet / FIRST_BATCH).is_file()
    monkeypatch.setattr("train.run.write_first_batch", lambda *_: None)
    without = train("without", *dropout)
    assert not (without / FIRST_BATCH).exists()
    assert lines(without) == lines(with_sheet)
    assert same_tensors(adapter(without), adapter(with_sheet))
    states = [torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()]
    plan_first_batch(config_of(*small(*CROPS, *dropout[:1]))).sheet()
    assert torch.equal(torch.get_rng_state(), states[0])
    assert [random.getstate(), np.random.get_state()[1].tolist()] == states[1:]


def test_a_resumed_run_keeps_it_and_a_start_that_failed_does_not(train):
    run = train("run", "steps=2", "checkpoint_every=2")
    Image.new("RGB", (8, 8)).save(run / FIRST_BATCH)
    before = (run / FIRST_BATCH).read_bytes()
    train("run", "steps=4", "resume=auto")
    assert (run / FIRST_BATCH).read_bytes() == before
    (run / FIRST_BATCH).unlink()
    train("run", "steps=5", "resume=auto")  # its first batch is not what is trained next
    assert not (run / FIRST_BATCH).exists()
    for left in ("other", "third"):
        (run.parent / left).mkdir()
        (run.parent / left / FIRST_BATCH).write_bytes(before)
    (run.parent / "third" / CONFIG_FILE).write_bytes((run / CONFIG_FILE).read_bytes())
    train("other", "steps=1")
    assert (run.parent / "other" / FIRST_BATCH).read_bytes() != before
    train("third", "steps=1", "resume=auto")  # starts again, without a checkpoint, perhaps with other captions
    assert (run.parent / "third" / FIRST_BATCH).read_bytes() != before


def test_a_failure_is_one_warning_and_the_run_goes_on(train, monkeypatch, capsys):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(first_batch, "batch_sheet", fail)
    run = train("run", "steps=1")
    assert (run / "adapter").is_dir()
    assert not (run / FIRST_BATCH).exists()
    warnings = [line for line in capsys.readouterr().err.splitlines() if FIRST_BATCH in line]
    assert len(warnings) == 1
    assert "was not written (OSError: No space left on device). The run goes on" in warnings[0]


def test_an_image_that_is_gone_or_too_late_is_named_in_its_place(small, masked, sheets):
    first = plan_first_batch(config_of(*small(f"dataset.path={masked}", "dataset.mask=masks", "steps=1")))
    gone, other = first.shown
    (masked / gone.name).unlink()
    times = iter([0.0, *[1.0] * 3, *[SECONDS + 1] * 9])
    first.sheet(clock=lambda: next(times))
    cards, sheet = sheets[0]
    assert "does not exist" in cards[0].tiles[0].problem
    assert "took more than" in cards[1].tiles[0].problem
    assert [card.captions[0] in sample.captions for card, sample in zip(cards, (gone, other), strict=True)] == [
        True
    ] * 2
    assert sheet.info["boxes"] == [[], []]


def test_texts_are_cut_to_their_width_and_have_no_control_characters():
    font = ImageFont.load_default(15)
    for text in ("a " * 3000, "x" * 3000, "\u65e5" * 3000, "a\u200bb " * 900):
        drawn = broken(text, font, 200, 4)
        assert drawn.endswith(" ...")
        assert drawn.count("\n") == 3
        assert max(map(font.getlength, drawn.split("\n"))) <= 200
    assert broken("a\x07b\nc\x1b[31m\u202ed \ud800", font, 2000, 4) == "a b c [31m d"
    assert missing_letters("ab", font) == 0
    assert missing_letters("a \u65e5\u672c", font) == 2


def test_a_font_of_the_machine_is_used_where_it_has_more_letters(monkeypatch):
    own, other = ImageFont.load_default(15), ImageFont.load_default(16)
    monkeypatch.setattr(batch_sheet, "system_fonts", lambda size: [other])
    missing = {own.size: 2, other.size: 1}
    monkeypatch.setattr(batch_sheet, "missing_letters", lambda text, font: missing[font.size] * (not text.isascii()))
    assert batch_sheet.font_for("plain", 15).size == own.size
    assert batch_sheet.font_for("\u65e5", 15).size == other.size


def test_the_pixels_come_from_the_one_function_that_encodes(monkeypatch, small, sheets):
    def refuse(work, limit):
        raise BadPicture(work.picture.name, "is not decoded")

    monkeypatch.setattr(Work, "image", refuse)
    plan_first_batch(config_of(*small())).sheet()
    assert all("is not decoded" in tile.problem for card in sheets[0][0] for tile in card.tiles)
