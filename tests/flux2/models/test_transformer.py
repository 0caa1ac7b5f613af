"""flux2.models.transformer: the values of diffusers' transformer, and the published shapes and names."""

from typing import Any

import helpers
import pytest
import torch
from diffusers import Flux2Pipeline
from diffusers.loaders.single_file_utils import convert_flux2_transformer_checkpoint_to_diffusers
from torch import Tensor

from flux2.models.positions import positions_with_references, to_tokens, with_references
from flux2.models.transformer import Transformer
from flux2.models.variants import DEV, KLEIN_4B, KLEIN_9B, TransformerConfig
from flux2.weights.key_names import transformer_tensor

KINDS = ("dev", "klein")
REFERENCES = {0: (), 1: ((2, 3),), 3: ((2, 3), (4, 2), (1, 5))}


def draw(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("references", [0, 1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_predictions_are_those_of_diffusers(kind: str, references: int, batch: int) -> None:
    model, reference = helpers.transformers(kind)
    inputs = helpers.transformer_inputs(model.config, batch)
    noisy = draw((batch, 128, 3, 4), 2)
    latents = [draw((batch, 128, *size), 3 + i) for i, size in enumerate(REFERENCES[references])]
    inputs["tokens"] = with_references(to_tokens(noisy), latents)
    inputs["positions"] = positions_with_references(noisy, latents)

    # what Flux2Pipeline would feed its transformer
    ids = Flux2Pipeline._prepare_latent_ids(noisy)
    packed = [Flux2Pipeline._pack_latents(grid) for grid in [noisy, *latents]]
    if latents:
        ids = torch.cat(
            [ids, Flux2Pipeline._prepare_image_ids([one[:1] for one in latents]).repeat(batch, 1, 1)], dim=1
        )
    theirs: dict[str, Any] = inputs | {
        "tokens": torch.cat(packed, dim=1),
        "positions": ids,
        "text_positions": Flux2Pipeline._prepare_text_ids(inputs["text"]),
    }
    with torch.no_grad():
        wanted = helpers.reference_forward(reference, theirs)[:, :12]
        assert helpers.relative_error(model(**inputs, keep=12), wanted) <= 1e-5
    assert wanted.std() > 0.3, "the comparison says nothing if the output is flat"


@torch.no_grad()
def test_norms_of_small_activations_are_those_of_diffusers() -> None:
    """Where variances are near the norms' epsilon, another epsilon shows."""
    _, reference = helpers.transformers("dev")
    for name, parameter in reference.named_parameters():
        if any(part in name for part in ("x_embedder", "context_embedder", "to_q", "to_k", "add_q", "add_k")):
            parameter.mul_(1e-3)
    model = helpers.transformer_like(reference, helpers.TRANSFORMERS["dev"])
    inputs = helpers.transformer_inputs(model.config)
    assert helpers.relative_error(model(**inputs), helpers.reference_forward(reference, inputs)) <= 1e-5


@pytest.mark.parametrize("argument", ["tokens", "text", "timestep", "guidance", "positions"])
def test_every_input_changes_the_prediction(argument: str) -> None:
    model = helpers.transformer("dev")
    inputs = helpers.transformer_inputs(model.config)
    with torch.no_grad():
        before = model(**inputs)
        after = model(
            **(inputs | {argument: inputs[argument].flip(0) if argument != "positions" else inputs[argument] * 2})
        )
    assert helpers.relative_error(after, before) > 1e-3


def test_keep_cuts_the_references_from_the_output_and_changes_nothing_else() -> None:
    model = helpers.transformer("klein")
    inputs = helpers.transformer_inputs(model.config)
    with torch.no_grad():
        whole, kept = model(**inputs), model(**inputs, keep=7)
    assert whole.shape == (2, 12, 128)
    torch.testing.assert_close(kept, whole[:, :7], rtol=0, atol=1e-6)


def test_a_guided_model_without_a_guidance_value_is_an_error() -> None:
    model = helpers.transformer("dev")
    with pytest.raises(ValueError, match="guidance"):
        model(**(helpers.transformer_inputs(model.config) | {"guidance": None}))


def test_bfloat16_stays_near_float32() -> None:
    model = helpers.transformer("dev")
    inputs = helpers.transformer_inputs(model.config)
    with torch.no_grad():
        exact = model(**inputs)
        rounded = model.to(torch.bfloat16)(**inputs)
    assert rounded.dtype == torch.bfloat16
    assert helpers.relative_error(rounded, exact) < 0.03


@pytest.mark.parametrize("kind", KINDS)
def test_parameter_names_are_those_of_black_forest_labs_files(kind: str) -> None:
    model, reference = helpers.transformers(kind)
    converted = convert_flux2_transformer_checkpoint_to_diffusers(model.state_dict())
    wanted = reference.state_dict()
    assert converted.keys() == wanted.keys()
    assert all(torch.equal(converted[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(
    ("config", "billions"), [(DEV, 32.22), (KLEIN_9B, 9.08), (KLEIN_4B, 3.88)], ids=["dev", "klein_9b", "klein_4b"]
)
def test_published_sizes_give_the_published_names_shapes_and_counts(config: TransformerConfig, billions: float) -> None:
    with torch.device("meta"):
        ours = Transformer(config).state_dict()
        theirs = helpers.reference_transformer(config).state_dict()
        split = {}
        for name, tensor in ours.items():
            parts = transformer_tensor(name).split(tensor)
            assert not parts.keys() & split.keys(), f"{name} is stored where another tensor is"
            split.update(parts)
            joined = transformer_tensor(name).join([theirs[part] for part in transformer_tensor(name).names])
            assert joined.shape == tensor.shape, name
    assert {name: tensor.shape for name, tensor in split.items()} == {name: t.shape for name, t in theirs.items()}
    assert round(sum(tensor.numel() for tensor in ours.values()) / 1e9, 2) == billions
