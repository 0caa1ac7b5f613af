"""What the embedded model sees: a text encoder for its captions, its images, and its edits (see `__main__`).

Held-out combinations (`data.synthetic.drawings.held_out`) are on no image.
"""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from multiprocessing import Pool
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor, nn
from transformers import MistralConfig, MistralModel, PreTrainedTokenizerFast

from data.files import atomic_write
from data.synthetic.captions import edit
from data.synthetic.drawings import Drawing, all_drawings, draw, held_out, jitter
from flux2.models.text_encoder import TextEncoder, build
from flux2.models.variants import VARIANTS

TINY = VARIANTS["tiny"]
PIXELS = TINY.resolution


WORDS = """
a an the of on in with and for to at by it its is this that into instead put make paint draw turn change replace
picture image drawing card photo painting illustration sketch icon sticker poster print style ink vintage tarot flat
woodcut watercolor pastel simple clean bold old new background colour color size subject small large big little tiny
cup sword star moon sun tower key heart crown fish tree wheel lantern bell
red orange yellow green blue purple pink brown white black grey gray gold silver
""".split()
MARKS = ",.;:!?'\"-()"
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}[INST]"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}"
    "[/INST]{% endif %}{% endfor %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer: known words are one token, others are spelled, so every trigger word is distinct."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    control = ["<unk>", "<s>", "</s>", "<pad>", "[INST]", "[/INST]"]
    entries = [*control, *dict.fromkeys(WORDS), *MARKS, *letters, *("##" + letter for letter in letters)]
    vocabulary = {entry: i for i, entry in enumerate(dict.fromkeys(entries))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>", max_input_chars_per_word=64))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["[INST]", "[/INST]"],
        padding_side="left",
        chat_template=TEMPLATE,
        model_max_length=512,
    )


def text_config(vocabulary: int) -> dict[str, Any]:
    """Return `text_encoder/config.json` in the layout of dev: a Mistral and a vision tower."""
    return {
        "architectures": ["Mistral3ForConditionalGeneration"],
        "model_type": "mistral3",
        "text_config": {
            "model_type": "mistral",
            "vocab_size": vocabulary,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 512,
            "initializer_range": 0.12,
            "sliding_window": None,
            "tie_word_embeddings": True,
            "pad_token_id": 3,
        },
        "vision_config": {"model_type": "pixtral", "num_hidden_layers": 1, "num_attention_heads": 1}
        | {"hidden_size": 16, "intermediate_size": 16, "head_dim": 16, "image_size": 32, "patch_size": 16},
        "image_token_index": 0,
        "spatial_merge_size": 2,
    }


def make_language_model(config: dict[str, Any], seed: int) -> dict[str, Tensor]:
    """Return the random text encoder's weights in bfloat16, as they are published, by `MistralModel`'s names."""
    torch.manual_seed(seed)
    model = MistralModel(MistralConfig(**config["text_config"]))
    nn.init.normal_(model.embed_tokens.weight)
    return {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}


def make_text_encoder(seed: int) -> TextEncoder:
    tokenizer = make_tokenizer()
    config = text_config(len(tokenizer))
    model = build(config, TINY.text)
    weights = {name: tensor.float() for name, tensor in make_language_model(config, seed).items()}
    model.load_state_dict({name: weights[name] for name in model.state_dict()})
    return TextEncoder(model, tokenizer, TINY.text)


def scene(rng: random.Random) -> Image.Image:
    """Draw an abstract scene for the autoencoder: overlapping shapes, strokes and scribbles in any colors."""
    side = 4 * PIXELS

    def color() -> tuple[int, int, int]:
        return (rng.randrange(256), rng.randrange(256), rng.randrange(256))

    def point(around: tuple[float, float] | None = None, reach: float = 0.0) -> tuple[float, float]:
        if around is None:
            return (rng.uniform(-0.1, 1.1) * side, rng.uniform(-0.1, 1.1) * side)
        return (around[0] + rng.uniform(-reach, reach), around[1] + rng.uniform(-reach, reach))

    picture = Image.new("RGB", (side, side), color())
    canvas = ImageDraw.Draw(picture)
    for _ in range(rng.randint(1, 12)):
        kind, fill, width = rng.randrange(6), color(), rng.randint(4, 40)
        (x0, y0), (x1, y1) = point(), point()
        box = (min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1))
        outline = rng.choice([None, color(), (20, 20, 30)])
        if kind == 0:
            canvas.rectangle(box, fill, outline, width // 2)
        elif kind == 1:
            canvas.ellipse(box, fill, outline, width // 2)
        elif kind == 2:
            canvas.polygon([point() for _ in range(rng.randint(3, 6))], fill, outline)
        elif kind == 3:
            canvas.line([point() for _ in range(rng.randint(2, 5))], fill, width, joint="curve")
        elif kind == 4:
            canvas.arc(box, rng.uniform(0, 360), rng.uniform(0, 360), fill, width)
        else:
            center, reach = point(), rng.uniform(20, 90)
            for _ in range(rng.randint(2, 6)):  # small strokes close together, as in writing
                canvas.line([point(center, reach), point(center, reach)], fill, rng.randint(6, 16))
    return picture.reduce(4)


@dataclass(frozen=True)
class Job:
    """One image to render: a drawing with its jitter, or a scene."""

    drawing: Drawing | None
    seed: int


def render(job: Job) -> np.ndarray:
    rng = random.Random(job.seed)
    return np.asarray(scene(rng) if job.drawing is None else draw(job.drawing, PIXELS, **jitter(rng)))


@dataclass(frozen=True)
class Catalog:
    """All images: `drawings`, then the results of `edits`, then the scenes; pictures[i] belongs to jobs[i]."""

    jobs: list[Job]
    drawings: int
    edits: list[tuple[int, str]]  # index of the source and instruction, for each result


def catalog(seed: int, drawings: int, edits: int, scenes: int) -> Catalog:
    """Return the images to draw, none with a held-out combination of subject, color and background."""
    rng = random.Random(seed)
    allowed = [drawing for drawing in all_drawings() if not held_out(drawing)]
    jobs: list[Job] = []
    while len(jobs) < drawings:
        rng.shuffle(allowed)
        jobs += [Job(drawing, rng.getrandbits(32)) for drawing in allowed]
    del jobs[drawings:]
    orders: list[tuple[int, str]] = []
    results: list[Job] = []
    for _ in range(edits):
        source = rng.randrange(drawings)
        drawing = jobs[source].drawing
        assert drawing is not None
        instruction, result = edit(drawing, rng)
        assert not held_out(result)
        orders.append((source, instruction))
        results.append(Job(result, jobs[source].seed))  # the same jitter, so that the unedited parts stay in place
    abstract = [Job(None, rng.getrandbits(32)) for _ in range(scenes)]
    return Catalog([*jobs, *results, *abstract], drawings, orders)


def draw_pictures(jobs: list[Job], file: Path) -> np.ndarray:
    """Return the images of `jobs`, (N, 128, 128, 3) uint8, stored in `file`."""
    if not file.exists():
        print(f"drawing {len(jobs)} images")
        with Pool(os.cpu_count()) as pool:
            pictures = np.stack(pool.map(render, jobs, chunksize=256))
        with atomic_write(file) as temporary, temporary.open("wb") as stream:
            np.save(stream, pictures)
    return np.load(file, mmap_mode="r")
