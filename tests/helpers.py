"""Small random models of every kind, and the same in diffusers and transformers, which are the oracle.

Every weight is random, norms and biases too: a layer whose weights are all one or zero hides its mistakes.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2Pipeline, Flux2Transformer2DModel
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from flux2.models.autoencoder import Autoencoder
from flux2.models.positions import image_positions, text_positions
from flux2.models.text_encoder import SYSTEM_MESSAGE
from flux2.models.transformer import Transformer
from flux2.models.variants import AutoencoderConfig, TextConfig, TransformerConfig, Variant
from flux2.weights.key_names import autoencoder_tensor, transformer_tensor

TRANSFORMERS = {
    "dev": TransformerConfig(
        heads=3,
        head_dim=16,
        rope_axes=(4, 4, 4, 4),
        double_blocks=2,
        single_blocks=3,
        text_width=48,
        time_width=32,
        guidance=True,
    ),
    "klein": TransformerConfig(
        heads=2,
        head_dim=16,
        rope_axes=(2, 6, 4, 4),
        double_blocks=1,
        single_blocks=2,
        text_width=72,
        time_width=32,
        guidance=False,
    ),
}
AUTOENCODER = AutoencoderConfig(widths=(8, 8, 16, 16), blocks=1, groups=4)
TEXTS = {
    "dev": TextConfig(kind="mistral", layers=(1, 2, 3), length=64),
    "klein": TextConfig(kind="qwen3", layers=(1, 2, 4), length=24),
}
VARIANTS = {
    kind: Variant(
        name=f"small_{kind}",
        repo="",
        transformer=TRANSFORMERS[kind],
        autoencoder=AUTOENCODER,
        text=TEXTS[kind],
        steps=3,
        guidance=4.0,
        resolution=64,
    )
    for kind in ("dev", "klein")
}


def relative_error(ours: Tensor, reference: Tensor) -> float:
    """Norm of the difference over the norm of the reference."""
    assert ours.shape == reference.shape, f"{tuple(ours.shape)} instead of {tuple(reference.shape)}"
    return float((ours.double() - reference.double()).norm() / reference.double().norm())


def same_tensors(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """The same names, and the same bits for each."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@torch.no_grad()
def randomize(module: nn.Module, seed: int) -> nn.Module:
    """Draw every parameter and running statistic, at scales that keep activations near one."""
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator)

    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            parameter.copy_(normal(parameter) / parameter[0].numel() ** 0.5)
        elif name.endswith("bias"):
            parameter.copy_(0.2 * normal(parameter))
        else:
            parameter.copy_(1 + 0.3 * normal(parameter))
    for child in module.modules():
        if isinstance(child, nn.BatchNorm2d):
            child.running_mean.copy_(normal(child.running_mean))
            child.running_var.copy_(0.5 + normal(child.running_var) ** 2)
    return module.requires_grad_(False).eval()


# ------------------------------------------------------------------ transformer


def reference_transformer(config: TransformerConfig) -> Flux2Transformer2DModel:
    """diffusers' transformer of these sizes, as initialized by diffusers."""
    return Flux2Transformer2DModel(
        in_channels=config.channels,
        num_layers=config.double_blocks,
        num_single_layers=config.single_blocks,
        attention_head_dim=config.head_dim,
        num_attention_heads=config.heads,
        joint_attention_dim=config.text_width,
        timestep_guidance_channels=config.time_width,
        mlp_ratio=config.mlp_ratio,
        axes_dims_rope=config.rope_axes,
        rope_theta=config.rope_theta,
        eps=config.eps,
        guidance_embeds=config.guidance,
    )


@cache
def made_transformers(kind: str, seed: int) -> tuple[Transformer, Flux2Transformer2DModel]:
    """What `transformers` copies, made once in a process: not to be changed."""
    reference = randomize(reference_transformer(TRANSFORMERS[kind]), seed)
    return transformer_like(reference, TRANSFORMERS[kind]), reference


def transformers(kind: str, seed: int = 0) -> tuple[Transformer, Flux2Transformer2DModel]:
    """Ours and diffusers', with the same random weights; both fresh, frozen, in evaluation mode."""
    ours, reference = made_transformers(kind, seed)
    return deepcopy(ours), deepcopy(reference)


