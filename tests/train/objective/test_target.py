"""Contrastive guidance: its formula, its one prediction without gradient and dropout, and the scale that is learned."""

import helpers
import pytest
import torch
from loss_helpers import batch_of, stir
from train_helpers import compose, drawn_and_mixed, refusal, run_training

from flux2 import adapters
from train.config.memory import choice_of
from train.loop import Trainer
from train.objective import ContrastiveGuidance
from train.objective.noise import noise_at
from train.objective.objective import Inputs, training_loss
from train.objective.timesteps import Uniform
from train.planner.from_config import workload_of
from train.planner.predictor import Planner
from train.stages.memory import load_config

pytest_plugins = ("train_helpers",)

V, U = torch.randn(2, 3, 6, 128, generator=torch.Generator().manual_seed(0))
TIMES = torch.tensor([0.0, 0.25, 1.0])
EVERY = torch.tensor([True, True, True])


def test_the_target_is_that_of_the_formula():
    torch.testing.assert_close(ContrastiveGuidance(3.0).guided(V, U, TIMES, EVERY), U + 3 * (V - U))
    scales = torch.tensor([1.0, 1.5, 3.0])[:, None, None]
    sigma = ContrastiveGuidance(3.0, "sigma").guided(V, U, TIMES, EVERY)
    torch.testing.assert_close(sigma, U + scales * (V - U))
    torch.testing.assert_close(sigma[0], V[0])  # at the image there is no guidance
    optimized = ContrastiveGuidance(2.0, optimized_scale=True).guided(V, U, TIMES, EVERY)
    for sample in range(3):
        alpha = (V[sample] * U[sample]).sum() / (U[sample] * U[sample]).sum()
        torch.testing.assert_close(optimized[sample], alpha * U[sample] + 2 * (V[sample] - alpha * U[sample]))


def test_a_sample_without_a_caption_keeps_the_flow():
    found = ContrastiveGuidance(3.0).guided(V, U, TIMES, torch.tensor([True, False, True]))
    assert torch.equal(found[1], V[1])
    assert not torch.equal(found[0], V[0])


def test_the_loss_compares_to_it_with_the_models_own_prediction_without_gradient_and_dropout():
    model = adapters.attach(helpers.transformers("klein")[0], rank=3, dropout=0.4).train()
    stir(model)
    batch = batch_of(3, kind="klein")
    empty = batch_of(1, start=30, kind="klein").embeddings
    noised, target = drawn_and_mixed(batch, Uniform(), 0, 0), ContrastiveGuidance(3.0, optimized_scale=True)
    inputs = Inputs(noised, batch.embeddings, empty=empty, has_caption=EVERY)
    torch.manual_seed(5)
    losses = training_loss(model, inputs, None, target=target)
    assert model.training
    assert all(module.training for module in model.modules())
    torch.manual_seed(5)
    with torch.no_grad():
        prediction = noised.predict(model, batch.embeddings, None)  # with the dropout of the same random numbers
        unconditional = noised.predict(model.eval(), empty.expand(3, -1, -1), None)
        base = noised.predict(helpers.transformers("klein")[0], empty.expand(3, -1, -1), None)
    assert (unconditional - base).square().mean() > 1e-3  # the adapter's, and not the base's
    guided = target.guided(noised.target, unconditional, noised.times, EVERY)
    torch.testing.assert_close(losses.total.detach(), (prediction - guided).square().mean())
    # the gradient is that of a fixed target
    model.train()
    losses.total.backward()
    first = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.zero_grad()
    torch.manual_seed(5)
    (noised.predict(model, batch.embeddings, None) - guided).square().mean().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(first[name], parameter.grad)


# ------------------------------------------------------------------ runs

EMBEDDED = ["dataset=demo", "buckets.resolution=64", "batch_size=4", "steps=100", "optimizer.lr=2e-3", "device=cpu"]
OFF = ["log_every=0", "checkpoint_every=0", "sample_every=0", "validate_every=0", "caption_dropout=0.2"]


