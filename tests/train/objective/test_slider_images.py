"""Sliders from pairs of images: the loss of their formula, runs, settings, and what moves on the embedded model."""

from dataclasses import replace
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch
from loss_helpers import batch_of, stir
from PIL import Image
from train_helpers import (
    CAPTIONS,
    PRESERVE,
    adapter,
    compose,
    draw_picture,
    execute,
    lines,
    refusal,
    refuse_encoders,
    same_tensors,
    values,
)

import flux2
from data.synthetic.probe import read
from docs.draw_objectives import draw_ends, slider_images_command
from flux2 import adapters
from flux2.adapters import AdapterError
from flux2.adapters.loading import scaled
from flux2.weights.loading import load_transformer
from train.config.memory import choice_of
from train.config.run_config import RunConfig
from train.objective import MSE, LogitNormal, Preservation, SliderImages, Unweighted
from train.objective.noise import noise_at
from train.objective.objective import Objective
from train.planner.from_config import workload_of
from train.planner.predictor import Planner
from train.stages.data import prepare_samples
from train.stages.memory import load_config
from train.validation.loss import FixedNoiseLoss, chosen_samples
from train.validation.sample_grid import split_grid

pytest_plugins = ("train_helpers",)


class OneBatch:
    """A loader whose every step has one batch; prompts have the embeddings of samples 70 and on."""

    def __init__(self, batch):
        self.batch = batch

    def batch_size_in(self, step):
        return len(self.batch.indices)

    def micro_batches(self, step):
        return [self.batch]

    def embeddings(self, prompts):
        return batch_of(len(prompts), start=70).embeddings


@pytest.mark.parametrize("references", [(), ((2, 2),)])
def test_the_loss_is_the_mean_of_both_ends_with_the_same_noise_and_times(references):
    base = helpers.transformers("dev")[0]
    model = adapters.attach(helpers.transformers("dev")[0], rank=3).train()
    stir(model)
    batch = replace(batch_of(2, references=references), rejected=batch_of(2, start=40).latents)
    held = Preservation(weight=0.5, prompts=["a cup"], samples=1)
    ours = Objective(3, LogitNormal(), MSE(), Unweighted(), held, target=SliderImages(), guidance=1.0)
    parts = ours.micro_batches(OneBatch(batch), step=5)
    total = 0.0
    for part in parts:
        inputs = ours.prepare(part, torch.device("cpu"))
        with scaled(model.get_base_model(), inputs.scale):
            total += part.weight * ours.losses(model, inputs).total.detach()

    noise, plain = parts[0].noise, batch_of(1, start=70).embeddings
    assert [part.scale for part in parts] == [1, -1]
    expected = 0.0
    for latents, scale in ((batch.latents, 1.0), (batch.rejected, -1.0)):
        noised = noise_at(replace(batch, latents=latents), noise.times, noise.noise)
        with torch.no_grad(), scaled(model.get_base_model(), scale):
            error = (noised.predict(model, batch.embeddings, 1.0) - noised.target).square().mean()
            shifts = [noised.predict(one, plain, 1.0, slice(1)) for one in (model, base)]
        expected += (error + 0.5 * (shifts[0] - shifts[1]).square().mean()) / 2
    torch.testing.assert_close(total, expected)


# ------------------------------------------------------------------ runs


@pytest.fixture
def ends(tmp_path):
    """The settings of a slider from four pairs of images."""
    folder = tmp_path / "ends"
    for name, start in (("large", 0), ("small", 10)):
        (folder / name).mkdir(parents=True)
        for number, caption in enumerate(CAPTIONS[:4]):
            draw_picture(start + number, (48, 48)).save(folder / name / f"{number}.png")
            if name == "large":
                (folder / name / f"{number}.txt").write_text(caption)
    folders = [f"dataset.path={folder}", "dataset.chosen_folder=large", "dataset.rejected_folder=small"]
    return ["target=slider_images", "dataset=preference", *folders]


def test_a_run_goes_on_to_the_bit_and_validates_and_samples(train, ends):
    settings = [*ends, *PRESERVE, "preservation.weight=1", "adapter.dropout=0.1", "caption_dropout=0.3"]
    settings += ["gradient_accumulation=2", "batch_size=1", "checkpoint_every=2", "validate_every=2"]
    settings += ["sample_every=4", "sample.prompts=[a red cup]", "sample.scales=[-1,0,1]", "sample.steps=2"]
    whole = train("whole", *settings)
    rest = train("rest", *settings, f"resume={whole / 'checkpoints' / 'step_000002'}")
    assert lines(rest) == [line for line in lines(whole) if line["step"] > 2]
    assert same_tensors(adapter(rest), adapter(whole))
    assert len(values(whole, "preservation_loss")) == 4
    assert len(values(whole, "validation_loss")) == 3
    images = [image.tobytes() for _, image in split_grid(Image.open(whole / "samples" / "step_000004.png"))]
    assert len(set(images)) == len(images) == 3


def test_the_split_of_a_batch_changes_no_loss(train, ends):
    settings = [*ends, "optimizer.lr=1e-3", "steps=3"]
    whole = train("whole", *settings, "batch_size=4")
    parts = train("parts", *settings, "batch_size=1", "gradient_accumulation=4")
    for key in ("loss", "grad_norm"):
        assert values(parts, key) == pytest.approx(values(whole, key), rel=1e-3)


