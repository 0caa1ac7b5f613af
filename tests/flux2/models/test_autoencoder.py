"""flux2.models.autoencoder: the values of diffusers' autoencoder, and the published names."""

from types import SimpleNamespace
from typing import Any

import helpers
import pytest
import torch
from diffusers import Flux2Pipeline
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flux2.models.autoencoder import AttentionBlock, Autoencoder, patchify, unpatchify
from flux2.models.variants import AutoencoderConfig
from flux2.weights.key_names import autoencoder_tensor


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("size", [(32, 32), (48, 80), (64, 16)])
@torch.no_grad()
def test_encoding_is_that_of_flux2_pipeline(size: tuple[int, int]) -> None:
    model, reference = helpers.autoencoders()
    pixels = draw(2, 3, *size).clamp(-1, 1)
    pipeline = SimpleNamespace(vae=reference, _patchify_latents=Flux2Pipeline._patchify_latents)
    wanted = Flux2Pipeline._encode_vae_image(pipeline, pixels, generator=None)
    latents = model.encode(pixels)
    assert latents.shape == (2, 128, size[0] // 16, size[1] // 16)
    assert helpers.relative_error(latents, wanted) <= 1e-5


@torch.no_grad()
def test_decoding_is_that_of_diffusers() -> None:
    model, reference = helpers.autoencoders()
    latents = draw(2, 128, 2, 3)
    mean = reference.bn.running_mean.view(1, -1, 1, 1)
    std = torch.sqrt(reference.bn.running_var.view(1, -1, 1, 1) + reference.config.batch_norm_eps)
    wanted = reference.decode(Flux2Pipeline._unpatchify_latents(latents * std + mean)).sample
    pixels = model.decode(latents)
    assert pixels.shape == (2, 3, 32, 48)
    assert helpers.relative_error(pixels, wanted) <= 1e-5


@torch.no_grad()
def test_moments_are_those_of_diffusers() -> None:
    model, reference = helpers.autoencoders()
    pixels = draw(1, 3, 32, 48)
    mean, logvar = model.moments(pixels)
    wanted = reference.encode(pixels).latent_dist
    assert helpers.relative_error(mean, wanted.mean) <= 1e-5
    assert helpers.relative_error(logvar.clamp(-30, 20), wanted.logvar) <= 1e-5


def test_patches_become_channels_in_the_published_order() -> None:
    latents = draw(2, 32, 4, 6)
    assert torch.equal(patchify(latents), Flux2Pipeline._patchify_latents(latents))
    assert torch.equal(unpatchify(patchify(latents)), latents)


def test_latents_are_not_drawn_at_random() -> None:
    model, _ = helpers.autoencoders()
    pixels = draw(1, 3, 32, 32)
    assert torch.equal(model.encode(pixels), model.encode(pixels))


@pytest.mark.parametrize("size", [(40, 32), (32, 40)])
def test_sides_that_are_no_multiples_of_16_are_an_error(size: tuple[int, int]) -> None:
    model, _ = helpers.autoencoders()
    with pytest.raises(ValueError, match=rf"\b16\b.*\b{size[1]} x {size[0]}\b"):
        model.encode(draw(1, 3, *size))


def test_norms_have_the_epsilon_of_diffusers() -> None:
    ours, theirs = ([m.eps for m in model.modules() if isinstance(m, nn.GroupNorm)] for model in helpers.autoencoders())
    assert ours == theirs == [1e-6] * len(ours)


def test_the_statistics_do_not_move_in_use() -> None:
    model, _ = helpers.autoencoders()
    before = model.bn.running_mean.clone()
    model.encode(draw(2, 3, 32, 32))
    assert not model.training
    assert torch.equal(model.bn.running_mean, before)


def test_published_sizes_give_the_published_names_and_shapes() -> None:
    config = AutoencoderConfig()
    with torch.device("meta"):
        ours = Autoencoder(config).state_dict()
        theirs = helpers.reference_autoencoder(config).state_dict()
        split = {}
        for name, tensor in ours.items():
            entry = autoencoder_tensor(name, len(config.widths))
            assert entry.join([theirs[part] for part in entry.names]).shape == tensor.shape, name
            split.update(entry.split(tensor))
    assert len(split) == len(ours)
    assert {name: tensor.shape for name, tensor in split.items()} == {name: t.shape for name, t in theirs.items()}


def test_names_are_those_of_the_published_single_file() -> None:
    """Not all 251: one of every kind, as Black Forest Labs' ae.safetensors names them."""
    with torch.device("meta"):
        names = set(Autoencoder(AutoencoderConfig()).state_dict())
    assert names >= {
        "bn.running_mean",
        "bn.running_var",
        "encoder.conv_in.weight",
        "encoder.down.0.block.1.conv2.bias",
        "encoder.down.1.block.0.nin_shortcut.weight",
        "encoder.down.2.downsample.conv.weight",
        "encoder.mid.block_1.norm1.weight",
        "encoder.mid.attn_1.q.weight",
        "encoder.mid.attn_1.proj_out.bias",
        "encoder.norm_out.weight",
        "encoder.conv_out.weight",
        "encoder.quant_conv.weight",
        "decoder.post_quant_conv.bias",
        "decoder.conv_in.weight",
        "decoder.up.0.block.2.conv1.weight",
        "decoder.up.0.block.0.nin_shortcut.weight",
        "decoder.up.3.upsample.conv.weight",
        "decoder.norm_out.bias",
        "decoder.conv_out.weight",
    }
    assert not {name for name in names if name.startswith(("encoder.down.3.downsample", "decoder.up.0.upsample"))}


class Largest(TorchDispatchMode):
    """Notes the elements of the largest tensor that any operation gives."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for one in tree_leaves(found):
            if isinstance(one, Tensor):
                self.elements = max(self.elements, one.numel())
        return found


@torch.no_grad()
def test_attention_over_a_large_picture_never_holds_all_pairs_of_positions() -> None:
    torch.manual_seed(0)
    block, positions = AttentionBlock(8, 4), 72 * 72
    x = draw(1, 8, 72, 72)
    with Largest() as largest:
        found = block(x)
    assert x.numel() <= largest.elements < positions**2 / 8
    q, k, v = (layer(block.norm(x)).flatten(2)[0].T for layer in (block.q, block.k, block.v))
    mixed = ((q @ k.T / 8**0.5).softmax(1) @ v).T.unflatten(1, (72, 72))[None]
    assert helpers.relative_error(found, x + block.proj_out(mixed)) <= 1e-5