def learned_scale(trainer: Trainer, reference: Trainer, time: float) -> float:
    """The g with which u + g (c - u) is closest to the trained prediction; u and c are those of the reference run."""
    shared = with_difference = 0.0
    for step in range(2):
        batch = reference.loader.micro_batches(step)[0].to("cpu", torch.float32)
        noise = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(step))
        noised = noise_at(batch, torch.full((4,), time), noise)
        empty = reference.loader.embeddings([""]).float().expand(4, -1, -1)
        with torch.no_grad():
            u, c = (noised.predict(reference.peft_model, text, 1.0) for text in (empty, batch.embeddings))
            prediction = noised.predict(trainer.peft_model, batch.embeddings, 1.0)
        shared += ((prediction - u) * (c - u)).sum().item()
        with_difference += (c - u).square().sum().item()
    return shared / with_difference


def test_on_the_embedded_model_the_prediction_without_guidance_becomes_the_guided_one(
    captured, cache_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(ContrastiveGuidance, "check", lambda *_: None)  # it takes a scale, which stays 1 in training
    for name, more in {
        "flow": [],
        "again": ["seed=1"],
        "constant": ["target=contrastive"],
        "sigma": ["target=contrastive", "target.schedule=sigma"],
    }.items():
        folders = [f"cache_dir={cache_folder}", f"output_dir={tmp_path / name}", "sample.prompts=[]"]
        run_training(compose(*EMBEDDED, *OFF, *folders, *more))
    flow, again, constant, sigma = captured
    for trainer in captured:
        trainer.peft_model.eval()
    assert learned_scale(again, flow, 0.8) == pytest.approx(1.0, abs=0.1)
    assert learned_scale(constant, flow, 0.8) > 1.9
    assert 1.3 < learned_scale(sigma, flow, 0.5) < learned_scale(constant, flow, 0.5) - 0.2


@pytest.mark.parametrize(
    ("model", "why"),
    [
        ("dev", "takes the guidance scale as an input"),
        ("tiny", "takes the guidance scale as an input"),
        ("klein_4b", "is distilled to a few steps"),
    ],
)
def test_a_model_that_is_sampled_without_guidance_is_refused(model, why):
    message = refusal("device=cpu", f"model={model}", "target=contrastive")
    assert why in message
    assert "target=flow" in message


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("target.scale=1", "target.scale=1 must be a number above 1, up to 1000. Without guidance, set target=flow"),
        ("target.scale=2000", "target.scale=2000 must be a number above 1"),
        ("target.schedule=cosine", "must be one of constant, sigma"),
        ("target.optimized_scale=1", "target.optimized_scale=1 must be true or false"),
        ("keep_last=1 keep_best=2", "keep_best=2 with target=contrastive"),
    ],
)
def test_a_refused_setting_is_named_with_its_value(word, said):
    assert said in refusal("device=cpu", "model=klein_base_4b", "target=contrastive", *word.split())


def test_sample_grids_with_guidance_are_warned_about(capsys):
    given = ["device=cpu", "model=klein_base_4b", "target=contrastive", "sample.prompts=[a fox]"]
    load_config(compose(*given))
    assert "set sample.guidance=1" in capsys.readouterr().err
    load_config(compose(*given, "sample.guidance=1"))
    assert "sample.guidance" not in capsys.readouterr().err


def test_the_planner_counts_the_prediction_for_the_empty_prompt(small):
    def planned(*more):
        run = load_config(compose(*small("batch_size=4", "memory.offload_blocks=1.0", *more, kind="klein")))
        job = workload_of(run, on_gpu=True)
        return job.frozen_rows, Planner(job).predict(choice_of(run.composed["memory"]))

    (none, plain), (one, guided) = planned(), planned("target=contrastive")
    assert (none, one) == ([], [4])
    assert sum(guided.work.flops.values()) == pytest.approx(1.25 * sum(plain.work.flops.values()), rel=0.06)
    assert guided.moved == pytest.approx(1.5 * plain.moved, rel=0.01)
    both = planned("target=contrastive", "loss.unmasked_prior=1", "preservation=blank", "preservation.samples=1")[0]
    assert both == [5, 4]
