"""flux2.sampling: the published schedule, Euler steps, guidance, and noise that belongs to its seed."""

from typing import Any

import helpers
import numpy as np
import pytest
import torch
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from torch import Tensor, nn

from flux2.models.positions import from_tokens, to_tokens
from flux2.models.variants import TransformerConfig
from flux2.sampling import empirical_mu, euler, initial_noise, sample, schedule, shift

TOKENS = (4, 256, 1024, 4096, 4300, 4301, 8160)


@pytest.mark.parametrize("steps", [1, 4, 28, 50])
@pytest.mark.parametrize("tokens", TOKENS)
def test_the_schedule_is_that_of_diffusers(tokens: int, steps: int) -> None:
    mu = compute_empirical_mu(tokens, steps)
    scheduler = helpers.make_scheduler()
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    assert empirical_mu(tokens, steps) == pytest.approx(mu, rel=1e-12)
    times = schedule(steps, tokens)
    assert times.dtype == torch.float32
    assert times.shape == (steps + 1,)
    torch.testing.assert_close(times, scheduler.sigmas, rtol=0, atol=1e-6)


def test_the_shift_of_training_is_the_published_one() -> None:
    """mu = 0.5 and 1.15, of 256 and 4096 tokens, move the middle to a / (1 + a) with a = 1.65 and 3.16."""
    for mu, a in ((0.5, 1.6487), (1.15, 3.1582)):
        assert shift(torch.tensor([0.0, 0.5, 1.0]), mu).tolist() == pytest.approx([0, a / (1 + a), 1], abs=1e-4)


def test_a_schedule_of_no_steps_is_an_error() -> None:
    with pytest.raises(ValueError, match="steps=0 must be an integer from 1"):
        schedule(0, 256)


def test_euler_steps_are_exact_for_a_straight_flow() -> None:
    noise, image = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    seen: list[Tensor] = []

    def flow(x: Tensor, time: Tensor) -> Tensor:
        seen.append(time)
        return noise - image

    torch.testing.assert_close(euler(flow, noise, schedule(5, 256)), image, rtol=0, atol=1e-5)
    assert all(time.shape == (2,) for time in seen)
    assert torch.equal(torch.stack(seen)[:, 0], schedule(5, 256)[:-1])


def test_euler_keeps_the_latents_in_float32() -> None:
    seen: list[torch.dtype] = []

    def flow(x: Tensor, _: Tensor) -> Tensor:
        seen.append(x.dtype)
        return torch.ones_like(x, dtype=torch.bfloat16)

    x = euler(flow, torch.zeros(1, 2, dtype=torch.bfloat16), schedule(3, 4))
    assert [*seen, x.dtype] == [torch.float32] * 4
    assert x.tolist() == [[pytest.approx(-1), pytest.approx(-1)]]


def test_progress_is_called_after_every_step_with_the_new_latents() -> None:
    seen: list[float] = []
    euler(
        lambda x, _: torch.ones_like(x), torch.zeros(1, 1), torch.tensor([1, 0.6, 0.0]), lambda x: seen.append(x.item())
    )
    assert seen == [pytest.approx(-0.4), pytest.approx(-1.0)]


def test_noise_belongs_to_its_seed_whatever_the_batch() -> None:
    together = initial_noise([3, 7, 3], 4, 2)
    assert together.shape == (3, 128, 4, 2)
    assert torch.equal(together[1], initial_noise([7], 4, 2)[0])
    assert torch.equal(together[0], together[2])
    assert not torch.equal(together[0], together[1])


def test_noise_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    wanted = torch.randn(3)
    torch.manual_seed(0)
    initial_noise([1, 2], 2, 2)
    assert torch.equal(torch.randn(3), wanted)


@pytest.mark.parametrize("kind", ["dev", "klein"])
def test_a_picture_depends_on_its_own_seed_whatever_the_batch(kind: str) -> None:
    model, _ = helpers.transformers(kind)
    text = torch.randn(3, 5, model.config.text_width, generator=torch.Generator().manual_seed(1))
    options: dict[str, Any] = {"steps": 3, "guidance": 3.0, "empty": text[:1]}
    together = sample(model, initial_noise([5, 6, 7], 2, 3), text, **options)
    for i, seed in enumerate([5, 6, 7]):
        alone = sample(model, initial_noise([seed], 2, 3), text[i : i + 1], **options)
        assert helpers.relative_error(alone[0], together[i]) <= 1e-5
    assert helpers.relative_error(together[1], together[0]) > 0.1


