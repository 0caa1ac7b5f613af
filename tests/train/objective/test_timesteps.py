import math
from statistics import NormalDist

import pytest
import torch
from train_helpers import compose

from flux2.sampling import schedule, shift
from train.objective import objective
from train.objective.timesteps import LogitNormal, LogSNR, Mode, Uniform
from train.stages.memory import load_config

pytest_plugins = ("train_helpers",)

COUNT = 4000
KOLMOGOROV = 1.63 / math.sqrt(COUNT)  # the distance of a sample's distribution that one in a hundred goes beyond


def draws(timesteps, tokens, count=COUNT):
    generator = torch.Generator().manual_seed(0)
    return torch.stack([timesteps.draw(generator, tokens) for _ in range(count)])


def logit_normal(share, mean=0.0, std=1.0):
    return 1 / (1 + math.exp(-NormalDist(mean, std).inv_cdf(share)))


def mode(share, scale):
    u = 1 - share  # times fall as u rises
    return 1 - u - scale * (math.cos(math.pi * u / 2) ** 2 - 1 + u)


def signal_to_noise(share, mean, std):
    """sigmoid(-l / 2) of a normal l, which falls as l rises."""
    return 1 / (1 + math.exp(NormalDist(mean, std).inv_cdf(1 - share) / 2))


def times_odds(time, factor):
    odds = factor * time / (1 - time)
    return odds / (1 + odds)


@pytest.mark.parametrize(
    ("timesteps", "tokens", "quantile"),
    [
        (Uniform(), 64, lambda q: q),
        (Uniform("resolution"), 4096, lambda q: times_odds(q, math.exp(1.15))),
        (Uniform(2.5), 64, lambda q: times_odds(q, 2.5)),
        (LogitNormal(shift="none"), 64, logit_normal),
        (LogitNormal(-0.5, 0.7, "none"), 64, lambda q: logit_normal(q, -0.5, 0.7)),
        (LogitNormal(), 256, lambda q: times_odds(logit_normal(q), math.exp(0.5))),
        (LogitNormal(shift=0.5), 64, lambda q: times_odds(logit_normal(q), 0.5)),
        (Mode(), 64, lambda q: mode(q, 1.29)),
        (Mode(-0.8), 64, lambda q: mode(q, -0.8)),
        (Mode(1.0, 3.0), 64, lambda q: times_odds(mode(q, 1.0), 3.0)),
        (LogSNR(), 64, lambda q: signal_to_noise(q, -6.0, 2.0)),
        (LogSNR(1.0, 3.0, 2.0), 64, lambda q: times_odds(signal_to_noise(q, 1.0, 3.0), 2.0)),
    ],
)
def test_the_draws_of_a_density_have_the_quantiles_of_its_closed_form(timesteps, tokens, quantile):
    times = draws(timesteps, tokens)
    assert times.dtype == torch.float32
    assert ((times >= 0) & (times <= 1)).all()
    for share in (0.02, 0.1, 0.25, 0.5, 0.75, 0.9, 0.98):
        below = (times < quantile(share)).float().mean().item()
        assert below == pytest.approx(share, abs=KOLMOGOROV)


@pytest.mark.parametrize(
    ("make", "tokens"),
    [
        (lambda **more: Uniform(2.5, **more), 64),
        (lambda **more: LogitNormal(**more), 1024),
        (lambda **more: LogitNormal(-0.5, 0.7, "none", **more), 64),
        (lambda **more: Mode(**more), 64),
        (lambda **more: Mode(-0.8, 3.0, **more), 64),
        (lambda **more: LogSNR(**more), 64),
    ],
)
@pytest.mark.parametrize(("low", "high"), [(0.3, 0.8), (0.0, 0.6), (0.7, 1.0)])
def test_a_range_keeps_the_shape_of_the_distribution_in_it(make, tokens, low, high):
    every, times = draws(make(), tokens, 20_000), draws(make(min=low, max=high), tokens)
    assert times.dtype == torch.float32
    assert low <= times.min() < times.max() <= high
    within = every[(every >= low) & (every <= high)]
    assert len(within) > 80
    allowed = KOLMOGOROV + 1.63 / math.sqrt(len(within))
    for share in (0.1, 0.25, 0.5, 0.75, 0.9):
        below = (times < within.quantile(share)).float().mean().item()
        assert below == pytest.approx(share, abs=allowed)


def test_the_whole_range_is_to_the_bit_no_range():
    assert torch.equal(draws(LogitNormal(min=0, max=1), 64, 50), draws(LogitNormal(), 64, 50))


