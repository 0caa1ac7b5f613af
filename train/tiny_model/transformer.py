"""Train the transformer of the embedded model and score it on held-out prompts and edits."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy import ndarray
from numpy.random import Generator
from PIL import Image
from torch import Tensor, nn

import flux2.models.transformer
from data.synthetic import probe
from data.synthetic.captions import EDITS, caption, edit, plain_caption
from data.synthetic.drawings import Drawing, all_drawings, draw, held_out, jitter
from flux2.models.autoencoder import Autoencoder
from flux2.models.positions import positions_with_references, text_positions, to_tokens, with_references
from flux2.models.text_encoder import TextEncoder
from flux2.models.transformer import RotaryAngles, Transformer, apply_rope
from flux2.sampling import initial_noise, sample
from train.tiny_model.autoencoder import save_grid, to_pixels, to_uint8
from train.tiny_model.training import Lesson, PhaseTrainer, Recipe, rate, step_generator
from train.tiny_model.world import PIXELS, TINY, Catalog


def attend(q: Tensor, k: Tensor, v: Tensor, rope: RotaryAngles | None) -> Tensor:
    """Replace `flux2.models.transformer.attend` by two matrix products: twice as fast on a CPU in bfloat16."""
    assert rope is not None, "kernels, which rotate before, run on a GPU"
    scores = apply_rope(q, rope) @ apply_rope(k, rope).transpose(-1, -2) * q.shape[-1] ** -0.5
    return (scores.float().softmax(-1).to(v.dtype) @ v).transpose(1, 2).flatten(2)


def initialize(model: nn.Module) -> None:
    """Initialize linears by Xavier, modulation and output with zeros, so that every block starts as the identity."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            zero = "modulation" in name or name == "final_layer.linear"
            nn.init.zeros_(module.weight) if zero else nn.init.xavier_uniform_(module.weight)


def draw_times(rng: Generator, count: int) -> Tensor:
    """Draw times, half uniform, half logit-normal around 0.73: subject and colors are decided near the noise."""
    uniform = rng.random(count)
    normal = 1 / (1 + np.exp(-rng.normal(1.0, 1.0, count)))
    return torch.from_numpy(np.where(rng.random(count) < 0.5, uniform, normal)).float()


class TinyBatch(NamedTuple):
    latents: Tensor  # (B, 128, 8, 8)
    references: list[Tensor]
    captions: list[str]


def edit_shares(world: Catalog, kinds: dict[str, float]) -> ndarray:
    """Return the probability of drawing each edit so that the kinds of edits have the shares `kinds`."""

    def kind(i: int) -> str:
        source, result = world.jobs[world.edits[i][0]].drawing, world.jobs[world.drawings + i].drawing
        return next(key for key in EDITS if getattr(source, key) != getattr(result, key))

    each = [kind(i) for i in range(len(world.edits))]
    shares = np.array([kinds[key] / each.count(key) for key in each])
    return shares / shares.sum()  # the sum is below 1 if a very small catalog lacks a kind


def draw_batch(
    recipe: Recipe, lesson: Lesson, world: Catalog, shares: ndarray | None, latents: Tensor, step: int, rng: Generator
) -> TinyBatch:
    """Return the batch of `step`: every `edits_every`th one edits, the others draw from captions."""
    words = random.Random(int(rng.integers(2**31)))
    if step % lesson.edits_every == lesson.edits_every - 1:
        count = recipe.transformer_batch * 3 // 4
        every = len(world.edits)
        chosen = rng.integers(0, every, count) if shares is None else rng.choice(every, count, p=shares)
        edits = [world.edits[i] for i in chosen]
        captions = [instruction for _, instruction in edits]
        references = [latents[torch.tensor([source for source, _ in edits])].float()]
        targets = chosen + world.drawings
    else:
        targets, references = rng.integers(0, world.drawings + len(world.edits), recipe.transformer_batch), []
        captions = [caption(drawing, words) for i in targets if (drawing := world.jobs[i].drawing)]
    captions = ["" if words.random() < 0.1 else text for text in captions]
    return TinyBatch(latents[torch.from_numpy(targets)].float(), references, captions)


