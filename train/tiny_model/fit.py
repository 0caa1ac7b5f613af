"""Train the parts of the embedded model. The stages and their recipe are described in `__main__`."""

from __future__ import annotations

import copy
import json
import math
import random
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import flux2.models.transformer
from data.synthetic import probe
from data.synthetic.drawings import EDITS, Drawing, all_drawings, caption, draw, edit, held_out, plain_caption
from flux2.models.autoencoder import Autoencoder, patchify
from flux2.models.positions import positions_with_references, text_positions, to_tokens, with_references
from flux2.models.text_encoder import TextEncoder
from flux2.sampling import initial_noise, sample
from train.tiny_model.world import PIXELS, TINY, Atomic, Catalog, jitter


@dataclass(frozen=True)
class Phase:
    """One part of the autoencoder's training.

    With 8 groups a norm sees 2 channels at a time in the widest layers: colors are learned quickly, but those of areas
    are normalized away and guessed from what was seen, so that a picture that is no drawing comes out in the drawings'
    colors. With one group they are kept, but hardly learned from scratch. So the first phase has 8 groups, and the
    second goes on with one.
    """

    steps: int
    groups: int
    scenes: float  # share of pictures that are scenes
    crops: float  # share of the steps that see 48-pixel crops, before whole pictures
    lr: float
    areas: float  # weight of the colors of areas in the loss