class Recorder(nn.Module):
    """A stand-in transformer whose flow is the mean of the prompt it is given, everywhere."""

    def __init__(self, guided: bool) -> None:
        super().__init__()
        self.config = TransformerConfig(1, 1, 1, 8, guidance=guided, head_dim=4, rope_axes=(4,))
        self.calls: list[dict[str, Any]] = []

    def forward(
        self, tokens: Tensor, positions: Tensor, text: Tensor, text_at: Tensor, time: Tensor, guidance: Any, keep: int
    ) -> Tensor:
        self.calls.append({"tokens": tokens, "positions": positions, "text": text, "guidance": guidance, "keep": keep})
        return text.mean((1, 2))[:, None, None].expand(-1, keep, tokens.shape[2])


def test_classifier_free_guidance_moves_away_from_the_empty_prompt() -> None:
    """The flow is empty + g (prompt - empty) = 1 + 3 (2 - 1) = 4, and the whole time is 1."""
    model, noise = Recorder(guided=False), initial_noise([0], 2, 2)
    prompt, empty = torch.full((1, 3, 8), 2.0), torch.full((1, 3, 8), 1.0)
    latents = sample(model, noise, prompt, steps=2, guidance=3.0, empty=empty)  # type: ignore[arg-type]
    torch.testing.assert_close(latents, noise - 4)
    assert [call["text"].mean().item() for call in model.calls] == [2, 1, 2, 1]
    assert all(call["guidance"] is None for call in model.calls)


def test_guidance_one_without_an_embedding_predicts_once_a_step() -> None:
    model = Recorder(guided=False)
    sample(model, initial_noise([0], 2, 2), torch.zeros(1, 3, 8), steps=4, guidance=1.0)  # type: ignore[arg-type]
    assert len(model.calls) == 4


def test_a_guided_model_gets_the_value_and_predicts_once_a_step() -> None:
    model, empty = Recorder(guided=True), torch.zeros(1, 3, 8)
    sample(model, initial_noise([0, 1], 2, 2), torch.zeros(2, 3, 8), steps=2, guidance=2.5, empty=empty)  # type: ignore[arg-type]
    assert [call["guidance"].tolist() for call in model.calls] == [[2.5, 2.5]] * 2


def test_references_are_seen_at_every_step_and_cut_from_the_result() -> None:
    model, noise, reference = Recorder(guided=False), initial_noise([0], 2, 3), torch.randn(1, 128, 1, 4)
    latents = sample(model, noise, torch.zeros(1, 3, 8), steps=2, guidance=1.0, references=[reference])  # type: ignore[arg-type]
    assert latents.shape == noise.shape
    for call in model.calls:
        assert call["keep"] == 6
        assert call["positions"][:, 0].tolist() == [0] * 6 + [10] * 4
        assert torch.equal(call["tokens"][:, 6:], to_tokens(reference))
    assert torch.equal(from_tokens(model.calls[0]["tokens"][:, :6], 2, 3), noise)


def test_references_do_not_change_the_schedule() -> None:
    """The shift counts the image's tokens alone, so a flow of one ends at the same place."""
    for references in ([], [torch.zeros(1, 128, 60, 80)]):
        model, times = Recorder(guided=False), []
        forward = model.forward

        def spy(*arguments: Any, forward: Any = forward, times: list = times, **options: Any) -> Tensor:
            times.append(arguments[4].item())
            return forward(*arguments, **options)

        model.forward = spy  # type: ignore[method-assign]
        sample(model, initial_noise([0], 2, 2), torch.zeros(1, 3, 8), steps=3, guidance=1.0, references=references)  # type: ignore[arg-type]
        assert times == pytest.approx(schedule(3, 4)[:-1].tolist())


def test_classifier_free_guidance_without_the_empty_prompt_is_an_error() -> None:
    model, _ = helpers.transformers("klein")
    with pytest.raises(ValueError, match=r"guidance=3.0: .*embeddings of the empty prompt"):
        sample(model, initial_noise([0], 2, 2), torch.zeros(1, 5, 72), steps=1, guidance=3.0)
