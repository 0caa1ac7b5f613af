"""train.validation.samples and sample_grid: settings of the grids, their images, and the page they are on."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFont
from PIL.PngImagePlugin import PngInfo
from train_helpers import compose, draw_picture, pixels

from data.sources import Sample
from data.sources.images import FileOpener, Picture
from flux2.models.variants import VARIANTS
from flux2.weights.loading import load_transformer
from train.reports.run_pictures import training_cells
from train.stages.data import announce_samples, first_captions, prepare_samples
from train.stages.memory import load_config
from train.stages.model import load_sampler
from train.validation.sample_grid import (
    LAYOUT,
    sample_grid,
    side_by_side,
    split_grid,
    split_references,
    wrap,
)
from train.validation.samples import Sampler, SampleSettings

pytest_plugins = ("train_helpers",)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"prompts": "a cup"}, r"sample\.prompts='?a cup"),
        ({"prompts": [1]}, r"sample\.prompts=\[1\]"),
        ({"prompts": 5}, r"sample\.prompts=5"),
        ({"references": "x.png"}, r"sample\.references='?x\.png'?"),
        (
            {"references": ["x.png", ["y.png"]]},
            r"sample\.references=\['?x\.png'?, \['?y\.png'?\]\]",
        ),
        ({"references": [[1]], "prompts": ["a cup"]}, r"sample\.references=\[\[1\]\]"),
        ({"references": [["x.png"]]}, r"sample\.references=.* 1 .* 0 sample\.prompts"),
        ({"references": ["x.png"]}, r"sample\.references=\['x\.png'\] has no effect without sample\.prompts"),
        ({"captions": -1}, r"sample\.captions=-1 must be an integer from 0 to 64"),
        ({"references": [[], []], "prompts": ["a cup"]}, r"sample\.references=.* 2 .* 1 sample\.prompts"),
        ({"seed": -1}, r"sample\.seed=-1"),
        ({"seed": 2**64}, r"sample\.seed=18446744073709551616"),
        ({"seed": False}, r"sample\.seed=[Ff]alse"),
        ({"steps": 10**6}, r"sample\.steps=1000000"),
        ({"guidance": 1e9}, r"sample\.guidance=1000000000\.0"),
        ({"width": 100}, r"sample\.width=100"),
        ({"height": "x"}, r"sample\.height='?x'?"),
        ({"steps": 0}, r"sample\.steps=0"),
        ({"guidance": -1}, r"sample\.guidance=-1"),
        ({"scales": []}, r"sample\.scales=\[\]"),
        ({"scales": [1.0, 1.0]}, r"sample\.scales=\[1\.0, 1\.0\] must be a list of different numbers"),
        ({"scales": [11]}, r"sample\.scales=\[11\].*from -10 to 10"),
        ({"scales": 1.0}, r"sample\.scales=1\.0"),
    ],
)
def test_a_refused_setting_of_the_grids_is_named_with_its_value(settings, said):
    with pytest.raises(ValueError, match=said):
        SampleSettings(**settings)


def test_every_prompt_has_a_seed_of_its_own_whatever_the_others_are(small):
    run = load_config(compose(*small("sample.prompts=[a fox, a fox, a red cup]", "sample.steps=1", "sample_every=1")))
    prepared = prepare_samples(run).cached
    sampler, model = load_sampler(run, prepared), load_transformer(run.source)
    assert sampler.sizes == [(48, 48)] * 3
    first, second, third = sampler.pictures(model)
    assert abs(pixels(first) - pixels(second)).max() > 8
    alone = load_config(
        compose(*small("sample.prompts=[a red cup]", "sample.seed=2", "sample.steps=1", "sample_every=1"))
    )
    (again,) = load_sampler(alone, prepared).pictures(model)
    assert abs(pixels(again) - pixels(third)).max() == 0


def test_prompts_edit_the_same_files_or_each_its_own():
    prompts = ["a cup", "a fox"]
    assert SampleSettings(prompts).edits == [[], []]
    assert SampleSettings(prompts, ["x.png", "y.png"]).edits == [["x.png", "y.png"]] * 2
    own = SampleSettings(prompts, [["x.png", "y.png"], []])
    assert own.edits == [["x.png", "y.png"], []]
    assert own.files == ["x.png", "y.png"]


def test_each_prompt_is_shown_as_the_edit_of_its_own_files_in_the_shape_of_the_first(small, tmp_path):
    files = [str(tmp_path / f"{name}.png") for name in ("wide", "tall", "square")]
    for seed, (file, size) in enumerate(zip(files, [(96, 48), (48, 96), (64, 64)], strict=True)):
        draw_picture(seed, size).save(file)
    wide, tall, square = files
    settings = ["sample.steps=1", "sample_every=1"]

    def shown(prompts, references):
        given = f"[{','.join('[' + ','.join(names) + ']' for names in references)}]"
        run = load_config(
            compose(*small(f"sample.prompts=[{','.join(prompts)}]", f"sample.references={given}", *settings))
        )
        return load_sampler(run, prepare_samples(run).cached), load_transformer(run.source)

    sampler, model = shown(["the fox"] * 4, [[wide, square], [tall], [], [square]])
    assert sampler.sizes == [(64, 32), (32, 64), (48, 48), (48, 48)]
    assert [len(latents) for latents in sampler.references] == [2, 1, 0, 1]
    pictures = sampler.pictures(model)
    assert [picture.size for picture in pictures] == sampler.sizes
    # the last two have the same size and the same prompt: what differs is the seed, and then the reference
    alone, _ = shown(["the fox"] * 4, [[], [], [], []])
    plain = alone.pictures(model)
    assert abs(pixels(pictures[2]) - pixels(plain[2])).max() == 0
    assert abs(pixels(pictures[3]) - pixels(plain[3])).max() > 8
    sampler.write_grid(model, tmp_path / "grid.png")
    assert Image.open(tmp_path / "grid.png").height > 512  # the tall picture is not squeezed


def test_a_run_without_prompts_or_grids_has_no_sampler(small):
    for settings in ([], ["sample.prompts=[a fox]"]):
        run = load_config(compose(*small(*settings)))
        assert load_sampler(run, prepare_samples(run).cached) is None


def test_without_prompts_the_first_captions_are_drawn_and_it_is_said(small, capsys):
    run = load_config(compose(*small("sample.captions=2", "sample.steps=1", "sample_every=3")))
    data = prepare_samples(run)
    chosen = announce_samples(run, data.samples)
    first = [sample.caption for sample in data.samples][:2]
    assert chosen.sample.prompts == first
    assert chosen.sample.edits == [[], []]
    said = "sample grids: 2 images of the first 2 captions before training, every 3 steps and at the end. Set sample."
    assert said in capsys.readouterr().out
    sampler, model = load_sampler(chosen, data.cached), load_transformer(run.source)
    asked = load_config(compose(*small(f"sample.prompts=[{','.join(first)}]", "sample.steps=1", "sample_every=3")))
    pictures = load_sampler(asked, prepare_samples(asked).cached).pictures(model)
    assert all((pixels(a) == pixels(b)).all() for a, b in zip(sampler.pictures(model), pictures, strict=True))
    for off in ("sample.captions=0", "sample_every=0"):
        run = load_config(compose(*small("sample_every=3", off)))
        assert announce_samples(run, data.samples) is run
        assert load_sampler(run, data.cached) is None
    assert "sample grids" not in capsys.readouterr().out


def test_the_first_captions_edit_the_references_of_their_samples():
    def sample(caption, *references):
        opened = [Picture(name, FileOpener(name) if name.endswith("png") else lambda: None) for name in references]
        return Sample(Picture("x.png", FileOpener("x.png")), (caption,), tuple(opened))

    samples = [sample(""), sample("a", "1.png", "2.png"), sample("a", "3.png"), sample("b", "row 5"), sample("c")]
    assert first_captions(samples, 9) == [("a", ["1.png", "2.png"]), ("b", [""]), ("c", [])]
    assert first_captions(samples, 1) == [("a", ["1.png", "2.png"])]
    config = load_config(compose("model=tiny", "device=cpu", "sample.captions=9"))
    chosen = announce_samples(config, samples)  # a reference in a table has no file to read it from
    assert (chosen.sample.prompts, chosen.sample.edits) == (["a", "c"], [["1.png", "2.png"], []])


def test_a_grid_of_edits_shows_what_is_edited_and_the_report_too(tmp_path):
    settings = SampleSettings(prompts=["a cup", "a fox"], references=[["x.png", "y.png"], []], scales=[0.0, 1.0])
    edited = [side_by_side([plain("red", (40, 40)), plain("blue", (20, 40))]), None]
    sampler = Sampler(settings, VARIANTS["tiny"], None, None, None, [[], []], [(64, 48)] * 2, edited)
    page, layout = sampler.page([[plain("green")] * 2, [plain("yellow")] * 2])
    (tmp_path / "samples").mkdir()
    info = PngInfo()
    info.add_itxt(LAYOUT, json.dumps(layout))
    page.save(tmp_path / "samples" / "step_000000.png", pnginfo=info)
    grid = Image.open(tmp_path / "samples" / "step_000000.png")
    assert [prompt for prompt, _ in split_grid(grid)] == ["a cup (scale 0)", "a fox (scale 0)", "a cup", "a fox"]
    assert [image.getpixel((9, 9)) for _, image in split_grid(grid)] == 2 * [(0, 128, 0)] + 2 * [(255, 255, 0)]
    shown, nothing = split_references(grid)
    assert nothing is None
    assert [shown.getpixel((round(at * shown.width), 9)) for at in (0.3, 0.9)] == [(255, 0, 0), (0, 0, 255)]
    cells = training_cells(tmp_path)
    assert [[shot.name for shot in cell.shots] for cell in cells] == 2 * [["base", "reference"], ["base"]]
    assert (pixels(cells[0].shots[1].image) == pixels(shown)).all()
    without = Sampler(replace(settings, references=[]), VARIANTS["tiny"], None, None, None, [[], []], [(64, 48)] * 2)
    page, layout = without.page([[plain("green")] * 2, [plain("yellow")] * 2])
    page.info[LAYOUT] = json.dumps(layout)
    assert split_references(page) == []


@pytest.mark.parametrize("boxes", [[[0, 0, 999, 9]], [[0, 0, 9, 9]] * 99, [["x"]], 3, {"a": 1}])
def test_positions_of_references_from_someone_else_lie_in_the_grid(boxes):
    grid = plain("red")
    grid.info[LAYOUT] = json.dumps({"prompts": [], "boxes": [], "references": boxes})
    assert split_references(grid) == []


def plain(color, size=(64, 48)):
    return Image.new("RGB", size, color)


def test_a_grid_shows_no_secret_as_text_nor_as_pixels(monkeypatch, tmp_path):
    monkeypatch.setenv("SOME_TOKEN", "planted-key")
    monkeypatch.setattr(Sampler, "pictures", lambda *_: [plain("red")])
    files = [tmp_path / "a.png", tmp_path / "b.png"]
    for file, prompt in zip(files, ("a planted-key", "a ***"), strict=True):
        sampler = Sampler(SampleSettings(prompts=[prompt]), None, None, None, None, [[]], [(64, 48)])
        sampler.write_grid(None, file)
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_grid_holds_the_very_pixels_under_their_captions():
    noise = np.random.default_rng(0).integers(0, 256, (2, 48, 64, 3), dtype=np.uint8)
    pictures = [Image.fromarray(one) for one in noise]
    page = pixels(sample_grid([pictures], ["a red cup", "the fox"]))
    top = page.shape[0] - 4 * 48 - 12  # a gap below the row, and one at the edge
    for i, picture in enumerate(pictures):
        left = 6 + i * (4 * 64 + 6)
        shown = page[top : top + 4 * 48 : 4, left : left + 4 * 64 : 4]
        assert (shown == pixels(picture)).all()
        assert (page[:top, left : left + 200] < 128).any()  # the caption
    assert (page[:4] == 255).all()


def test_pictures_of_different_shapes_keep_theirs_on_a_grid():
    page = pixels(sample_grid([[plain("red", (64, 32)), plain("blue", (32, 64))]], ["a cup", "a fox"]))
    assert (page == (255, 0, 0)).all(-1).sum() == 256 * 128
    assert (page == (0, 0, 255)).all(-1).sum() == 256 * 512


def test_rows_are_named_and_columns_captioned():
    page = pixels(sample_grid([[plain("red")], [plain("blue")]], ["a cup"], ["before", "after"]))
    reds = (page == (255, 0, 0)).all(-1)
    blues = (page == (0, 0, 255)).all(-1)
    assert reds.sum() == blues.sum() == 256 * 192
    ys, xs = np.nonzero(reds)
    assert np.nonzero(blues)[0].min() == ys.max() + 7  # under it, a gap between
    assert (page[ys.min() : ys.max(), : xs.min()] < 128).any()  # its name
    assert sample_grid([[plain("red")]], [""]).height == 192 + 12  # no room for captions that are not there


def test_a_long_row_is_broken_after_four():
    page = pixels(sample_grid([[plain("red")] * 6], [f"prompt {i}" for i in range(6)]))
    counts = [(page[half] == (255, 0, 0)).all(-1).sum() for half in np.array_split(range(page.shape[0]), 2)]
    assert counts == [4 * 256 * 192, 2 * 256 * 192]


def test_large_pictures_are_scaled_down_to_the_width_of_a_column():
    page = sample_grid([[plain("red", (1024, 512))]], ["a cup"])
    assert (pixels(page) == (255, 0, 0)).all(-1).sum() == 256 * 128


def test_captions_are_broken_at_spaces_and_cut_with_dots():
    font = ImageFont.load_default(12)
    text = "a large red cup on a small blue background with a fox"
    broken = wrap(text, font, 120, 9)
    assert broken.replace("\n", " ") == text
    assert all(font.getlength(line) <= 120 for line in broken.split("\n"))
    cut = wrap(text, font, 120, 2).split("\n")
    assert len(cut) == 2
    assert cut[1].endswith(" ...")
    assert font.getlength(cut[1]) <= 120
    assert wrap("short", font, 120, 3) == "short"
    assert wrap("oneverylongwordthatdoesnotfit", font, 50, 3) == "oneverylongwordthatdoesnotfit"


@pytest.mark.parametrize("key", ["width", "height"])
def test_a_size_of_a_grids_pictures_that_no_machine_has_room_for_is_refused(key):
    with pytest.raises(ValueError, match=rf"sample\.{key}=1000000.*16.*8192"):
        SampleSettings(**{key: 1_000_000})
    SampleSettings(**{key: 8192})
