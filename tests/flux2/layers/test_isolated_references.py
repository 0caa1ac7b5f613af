"""Isolated references: diffusers' KV model and pipeline, the cache, training with every policy, and refusals."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from adapter_helpers import draw_adapter
from diffusers import Flux2KleinKVPipeline
from pipeline_helpers import difference, picture, pipeline
from torch import Tensor

import flux2
from flux2 import adapters
from flux2.layers.isolated_references import ReferenceCache
from flux2.memory.activation_checkpointing import set_policy
from flux2.models.positions import positions_with_references, text_positions, to_tokens, with_references
from flux2.models.transformer import Transformer
from flux2.pipeline import Pipeline
from flux2.sampling import initial_noise, sample
from flux2.weights.sources import ModelSource

ISOLATED = replace(helpers.TRANSFORMERS["klein"], isolated_references=True)
VARIANT = replace(helpers.VARIANTS["klein"], transformer=ISOLATED)
REFERENCES = [picture(96, 64, 1), picture(64, 80, 2)]


def model_of(isolated: bool = True) -> Transformer:
    """The small klein of the tests, whose references are isolated or not."""
    model = helpers.transformer("klein")
    model.config = replace(model.config, isolated_references=isolated)
    return model


def inputs(seed: int = 0, batch: int = 2) -> dict[str, Any]:
    """Images of 2 x 3 tokens with references of 2 and 4, and prompts of 5 tokens."""
    generator = torch.Generator().manual_seed(seed)
    noise, *references = (torch.randn(batch, 128, *sides, generator=generator) for sides in ((2, 3), (1, 2), (2, 2)))
    text = torch.randn(batch, 5, ISOLATED.text_width, generator=generator)
    return {
        "tokens": with_references(to_tokens(noise), references),
        "positions": positions_with_references(noise, references),
        "text": text,
        "text_positions": text_positions(5),
        "timestep": torch.rand(batch, generator=generator),
        "keep": 6,
    }


@pytest.fixture
def pipe(model_folders: Any) -> Pipeline:
    return pipeline(ModelSource(VARIANT, str(model_folders("klein"))))


@pytest.mark.parametrize("references", [REFERENCES, REFERENCES[:1], []])
def test_the_latents_of_every_step_are_diffusers(references: Sequence[Any], pipe: Pipeline) -> None:
    theirs, ours = list[Tensor](), list[Tensor]()

    def keep(_pipe: Any, _step: int, _time: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
        theirs.append(given["latents"])
        return {}

    parts = helpers.reference_parts("klein")
    made = Flux2KleinKVPipeline(**parts | {"transformer": deepcopy(parts["transformer"])})
    made.set_progress_bar_config(disable=True)
    wanted = made(
        prompt=["a cup", "a fox"],
        image=list(references) or None,
        width=48,
        height=32,
        latents=initial_noise([7, 8], 2, 3),
        num_inference_steps=4,
        max_sequence_length=VARIANT.text.length,
        text_encoder_out_layers=VARIANT.text.layers,
        callback_on_step_end=keep,
    ).images
    options: dict[str, Any] = {"seed": 7, "width": 48, "height": 32, "steps": 4, "guidance": 1.0}
    counts: list[int] = []
    pipe.transformer.register_forward_pre_hook(lambda _, args: counts.append(args[0].shape[1]))
    images = pipe.generate(["a cup", "a fox"], references=references, progress=ours.append, **options)
    assert len(ours) == len(theirs) == 4
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    assert difference(images, wanted) <= 2
    tokens = 6 + sum(image.width * image.height // 256 for image in references)
    assert counts == [tokens, 6, 6, 6], "later steps have no tokens of references"
    pipe.reference_cache = False
    again = list[Tensor]()
    pipe.generate(["a cup", "a fox"], references=references, progress=again.append, **options)
    torch.testing.assert_close(again[-1], ours[-1], rtol=0, atol=1e-5)
    assert counts[4:] == [tokens] * 4


def test_a_forward_with_references_is_diffusers_and_fills_the_cache_for_the_next() -> None:
    model, given = model_of(), inputs()
    with torch.no_grad():
        whole = model(**given)
        cache = ReferenceCache()
        assert torch.equal(model(**given, cache=cache), whole)
        assert [block.keys.shape for block in cache.blocks if block.keys is not None] == [(2, 2, 6, 16)] * 3
        other = inputs(1)
        without = other | {"tokens": other["tokens"][:, :6], "positions": other["positions"][:6]}
        joined = other | {"tokens": torch.cat([other["tokens"][:, :6], given["tokens"][:, 6:]], dim=1)}
        cached = model(**without, cache=cache)
        torch.testing.assert_close(cached, model(**joined), rtol=0, atol=1e-5)
        assert helpers.relative_error(model_of(False)(**given), whole) > 1e-3, "ordinary attention is another"


def test_references_see_neither_prompt_nor_image_nor_time() -> None:
    """Keys and values that the cache holds are equal, whatever is beside the references."""
    model, caches = model_of(), [ReferenceCache(), ReferenceCache()]
    given, other = inputs(), inputs(1)
    other["tokens"] = torch.cat([other["tokens"][:, :6], given["tokens"][:, 6:]], dim=1)
    with torch.no_grad():
        for one, cache in zip((given, other), caches, strict=True):
            model(**one, cache=cache)
    for ours, theirs in zip(caches[0].blocks, caches[1].blocks, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys, rtol=0, atol=1e-5)
        torch.testing.assert_close(ours.values, theirs.values, rtol=0, atol=1e-5)


def test_without_references_isolation_changes_no_bit() -> None:
    given = inputs()
    given |= {"tokens": given["tokens"][:, :6], "positions": given["positions"][:6]}
    with torch.no_grad():
        assert torch.equal(model_of()(**given), model_of(False)(**given))


def test_guidance_by_two_predictions_shares_one_cache() -> None:
    model, noise = model_of(), initial_noise([1], 2, 3)
    generator = torch.Generator().manual_seed(0)
    text, empty = (torch.randn(1, 5, ISOLATED.text_width, generator=generator) for _ in range(2))
    reference = torch.randn(1, 128, 2, 2, generator=generator)
    options: dict[str, Any] = {"steps": 3, "guidance": 4.0, "empty": empty, "references": [reference]}
    ours = sample(model, noise, text, **options)
    torch.testing.assert_close(ours, sample(model, noise, text, cached=False, **options), rtol=0, atol=1e-5)


def gradients(policy: str, targets: Any, compile: bool = False) -> tuple[Tensor, list[Tensor]]:
    """Prediction of a model with an adapter, and the adapter's gradients, under a recompute policy."""
    model = model_of()
    wrapped = adapters.attach(model, rank=2, targets=targets)
    draw_adapter(wrapped, 0.1)
    options: dict[str, Any] = {"budget_gb": 0.0} if policy == "budget" else {}
    set_policy(model, policy, compile=compile, compiler="aot_eager", **options)
    prediction = model(**inputs())
    prediction.square().mean().backward()
    return prediction.detach(), [parameter.grad.clone() for parameter in adapters.adapter_parameters(model)]  # type: ignore[union-attr]


