"""Write the trained parts in the published folder layout, and the image grid of the model card."""

from __future__ import annotations

import json
import random
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import Mistral3Config, Mistral3ForConditionalGeneration

import flux2
from data.synthetic.captions import edit, plain_caption
from data.synthetic.drawings import SHAPES, all_drawings, draw, held_out, jitter
from flux2.models.autoencoder import Autoencoder
from flux2.models.transformer import Transformer
from flux2.weights.key_names import autoencoder_tensor, transformer_tensor
from train.tiny_model.world import PIXELS, TINY, make_language_model, make_tokenizer, text_config
from train.validation.sample_grid import sample_grid, stack


def config_files() -> dict[str, dict[str, Any]]:
    """Return the configurations of the published folder layout by path."""
    transformer, autoencoder, levels = TINY.transformer, TINY.autoencoder, len(TINY.autoencoder.widths)
    return {
        "transformer/config.json": {
            "_class_name": "Flux2Transformer2DModel",
            "patch_size": 1,
            "in_channels": transformer.channels,
            "num_layers": transformer.double_blocks,
            "num_single_layers": transformer.single_blocks,
            "attention_head_dim": transformer.head_dim,
            "num_attention_heads": transformer.heads,
            "joint_attention_dim": transformer.text_width,
            "timestep_guidance_channels": transformer.time_width,
            "mlp_ratio": transformer.mlp_ratio,
            "axes_dims_rope": list(transformer.rope_axes),
            "rope_theta": transformer.rope_theta,
            "eps": transformer.eps,
            "guidance_embeds": transformer.guidance,
        },
        "vae/config.json": {
            "_class_name": "AutoencoderKLFlux2",
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
            "block_out_channels": list(autoencoder.widths),
            "layers_per_block": autoencoder.blocks,
            "norm_num_groups": autoencoder.groups,
            "latent_channels": autoencoder.latent_channels,
            "batch_norm_eps": autoencoder.bn_eps,
            "sample_size": PIXELS,
        },
        "scheduler/scheduler_config.json": {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "num_train_timesteps": 1000,
            "use_dynamic_shifting": True,
            "base_shift": 0.5,
            "max_shift": 1.15,
            "shift": 3.0,
            "time_shift_type": "exponential",
        },
        "model_index.json": {
            "_class_name": "Flux2Pipeline",
            "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
            "text_encoder": ["transformers", "Mistral3ForConditionalGeneration"],
            "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
            "transformer": ["diffusers", "Flux2Transformer2DModel"],
            "vae": ["diffusers", "AutoencoderKLFlux2"],
        },
    }


def export(model: Transformer, autoencoder: Autoencoder, text_seed: int, folder: Path) -> None:
    """Write the published folder layout, which `flux2.load` and diffusers' `Flux2Pipeline.from_pretrained` open."""
    tokenizer = make_tokenizer()
    language_config = text_config(len(tokenizer))

    def write(name: str, values: dict[str, Any]) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

    for name, values in config_files().items():
        write(name, values)
    published_name = partial(autoencoder_tensor, levels=len(TINY.autoencoder.widths))
    modules = ("transformer", model, transformer_tensor), ("vae", autoencoder, published_name)
    for part, module, published in modules:
        tensors: dict[str, Tensor] = {}
        for name, tensor in module.state_dict().items():
            # the count of the autoencoder's batches is an integer: diffusers warns of a file without it
            tensors |= published(name).split(tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor)
        stored = {key: tensor.contiguous() for key, tensor in tensors.items()}
        save_file(stored, folder / part / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})

    torch.manual_seed(text_seed)
    complete = Mistral3ForConditionalGeneration(Mistral3Config(**language_config)).to(torch.bfloat16)
    language = make_language_model(language_config, text_seed)
    missing, unexpected = complete.model.language_model.load_state_dict(language)
    assert not missing, missing
    assert not unexpected, unexpected
    complete.save_pretrained(folder / "text_encoder")
    (folder / "text_encoder" / "generation_config.json").unlink(missing_ok=True)

    tokenizer.save_pretrained(folder / "tokenizer")
    settings = json.loads((folder / "tokenizer" / "tokenizer_config.json").read_text(encoding="utf-8"))
    write("tokenizer/tokenizer_config.json", settings | {"tokenizer_class": "PreTrainedTokenizerFast"})


def grid(folder: Path, file: Path) -> None:
    """Write the image grid of the model card: every subject, held-out combinations only, and a row of edits."""
    pipeline = flux2.load("tiny", str(folder))
    rng = random.Random(3)
    unseen = [drawing for drawing in all_drawings() if held_out(drawing)]
    chosen = [rng.choice([drawing for drawing in unseen if drawing.shape == shape]) for shape in SHAPES]
    captions = [plain_caption(drawing) for drawing in chosen]
    generated = pipeline.generate(captions, seed=0)
    sources = rng.sample(unseen, 7)
    before = [draw(source, PIXELS, **jitter(rng)) for source in sources]
    orders = [edit(source, rng)[0] for source in sources]
    edits = enumerate(zip(orders, before, strict=True))
    after = [pipeline.generate(order, references=[image], seed=i)[0] for i, (order, image) in edits]
    strips = [
        sample_grid([generated[:7]], captions[:7], ["prompt"]),
        sample_grid([generated[7:]], captions[7:], ["prompt"]),
        sample_grid([before, after], orders, ["reference", "edit"]),
    ]
    page = stack(strips, right=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    page.save(file, optimize=True)
