"""The group `loss`: distances against torch's, masks and weights, and what they do to what is learned."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from train_helpers import compose, lines, refusal, run_training, values

from train.objective import MAE, MSE, Huber, PseudoHuber
from train.stages.memory import load_config

pytest_plugins = ("train_helpers",)

PREDICTION, TARGET = torch.randn(2, 2, 5, 8, generator=torch.Generator().manual_seed(0))
TIMES = torch.tensor([0.25, 1.0])
MASK = torch.tensor([[1.0, 0.0, 0.5, 0.0, 1.0], [0.0, 0.25, 0.0, 1.0, 0.0]])[..., None]
EVERY = [MSE(), MAE(), Huber(0.5), PseudoHuber(0.3), Huber(0.2, "exponential"), PseudoHuber(0.2, "exponential")]


def test_each_is_the_one_of_torch_or_of_its_formula():
    d = PREDICTION - TARGET
    torch.testing.assert_close(MAE()(PREDICTION, TARGET), F.l1_loss(PREDICTION, TARGET))
    torch.testing.assert_close(Huber(0.5)(PREDICTION, TARGET), F.huber_loss(PREDICTION, TARGET, delta=0.5))
    torch.testing.assert_close(PseudoHuber(0.3)(PREDICTION, TARGET), ((d**2 + 0.09).sqrt() - 0.3).mean())
    assert torch.equal(MSE()(PREDICTION, TARGET), F.mse_loss(PREDICTION, TARGET))


@pytest.mark.parametrize("kind", [Huber, PseudoHuber])
def test_delta_by_time_falls_from_one_at_the_image_to_delta_at_the_noise(kind):
    for time, delta in ((0.0, 1.0), (0.5, math.sqrt(0.04)), (1.0, 0.04)):
        scheduled = kind(0.04, "exponential")(PREDICTION, TARGET, times=torch.full((2,), time))
        torch.testing.assert_close(scheduled, kind(delta)(PREDICTION, TARGET))
    mixed = kind(0.04, "exponential")(PREDICTION, TARGET, times=torch.tensor([0.0, 1.0]))
    parts = [kind(delta)(PREDICTION[i : i + 1], TARGET[i : i + 1]) for i, delta in enumerate((1.0, 0.04))]
    torch.testing.assert_close(mixed, sum(parts) / 2)


@pytest.mark.parametrize("loss", EVERY, ids=str)
def test_masks_and_weights_apply_to_every_distance(loss):
    weights = torch.tensor([0.5, 3.0])
    each = loss.distances(PREDICTION, TARGET, TIMES).mean(-1)  # (B, n)
    by_sample = [(each[i] * MASK[i, :, 0]).sum() / MASK[i].sum() for i in range(2)]
    expected = (0.5 * by_sample[0] + 3.0 * by_sample[1]) / 2
    torch.testing.assert_close(loss(PREDICTION, TARGET, MASK, weights, TIMES), expected)
    everywhere, ones = torch.ones(2, 5, 1), torch.ones(2)
    torch.testing.assert_close(loss(PREDICTION, TARGET, everywhere, ones, TIMES), loss(PREDICTION, TARGET, times=TIMES))


def learned(loss: MSE) -> float:
    """The constant that has the least loss over nine targets of 0 to 1 and an outlier."""
    target = torch.tensor([*torch.linspace(0, 1, 10).tolist(), 100.0])[None, :, None]
    guess = torch.zeros(1, 1, 1, requires_grad=True)
    optimizer = torch.optim.Adam([guess], lr=0.05)
    for step in range(3000):
        optimizer.param_groups[0]["lr"] = 0.2 * (1 - step / 3000)
        optimizer.zero_grad()
        loss(guess.expand_as(target), target).backward()
        optimizer.step()
    return guess.item()


def test_an_outlier_moves_the_mean_and_not_what_the_robust_ones_learn():
    assert learned(MSE()) == pytest.approx((5 + 100) / 11, rel=0.01)
    median = 5 / 9
    assert learned(MAE()) == pytest.approx(median, abs=0.06)
    assert learned(PseudoHuber(0.01)) == pytest.approx(median, abs=0.06)
    assert median < learned(Huber(0.5)) < 0.8
    assert learned(Huber(1e3)) == pytest.approx((5 + 100) / 11, rel=0.01)


def test_a_run_trains_the_loss_of_its_group_and_validates_the_squared_one(train):
    runs = {loss: train(loss, f"loss={loss}", "validate_every=4") for loss in ("mse", "mae", "huber", "pseudo_huber")}
    assert len({values(run, "validation_loss")[0] for run in runs.values()}) == 1
    assert len({values(run, "validation_loss")[1] for run in runs.values()}) == 4
    first = {loss: values(run)[0] for loss, run in runs.items()}
    assert first["huber"] == pytest.approx(0.1 * (first["mae"] - 0.05), rel=0.01)  # nearly all differences are larger
    assert first["pseudo_huber"] == pytest.approx(first["mae"] - 0.01, rel=0.01)
    assert first["mae"] < first["mse"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("loss=huber loss.delta=0", r"loss\.delta=0 must be a number from 1e-06 to 1e\+06"),
        ("loss=pseudo_huber loss.delta=x", r"loss\.delta='?x'? must be a number"),
        ("loss=huber loss.delta_schedule=snr", r"loss\.delta_schedule='?snr'? must be one of constant, exponential"),
        ("loss=huber loss.delta=1 loss.delta_schedule=exponential", r"delta_schedule=exponential has no effect"),
        ("dataset.loss_weight=0", r"dataset\.loss_weight=0 must be a number from 1e-06 to 1e\+06"),
    ],
)
def test_a_refused_setting_is_named_with_its_value(words, said):
    def check(config):
        load_config(config).instantiate("dataset")

    with pytest.raises(ValueError, match=said):
        check(compose("device=cpu", *words.split()))


def test_a_loss_without_delta_refuses_one():
    assert "loss.delta" in refusal("device=cpu", "+loss.delta=0.1")


# ------------------------------------------------------------------ datasets


@pytest.fixture
def opposites(small, tmp_path):
    """Settings of a run on a mix of two datasets: with one caption, a white picture in `a` and a black one in `b`."""
    settings = [setting for setting in small("batch_size=4") if not setting.startswith("dataset")] + ["dataset=mix"]
    for name, color in (("a", "white"), ("b", "black")):
        folder = tmp_path / name
        folder.mkdir()
        Image.new("RGB", (48, 48), color).save(folder / "0.png")
        (folder / "0.txt").write_text("a red cup")
        settings += [f"+dataset@dataset.sources.{name}=folder", f"dataset.sources.{name}.path={folder}"]
    return settings


def test_of_two_datasets_that_contradict_each_other_the_one_of_more_weight_is_learned(opposites, batches, tmp_path):
    def gain(weight: str) -> float:
        """How much more the validation loss of the picture of `a` falls than that of `b`."""
        own = [f"dataset.sources.b.loss_weight={weight}", f"output_dir={tmp_path / weight}"]
        run = run_training(compose(*opposites, *own, "steps=30", "validate_every=30")).parent
        rows = [json.loads(line) for line in (run / "validation.jsonl").read_text().splitlines()]
        mean = [
            {
                Path(name).parent.name: sum(losses) / 5
                for name, losses in zip(row["samples"], row["losses"], strict=True)
            }
            for row in rows
        ]
        return (mean[0]["a"] - mean[1]["a"]) - (mean[0]["b"] - mean[1]["b"])

    less, same, more = gain("1e-3"), gain("1.0"), gain("1e+3")
    assert batches[0].weights.tolist() == [1.0 if index == 0 else pytest.approx(1e-3) for index in batches[0].indices]
    assert less > same + 0.01 > more + 0.03


def test_equal_weights_are_none_and_leave_a_run_as_it_was(train, reference, batches):
    run = train("run", "dataset.loss_weight=1")
    assert lines(run) == lines(reference())
    assert {batch.weights for batch in batches} == {None}