def test_compiled_blocks_have_the_same_gradients() -> None:
    wanted, gradient = gradients("full", "blocks")
    ours, others = gradients("full", "blocks", compile=True)
    torch.testing.assert_close(ours, wanted)
    for a, b in zip(others, gradient, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_offloaded_blocks_draw_the_same_image(pipe: Pipeline) -> None:
    options: dict[str, Any] = {"references": REFERENCES, "width": 32, "height": 32, "steps": 2, "guidance": 1.0}
    device, precision = torch.device("cpu"), pipe.precision
    offloaded = Pipeline(pipe.source, device, precision, keep_text_encoder=True, offload_blocks=1.0)
    assert difference(offloaded.generate("a cup", **options), pipe.generate("a cup", **options)) == 0


@pytest.mark.parametrize("targets", ["blocks", [".*"]], ids=["blocks", "modulation too"])
@pytest.mark.parametrize("policy", ["full", "selective", "budget"])
def test_training_has_the_same_gradients_with_every_policy(policy: str, targets: Any) -> None:
    wanted, gradient = gradients("none", targets)
    with torch.no_grad():
        assert helpers.relative_error(wanted, model_of()(**inputs())) > 1e-3
    ours, others = gradients(policy, targets)
    assert torch.equal(ours, wanted)
    for a, b in zip(others, gradient, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_the_cache_is_refused_with_the_reason_on_other_models(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"reference_cache=True: references of this model see .* klein_9b_kv"):
        flux2.load("tiny", reference_cache=True)
    with pytest.raises(ValueError, match=r"reference_cache='yes' must be True, False or None"):
        flux2.load("tiny", reference_cache="yes")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"cannot be cached"):
        model_of(False)(**inputs(), cache=ReferenceCache())
    options: dict[str, Any] = {"references": [torch.zeros(1, 128, 1, 1)], "cached": True}
    options |= {"steps": 1, "guidance": 1.0}
    with pytest.raises(ValueError, match=r"cannot be cached"):
        sample(model_of(False), initial_noise([0], 1, 1), torch.zeros(1, 2, ISOLATED.text_width), **options)
    assert flux2.load("klein_9b_kv", tmp_path, device="cpu").variant.transformer.isolated_references


def test_one_reference_is_limited_to_a_megapixel_as_several_are(pipe: Pipeline) -> None:
    (latent,) = pipe.encode_references([picture(1600, 1000)])
    assert latent.shape[2:] == (50, 80)