def test_a_range_with_almost_nothing_of_the_distribution_is_refused_for_the_sizes_of_the_run():
    few = ["timesteps.shift=none", "timesteps.std=0.1", "timesteps.min=0.9"]
    with pytest.raises(ValueError, match=r"timesteps\.min=0\.9 with timesteps\.max=1\.0: only .*tokens"):
        load_config(compose("device=cpu", *few))
    load_config(compose("device=cpu", *few, "timesteps.min=0.6"))


def test_a_run_with_a_range_trains_in_it(train, batches, monkeypatch):
    seen, add = [], objective.add_noise
    monkeypatch.setattr(objective, "add_noise", lambda batch, drawn: (seen.append(drawn.times), add(batch, drawn))[1])
    train("run", "timesteps.min=0.55", "timesteps.max=0.7")
    times = torch.cat(seen)
    assert len(set(times.tolist())) == len(times) == 8
    assert times.min() >= 0.55
    assert times.max() <= 0.7


@pytest.mark.parametrize("steps", [4, 28, 50])
@pytest.mark.parametrize("tokens", [256, 4096, 6000])
def test_the_empirical_shift_is_that_of_sampling(steps, tokens):
    timesteps = Uniform("empirical")
    timesteps.sampled_in(steps)
    even = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    torch.testing.assert_close(shift(even, timesteps.mu(tokens)).float(), schedule(steps, tokens))


def test_the_empirical_shift_is_read_off_the_two_published_lines():
    at_10, at_200 = 8.73809524e-05 * 4096 + 1.89833333, 0.00016927 * 4096 + 0.45666666
    between = at_10 + (at_200 - at_10) * (50 - 10) / 190
    assert Uniform("empirical", steps=50).mu(4096) == pytest.approx(between, rel=1e-9)
    assert between == pytest.approx(2.0234, abs=1e-4)


def test_the_empirical_shift_follows_the_models_own_steps_unless_others_are_given():
    given = {"klein_4b": 4, "klein_base_4b": 50, "dev": 28}
    for model, steps in given.items():
        run = load_config(compose(f"model={model}", "timesteps.shift=empirical", "device=cpu"))
        assert run.timesteps.sampling_steps == steps
    few = load_config(compose("model=klein_base_4b", "timesteps.shift=empirical", "timesteps.steps=4", "device=cpu"))
    assert few.timesteps.mu(1024) == load_config(
        compose("model=klein_4b", "timesteps=uniform", "timesteps.shift=empirical", "device=cpu")
    ).timesteps.mu(1024)


def test_the_default_draws_are_to_the_bit_what_they_were_before_there_was_a_choice():
    timesteps, generator, again = LogitNormal(), torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    for tokens in (64, 1024, 4096):
        mu = 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)
        before = shift(torch.sigmoid(0.0 + 1.0 * torch.randn((), generator=again)), mu)
        assert torch.equal(timesteps.draw(generator, tokens), before)
    assert torch.equal(Uniform().draw(generator, 64), torch.rand((), generator=again))


def test_a_shift_of_one_is_none():
    one, none = draws(LogitNormal(shift=1.0), 64, 50), draws(LogitNormal(shift="none"), 64, 50)
    assert torch.equal(one, none)
    assert LogitNormal(shift="none").mu(4096) == 0.0


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Uniform("much"), r"timesteps\.shift='?much'?"),
        (lambda: Uniform(0), r"timesteps\.shift=0"),
        (lambda: Uniform(None), r"timesteps\.shift=(None|null)"),
        (lambda: Uniform("empirical", 0), r"timesteps\.steps=0"),
        (lambda: Uniform("none", 4), r"timesteps\.steps=4 has no effect with timesteps\.shift=none"),
        (lambda: Mode(1.8), r"timesteps\.scale=1\.8"),
        (lambda: Mode("x"), r"timesteps\.scale='?x'?"),
        (lambda: Mode(min=-0.1), r"timesteps\.min=-0\.1 must be a number from 0 to 1"),
        (lambda: Uniform(max=2), r"timesteps\.max=2 must be a number from 0 to 1"),
        (lambda: LogitNormal(min=0.5, max=0.5), r"timesteps\.min=0\.5 must be less than timesteps\.max=0\.5"),
        (lambda: LogSNR(mean=21), r"timesteps\.mean=21 must be a number from -20 to 20"),
    ],
)
def test_a_refused_setting_is_named_with_its_value(make, said):
    with pytest.raises(ValueError, match=said):
        make()
