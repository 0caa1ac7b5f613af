import math
from dataclasses import replace
from itertools import pairwise

import helpers
import pytest
import torch
import torch.nn.functional as F
from loss_helpers import batch_of, losses_of, masked, stir
from train_helpers import drawn_and_mixed

from data.loader import Batch
from flux2 import adapters
from flux2.adapters.files import layer_pairs
from flux2.models.positions import from_tokens, to_tokens
from flux2.sampling import shift
from train.objective.loss import flow_loss
from train.objective.noise import Noised, noise_at
from train.objective.preservation import Preservation
from train.objective.timesteps import LogitNormal, Uniform

REFERENCES = [(2, 2)] * 2
DIFFERENT_SIZES = [(2, 3), (4, 2), (1, 5)]  # rows and columns of latents


def draws(timesteps, tokens, count=4000):
    generator = torch.Generator().manual_seed(0)
    return torch.stack([timesteps.draw(generator, tokens) for _ in range(count)])


@pytest.fixture
def model():
    """A small dev with a LoRA that changes it, in training mode."""
    wrapped = adapters.attach(helpers.transformers("dev")[0], rank=3)
    return wrapped.train()


# ------------------------------------------------------------------ times


def test_the_shift_multiplies_the_odds_as_at_512_and_at_1024_pixels():
    assert math.exp(LogitNormal().mu(1024)) == pytest.approx(1.8776, abs=1e-4)
    assert math.exp(LogitNormal().mu(4096)) == pytest.approx(3.1582, abs=1e-4)
    assert LogitNormal().mu(256) == pytest.approx(0.5)
    assert math.exp(LogitNormal(shift=2.5).mu(4096)) == pytest.approx(2.5)
    assert LogitNormal(shift=1.0).mu(4096) == 0.0


def test_a_shifted_time_has_its_odds_multiplied():
    plain, shifted = LogitNormal(shift=1.0), LogitNormal(shift=3.0)
    one = plain.draw(torch.Generator().manual_seed(3), 64)
    other = shifted.draw(torch.Generator().manual_seed(3), 64)
    assert (other / (1 - other) / (one / (1 - one))).item() == pytest.approx(3.0, rel=1e-4)
    assert shift(one, math.log(3.0)) == other


@pytest.mark.parametrize(("mean", "std", "factor"), [(0.0, 1.0, 1.0), (-0.5, 0.7, 2.0)])
def test_the_logits_are_normal_with_the_mean_and_deviation_asked_for(mean, std, factor):
    times = draws(LogitNormal(mean, std, factor), 64)
    assert ((times > 0) & (times < 1)).all()
    logits = torch.log(times / (1 - times)) - math.log(factor)
    assert logits.mean().item() == pytest.approx(mean, abs=4 * std / math.sqrt(len(times)))
    assert logits.std().item() == pytest.approx(std, rel=0.04)
    # a normal distribution, and not another of this mean and deviation: shares within one and two deviations
    distance = ((logits - mean) / std).abs()
    assert (distance < 1).float().mean().item() == pytest.approx(0.6827, abs=0.03)
    assert (distance < 2).float().mean().item() == pytest.approx(0.9545, abs=0.015)


def test_larger_pictures_are_trained_at_noisier_times():
    medians = [draws(LogitNormal(), tokens, 1500).median().item() for tokens in (64, 1024, 4096)]
    assert all(a + 0.03 < b for a, b in pairwise(medians))
    assert medians[2] == pytest.approx(3.1582 / 4.1582, abs=0.03)