def transformer(kind: str, seed: int = 0) -> Transformer:
    """Ours of `transformers` alone."""
    return deepcopy(made_transformers(kind, seed)[0])


def transformer_of(double_blocks: int, single_blocks: int) -> Transformer:
    """A frozen random transformer as narrow as klein with so many blocks."""
    config = replace(TRANSFORMERS["klein"], double_blocks=double_blocks, single_blocks=single_blocks)
    model = Transformer(config)
    randomize(model, 0)
    return model


def transformer_like(reference: Flux2Transformer2DModel, config: TransformerConfig) -> Transformer:
    """Ours with the weights of diffusers'."""
    theirs = reference.state_dict()
    model = Transformer(config)
    stored = {name: transformer_tensor(name) for name in model.state_dict()}
    model.load_state_dict({name: entry.join([theirs[part] for part in entry.names]) for name, entry in stored.items()})
    return model.requires_grad_(False).eval()


def transformer_inputs(
    config: TransformerConfig, batch: int = 2, size: tuple[int, int] = (3, 4), text: int = 5, seed: int = 1
) -> dict[str, Any]:
    """Random arguments of `Transformer.forward`, without references."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "tokens": torch.randn(batch, size[0] * size[1], config.channels, generator=generator),
        "positions": image_positions(*size),
        "text": torch.randn(batch, text, config.text_width, generator=generator),
        "text_positions": text_positions(text),
        "timestep": torch.rand(batch, generator=generator),
        "guidance": 1 + 3 * torch.rand(batch, generator=generator) if config.guidance else None,
    }


def reference_forward(reference: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """What diffusers' transformer predicts for the arguments of ours."""
    return reference(
        hidden_states=inputs["tokens"],
        encoder_hidden_states=inputs["text"],
        timestep=inputs["timestep"],
        img_ids=inputs["positions"],
        txt_ids=inputs["text_positions"],
        guidance=inputs["guidance"],
        return_dict=False,
    )[0]


def published_step(
    reference: nn.Module,
    latents: Tensor,
    references: list[Tensor],
    text: Tensor,
    time: Tensor,
    noise: Tensor,
    guidance: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """A training step of one sample as diffusers' image-to-image script takes it, with the pipeline's own functions.

    Latents, noise and references are (1, 128, h, w), each reference of its own size; `time` is (1,). Returns the
    prediction and its target, (1, 128, h, w), and the loss, (1,). Several samples one by one: the script for dev
    counts the references' positions on from sample to sample.
    """
    sigma = time.view(1, 1, 1, 1)
    packed = Flux2Pipeline._pack_latents((1.0 - sigma) * latents + sigma * noise)
    ids = Flux2Pipeline._prepare_latent_ids(latents)
    tokens, positions = packed, ids
    if references:
        tokens = torch.cat([packed, *map(Flux2Pipeline._pack_latents, references)], dim=1)
        positions = torch.cat([ids, Flux2Pipeline._prepare_image_ids(references)], dim=1)
    predicted = reference(
        hidden_states=tokens,
        timestep=time,
        guidance=None if guidance is None else torch.full([1], guidance),
        encoder_hidden_states=text,
        txt_ids=Flux2Pipeline._prepare_text_ids(text),
        img_ids=positions,
        return_dict=False,
    )[0]
    predicted = Flux2Pipeline._unpack_latents_with_ids(predicted[:, : packed.shape[1]], ids)
    target = noise - latents
    return predicted, target, ((predicted.float() - target.float()) ** 2).reshape(1, -1).mean(1)


# ------------------------------------------------------------------ autoencoder


def reference_autoencoder(config: AutoencoderConfig) -> AutoencoderKLFlux2:
    """diffusers' autoencoder of these sizes, as initialized by diffusers."""
    return AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * len(config.widths),
        up_block_types=("UpDecoderBlock2D",) * len(config.widths),
        block_out_channels=config.widths,
        layers_per_block=config.blocks,
        norm_num_groups=config.groups,
        latent_channels=config.latent_channels,
        batch_norm_eps=config.bn_eps,
    )


