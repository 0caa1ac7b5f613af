"""Outside of a mask: a least weight, the base's prediction, and samples without their mask."""

import math
from dataclasses import replace

import helpers
import pytest
import torch
from loss_helpers import batch_of, masked, stir
from PIL import Image
from train_helpers import adapter, compose, drawn_and_mixed, refusal, values

from flux2 import adapters
from train.config.memory import choice_of
from train.objective import MSE, Huber
from train.objective.objective import Inputs, training_loss
from train.objective.timesteps import Uniform
from train.planner.from_config import workload_of
from train.planner.predictor import Planner
from train.stages.memory import load_config

pytest_plugins = ("train_helpers",)


OUTSIDE = {"unmasked_weight": 0.25, "unmasked_prior": 0.7}


@pytest.fixture
def model():
    wrapped = adapters.attach(helpers.transformers("dev")[0], rank=3).train()
    stir(wrapped)
    return wrapped


@pytest.mark.parametrize("loss", [MSE(**OUTSIDE), Huber(0.3, **OUTSIDE)], ids=str)
def test_the_loss_is_that_of_the_formula_and_the_prior_is_the_bases_prediction(model, loss):
    batch = masked(batch_of(2))
    noised = drawn_and_mixed(batch, Uniform(), 0, 0)
    with torch.no_grad():
        prediction = noised.predict(model, batch.embeddings, 1.0)
        base = noised.predict(helpers.transformers("dev")[0], batch.embeddings, 1.0)
    assert (prediction - base).square().mean() > 1e-3
    m = noised.mask.clamp(0.25, 1)
    terms = [
        (m * loss.distances(prediction, noised.target, None).mean(-1, keepdim=True)).sum((1, 2)) / m.sum((1, 2)),
        ((1 - m) * loss.distances(prediction, base, None).mean(-1, keepdim=True)).sum((1, 2)) / (1 - m).sum((1, 2)),
    ]
    weights = torch.tensor([2.0, 0.5])
    expected = (weights * (terms[0] + 0.7 * terms[1])).mean()
    losses = training_loss(model, Inputs(noised, batch.embeddings, weights), 1.0, loss)
    torch.testing.assert_close(losses.total.detach(), expected)
    losses.total.backward()
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if "lora_" not in name)


def test_a_sample_without_a_mask_has_no_prior_and_one_that_is_all_masked_only_that(model):
    loss = MSE(unmasked_prior=1.0)
    batch = replace(batch_of(2), mask=torch.stack([torch.ones(1, 2, 3), torch.zeros(1, 2, 3)]))
    noised = drawn_and_mixed(batch, Uniform(), 0, 0)
    found = training_loss(model, Inputs(noised, batch.embeddings), 1.0, loss).flow
    with torch.no_grad():
        prediction = noised.predict(model, batch.embeddings, 1.0)
        base = noised.predict(helpers.transformers("dev")[0], batch.embeddings, 1.0)
    expected = (prediction[0] - noised.target[0]).square().mean() + (prediction[1] - base[1]).square().mean()
    torch.testing.assert_close(found, expected / 2)


def test_preservation_and_prior_share_one_prediction_of_the_base(model, monkeypatch):
    rows, forward = [], type(model.get_base_model()).forward

    def spy(self, tokens, *rest, **more):
        rows.append((len(tokens), torch.is_grad_enabled()))
        return forward(self, tokens, *rest, **more)

    monkeypatch.setattr(type(model.get_base_model()), "forward", spy)
    batch, plain = masked(batch_of(3)), batch_of(2, start=20).embeddings
    noised = drawn_and_mixed(batch, Uniform(), 0, 0)
    both = training_loss(model, Inputs(noised, batch.embeddings, None, plain), 1.0, MSE(unmasked_prior=0.5), 1.0)
    assert rows == [(5, False), (5, True)]
    held = training_loss(model, Inputs(noised, batch.embeddings, None, plain), 1.0, MSE(), 1.0)
    outside = training_loss(model, Inputs(noised, batch.embeddings), 1.0, MSE(unmasked_prior=0.5))
    torch.testing.assert_close(both.preservation, held.preservation)
    torch.testing.assert_close(both.flow, outside.flow)


