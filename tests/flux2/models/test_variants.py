"""flux2.models.variants: the records hold the published numbers."""

from dataclasses import FrozenInstanceError, replace
from inspect import signature
from typing import Any

import pytest
from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel

from flux2.models.variants import DEV, KLEIN_4B, KLEIN_9B, VARIANTS, AutoencoderConfig, TransformerConfig, get_variant


@pytest.mark.parametrize(
    ("name", "repo", "hidden", "heads", "blocks", "text_width", "guidance", "steps", "scale"),
    [
        ("dev", "FLUX.2-dev", 6144, 48, (8, 48), 3 * 5120, True, 28, 4.0),
        ("klein_base_9b", "FLUX.2-klein-base-9B", 4096, 32, (8, 24), 3 * 4096, False, 50, 4.0),
        ("klein_9b", "FLUX.2-klein-9B", 4096, 32, (8, 24), 3 * 4096, False, 4, 1.0),
        ("klein_9b_kv", "FLUX.2-klein-9b-kv", 4096, 32, (8, 24), 3 * 4096, False, 4, 1.0),
        ("klein_base_4b", "FLUX.2-klein-base-4B", 3072, 24, (5, 20), 3 * 2560, False, 50, 4.0),
        ("klein_4b", "FLUX.2-klein-4B", 3072, 24, (5, 20), 3 * 2560, False, 4, 1.0),
    ],
)
def test_the_records_hold_the_published_numbers(
    name: str,
    repo: str,
    hidden: int,
    heads: int,
    blocks: tuple[int, int],
    text_width: int,
    guidance: bool,
    steps: int,
    scale: float,
) -> None:
    found = get_variant(name)
    sizes = found.transformer
    assert found.repo == f"black-forest-labs/{repo}"
    assert (sizes.hidden, sizes.heads, sizes.head_dim) == (hidden, heads, 128)
    assert (sizes.double_blocks, sizes.single_blocks) == blocks
    assert (sizes.text_width, sizes.guidance) == (text_width, guidance)
    assert (found.steps, found.guidance) == (steps, scale)
    assert found.text.layers == ((10, 20, 30) if name == "dev" else (9, 18, 27))
    assert found.text.length == 512


def default(cls: type, argument: str) -> Any:
    value = signature(cls).parameters[argument].default
    return tuple(value) if isinstance(value, list) else value


def test_what_all_models_share_are_the_defaults_of_diffusers() -> None:
    shared = {
        "num_layers": DEV.double_blocks,
        "num_single_layers": DEV.single_blocks,
        "num_attention_heads": DEV.heads,
        "joint_attention_dim": DEV.text_width,
        "guidance_embeds": DEV.guidance,
        "attention_head_dim": DEV.head_dim,
        "mlp_ratio": DEV.mlp_ratio,
        "axes_dims_rope": DEV.rope_axes,
        "rope_theta": DEV.rope_theta,
        "in_channels": DEV.channels,
        "timestep_guidance_channels": DEV.time_width,
        "eps": DEV.eps,
    }
    assert {name: default(Flux2Transformer2DModel, name) for name in shared} == shared
    for klein in (KLEIN_9B, KLEIN_4B):
        same = ("head_dim", "mlp_ratio", "rope_axes", "rope_theta", "channels", "time_width", "eps")
        assert [getattr(klein, name) for name in same] == [getattr(DEV, name) for name in same]

    config = AutoencoderConfig()
    autoencoder = {
        "block_out_channels": config.widths,
        "layers_per_block": config.blocks,
        "norm_num_groups": config.groups,
        "latent_channels": config.latent_channels,
        "batch_norm_eps": config.bn_eps,
    }
    assert {name: default(AutoencoderKLFlux2, name) for name in autoencoder} == autoencoder


def test_only_the_klein_bases_sample_with_classifier_free_guidance() -> None:
    names = [name for name, found in VARIANTS.items() if found.guidance > 1 and not found.transformer.guidance]
    assert names == ["klein_base_9b", "klein_base_4b"]


def test_only_the_4b_models_are_free_of_a_license_to_accept() -> None:
    assert {name for name, found in VARIANTS.items() if found.license} == {
        "dev",
        "klein_9b",
        "klein_9b_kv",
        "klein_base_9b",
    }


def test_references_are_isolated_in_the_kv_model_alone() -> None:
    assert [name for name, found in VARIANTS.items() if found.transformer.isolated_references] == ["klein_9b_kv"]
    assert replace(get_variant("klein_9b_kv").transformer, isolated_references=False) == KLEIN_9B


def test_an_unknown_model_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"model='flux1'.*tiny, dev, .*_9b, klein_9b_kv, klein_base_4b, klein_4b"):
        get_variant("flux1")


def test_rope_axes_that_do_not_fill_a_head_are_refused() -> None:
    with pytest.raises(ValueError, match=r"rope_axes=\(4, 4\).*head_dim=16"):
        TransformerConfig(
            heads=1, double_blocks=1, single_blocks=1, text_width=8, guidance=True, head_dim=16, rope_axes=(4, 4)
        )


def test_records_cannot_be_changed_in_place() -> None:
    with pytest.raises(FrozenInstanceError):
        get_variant("dev").steps = 3  # type: ignore[misc]
    assert replace(get_variant("dev"), steps=3).steps == 3
    assert get_variant("dev").steps == 28