def autoencoders(seed: int = 0) -> tuple[Autoencoder, AutoencoderKLFlux2]:
    """Ours and diffusers', with the same random weights and statistics."""
    reference = randomize(reference_autoencoder(AUTOENCODER), seed)
    theirs = reference.state_dict()
    model = Autoencoder(AUTOENCODER)
    stored = {name: autoencoder_tensor(name, len(AUTOENCODER.widths)) for name in model.state_dict()}
    model.load_state_dict({name: entry.join([theirs[part] for part in entry.names]) for name, entry in stored.items()})
    return model.requires_grad_(False).eval(), reference


# ------------------------------------------------------------------ text encoders

WORDS = "a the small red blue cup fox on in of background tarot card trtcrd , . ; ! ?".split()
MISTRAL_CONTROL = ["<unk>", "<s>", "</s>", "<pad>", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[INST]", "[/INST]"]
QWEN3_CONTROL = ["<unk>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>", "</think>"]
MISTRAL_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% set tag = 'SYSTEM_PROMPT' if message['role'] == 'system' else 'INST' %}"
    "[{{ tag }}]{% for part in message['content'] %}{{ part['text'] }}{% endfor %}[/{{ tag }}]"
    "{% endfor %}{% if add_generation_prompt %}{{ eos_token }}{% endif %}"
)
QWEN3_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def make_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """Whole words and line breaks; what the words are not known for is one unknown token."""
    mistral = kind == "dev"
    control = MISTRAL_CONTROL if mistral else QWEN3_CONTROL
    known = [
        *control,
        "\n",
        *WORDS,
        "user",
        "assistant",
        *SYSTEM_MESSAGE.replace(".", " . ").replace(",", " , ").split(),
    ]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(known))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(" +"), "removed"),
            pre_tokenizers.Split("\n", "isolated"),
            pre_tokenizers.Punctuation(),
        ]
    )
    if mistral:  # as in the published file: what asks for special tokens gets a second <s> before the template's own
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", vocabulary["<s>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>" if mistral else None,
        eos_token="</s>" if mistral else "<|im_end|>",
        pad_token="<pad>" if mistral else "<|endoftext|>",
        additional_special_tokens=control[4:] if mistral else ["<|im_start|>", "<think>", "</think>"],
        padding_side="left" if mistral else "right",
        chat_template=MISTRAL_TEMPLATE if mistral else QWEN3_TEMPLATE,
        model_max_length=512,
    )


def reference_text_encoder(kind: str, seed: int = 0) -> Mistral3ForConditionalGeneration | Qwen3ForCausalLM:
    """The whole language model as published: one layer more than is read, a head, and Mistral's vision tower."""
    sizes = {
        "vocab_size": len(make_tokenizer(kind)),
        "intermediate_size": 40,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
    }
    model: Any
    if kind == "dev":
        vision = {"model_type": "pixtral", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
        config = Mistral3Config(
            text_config={
                "model_type": "mistral",
                "hidden_size": 16,
                "num_hidden_layers": 4,
                "rope_theta": 500.0,
                **sizes,
            },
            vision_config={**vision, "num_attention_heads": 1, "head_dim": 8, "image_size": 32, "patch_size": 16},
        )
        model = Mistral3ForConditionalGeneration(config)
    else:
        model = Qwen3ForCausalLM(
            Qwen3Config(hidden_size=24, num_hidden_layers=5, tie_word_embeddings=False, rope_theta=1e6, **sizes)
        )
    return randomize(model, seed)


# ------------------------------------------------------------------ folders


def make_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """With the settings of the published `scheduler_config.json`."""
    return FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, shift=3.0, base_shift=0.5, max_shift=1.15, time_shift_type="exponential"
    )


@cache
def reference_parts(kind: str) -> dict[str, Any]:
    """The parts of a diffusers pipeline with random weights, shared by the tests of a process: not to be changed."""
    return {
        "transformer": transformers(kind)[1],
        "vae": autoencoders()[1],
        "text_encoder": reference_text_encoder(kind),
        "tokenizer": make_tokenizer(kind),
        "scheduler": make_scheduler(),
    }


def write_model(kind: str, folder: Path) -> Path:
    """Write `reference_parts` in the published layout, the transformer in several shards."""
    parts = reference_parts(kind)
    for name, part in parts.items():
        options = {"max_shard_size": "100KB"} if name == "transformer" else {}
        part.save_pretrained(folder / name, **options)
    return folder
