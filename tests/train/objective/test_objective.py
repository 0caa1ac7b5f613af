"""Runs with every part of the objective: resumed to the bit, and with the same losses for every split of a batch."""

import pytest
from PIL import Image
from train_helpers import CAPTIONS, adapter, draw_picture, lines, same_tensors, values

pytest_plugins = ("train_helpers",)

RESUMED = {
    "distance": [
        "loss=huber",
        "loss.delta_schedule=exponential",
        "timesteps=log_snr",
        "timesteps.max=0.97",
        "dataset.loss_weight=2",
    ],
    "masks": [
        "dataset.mask=alpha",
        "loss.unmasked_weight=0.1",
        "loss.unmasked_prior=0.5",
        "loss.unmasked_probability=0.5",
        "adapter.dropout=0.2",
    ],
    "class": [
        "preservation=class",
        "dataset.captions.trigger=trtcrd",
        "dataset.captions.shuffle_tags=2",
        "preservation.samples=1",
        "caption_dropout=0.3",
    ],
    "contrastive": [
        "target=contrastive",
        "target.schedule=sigma",
        "target.optimized_scale=true",
        "adapter.dropout=0.2",
        "caption_dropout=0.3",
    ],
    "slider": ["target=slider", "target.positive='old {caption}'", "target.negative=a fox", "caption_dropout=0.3"],
    "blank": ["preservation=blank", "caption_dropout=0.3", "gradient_accumulation=2", "batch_size=1"],
}


@pytest.fixture
def cut_out(tmp_path):
    """A folder of captioned pictures whose right part is transparent."""
    folder = tmp_path / "cut_out"
    folder.mkdir()
    alpha = Image.new("L", (48, 48))
    alpha.paste(255, (0, 0, 24, 48))
    for number, caption in enumerate(CAPTIONS):
        picture = draw_picture(number, (48, 48))
        picture.putalpha(alpha)
        picture.save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(caption)
    return folder


@pytest.mark.parametrize("settings", RESUMED.values(), ids=RESUMED)
def test_a_run_goes_on_to_the_bit(train, cut_out, settings):
    kind = "klein" if "target=contrastive" in settings else "dev"
    settings = [f"dataset.path={cut_out}", *settings, "checkpoint_every=2"]
    whole = train("whole", *settings, kind=kind)
    rest = train("rest", *settings, f"resume={whole / 'checkpoints' / 'step_000002'}", kind=kind)
    assert lines(rest) == [line for line in lines(whole) if line["step"] > 2]
    assert len(lines(whole)) == 4
    assert same_tensors(adapter(rest), adapter(whole))
    card = (whole / "adapter" / "README.md").read_text()
    assert ("sampled with a guidance scale of 1" in card) == (kind == "klein")


@pytest.mark.parametrize("settings", RESUMED.values(), ids=RESUMED)
def test_the_split_of_a_batch_changes_no_loss(train, cut_out, settings):
    kind = "klein" if "target=contrastive" in settings else "dev"
    per_process = ("adapter.dropout", "preservation.samples", "gradient_accumulation", "batch_size")
    settings = [f"dataset.path={cut_out}", *(one for one in settings if not one.startswith(per_process))]
    settings += ["optimizer.lr=1e-3", "steps=3"]
    whole = train("whole", *settings, "batch_size=4", kind=kind)
    parts = train("parts", *settings, "batch_size=1", "gradient_accumulation=4", kind=kind)
    for key in ("loss", "preservation_loss", "grad_norm"):
        assert values(parts, key) == pytest.approx(values(whole, key), rel=1e-3, abs=1e-7)