def test_uniform_times_have_the_moments_of_the_unit_interval():
    times = draws(Uniform(), 64)
    assert times.mean().item() == pytest.approx(0.5, abs=0.02)
    assert times.var().item() == pytest.approx(1 / 12, rel=0.05)
    assert 0 <= times.min() < 0.01
    assert 0.99 < times.max() <= 1


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"mean": "x"}, "timesteps.mean='x'"),
        ({"std": 0}, "timesteps.std=0"),
        ({"std": True}, "timesteps.std=True"),
        ({"shift": "much"}, "timesteps.shift='much'"),
        ({"shift": -1}, "timesteps.shift=-1"),
        ({"mean": math.nan}, "timesteps.mean=nan"),
    ],
)
def test_a_refused_setting_of_the_times_is_named_with_its_value(settings, key):
    with pytest.raises(ValueError, match=key.replace(".", r"\.")):
        LogitNormal(**settings)


# ------------------------------------------------------------------ mixing


def test_a_picture_and_noise_are_mixed_by_the_time_and_the_target_leads_from_the_one_to_the_other():
    batch = batch_of(3)
    noise = torch.randn_like(batch.latents)
    times = torch.tensor([0.0, 0.25, 1.0])
    noised = noise_at(batch, times, noise)
    assert torch.equal(noised.tokens[0], to_tokens(batch.latents)[0])
    assert torch.equal(noised.tokens[2], to_tokens(noise)[2])
    mixed = 0.75 * batch.latents[1] + 0.25 * noise[1]
    torch.testing.assert_close(noised.tokens[1], to_tokens(mixed[None])[0])
    torch.testing.assert_close(noised.target, to_tokens(noise) - to_tokens(batch.latents))
    # one step along the target from any time arrives at the picture
    arrived = noised.tokens - times[:, None, None] * noised.target
    torch.testing.assert_close(arrived, to_tokens(batch.latents), atol=1e-5, rtol=0)


def test_references_follow_the_noisy_tokens_unmixed_and_are_not_part_of_the_target():
    batch = batch_of(2, references=REFERENCES)
    noised = drawn_and_mixed(batch, LogitNormal(), seed=1, step=2)
    assert noised.tokens.shape == (2, 6 + 4 + 4, 128)
    assert torch.equal(noised.tokens[:, 6:10], to_tokens(batch.references[0]))
    assert torch.equal(noised.tokens[:, 10:], to_tokens(batch.references[1]))
    assert noised.target.shape == (2, 6, 128)
    assert noised.positions.shape == (14, 4)


def test_noise_and_time_depend_on_seed_step_and_position_and_not_on_how_the_batch_is_cut():
    whole = drawn_and_mixed(batch_of(4), LogitNormal(), seed=3, step=5)
    parts = [
        drawn_and_mixed(batch_of(count, start=start), LogitNormal(), 3, 5) for start, count in ((0, 1), (1, 2), (3, 1))
    ]
    assert torch.equal(whole.tokens, torch.cat([part.tokens for part in parts]))
    assert torch.equal(whole.times, torch.cat([part.times for part in parts]))
    assert torch.equal(whole.target, torch.cat([part.target for part in parts]))
    assert len(set(whole.times.tolist())) == 4
    for seed, step in ((4, 5), (3, 6)):
        other = drawn_and_mixed(batch_of(4), LogitNormal(), seed, step)
        assert (other.times != whole.times).all()
        assert not torch.equal(other.target, whole.target)


