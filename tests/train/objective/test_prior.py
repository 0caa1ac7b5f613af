"""Prior preservation in training: class pictures beside the samples, their loss and their settings."""

import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from train_helpers import adapter, compose, draw_picture, lines, same_tensors, values

from train.config.memory import choice_of
from train.objective import objective
from train.objective.prior import ClassPictures, PriorPreservation
from train.planner.from_config import workload_of
from train.planner.predictor import Planner
from train.stages.class_data import class_loader
from train.stages.data import prepare_samples
from train.stages.memory import load_config

pytest_plugins = ("train_helpers", "prior_helpers")

SGD = ["optimizer._target_=torch.optim.SGD", "~optimizer.betas", "optimizer.fused=false", "optimizer.lr=1.0"]


# ------------------------------------------------------------------ in training


def test_class_pictures_are_an_exact_share_of_what_is_trained_however_a_step_is_cut(small, given):
    run = load_config(compose(*small("preservation.share=0.5", "batch_size=4", *given)))
    classes = prepare_samples(run).classes

    def indices(step, processes, accumulation):
        found, cut = {}, run.settings
        micro = 16 // processes // accumulation
        run.settings = replace(cut, batch_size=micro)
        for index in range(processes):
            own = {"gradient_accumulation": accumulation, "num_processes": processes, "process_index": index}
            reader = class_loader(run, classes, **own)
            batches = reader.micro_batches(step)
            assert len(batches) == accumulation  # one beside each micro-batch
            for batch in batches:
                assert len(batch.latents) == micro / 2
                found |= dict(zip(batch.positions, batch.indices, strict=True))
        run.settings = cut
        return [found[position] for position in sorted(found)]

    whole = [indices(step, 2, 2) for step in range(10)]
    assert all(len(step) == 8 for step in whole)  # beside 16
    assert whole == [indices(step, 1, 8) for step in range(10)] == [indices(step, 4, 1) for step in range(10)]
    counted = np.bincount(np.concatenate(whole), minlength=5)
    assert (counted == 16).all()  # two passes of 5 x 8
    run.settings = replace(run.settings, seed=1)
    assert whole != [indices(step, 2, 2) for step in range(10)]


def test_their_noise_is_another_than_that_of_the_samples_beside_them(train, given, monkeypatch):
    noised, draw = [], objective.draw

    def noted(batch, timesteps, seed, step):
        noised.append((step, batch.positions, draw(batch, timesteps, seed, step).times))
        return draw(batch, timesteps, seed, step)

    monkeypatch.setattr(objective, "draw", noted)
    train("run", *given, "steps=2")
    assert [(step, positions) for step, positions, _ in noised] == [(0, [0, 1])] * 2 + [(1, [0, 1])] * 2
    for own, beside in (noised[:2], noised[2:]):
        assert (own[2] != beside[2]).all()
    made = [ClassPictures(lambda seed: seed, seed, 1.0, []) for seed in (0, 0, 1)]
    assert made[0].seed == made[1].seed == made[0].loader != made[2].seed


def test_their_loss_is_added_with_its_weight_to_an_unchanged_one(train, given):
    """The second factor starts at zero, so after a step of 1.0 along the gradient it is the gradient."""
    weights = {0.0: [], 1.0: given, 3.0: [*given, "preservation.weight=3.0"]}
    runs = {}
    for weight, settings in weights.items():
        runs[weight] = train(f"{weight}", *settings, *SGD, "max_grad_norm=0", "gradient_accumulation=2", "steps=1")
    losses = {weight: lines(folder)[0] for weight, folder in runs.items()}
    assert losses[0.0]["loss"] == losses[1.0]["loss"] == losses[3.0]["loss"]
    assert "prior_loss" not in losses[0.0]
    assert losses[3.0]["prior_loss"] == pytest.approx(3 * losses[1.0]["prior_loss"], rel=1e-6)
    none, one, three = (adapter(runs[weight]) for weight in (0.0, 1.0, 3.0))
    seconds = [name for name in none if "lora_B" in name]
    assert max((one[name] - none[name]).abs().max().item() for name in seconds) > 1e-4
    for name in seconds:
        torch.testing.assert_close(three[name] - none[name], 3 * (one[name] - none[name]), rtol=1e-3, atol=1e-6)


def test_a_run_with_class_pictures_goes_on_to_the_bit(train, given):
    whole = train("whole", *given, "checkpoint_every=2")
    rest = train("rest", *given, "checkpoint_every=2", f"resume={whole / 'checkpoints' / 'step_000002'}")
    assert lines(rest) == [line for line in lines(whole) if line["step"] > 2]
    assert same_tensors(adapter(rest), adapter(whole))
    assert len(values(whole, "prior_loss")) == 4