def test_masks_are_dropped_at_the_rate_asked_for_by_seed_step_and_position():
    loss, batch = MSE(unmasked_probability=0.3), masked(batch_of(8))
    dropped = []
    for step in range(200):
        mask = loss.with_drawn_masks(batch, 5, step).mask
        flags = [bool((row == 1).all()) for row in mask]
        assert all(
            torch.equal(row, whole) for row, whole, flag in zip(mask, batch.mask, flags, strict=True) if not flag
        )
        part = replace(batch_of(3, start=4), mask=batch.mask[4:7])
        assert torch.equal(loss.with_drawn_masks(part, 5, step).mask, mask[4:7])
        dropped += flags
    assert len({tuple(dropped[start : start + 8]) for start in range(0, 1600, 8)}) > 50  # each by its position
    assert sum(dropped) / len(dropped) == pytest.approx(0.3, abs=3 * math.sqrt(0.3 * 0.7 / 1600))
    assert MSE().with_drawn_masks(batch, 5, 0) is batch


# ------------------------------------------------------------------ runs


@pytest.fixture
def masks(small, tmp_path):
    """Settings of a run on pictures whose left half counts."""
    folder = tmp_path / "masked"
    (folder / "masks").mkdir(parents=True)
    for number, caption in enumerate(("a red cup", "a blue fox")):
        Image.effect_noise((48, 48), 90).convert("RGB").save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(caption)
        mask = Image.new("L", (48, 48))
        mask.paste(255, (0, 0, 16, 48))
        mask.save(folder / "masks" / f"{number}.png")
    return [f"dataset.path={folder}", "dataset.mask=masks"]


def test_what_is_outside_of_the_mask_stays_at_the_base_and_what_is_inside_is_learned(
    train, masks, captured, monkeypatch
):
    def differences(*settings: str) -> tuple[float, float]:
        """Squared difference of the adapter's prediction to the base's, inside and outside of the masks."""
        train(f"run{len(captured)}", *masks, *settings, "steps=40", "optimizer.lr=5e-3")
        trainer = captured[-1]
        batch = trainer.loader.micro_batches(0)[0].to("cpu", torch.float32)
        noised = drawn_and_mixed(batch, Uniform(), 3, 3)
        with torch.no_grad():
            prediction = noised.predict(trainer.peft_model, batch.embeddings, 1.0)
            with adapters.adapters_disabled(trainer.peft_model):
                base = noised.predict(trainer.peft_model, batch.embeddings, 1.0)
        square = (prediction - base).square().mean(-1, keepdim=True)
        inside = noised.mask > 0.5
        return square[inside].mean().item(), square[~inside].mean().item()

    free, held = differences(), differences("loss.unmasked_prior=1.0")
    assert held[1] < 0.3 * free[1]
    assert held[0] > 0.3 * free[0]
    assert held[0] > 1.3 * held[1]


def test_each_setting_of_masks_changes_what_a_run_learns(train, masks):
    runs = [train(f"run{i}", *masks, *more) for i, more in enumerate(([], *([f"loss.{k}=0.6"] for k in KEYS)))]
    assert len({values(run)[0] for run in runs[:2]}) == 2  # the weight counts in the first step, the prior is 0 there
    assert values(runs[2])[0] == pytest.approx(values(runs[0])[0], rel=1e-6)
    sums = [sum(tensor.double().abs().sum().item() for tensor in adapter(run).values()) for run in runs]
    assert len(set(sums)) == 4


KEYS = ("unmasked_weight", "unmasked_prior", "unmasked_probability")


@pytest.mark.parametrize("key", KEYS)
def test_without_masks_a_setting_of_them_is_refused(train, key):
    with pytest.raises(ValueError, match=rf"loss\.{key}=0\.5 has no effect: no sample has a mask\. Set dataset\.mask"):
        train("run", f"loss.{key}=0.5")


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("loss.unmasked_weight=1", r"loss.unmasked_weight=1 must be a number >= 0 and < 1. To train without masks"),
        ("loss.unmasked_probability=-1", r"loss.unmasked_probability=-1 must be a number >= 0 and < 1"),
        ("loss.unmasked_prior=x", r"loss.unmasked_prior=x must be a number from 0 to 1e+06"),
    ],
)
def test_a_refused_value_is_named(word, said):
    assert said in refusal("device=cpu", word).replace("'", "")


def test_the_planner_counts_the_bases_prediction(small):
    def planned(*more):
        run = load_config(compose(*small("batch_size=4", *more)))
        planner = Planner(workload_of(run, on_gpu=True))
        return planner.predict(choice_of(run.composed["memory"]))

    plain, prior = planned("memory.offload_blocks=1.0"), planned("memory.offload_blocks=1.0", "loss.unmasked_prior=1.0")
    forward_share = sum(prior.work.flops.values()) / sum(plain.work.flops.values()) - 1
    assert forward_share == pytest.approx(1 / 4, abs=0.08)  # forward, recompute and backward of two products each
    assert prior.moved == pytest.approx(1.5 * plain.moved, rel=0.01)