def test_the_global_generator_is_neither_used_nor_moved():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    one = drawn_and_mixed(batch_of(2), LogitNormal(), 0, 0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(one.tokens, drawn_and_mixed(batch_of(2), LogitNormal(), 0, 0).tokens)


# ------------------------------------------------------------------ the loss


def test_the_loss_is_the_mean_squared_difference_to_the_target(model):
    stir(model)
    batch = batch_of(2, references=REFERENCES[:1])
    noised = drawn_and_mixed(batch, LogitNormal(), 0, 0)
    losses = losses_of(model, noised, batch.embeddings, 2.0)
    with torch.no_grad():
        guidance = torch.full((2,), 2.0)
        prediction = model(
            noised.tokens, noised.positions, batch.embeddings, noised.text_at, noised.times, guidance, keep=6
        )
    torch.testing.assert_close(losses.total.detach(), (prediction - noised.target).square().mean())
    assert losses.flow == losses.total
    assert losses.preservation == 0
    assert not losses.flow.requires_grad
    assert losses_of(model, noised, batch.embeddings, 3.0).total != losses.total


def test_only_the_adapter_has_gradients(model):
    batch = batch_of(2)
    losses_of(model, drawn_and_mixed(batch, LogitNormal(), 0, 0), batch.embeddings, 1.0).total.backward()
    gradients = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert gradients == {name for name, parameter in model.named_parameters() if "lora_" in name}
    assert len(gradients) == 2 * len(layer_pairs(model.get_base_model()))


def test_a_rescaled_prediction_for_chosen_rows_is_that_of_the_rows_alone(model):
    batch = batch_of(3)
    noised = drawn_and_mixed(batch, LogitNormal(), 0, 0)
    rows = slice(0, 2)
    whole = noised.predict(model, batch.embeddings, 1.0)
    torch.testing.assert_close(noised.predict(model, batch.embeddings[rows], 1.0, rows), whole[rows])


# ------------------------------------------------------------------ beside diffusers


@pytest.mark.parametrize("references", [0, 1, 3])
@pytest.mark.parametrize(("kind", "guidance"), [("dev", 1.0), ("klein", None)])
@torch.no_grad()
def test_a_step_has_the_prediction_target_and_loss_of_diffusers(kind, guidance, references):
    """Pictures that are not square, references of different sizes, two samples that differ in everything."""
    model, reference = helpers.transformers(kind)
    batch = batch_of(2, references=DIFFERENT_SIZES[:references], size=(3, 4), kind=kind)
    noise = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(11))
    times = torch.tensor([0.3, 0.85])
    noised = noise_at(batch, times, noise)
    steps = []
    for row in (slice(0, 1), slice(1, 2)):
        own = [one[row] for one in batch.references]
        text = batch.embeddings[row]
        steps.append(helpers.published_step(reference, batch.latents[row], own, text, times[row], noise[row], guidance))
    predicted, target, losses = (torch.cat(parts) for parts in zip(*steps, strict=True))

    ours = from_tokens(noised.predict(model, batch.embeddings, guidance), 3, 4)
    assert helpers.relative_error(ours, predicted) <= 1e-5
    assert torch.equal(from_tokens(noised.target, 3, 4), target)
    total = losses_of(model, noised, batch.embeddings, guidance).total
    assert total.item() == pytest.approx(losses.mean().item(), rel=1e-5)
    assert abs(losses[0] - losses[1]) > 0.01 * losses[0], "the two samples say the same"
    if references:  # and they count: without them the prediction is another
        alone = noise_at(replace(batch, references=[]), times, noise).predict(model, batch.embeddings, guidance)
        assert helpers.relative_error(from_tokens(alone, 3, 4), predicted) > 0.01


# ------------------------------------------------------------------ preservation


def held(model, weight=1.0, count=2):
    """Losses of a batch of three, `count` of which are held on plain prompts."""
    batch = batch_of(3)
    plain = batch_of(count, start=20).embeddings
    return (
        losses_of(model, drawn_and_mixed(batch, LogitNormal(), 0, 0), batch.embeddings, 1.0, weight, plain),
        batch,
        plain,
    )


def test_a_fresh_adapter_has_nothing_to_preserve(model):
    losses, batch, _ = held(model)
    alone = losses_of(model, drawn_and_mixed(batch, LogitNormal(), 0, 0), batch.embeddings, 1.0)
    assert losses.preservation.item() < 1e-10
    torch.testing.assert_close(losses.flow, alone.flow)
    (losses.total - alone.total).backward()  # what the part adds
    gradients = [parameter.grad.abs().max().item() for parameter in adapters.adapter_parameters(model)]
    assert max(gradients) < 1e-6