def test_a_run_with_other_class_pictures_does_not_go_on_unasked(train, given, class_folder, tmp_path):
    whole = train("whole", *given, "checkpoint_every=2")
    moved = tmp_path / "moved"
    shutil.copytree(class_folder, moved)
    again = [*given[:2], f"preservation.dataset.path={class_folder}", f"resume={whole / 'checkpoints' / 'step_000002'}"]
    draw_picture(90, (50, 100)).save(moved / "3.png")
    try:
        class_folder.rename(tmp_path / "kept")
        moved.rename(class_folder)
        with pytest.raises(ValueError, match=r"samples.*1 changed.*3\.png"):
            train("rest", *again, "checkpoint_every=2")
    finally:
        class_folder.rename(moved)
        (tmp_path / "kept").rename(class_folder)


def test_class_pictures_are_among_the_samples_of_a_bad_step(train, given, monkeypatch):
    def ruined(model, noised, *rest):
        losses = training_loss(model, noised, *rest)
        return replace(losses, total=losses.total * math.nan)

    training_loss = objective.training_loss
    monkeypatch.setattr(objective, "training_loss", ruined)
    with pytest.raises(ValueError, match=r"class0/\d\.png"):
        train("run", *given, "max_nonfinite_steps=1")


# ------------------------------------------------------------------ planner and settings


@pytest.mark.slow
def test_the_planner_counts_their_pass_and_their_drawing(small, given, drawn):
    def planned(*settings):
        run = load_config(compose(*small("batch_size=4", *settings)))
        planner = Planner(workload_of(run, on_gpu=True))
        return planner, planner.predict(choice_of(run.composed["memory"]))

    (_, plain), (planner, read), (_, made) = planned(), planned(*given, "preservation.share=0.5"), planned(*drawn(3))
    assert planner.class_share == 0.5
    assert sum(read.work.flops.values()) == pytest.approx(1.5 * sum(plain.work.flops.values()))
    assert read.phases["step"] == plain.phases["step"]  # one after the other, and never the larger
    assert "class images" not in read.phases
    assert 0 < made.total("class images") < made.total("step")
    assert not planner.job.usual


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, r"prompts=\[\].*dataset=(None|null)"),
        ({"prompts": ["a"], "dataset": {"path": "x"}}, r"prompts=\['?a'?\].*dataset="),
        ({"prompts": "a"}, r"preservation\.prompts='?a'?"),
        ({"dataset": "x"}, r"preservation\.dataset='?x'?"),
        ({"prompts": ["a"], "weight": 0}, r"preservation\.weight=0"),
        ({"prompts": ["a"], "share": 0}, r"preservation\.share=0"),
        ({"prompts": ["a"], "share": 1.5}, r"preservation\.share=1\.5"),
        ({"prompts": ["a"], "count": 0}, r"preservation\.count=0"),
        ({"prompts": ["a"], "count": 10**9}, r"preservation\.count=1000000000"),
        ({"prompts": ["a"], "seed": -1}, r"preservation\.seed=-1"),
        ({"prompts": ["a"], "width": 50}, r"preservation\.width=50"),
        ({"prompts": ["a"], "steps": 0}, r"preservation\.steps=0"),
        ({"prompts": ["a"], "steps": 10**6}, r"preservation\.steps=1000000"),
        (
            {"prompts": ["a"], "width": 1 << 20, "height": 1 << 20},
            r"preservation\.width=1048576.*8192 x 8192",
        ),
        ({"prompts": ["a"], "guidance": 1e9}, r"preservation\.guidance=1000000000\.0"),
        ({"prompts": ["a"], "seed": 2**63}, r"preservation\.seed=9223372036854775808"),
        ({"prompts": ["a"], "seed": 1.0}, r"preservation\.seed=1\.0"),
        ({"prompts": ["a", " "]}, r"preservation\.prompts=\['?a"),
        ({"prompts": ["a", "b", "a "]}, r"preservation\.prompts=\['?a'?, '?b"),
        ({"prompts": ["a"], "guidance": "x"}, r"preservation\.guidance='?x'?"),
        ({"prompts": ["a"], "folder": ""}, r"preservation\.folder='?'?"),
    ],
)
def test_a_refused_setting_is_named_with_its_value(settings, said):
    with pytest.raises(ValueError, match=said):
        PriorPreservation(**settings)


@pytest.mark.parametrize(("share", "what"), [(0.25, "0.5"), (0.3, "0.6"), (0.75, "1.5")])
def test_a_share_that_is_no_whole_number_of_pictures_is_refused_before_anything_is_loaded(small, given, share, what):
    with pytest.raises(ValueError, match=rf"preservation\.share={share}\b.*batch_size=2.*\b{what}\b"):
        load_config(compose(*small(*given, f"preservation.share={share}")))
    assert PriorPreservation(prompts=["a"], share=1 / 3).images_per_batch(3) == 1


def test_a_misspelt_setting_of_their_dataset_is_named(small, given):
    run = load_config(compose(*small(*given, "+preservation.dataset.recursiv=true")))
    with pytest.raises(ValueError, match=r"preservation\.dataset\.recursiv.* did you mean .*recursive"):
        prepare_samples(run)
