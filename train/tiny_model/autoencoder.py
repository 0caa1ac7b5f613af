"""Train the autoencoder of the embedded model and encode the pictures with it."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from data.files import atomic_write
from flux2.models.autoencoder import Autoencoder, patchify
from train.tiny_model.training import PhaseTrainer, Recipe, rate, step_generator
from train.tiny_model.world import PIXELS, TINY


def to_pixels(pictures: np.ndarray) -> Tensor:
    """Convert (B, H, W, 3) uint8 to (B, 3, H, W) float32 in [-1, 1], channels last in memory."""
    return torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_uint8(pixels: Tensor) -> np.ndarray:
    """Convert (B, 3, H, W) in [-1, 1] to (B, H, W, 3) uint8."""
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def gradients(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., 1:, :] - x[..., :-1, :], x[..., 1:] - x[..., :-1]


def crop(pictures: np.ndarray, side: int, rng: np.random.Generator) -> np.ndarray:
    corners = rng.integers(0, PIXELS - side + 1, (len(pictures), 2))
    return np.stack([p[y : y + side, x : x + side] for p, (y, x) in zip(pictures, corners, strict=True)])


def set_groups(module: nn.Module, groups: int) -> None:
    """Set the number of groups of all norms; their weights are per channel and stay the same."""
    for part in module.modules():
        if isinstance(part, nn.GroupNorm):
            part.num_groups = groups


def train_autoencoder(recipe: Recipe, pictures: np.ndarray, home: Path) -> Autoencoder:
    """Train all phases; return the averaged autoencoder of the last."""
    torch.manual_seed(recipe.seed)
    module = Autoencoder(TINY.autoencoder)
    with torch.no_grad():  # start with little noise in the latents, or the decoder learns to ignore them
        assert module.encoder.quant_conv.bias is not None
        module.encoder.quant_conv.bias[TINY.autoencoder.latent_channels :] = -5.0
    first_scene = len(pictures) - recipe.scenes
    for number, phase in enumerate(recipe.autoencoder, start=1):
        module = copy.deepcopy(module).to(memory_format=torch.channels_last).requires_grad_(True)  # type: ignore[call-overload]
        set_groups(module, phase.groups)
        trainer = PhaseTrainer(f"autoencoder_{number}", module, phase.lr, (0.9, 0.99), recipe.average, home)
        trainer.resume()
        while trainer.step < phase.steps:
            rng = step_generator(recipe, number, trainer.step)
            torch.manual_seed(int(rng.integers(2**31)))
            crops = trainer.step < phase.crops * phase.steps
            is_scene = rng.random(8 if crops else 4) < phase.scenes
            low, high = np.where(is_scene, first_scene, 0), np.where(is_scene, len(pictures), first_scene)
            batch = pictures[rng.integers(low, high)]
            x = to_pixels(crop(batch, 48, rng) if crops else batch)
            with torch.autocast("cpu", torch.bfloat16):
                mean, logvar = module.moments(x)
                mean, logvar = mean.float(), logvar.float().clamp(-12, 4)
                y = module.decoder(mean + torch.randn_like(mean) * torch.exp(0.5 * logvar)).float()
            edges = sum((F.l1_loss(a, b) for a, b in zip(gradients(y), gradients(x), strict=True)), torch.zeros(()))
            areas = F.l1_loss(F.avg_pool2d(y, 8), F.avg_pool2d(x, 8))
            kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
            loss = F.l1_loss(y, x) + 0.5 * F.mse_loss(y, x) + 0.5 * edges + phase.areas * areas + 1e-4 * kl
            trainer.update(loss, phase.lr * rate(trainer.step, phase.steps, 0.5))
            if trainer.step % 200 == 0:
                trainer.log(phase.steps, loss=loss.item(), kl=kl.item())
            if trainer.step % 500 == 0 or trainer.step == phase.steps:
                trainer.save()
                show_reconstructions(trainer, pictures, first_scene, home / f"autoencoder_{number}.png")
        module = trainer.averaged
    return module


@torch.no_grad()
def show_reconstructions(
    trainer: PhaseTrainer[Autoencoder], pictures: np.ndarray, first_scene: int, file: Path
) -> None:
    """Log the peak signal-to-noise ratio on drawings and on scenes, and save a grid of reconstructions."""
    averaged, values, restored = trainer.averaged, {}, []
    for name, start, stop in (("drawings", 0, first_scene), ("scenes", first_scene, len(pictures))):
        x = to_pixels(pictures[np.linspace(start, stop - 1, 32).astype(int)])
        restored.append(averaged.decoder(averaged.moments(x)[0]).clamp(-1, 1))
        values[f"psnr_{name}"] = -10 * math.log10(F.mse_loss(restored[-1], x).item() / 4)
    trainer.log(trainer.step, **values)
    save_grid(torch.cat(restored), file)


def save_grid(pixels: Tensor, file: Path, columns: int = 16) -> None:
    """Save images (B, 3, H, W) in [-1, 1] as one PNG."""
    array = to_uint8(pixels)
    rows = [np.concatenate(list(array[i : i + columns]), 1) for i in range(0, len(array), columns)]
    Image.fromarray(np.concatenate([row for row in rows if row.shape == rows[0].shape])).save(file)


@torch.no_grad()
def encode_pictures(autoencoder: Autoencoder, pictures: np.ndarray, file: Path) -> Tensor:
    """Return normalized latents, (N, 128, 8, 8) bfloat16, and set the autoencoder's statistics from them."""
    if not file.exists():
        print(f"encoding {len(pictures)} images")
        parts = [patchify(autoencoder.moments(to_pixels(pictures[i : i + 64]))[0]) for i in range(0, len(pictures), 64)]
        latents = torch.cat(parts)
        mean, var = latents.mean((0, 2, 3)), latents.var((0, 2, 3))
        std = torch.sqrt(var + TINY.autoencoder.bn_eps)[:, None, None]
        normalized = ((latents - mean[:, None, None]) / std).to(torch.bfloat16).contiguous()
        with atomic_write(file) as temporary:
            save_file({"latents": normalized, "mean": mean, "var": var}, temporary)
    stored = load_file(file)
    autoencoder.bn.running_mean, autoencoder.bn.running_var = stored["mean"], stored["var"]
    return stored["latents"]