def test_the_prediction_is_held_to_the_bases_own_at_the_same_noisy_latents(model):
    stir(model)
    losses, batch, plain = held(model)
    noised = drawn_and_mixed(batch, LogitNormal(), 0, 0)
    base = helpers.transformers("dev")[0]  # the same weights without an adapter
    with torch.no_grad():
        arguments = (noised.tokens[:2], noised.positions, plain, noised.text_at, noised.times[:2], torch.ones(2))
        difference = (model(*arguments, keep=6) - base(*arguments, keep=6)).square().mean()
    assert difference > 1e-3
    torch.testing.assert_close(losses.preservation, difference)


def test_the_weight_applies_to_the_preserved_part_alone(model):
    stir(model)
    light, heavy = held(model, 0.5)[0], held(model, 4.0)[0]
    assert light.flow == heavy.flow
    assert light.preservation == heavy.preservation > 0
    torch.testing.assert_close(light.total.detach(), light.flow + 0.5 * light.preservation)
    torch.testing.assert_close(heavy.total.detach(), heavy.flow + 4.0 * heavy.preservation)


def test_the_part_pulls_towards_the_base_and_the_base_gets_no_gradient(model):
    stir(model)
    optimizer = torch.optim.SGD(adapters.adapter_parameters(model), lr=0.02)
    differences = []
    for _ in range(4):
        losses, batch, _ = held(model)
        alone = losses_of(model, drawn_and_mixed(batch, LogitNormal(), 0, 0), batch.embeddings, 1.0)
        differences.append(losses.preservation.item())
        optimizer.zero_grad()
        (losses.total - alone.total).backward()
        optimizer.step()
    assert differences == sorted(differences, reverse=True)
    assert differences[-1] < 0.9 * differences[0]
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if "lora_" not in name)


def test_dropout_of_the_adapter_does_not_reach_the_bases_prediction():
    model = adapters.attach(helpers.transformers("dev")[0], rank=3, dropout=0.5).train()
    assert held(model)[0].preservation.item() < 1e-10  # B is zero: with dropout in the base they would still be equal
    stir(model)
    base = helpers.transformers("dev")[0]
    batch = batch_of(2)
    noised = drawn_and_mixed(batch, LogitNormal(), 0, 0)
    with adapters.adapters_disabled(model):
        off = noised.predict(model, batch.embeddings, 1.0)
    torch.testing.assert_close(off, noised.predict(base, batch.embeddings, 1.0), atol=0, rtol=0)


def test_prompts_are_chosen_by_seed_step_and_position():
    kept = Preservation(1.0, [f"prompt {i}" for i in range(7)], 2)
    whole = [kept.choose(0, step, [0, 1, 2, 3]) for step in range(40)]
    cut = [[*kept.choose(0, step, [0]), *kept.choose(0, step, [1, 2, 3])] for step in range(40)]
    assert whole == cut
    assert {prompt for row in whole for prompt in row} == set(kept.prompts)
    assert whole != [kept.choose(1, step, [0, 1, 2, 3]) for step in range(40)]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"weight": -1}, r"preservation\.weight=-1"),
        ({"weight": "x"}, r"preservation\.weight='?x'?"),
        ({"samples": 1.5}, r"preservation\.samples=1\.5"),
        ({"prompts": "a red cup"}, r"preservation\.prompts='?a red cup"),
        ({"prompts": None}, r"preservation\.prompts=(None|null)"),
        ({"weight": 1.0}, r"preservation\.weight=1\.0.*preservation\.prompts"),
        ({"weight": 1.0, "samples": 1}, r"preservation\.weight=1\.0.*preservation\.prompts"),
        ({"weight": 1.0, "prompts": ["a"]}, r"preservation\.weight=1\.0.*preservation\.samples"),
    ],
)
def test_a_refused_setting_of_preservation_is_named_with_its_value(settings, said):
    with pytest.raises(ValueError, match=said):
        Preservation(**settings)


