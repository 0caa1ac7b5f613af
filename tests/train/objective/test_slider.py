"""Sliders: the targets of their formula at both scales, on gradients too, and what moves on the embedded model."""

import re
from dataclasses import replace
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch
from loss_helpers import batch_of, stir
from train_helpers import ROOT, compose, drawn_and_mixed, execute, lines, refusal

import flux2
from data.synthetic.probe import read
from docs.draw_objectives import command, draw_images
from flux2 import adapters
from flux2.adapters import AdapterError
from flux2.adapters.loading import scaled
from flux2.memory.activation_checkpointing import set_policy
from train.config.memory import Choice, choice_of
from train.config.run_config import RunConfig
from train.objective import Flow, Slider
from train.objective.objective import Inputs, training_loss
from train.objective.timesteps import Uniform
from train.planner.from_config import workload_of
from train.planner.predictor import Planner
from train.stages.data import prepare_samples
from train.stages.memory import load_config

pytest_plugins = ("train_helpers",)

P, N, Z = torch.randn(3, 4, 6, 128, generator=torch.Generator().manual_seed(0))
ENDS = ["target.positive=a large cup", "target.negative=a small cup"]


@pytest.mark.parametrize("scale", [1.0, -1.0])
def test_the_target_is_that_of_the_formula(scale):
    found = Slider("old", "young", guidance=2.0).moved(P, N, Z, scale)
    for sample in range(4):
        plain = Z[sample] + scale * 2.0 * (P[sample] - N[sample])
        expected = (plain - plain.mean()) / plain.std() * Z[sample].std() + Z[sample].mean()
        torch.testing.assert_close(found[sample], expected)


def test_prompts_have_the_caption_where_it_stands():
    slider = Slider("an old {caption}, {caption}", "young", "a {caption}")
    assert slider.prompts_for(["cup", ""]) == [["an old cup, cup", "an old , "], ["young"] * 2, ["a cup", "a "]]
    assert set(slider.all_prompts(["cup"])) == {"an old cup, cup", "young", "a cup", "an old , ", "a "}
    batch = batch_of(1)
    assert [slider.at_scales(batch, step) for step in range(3)] == [[(batch, 1)], [(batch, -1)], [(batch, 1)]]
    assert {Flow().at_scales(batch, step)[0][1] for step in range(4)} == {1}


def test_the_loss_compares_the_neutral_prompt_at_a_scale_to_predictions_of_the_base():
    base = helpers.transformers("klein")[0]
    model = adapters.attach(helpers.transformers("klein")[0], rank=3).train()
    stir(model)
    batch = batch_of(2, kind="klein")
    guides = [batch_of(2, start=start, kind="klein").embeddings for start in (30, 40, 50)]
    noised, target = drawn_and_mixed(batch, Uniform(), 0, 0), Slider("old", "young")
    for scale in (1.0, -1.0):
        with scaled(model.get_base_model(), scale):
            losses = training_loss(
                model, Inputs(noised, batch.embeddings, guides=guides, scale=scale), None, target=target
            )
            with torch.no_grad():
                prediction = noised.predict(model, guides[2], None)
        with torch.no_grad():
            ends = [noised.predict(base, text, None) for text in guides]
        expected = (prediction - target.moved(*ends, scale)).square().mean()
        torch.testing.assert_close(losses.total, expected)


def test_a_recomputed_step_sees_the_scale_of_its_forward(train):
    runs = [
        train(policy, "target=slider", *ENDS, f"memory.checkpointing={policy}", kind="klein")
        for policy in ("none", "full")
    ]
    assert lines(runs[0]) == lines(runs[1])
    assert len({line["loss"] for line in lines(runs[0])}) == 4


def test_gradients_at_scale_minus_one_are_those_of_the_negated_adapter():
    gradients = []
    for scale, sign in ((-1.0, 1), (1.0, -1)):
        model = adapters.attach(helpers.transformers("klein")[0], rank=3).train()
        stir(model)
        set_policy(model.get_base_model(), "full")
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data *= sign
        batch = batch_of(2, kind="klein")
        guides = [batch_of(2, start=start, kind="klein").embeddings for start in (30, 40, 50)]
        inputs = Inputs(drawn_and_mixed(batch, Uniform(), 0, 0), batch.embeddings, guides=guides, scale=-1.0)
        with scaled(model.get_base_model(), scale):
            training_loss(model, inputs, None, target=Slider("old", "young")).total.backward()
        gradients.append({name: one.grad for name, one in model.named_parameters() if one.grad is not None})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name] * (-1 if "lora_B" in name else 1))