def test_class_images_are_trained_at_both_ends(train, ends, pictures):
    classes = ["preservation=prior", "+dataset@preservation.dataset=folder", f"preservation.dataset.path={pictures}"]
    run = train("run", *ends, *classes)
    assert len(values(run, "prior_loss")) == 4
    pairs = [f"preservation.{one}" for one in ends if one.startswith("dataset.")]
    with pytest.raises(ValueError, match=r"dataset=preference has rejected images"):
        train("pairs", *ends, "preservation=prior", "+dataset@preservation.dataset=preference", *pairs)


def test_the_validation_loss_is_the_mean_of_both_ends(small, ends):
    run = load_config(compose(*small(*ends)))
    data = prepare_samples(run)
    base = load_transformer(run.source)
    model = adapters.attach(base, rank=3).eval()
    stir(model)
    chosen = chosen_samples(data.samples, data.cached, (0, 2), both_ends=True)
    loss = FixedNoiseLoss(data.cached, chosen, seed=0, times=(0.3, 0.8))
    found = loss(base, 1.0)
    for sample, row in zip(chosen, found, strict=True):
        noised, text = loss.inputs(sample, torch.device("cpu"))
        ends = sample.entry.key, sample.entry.rejected_key
        other, _ = loss.inputs(replace(sample, entry=replace(sample.entry, key=ends[1])), torch.device("cpu"))
        latents = [data.cached.cache.get(key)["latents"].flatten(1).T for key in ends]
        torch.testing.assert_close(noised.target + latents[0], other.target + latents[1])  # the noise of both
        errors = []
        for one, scale in ((noised, 1.0), (other, -1.0)):
            with torch.no_grad(), scaled(base, scale):
                errors.append((one.predict(base, text, 1.0) - one.target).square().mean((1, 2)))
        torch.testing.assert_close(row.float(), (errors[0] + errors[1]) / 2, rtol=1e-5, atol=0)


# ------------------------------------------------------------------ settings


def test_the_target_and_the_dataset_need_each_other_which_is_said_before_anything_is_encoded(
    train, ends, tmp_path, monkeypatch
):
    refuse_encoders(monkeypatch)
    ends = [*ends, f"cache_dir={tmp_path / 'cache'}"]
    with pytest.raises(ValueError, match=r"dataset=preference has rejected images, which only loss=dpo and target=sl"):
        train("flow", *ends, "target=flow")
    with pytest.raises(ValueError, match=r"target=slider_images needs a rejected image for every sample, and 6 of 6"):
        train("folder", "target=slider_images", f"cache_dir={tmp_path / 'cache'}")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["loss=dpo"], "loss=dpo with target=slider_images"),
        (["adapter.init=/x", "adapter.init_mode=frozen"], "adapter.init_mode=frozen with target=slider_images"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(small, settings, said):
    assert said in refusal(*small("target=slider_images", *settings))


def test_an_adapter_without_scale_is_refused(small):
    given = [one for one in small("target=slider_images", "adapter=oft", "adapter.block_size=8") if "rank" not in one]
    with pytest.raises(AdapterError, match=r"scale=-1: an OFT"):
        RunConfig(compose(*given)).dry_run()


def test_the_planner_counts_twice_the_work_and_the_same_memory(small):
    plain, slider = (load_config(compose(*small(*more))) for more in ([], ["target=slider_images"]))
    found = [
        Planner(workload_of(run, on_gpu=True)).predict(choice_of(run.composed["memory"])) for run in (plain, slider)
    ]
    work = [sum(one.work.flops.values()) for one in found]
    assert work[1] == pytest.approx(2 * work[0])
    assert found[0].training == found[1].training


# ------------------------------------------------------------------ effect


@pytest.mark.slow
def test_pairs_of_two_sizes_move_the_size_and_leave_color_and_subject(tmp_path: Path):
    """On prompts that are in no pair."""
    draw_ends(tmp_path / "sizes")
    done = execute(slider_images_command(tmp_path / "sizes", tmp_path, "sample_every=0", "log_every=0"))
    assert done.returncode == 0, done.stderr
    subjects = [("red", "cup"), ("green", "fish"), ("purple", "tree"), ("yellow", "lantern")]
    pipe = flux2.load("tiny", device="cpu")
    name = pipe.load_adapter(tmp_path / "run").name
    means, right = [], 0
    for scale in (-2, -1, 0, 1, 2):
        pipe.set_adapter_scale(name, scale)
        drawn = [pipe.generate(f"a {color} {shape} on a blue background", seed=7)[0] for color, shape in subjects]
        readings = [read(image) for image in drawn]
        right += sum((one.color, one.shape) == subject for one, subject in zip(readings, subjects, strict=True))
        pixels = [np.asarray(image, dtype=float) for image in drawn]
        areas = [(abs(one - np.median(one[:4], (0, 1))).max(-1) > 60).mean() for one in pixels]
        means.append(float(np.mean(areas)))
    assert means[0] < means[1] < means[2] < means[3] < 1.02 * means[4], means
    assert means[4] > 2 * means[0]
    assert right >= 18
