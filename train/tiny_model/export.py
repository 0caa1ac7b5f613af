"""Write the trained parts in the published folder layout, and the image grid of the model card."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers import Mistral3Config, Mistral3ForConditionalGeneration

import flux2
from data.synthetic.drawings import SHAPES, all_drawings, draw, edit, held_out, plain_caption
from flux2.models.autoencoder import Autoencoder
from flux2.models.transformer import Transformer
from flux2.weights.key_names import autoencoder_tensor, transformer_tensor
from train.tiny_model.world import PIXELS, TINY, jitter, make_language_model, make_tokenizer, text_config
from train.validation.sample_grid import sample_grid


def export(model: Transformer, autoencoder: Autoencoder, text_seed: int, folder: Path) -> None:
    """Write the published folder layout, which `flux2.load` and diffusers' `Flux2Pipeline.from_pretrained` open."""
    config = TINY.transformer
    levels = len(TINY.autoencoder.widths)
    tokenizer = make_tokenizer()
    language_config = text_config(len(tokenizer))

    def write(part: str, name: str, values: dict[str, Any]) -> None:
        (folder / part).mkdir(parents=True, exist_ok=True)
        (folder / part / name).write_text(json.dumps(values, indent=2) + "\n")

    def weights(part: str, name: str, tensors: dict[str, Tensor]) -> None:
        stored = {key: t.to(torch.bfloat16).contiguous() for key, t in tensors.items() if t.is_floating_point()}
        save_file(stored, folder / part / name, metadata={"format": "pt"})

    write(
        "transformer",
        "config.json",
        {
            "_class_name": "Flux2Transformer2DModel",
            "patch_size": 1,
            "in_channels": config.channels,
            "num_layers": config.double_blocks,
            "num_single_layers": config.single_blocks,
            "attention_head_dim": config.head_dim,
            "num_attention_heads": config.heads,
            "joint_attention_dim": config.text_width,
            "timestep_guidance_channels": config.time_width,
            "mlp_ratio": config.mlp_ratio,
            "axes_dims_rope": list(config.rope_axes),
            "rope_theta": config.rope_theta,
            "eps": config.eps,
            "guidance_embeds": config.guidance,
        },
    )
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        tensors |= transformer_tensor(name).split(tensor)
    weights("transformer", "diffusion_pytorch_model.safetensors", tensors)

    widths = TINY.autoencoder.widths
    write(
        "vae",
        "config.json",
        {
            "_class_name": "AutoencoderKLFlux2",
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
            "block_out_channels": list(widths),
            "layers_per_block": TINY.autoencoder.blocks,
            "norm_num_groups": TINY.autoencoder.groups,
            "latent_channels": TINY.autoencoder.latent_channels,
            "batch_norm_eps": TINY.autoencoder.bn_eps,
            "sample_size": PIXELS,
        },
    )
    tensors = {}
    for name, tensor in autoencoder.state_dict().items():
        tensors |= autoencoder_tensor(name, levels).split(tensor)
    weights("vae", "diffusion_pytorch_model.safetensors", tensors)

    write("text_encoder", "config.json", language_config)
    torch.manual_seed(text_seed)
    complete = Mistral3ForConditionalGeneration(Mistral3Config(**language_config)).to(torch.bfloat16)
    language = make_language_model(language_config, text_seed)
    missing, unexpected = complete.model.language_model.load_state_dict(language)
    assert not missing, missing
    assert not unexpected, unexpected
    complete.save_pretrained(folder / "text_encoder")
    (folder / "text_encoder" / "generation_config.json").unlink(missing_ok=True)

    tokenizer.save_pretrained(folder / "tokenizer")
    settings_file = folder / "tokenizer" / "tokenizer_config.json"
    settings = json.loads(settings_file.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    write("tokenizer", "tokenizer_config.json", settings)
    write(
        "scheduler",
        "scheduler_config.json",
        {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "num_train_timesteps": 1000,
            "use_dynamic_shifting": True,
            "base_shift": 0.5,
            "max_shift": 1.15,
            "shift": 3.0,
            "time_shift_type": "exponential",
        },
    )
    write(
        ".",
        "model_index.json",
        {
            "_class_name": "Flux2Pipeline",
            "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
            "text_encoder": ["transformers", "Mistral3ForConditionalGeneration"],
            "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
            "transformer": ["diffusers", "Flux2Transformer2DModel"],
            "vae": ["diffusers", "AutoencoderKLFlux2"],
        },
    )


def grid(folder: Path, file: Path) -> None:
    """Write the image grid of the model card: every subject, held-out combinations only, and a row of edits."""
    pipeline = flux2.load("tiny", str(folder))
    rng = random.Random(3)
    unseen = [drawing for drawing in all_drawings() if held_out(drawing)]
    chosen = [rng.choice([drawing for drawing in unseen if drawing.shape == shape]) for shape in SHAPES]
    generated = pipeline.generate([plain_caption(drawing) for drawing in chosen], seed=0)
    sources = rng.sample(unseen, 7)
    before = [draw(source, PIXELS, **jitter(rng)) for source in sources]
    orders = [edit(source, rng)[0] for source in sources]
    after = [
        pipeline.generate(order, references=[picture], seed=i)[0]
        for i, (order, picture) in enumerate(zip(orders, before, strict=True))
    ]
    captions = [plain_caption(drawing) for drawing in chosen]
    strips = [
        sample_grid([generated[:7]], captions[:7], ["prompt"]),
        sample_grid([generated[7:]], captions[7:], ["prompt"]),
        sample_grid([before, after], orders, ["reference", "edit"]),
    ]
    page = Image.new("RGB", (max(strip.width for strip in strips), sum(strip.height for strip in strips)), "white")
    y = 0
    for strip in strips:
        page.paste(strip, (page.width - strip.width, y))
        y += strip.height
    file.parent.mkdir(parents=True, exist_ok=True)
    page.save(file, optimize=True)
