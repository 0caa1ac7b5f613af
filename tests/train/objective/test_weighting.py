import math
from dataclasses import replace

import helpers
import pytest
import torch
from diffusers.training_utils import compute_loss_weighting_for_sd3
from loss_helpers import batch_of, losses_of, masked, stir
from train_helpers import drawn_and_mixed, values

from flux2 import adapters
from train.objective.loss import flow_loss
from train.objective.timesteps import LogitNormal
from train.objective.weighting import Bell, Cosmap, SigmaSqrt, Unweighted

pytest_plugins = ("train_helpers",)

TIMES = torch.linspace(0.02, 1.0, 50)


@pytest.mark.parametrize(("weighting", "name"), [(SigmaSqrt(most=None), "sigma_sqrt"), (Cosmap(), "cosmap")])
def test_weightings_are_those_of_diffusers(weighting, name):
    torch.testing.assert_close(weighting(TIMES), compute_loss_weighting_for_sd3(name, TIMES))


def test_sigma_sqrt_counts_no_sample_more_than_its_limit_even_without_noise():
    weights = SigmaSqrt(most=25.0)(torch.tensor([0.0, 0.1, 0.2, 0.5, 1.0]))
    torch.testing.assert_close(weights, torch.tensor([25.0, 25.0, 25.0, 4.0, 1.0]))
    with pytest.raises(ValueError, match=r"weighting\.most=0\.5.* null"):
        SigmaSqrt(most=0.5)


def test_the_bell_is_the_published_one_of_many_steps():
    count = 20000
    at = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    heights = torch.exp(-2 * ((at * count - count / 2) / count) ** 2)
    expected = (heights - heights.min()) * count / (heights - heights.min()).sum()
    torch.testing.assert_close(Bell()(at), expected, atol=1e-3, rtol=0)
    assert Bell()(torch.tensor([0.0, 1.0])).abs().max() < 1e-6


@pytest.mark.parametrize("weighting", [Cosmap(), Bell()])
def test_over_uniform_times_the_mean_weight_is_one(weighting):
    at = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    assert weighting(at).mean().item() == pytest.approx(1.0, abs=1e-4)


def test_weights_multiply_each_samples_loss_also_where_it_is_masked():
    prediction, target = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)), torch.zeros(2, 3, 4)
    weights = torch.tensor([0.5, 3.0])
    squares = prediction.square().mean(-1)
    plain = (0.5 * squares[0].mean() + 3.0 * squares[1].mean()) / 2
    torch.testing.assert_close(flow_loss(prediction, target, None, weights), plain)
    mask = torch.tensor([[1.0, 0.0, 0.5], [0.0, 0.25, 0.0]])[..., None]
    first = (squares[0, 0] + 0.5 * squares[0, 2]) / 1.5
    torch.testing.assert_close(flow_loss(prediction, target, mask, weights), (0.5 * first + 3.0 * squares[1, 1]) / 2)


def test_no_weighting_computes_nothing():
    assert Unweighted()(TIMES) is None


def test_weights_go_to_the_samples_of_their_times_and_not_to_the_preserved_part():
    model = adapters.attach(helpers.transformers("dev")[0], rank=3).train()
    stir(model)
    whole = masked(batch_of(3))
    noised, plain = drawn_and_mixed(whole, LogitNormal(), 0, 0), batch_of(2, start=20).embeddings
    weights = Cosmap()(noised.times)
    assert weights.std() > 0.05
    losses = losses_of(model, noised, whole.embeddings, 1.0, 0.5, plain, weights)
    alone = [
        losses_of(model, drawn_and_mixed(one, LogitNormal(), 0, 0), one.embeddings, 1.0).flow
        for one in (replace(batch_of(1, start=i), mask=whole.mask[i : i + 1]) for i in range(3))
    ]
    torch.testing.assert_close(losses.flow, (torch.stack(alone) * weights).mean())
    unweighted = losses_of(model, noised, whole.embeddings, 1.0, 0.5, plain)
    torch.testing.assert_close(losses.preservation, unweighted.preservation)
    torch.testing.assert_close(losses.total.detach(), losses.flow + 0.5 * losses.preservation)


def test_a_weighted_run_trains_another_loss_and_validates_the_same_one(train):
    plain = train("plain", "steps=1", "validate_every=1")
    weighted = train("weighted", "steps=1", "validate_every=1", "weighting=sigma_sqrt")
    assert values(plain, "validation_loss")[0] == values(weighted, "validation_loss")[0]
    assert values(weighted)[0] > 1.01 * values(plain)[0]
    assert not math.isclose(values(plain, "validation_loss")[1], values(weighted, "validation_loss")[1], rel_tol=1e-9)