def train_transformer(
    recipe: Recipe, world: Catalog, latents: Tensor, autoencoder: Autoencoder, text: TextEncoder, home: Path
) -> Transformer:
    """Train all lessons; return the averaged transformer of the last."""
    torch.manual_seed(recipe.seed)
    flux2.models.transformer.attend = attend  # type: ignore[assignment]  # no isolated references
    module = Transformer(TINY.transformer)
    initialize(module)
    empty = text.encode([""])
    for number, lesson in enumerate(recipe.transformer, start=1):
        module = copy.deepcopy(module).requires_grad_(True)
        trainer = PhaseTrainer(f"transformer_{number}", module, lesson.lr, (0.9, 0.98), recipe.average, home)
        trainer.resume()
        student, teacher = torch.compile(module, dynamic=False), torch.compile(trainer.averaged, dynamic=False)
        shares = edit_shares(world, lesson.kinds) if lesson.kinds else None
        smooth = 1.0
        while trainer.step < lesson.steps:
            rng = step_generator(recipe, lesson.stream, trainer.step)
            batch = draw_batch(recipe, lesson, world, shares, latents, trainer.step, rng)
            count, prompts = len(batch.captions), text.encode(batch.captions)
            noise = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(int(rng.integers(2**31))))
            time_ = draw_times(rng, count)
            guidance = torch.from_numpy(np.where(rng.random(count) < 0.5, 1.0, rng.uniform(1, 4, count))).float()
            x, flow = to_tokens(batch.latents), to_tokens(noise - batch.latents)
            tokens = with_references(x + time_[:, None, None] * flow, batch.references)
            positions = positions_with_references(noise, batch.references)
            text_at, keep = text_positions(prompts.shape[1]), x.shape[1]
            target = flow
            with torch.autocast("cpu", torch.bfloat16):
                if trainer.step >= lesson.guide_from * lesson.steps:
                    plain, unprompted = torch.ones(count), empty.expand_as(prompts)
                    with torch.no_grad():
                        prompted = teacher(tokens, positions, prompts, text_at, time_, plain, keep).float()
                        without = teacher(tokens, positions, unprompted, text_at, time_, plain, keep).float()
                    target = flow + (guidance - 1)[:, None, None] * (prompted - without)
                prediction = student(tokens, positions, prompts, text_at, time_, guidance, keep).float()
            loss = F.mse_loss(prediction, target)
            trainer.update(loss, lesson.lr * rate(trainer.step, lesson.steps, lesson.flat))
            smooth = 0.99 * smooth + 0.01 * F.mse_loss(prediction, flow).item()
            if trainer.step % 100 == 0:
                trainer.log(lesson.steps, loss=smooth)
            if trainer.step % 500 == 0:
                trainer.save()
            if trainer.step % 2000 == 0 or trainer.step == lesson.steps:
                scores = evaluate(trainer.averaged, autoencoder, text, home / "samples.png", min(64, recipe.judged))
                trainer.log(lesson.steps, **scores)
        trainer.save()
        module = trainer.averaged
    return module


def held_out_prompts(count: int, seed: int = 1) -> list[Drawing]:
    drawings = [drawing for drawing in all_drawings() if held_out(drawing)]
    return random.Random(seed).sample(drawings, count)


@torch.no_grad()
def evaluate(
    model: Transformer, autoencoder: Autoencoder, text: TextEncoder, grid: Path | None, count: int
) -> dict[str, float]:
    """Return the shares of held-out prompts, and of edits of held-out drawings, that the probe reads as requested."""
    wanted = held_out_prompts(count)
    noise = initial_noise(range(count), PIXELS // 16, PIXELS // 16)
    prompts = [plain_caption(drawing) for drawing in wanted]

    def pictures(captions: list[str], references: list[Tensor]) -> Tensor:
        parts = []
        for start in range(0, count, 32):
            part = slice(start, start + 32)
            latents, prompt, given = noise[part], text.encode(captions[part]), [one[part] for one in references]
            parts.append(sample(model, latents, prompt, steps=TINY.steps, guidance=TINY.guidance, references=given))
        return autoencoder.decode(torch.cat(parts)).clamp(-1, 1)

    generated = pictures(prompts, [])
    scores = score(generated, wanted, "prompt")
    rng = random.Random(2)
    sources = held_out_prompts(count, seed=2)
    instructions, results = (list(part) for part in zip(*(edit(source, rng) for source in sources), strict=True))
    drawn = to_pixels(np.stack([np.asarray(draw(source, PIXELS, **jitter(rng))) for source in sources]))
    edited = pictures(instructions, [autoencoder.encode(drawn)])
    scores |= score(edited, results, "edit")
    if grid is not None:
        shown = torch.stack([drawn[:16], edited[:16]]).transpose(0, 1).flatten(0, 1)
        save_grid(torch.cat([generated[:64], shown]), grid)
    return scores


def score(pixels: Tensor, wanted: list[Drawing], name: str) -> dict[str, float]:
    """Return the share of images that show each attribute of `wanted`, and the share that shows all of them."""
    read = [probe.read(Image.fromarray(picture)) for picture in to_uint8(pixels)]
    right = {
        key: [getattr(r, key) == getattr(w, key) for r, w in zip(read, wanted, strict=True)]
        for key in ("shape", "color", "background", "size")
    }
    right["all"] = [all(each) for each in zip(*right.values(), strict=True)]
    return {f"{name}_{key}": sum(values) / len(wanted) for key, values in right.items()}