@dataclass(frozen=True)
class Lesson:
    """One part of the transformer's training.

    The first part leaves edits of the size behind: they are few, and the subject must be drawn anew in another place.
    The others have more edits, and more of those.
    """

    steps: int
    lr: float
    flat: float  # share of the steps before the learning rate decays
    guide_from: float  # share of the steps before guided flows are learned
    edits_every: int  # one batch in so many edits
    kinds: dict[str, float] | None  # shares of the kinds of edits; None: as they were drawn
    stream: int  # of random numbers; the autoencoder's phases have 1 and 2


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result: counts of pictures, steps, batch sizes, rates."""

    seed: int = 0
    drawings: int = 24_000
    edits: int = 10_000
    scenes: int = 12_000
    autoencoder: tuple[Phase, ...] = (
        Phase(steps=8_000, groups=8, scenes=0.15, crops=0.6, lr=2e-3, areas=0.0),
        Phase(steps=6_000, groups=TINY.autoencoder.groups, scenes=0.5, crops=0.67, lr=1.5e-3, areas=1.0),
    )
    transformer: tuple[Lesson, ...] = (
        Lesson(steps=11_000, lr=1.2e-3, flat=0.6, guide_from=0.6, edits_every=4, kinds=None, stream=0),
        Lesson(
            steps=5_000,
            lr=6e-4,
            flat=0.3,
            guide_from=0.0,
            edits_every=2,
            kinds={"color": 0.15, "background": 0.15, "shape": 0.25, "size": 0.45},
            stream=3,
        ),
        Lesson(
            steps=5_000,
            lr=1e-3,
            flat=0.4,
            guide_from=0.0,
            edits_every=2,
            kinds={"color": 0.1, "background": 0.1, "shape": 0.2, "size": 0.6},
            stream=4,
        ),
    )
    transformer_batch: int = 32
    average: float = 0.999  # decay of the averaged weights
    judged: int = 192  # held-out prompts, and as many edits, for the final scores

    def scaled(self, scale: float) -> Recipe:
        """The same recipe with all counts and steps multiplied by `scale`, but at least 8."""

        def part(count: int) -> int:
            return max(8, round(count * scale))

        counts = {key: part(getattr(self, key)) for key in ("drawings", "edits", "scenes", "judged")}
        phases = tuple(replace(phase, steps=part(phase.steps)) for phase in self.autoencoder)
        lessons = tuple(replace(lesson, steps=part(lesson.steps)) for lesson in self.transformer)
        return replace(self, autoencoder=phases, transformer=lessons, **counts)


def attend(q: Tensor, k: Tensor, v: Tensor, rope: flux2.models.transformer.RotaryAngles) -> Tensor:
    """`flux2.models.transformer.attend` as two matrix products: on a CPU in bfloat16 the fused kernel is twice as
    slow.
    """
    scores = (
        flux2.models.transformer.apply_rope(q, rope)
        @ flux2.models.transformer.apply_rope(k, rope).transpose(-1, -2)
        * q.shape[-1] ** -0.5
    )
    return (scores.float().softmax(-1).to(v.dtype) @ v).transpose(1, 2).flatten(2)


class Trainer:
    """Optimizer, averaged weights, checkpoints and log of one module."""

    def __init__(self, name: str, module: nn.Module, lr: float, betas: tuple[float, float], average: float, home: Path):
        self.name, self.module, self.lr, self.average, self.home = name, module, lr, average, home
        decayed = [p for p in module.parameters() if p.ndim >= 2]
        other = [p for p in module.parameters() if p.ndim < 2]
        groups = [{"params": decayed, "weight_decay": 0.01}, {"params": other, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)
        self.averaged = copy.deepcopy(module).requires_grad_(False).eval()
        self.step = 0
        self.seconds = 0.0
        self.started = time.monotonic()

    @property
    def file(self) -> Path:
        return self.home / f"{self.name}.pt"

    def update(self, loss: Tensor, lr: float) -> None:
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        if not torch.isfinite(norm):
            raise RuntimeError(f"{self.name}: the gradient is not finite at step {self.step}")
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        decay = min(self.average, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.averaged.parameters()), list(self.module.parameters()), 1 - decay)

    def save(self) -> None:
        now = time.monotonic()
        self.seconds += now - self.started
        self.started = now
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "module": self.module.state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        with Atomic(self.file) as temporary:
            torch.save(state, temporary)

    def resume(self) -> None:
        if self.file.exists():
            state = torch.load(self.file, weights_only=True)
            self.module.load_state_dict(state["module"])
            self.averaged.load_state_dict(state["averaged"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.seconds = state["step"], state["seconds"]
            print(f"{self.name}: going on from step {self.step}")

    def log(self, total: int, **values: float) -> None:
        seconds = self.seconds + time.monotonic() - self.started
        record = {"stage": self.name, "step": self.step, "seconds": round(seconds, 1)}
        record |= {key: round(value, 5) for key, value in values.items()}
        with (self.home / "log.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(f"{self.name} {self.step}/{total} " + " ".join(f"{k} {v:.4g}" for k, v in values.items()), flush=True)


def rate(step: int, total: int, flat: float, warmup: int = 100) -> float:
    """Warm-up, flat, then a cosine to zero."""
    if step < warmup:
        return (step + 1) / warmup
    rest = (step / total - flat) / (1 - flat)
    return 1.0 if rest <= 0 else 0.5 * (1 + math.cos(math.pi * rest))


def step_generator(recipe: Recipe, stage: int, step: int) -> np.random.Generator:
    """All randomness of one step, from its number alone: a resumed training is the same training."""
    return np.random.default_rng((recipe.seed, stage, step))


# ---------------------------------------------------------------- autoencoder


def to_pixels(pictures: np.ndarray) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32 in [-1, 1], channels last in memory."""
    return torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def gradients(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., 1:, :] - x[..., :-1, :], x[..., 1:] - x[..., :-1]


def crop(pictures: np.ndarray, side: int, rng: np.random.Generator) -> np.ndarray:
    corners = rng.integers(0, PIXELS - side + 1, (len(pictures), 2))
    return np.stack([p[y : y + side, x : x + side] for p, (y, x) in zip(pictures, corners, strict=True)])


def set_groups(module: nn.Module, groups: int) -> None:
    """Change how many groups the norms have; their weights are one a channel and stay."""
    for part in module.modules():
        if isinstance(part, nn.GroupNorm):
            part.num_groups = groups