def test_its_predictions_are_counted(small):
    plain, slider = (RunConfig(compose(*small(*settings))) for settings in ([], ["target=slider", *ENDS]))
    jobs = [workload_of(run, on_gpu=False) for run in (plain, slider)]
    assert (jobs[0].frozen_rows, jobs[1].frozen_rows) == ([], [6])
    embedding = 2 * 3 * jobs[0].embedding_bytes
    assert jobs[1].input_bytes - jobs[0].input_bytes == embedding
    planners = [Planner(job) for job in jobs]
    assert "targets" not in planners[0].predict(Choice()).phases
    phases = planners[1].predict(Choice()).phases
    forward = planners[1].inference(replace(jobs[1].shape, rows=6), autocast=jobs[1].autocast)[0]
    assert phases["targets"]["working set"] == forward + embedding
    assert phases["targets"]["micro-batch"] == phases["step"]["micro-batch"]
    work = [sum(Planner(job).predict(choice_of(plain.composed["memory"])).work.flops.values()) for job in jobs]
    assert 1.7 < work[1] / work[0] < 2.2  # three predictions next to a forward and a backward with recomputation


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["target.positive=cup", "target.negative=' cup'"], "target.positive='cup' and target.negative are the same"),
        (["target.positive='a {captions}'", "target.negative=cup"], "target.positive='a {captions}' has {captions}"),
        ([*ENDS, "validate_every=1"], "validate_every=1 with target=slider"),
        ([*ENDS, "adapter.init=/x", "adapter.init_mode=frozen"], "adapter.init_mode=frozen with target=slider"),
        (["target.positive=3", "target.negative=cup"], "target.positive=3 must be a prompt"),
        ([*ENDS, "target.guidance=0"], "target.guidance=0 must be a number from 0.01 to 100"),
        (
            [*ENDS, "keep_best=1", "keep_last=2", "validate_every=2", "checkpoint_every=2"],
            "keep_best=1 with target=slider",
        ),
    ],
)
def test_a_setting_that_cannot_be_is_refused(small, settings, said):
    assert said in refusal(*small("target=slider", *settings))


def test_an_adapter_without_scale_is_refused(small):
    given = [one for one in small("target=slider", *ENDS, "adapter=oft", "adapter.block_size=8") if "rank" not in one]
    with pytest.raises(AdapterError, match=r"scale=-1: an OFT"):
        RunConfig(compose(*given)).dry_run()


def test_all_its_prompts_are_encoded(small):
    run = load_config(compose(*small("target=slider", "target.positive='old {caption}'", "target.negative=young")))
    samples = prepare_samples(run)
    assert {f"old {sample.caption}" for sample in samples.samples} < set(samples.cached.prompts)


@pytest.mark.slow
def test_a_slider_moves_the_size_and_leaves_color_and_subject(tmp_path: Path):
    """On prompts that it was not trained on: areas grow with the scale, by a factor of at least two in all."""
    images = tmp_path / "images"
    images.mkdir()
    draw_images(images, 16)
    arguments = command(images, tmp_path, "sample_every=0", "checkpoint_every=0", "log_every=0")
    done = execute(arguments, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    subjects = [("red", "cup"), ("green", "fish"), ("purple", "sword"), ("yellow", "key")]
    areas = {}
    for scale in (-2, -1, 0, 1):
        pipe = flux2.load("tiny", device="cpu")
        pipe.load_adapter(tmp_path / "run", scale)
        drawn = [pipe.generate(f"a {color} {shape} on a blue background", seed=7)[0] for color, shape in subjects]
        readings = [read(image) for image in drawn]
        assert sum((one.color, one.shape) == subject for one, subject in zip(readings, subjects, strict=True)) >= 3
        pixels = [np.asarray(image, dtype=float) for image in drawn]
        areas[scale] = [float((abs(one - np.median(one[:4], (0, 1))).max(-1) > 60).mean()) for one in pixels]
    means = {scale: sum(found) / len(found) for scale, found in areas.items()}
    assert means[-1] < means[0]
    assert means[-2] <= 1.1 * means[-1]
    assert means[0] <= 1.1 * means[1]
    assert means[1] > 2 * means[-2], areas


def test_the_page_has_the_command_of_the_experiment():
    head = (ROOT / "conf" / "experiment" / "slider.yaml").read_text()
    page = (ROOT / "docs" / "training.md").read_text()
    for end in re.findall(r"'target\.(?:positive|negative)=\"[^']*\"'", head):
        assert end in page