def test_without_a_weight_nothing_is_preserved():
    assert not Preservation().active
    assert not Preservation(0.0, ["a"], 1).active
    assert Preservation(0.1, ["a"], 1).active


def test_a_batch_as_the_model_sees_it_keeps_its_rows_together():
    noised = drawn_and_mixed(batch_of(2), LogitNormal(), 0, 0)
    turned = replace(noised, tokens=noised.tokens.flip(0), times=noised.times.flip(0), target=noised.target.flip(0))
    model, text = helpers.transformers("dev")[0], batch_of(2).embeddings
    straight = losses_of(model, noised, text, 1.0).total
    torch.testing.assert_close(losses_of(model, turned, text.flip(0), 1.0).total, straight)
    assert isinstance(turned, Noised)


# ------------------------------------------------------------------ masks


def test_a_masked_loss_is_the_mean_over_each_samples_tokens_weighted_and_then_over_samples():
    prediction, target = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)), torch.zeros(2, 3, 4)
    mask = torch.tensor([[1.0, 0.0, 0.5], [0.0, 0.25, 0.0]])[..., None]
    squares = prediction.square().mean(-1)
    first = (squares[0, 0] + 0.5 * squares[0, 2]) / 1.5
    expected = (first + squares[1, 1]) / 2
    torch.testing.assert_close(flow_loss(prediction, target, mask), expected)
    torch.testing.assert_close(flow_loss(prediction, target, torch.ones(2, 3, 1)), prediction.square().mean())
    nothing = torch.cat([mask[:1], torch.zeros(1, 3, 1)])
    torch.testing.assert_close(flow_loss(prediction, target, nothing), first / 2)


def test_without_a_mask_the_loss_is_the_mean_squared_error_to_the_bit():
    prediction, target = torch.randn(2, 3, 30, 128, generator=torch.Generator().manual_seed(0))
    expected = F.mse_loss(prediction, target)
    assert torch.equal(flow_loss(prediction, target, None), expected)
    assert torch.equal((prediction - target).square().mean(), expected)  # as the validation loss was written before


def test_masks_do_not_tie_a_sample_to_its_micro_batch(model):
    stir(model)
    whole = masked(batch_of(4))
    parts = [replace(batch_of(2, start=2 * i), mask=whole.mask[2 * i : 2 * i + 2]) for i in range(2)]

    def loss(batch: Batch) -> torch.Tensor:
        return losses_of(model, drawn_and_mixed(batch, Uniform(), 0, 1), batch.embeddings, 1.0).flow

    torch.testing.assert_close(loss(whole), (loss(parts[0]) + loss(parts[1])) / 2)
    assert loss(whole) != loss(replace(whole, mask=None))


def test_what_is_masked_out_has_no_gradient_and_references_are_not_masked(model):
    stir(model)
    batch = batch_of(1, references=[(2, 2)], size=(2, 3))
    mask = torch.zeros(1, 1, 2, 3)
    mask[..., 1, 2] = 1  # the last token alone
    noised = drawn_and_mixed(replace(batch, mask=mask), Uniform(), 0, 1)
    assert noised.mask.flatten().tolist() == [0, 0, 0, 0, 0, 1]
    prediction = noised.predict(model, batch.embeddings, 1.0)
    expected = (prediction[:, 5] - noised.target[:, 5]).square().mean()
    torch.testing.assert_close(losses_of(model, noised, batch.embeddings, 1.0).flow, expected)
    plain = batch.embeddings.flip(1)
    losses = losses_of(model, noised, batch.embeddings, 1.0, 0.5, plain)
    torch.testing.assert_close(losses.flow, expected.detach())
    unmasked = losses_of(model, replace(noised, mask=None), batch.embeddings, 1.0, 0.5, plain)
    torch.testing.assert_close(losses.preservation, unmasked.preservation)