def train_autoencoder(recipe: Recipe, pictures: np.ndarray, home: Path) -> Autoencoder:
    """The averaged autoencoder of the last phase."""
    torch.manual_seed(recipe.seed)
    module = Autoencoder(TINY.autoencoder)
    with torch.no_grad():  # start with little noise in the latents, or the decoder learns to ignore them
        assert module.encoder.quant_conv.bias is not None
        module.encoder.quant_conv.bias[TINY.autoencoder.latent_channels :] = -5.0
    for number, phase in enumerate(recipe.autoencoder, start=1):
        module = train_phase(recipe, phase, number, module, pictures, home)
    return module


def train_phase(
    recipe: Recipe, phase: Phase, number: int, start: Autoencoder, pictures: np.ndarray, home: Path
) -> Autoencoder:
    module = copy.deepcopy(start).to(memory_format=torch.channels_last).requires_grad_(True)  # type: ignore[call-overload]
    set_groups(module, phase.groups)
    trainer = Trainer(f"autoencoder_{number}", module, phase.lr, (0.9, 0.99), recipe.average, home)
    trainer.resume()
    total, first_scene = phase.steps, len(pictures) - recipe.scenes
    while trainer.step < total:
        rng = step_generator(recipe, number, trainer.step)
        torch.manual_seed(int(rng.integers(2**31)))
        crops = trainer.step < phase.crops * total
        count = 8 if crops else 4
        is_scene = rng.random(count) < phase.scenes
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
        trainer.update(loss, phase.lr * rate(trainer.step, total, 0.5))
        if trainer.step % 200 == 0:
            trainer.log(total, loss=loss.item(), kl=kl.item())
        if trainer.step % 500 == 0 or trainer.step == total:
            trainer.save()
            show(trainer, pictures, first_scene, home / f"autoencoder_{number}.png")
    averaged = trainer.averaged
    assert isinstance(averaged, Autoencoder)
    return averaged


@torch.no_grad()
def show(trainer: Trainer, pictures: np.ndarray, first_scene: int, file: Path) -> None:
    """Log the peak signal-to-noise ratio on drawings and on scenes, and save a sample grid of what comes back."""
    averaged = trainer.averaged
    assert isinstance(averaged, Autoencoder)
    values, restored = {}, []
    for name, start, stop in (("drawings", 0, first_scene), ("scenes", first_scene, len(pictures))):
        x = to_pixels(pictures[np.linspace(start, stop - 1, 32).astype(int)])
        restored.append(averaged.decoder(averaged.moments(x)[0]).clamp(-1, 1))
        values[f"psnr_{name}"] = -10 * math.log10(F.mse_loss(restored[-1], x).item() / 4)
    trainer.log(trainer.step, **values)
    save_grid(torch.cat(restored), file)


def save_grid(pixels: Tensor, file: Path, columns: int = 16) -> None:
    """Pictures (B, 3, H, W) in [-1, 1] as one PNG."""
    array = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    rows = [np.concatenate(list(array[i : i + columns]), 1) for i in range(0, len(array), columns)]
    Image.fromarray(np.concatenate([row for row in rows if row.shape == rows[0].shape])).save(file)


@torch.no_grad()
def encode_pictures(autoencoder: Autoencoder, pictures: np.ndarray, file: Path) -> Tensor:
    """(N, 128, 8, 8) bfloat16 normalized latents; sets the autoencoder's statistics from them."""
    if not file.exists():
        print(f"encoding {len(pictures)} pictures")
        parts = [patchify(autoencoder.moments(to_pixels(pictures[i : i + 64]))[0]) for i in range(0, len(pictures), 64)]
        latents = torch.cat(parts)
        mean, var = latents.mean((0, 2, 3)), latents.var((0, 2, 3))
        std = torch.sqrt(var + TINY.autoencoder.bn_eps)[:, None, None]
        normalized = ((latents - mean[:, None, None]) / std).to(torch.bfloat16).contiguous()
        with Atomic(file) as temporary:
            save_file({"latents": normalized, "mean": mean, "var": var}, temporary)
    stored = load_file(file)
    autoencoder.bn.running_mean, autoencoder.bn.running_var = stored["mean"], stored["var"]
    return stored["latents"]


# ---------------------------------------------------------------- transformer


def initialize(model: nn.Module) -> None:
    """Xavier for the linears; modulation and output start at zero, so that every block starts as the identity."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            zero = "modulation" in name or name == "final_layer.linear"
            nn.init.zeros_(module.weight) if zero else nn.init.xavier_uniform_(module.weight)


def times(rng: np.random.Generator, count: int) -> Tensor:
    """Half uniform, half logit-normal around 0.73: subject and colors are decided near the noise."""
    uniform = rng.random(count)
    normal = 1 / (1 + np.exp(-rng.normal(1.0, 1.0, count)))
    return torch.from_numpy(np.where(rng.random(count) < 0.5, uniform, normal)).float()


@dataclass
class TinyBatch:
    latents: Tensor  # (B, 128, 8, 8)
    references: list[Tensor]
    captions: list[str]


def edit_shares(world: Catalog, kinds: dict[str, float]) -> np.ndarray:
    """How often each edit is to be drawn, so that the kinds of edits have these shares."""

    def kind(i: int) -> str:
        source, result = world.jobs[world.edits[i][0]].drawing, world.jobs[world.drawings + i].drawing
        return next(key for key in EDITS if getattr(source, key) != getattr(result, key))

    each = [kind(i) for i in range(len(world.edits))]
    shares = np.array([kinds[key] / each.count(key) for key in each])
    return shares / shares.sum()  # which is 1 before, but for a kind that a very small catalog lacks


def draw_batch(
    recipe: Recipe,
    lesson: Lesson,
    world: Catalog,
    shares: np.ndarray | None,
    latents: Tensor,
    step: int,
    rng: np.random.Generator,
) -> TinyBatch:
    """Every `edits_every`th batch edits; the others draw from captions, edited pictures included."""
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
        drawings = [world.jobs[i].drawing for i in targets]
        captions = [caption(drawing, words) for drawing in drawings if drawing is not None]
    captions = ["" if words.random() < 0.1 else text for text in captions]
    return TinyBatch(latents[torch.from_numpy(targets)].float(), references, captions)


def train_transformer(
    recipe: Recipe, world: Catalog, latents: Tensor, autoencoder: Autoencoder, text: TextEncoder, home: Path
) -> flux2.models.transformer.Transformer:
    """The averaged transformer of the last lesson."""
    torch.manual_seed(recipe.seed)
    flux2.models.transformer.attend = attend
    module = flux2.models.transformer.Transformer(TINY.transformer)
    initialize(module)
    for number, lesson in enumerate(recipe.transformer, start=1):
        module = train_lesson(recipe, lesson, number, module, world, latents, autoencoder, text, home)
    return module


def train_lesson(
    recipe: Recipe,
    lesson: Lesson,
    number: int,
    start: flux2.models.transformer.Transformer,
    world: Catalog,
    latents: Tensor,
    autoencoder: Autoencoder,
    text: TextEncoder,
    home: Path,
) -> flux2.models.transformer.Transformer:
    module = copy.deepcopy(start).requires_grad_(True)
    trainer = Trainer(f"transformer_{number}", module, lesson.lr, (0.9, 0.98), recipe.average, home)
    trainer.resume()
    student = torch.compile(module, dynamic=False)
    averaged = trainer.averaged
    assert isinstance(averaged, flux2.models.transformer.Transformer)
    teacher = torch.compile(averaged, dynamic=False)
    empty = text.encode([""])
    shares = edit_shares(world, lesson.kinds) if lesson.kinds else None
    total, smooth = lesson.steps, 1.0

    while trainer.step < total:
        rng = step_generator(recipe, lesson.stream, trainer.step)
        batch = draw_batch(recipe, lesson, world, shares, latents, trainer.step, rng)
        count = len(batch.captions)
        prompts = text.encode(batch.captions)
        noise = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(int(rng.integers(2**31))))
        time_ = times(rng, count)
        guidance = torch.from_numpy(np.where(rng.random(count) < 0.5, 1.0, rng.uniform(1, 4, count))).float()
        x, flow = to_tokens(batch.latents), to_tokens(noise - batch.latents)
        noisy = x + time_[:, None, None] * flow
        tokens = with_references(noisy, batch.references)
        positions = positions_with_references(noise, batch.references)
        text_at, keep = text_positions(prompts.shape[1]), x.shape[1]
        target = flow
        with torch.autocast("cpu", torch.bfloat16):
            if trainer.step >= lesson.guide_from * total:
                with torch.no_grad():
                    plain = torch.ones(count)
                    with_prompt = teacher(tokens, positions, prompts, text_at, time_, plain, keep).float()
                    without = teacher(tokens, positions, empty.expand_as(prompts), text_at, time_, plain, keep).float()
                target = flow + (guidance - 1)[:, None, None] * (with_prompt - without)
            prediction = student(tokens, positions, prompts, text_at, time_, guidance, keep).float()
        loss = F.mse_loss(prediction, target)
        trainer.update(loss, lesson.lr * rate(trainer.step, total, lesson.flat))
        smooth = 0.99 * smooth + 0.01 * F.mse_loss(prediction, flow).item()
        if trainer.step % 100 == 0:
            trainer.log(total, loss=smooth)
        if trainer.step % 500 == 0:
            trainer.save()
        if trainer.step % 2000 == 0 or trainer.step == total:
            scores = evaluate(averaged, autoencoder, text, home / "samples.png", min(64, recipe.judged))
            trainer.log(total, **scores)
    trainer.save()
    return averaged


def held_out_prompts(count: int, seed: int = 1) -> list[Drawing]:
    drawings = [drawing for drawing in all_drawings() if held_out(drawing)]
    return random.Random(seed).sample(drawings, count)


@torch.no_grad()
def evaluate(
    model: flux2.models.transformer.Transformer,
    autoencoder: Autoencoder,
    text: TextEncoder,
    grid: Path | None = None,
    count: int = 128,
    guidance: float = TINY.guidance,
) -> dict[str, float]:
    """Shares of held-out prompts, and of edits of held-out drawings, whose attributes the probe reads as asked."""
    wanted = held_out_prompts(count)
    noise = initial_noise(range(count), PIXELS // 16, PIXELS // 16)
    prompts = [plain_caption(drawing) for drawing in wanted]

    def pictures(captions: list[str], references: list[Tensor]) -> Tensor:
        parts = [
            sample(
                model,
                noise[i : i + 32],
                text.encode(captions[i : i + 32]),
                steps=TINY.steps,
                guidance=guidance,
                references=[reference[i : i + 32] for reference in references],
            )
            for i in range(0, count, 32)
        ]
        return autoencoder.decode(torch.cat(parts)).clamp(-1, 1)

    made = pictures(prompts, [])
    scores = score(made, wanted, "prompt")
    rng = random.Random(2)
    sources = held_out_prompts(count, seed=2)
    instructions, results = (list(part) for part in zip(*(edit(source, rng) for source in sources), strict=True))
    drawn = to_pixels(np.stack([np.asarray(draw(source, PIXELS, **jitter(rng))) for source in sources]))
    edited = pictures(instructions, [autoencoder.encode(drawn)])
    scores |= score(edited, results, "edit")
    if grid is not None:
        shown = torch.stack([drawn[:16], edited[:16]]).transpose(0, 1).flatten(0, 1)
        save_grid(torch.cat([made[:64], shown]), grid)
    return scores


def score(pixels: Tensor, wanted: list[Drawing], name: str) -> dict[str, float]:
    array = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    read = [probe.read(Image.fromarray(picture)) for picture in array]
    shares = {}
    for key in ("shape", "color", "background", "size"):
        shares[key] = sum(getattr(r, key) == getattr(w, key) for r, w in zip(read, wanted, strict=True)) / len(wanted)
    shares["all"] = sum(
        (r.shape, r.color, r.background, r.size) == (w.shape, w.color, w.background, w.size)
        for r, w in zip(read, wanted, strict=True)
    ) / len(wanted)
    return {f"{name}_{key}": value for key, value in shares.items()}
