"""Prompts to embeddings: three hidden states of a language model, stacked.

FLUX.2 reads the states after layers 10, 20 and 30 of Mistral Small 3.2 (dev) or after 9, 18 and 27 of Qwen3
(klein), concatenated to one vector a token, every prompt padded to the same length. Nothing behind the last
layer that is read is ever built or loaded: no later layers, no vision tower, no output head; and the model's
final norm is replaced by the identity, because transformers applies it to the last state it returns, which in
the full model is a later one than ours.

The encoder sees which tokens are padding; the transformer does not and attends to all of them, as in training.
Source: github.com/black-forest-labs/flux2, src/flux2/text_encoder.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from flux2.layers.selection import linear_names
from flux2.models.variants import TextConfig
from flux2.quantization.int8 import Int8Linear
from flux2.quantization.nf4 import Nf4Linear, Workspace

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Storage = Literal["nf4", "int8"]
STORAGES: tuple[Storage, ...] = get_args(Storage)
LAYER_LINEARS = (r"layers\.\d+\.(self_attn\.[qkvo]|mlp\.(gate|up|down))_proj",)

# Two lines: the line break is in the published message, and a space instead of it changes the embeddings.
SYSTEM_MESSAGE = (
    "You are an AI that reasons about image descriptions. You give structured responses focusing on object "
    "relationships, object\nattribution and actions without speculation."
)


def chat(prompt: str, kind: str) -> list[dict[str, Any]]:
    """The conversation that a prompt is sent as: Mistral with the system message, Qwen3 with a user turn alone."""
    if kind == "qwen3":
        return [{"role": "user", "content": prompt}]
    parts = (("system", SYSTEM_MESSAGE), ("user", prompt.replace("[IMG]", "")))
    return [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in parts]


def tokenize(
    tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], kind: str, length: int
) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, both (B, length); padded on the tokenizer's own side, cut at `length`."""
    options = {"add_generation_prompt": True, "enable_thinking": False} if kind == "qwen3" else {}
    texts = [tokenizer.apply_chat_template(chat(prompt, kind), tokenize=False, **options) for prompt in prompts]
    batch = tokenizer(
        texts,
        padding="max_length",
        truncation=True,
        max_length=length,
        add_special_tokens=kind == "qwen3",  # Mistral's template writes them itself
        return_tensors="pt",
    )
    return batch["input_ids"], batch["attention_mask"]


def build(config: dict[str, Any], text: TextConfig) -> nn.Module:
    """The language model of a published `text_encoder/config.json`, cut behind the last layer that is read."""
    from transformers import MistralConfig, MistralModel, Qwen3Config, Qwen3Model  # takes two seconds

    values = dict(config.get("text_config", config))
    layers = max(text.layers)
    if values["num_hidden_layers"] < layers:
        raise ValueError(
            f"the text encoder has {values['num_hidden_layers']} layers, but layer {layers} is read: "
            "this is not the text encoder of this model"
        )
    values["num_hidden_layers"] = layers
    if values.get("layer_types"):
        values["layer_types"] = values["layer_types"][:layers]
    model: nn.Module = (
        MistralModel(MistralConfig(**values)) if text.kind == "mistral" else Qwen3Model(Qwen3Config(**values))
    )
    model.norm = nn.Identity()
    return model


def check_storage(storage: object, setting: str) -> None:
    """Raises ValueError, naming `setting`, unless `storage` is None or one of `STORAGES`."""
    if storage is not None and storage not in STORAGES:
        raise ValueError(f"{setting}={storage!r} must be one of {', '.join(STORAGES)}, or null")


def quantize(model: nn.Module, storage: Storage, dtype: torch.dtype) -> None:
    """Swap all linears of the layers for ones that keep their weight in `storage` and multiply in the input's dtype.

    `model` is on the meta device: each weight is quantized when it is loaded. Embeddings and norms stay as they are.
    """
    workspace = Workspace()
    for name in linear_names(model, LAYER_LINEARS, "layers of the text encoder"):
        old = model.get_submodule(name)
        assert isinstance(old, nn.Linear)
        assert old.bias is None, f"{name} has a bias"
        sizes = old.in_features, old.out_features
        new = (
            Nf4Linear(*sizes, dtype=dtype, device="meta", workspace=workspace)
            if storage == "nf4"
            else Int8Linear(*sizes, dtype=dtype, device="meta")
        )
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new)


def is_cut(tokenizer: PreTrainedTokenizerFast, prompt: str, kind: str, length: int) -> bool:
    """Whether `tokenize` leaves out a part of `prompt`."""
    _, mask = tokenize(tokenizer, [prompt], kind, length + 1)
    return bool(mask.all())


class TextEncoder:
    """Prompts -> embeddings. `layers` and `length` come from the variant; `length` can be given a call.

    `cut` holds the prompts that were longer than that, of which a part was left out.
    """

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerFast, text: TextConfig) -> None:
        self.model = model.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        self.text = text
        self.cut: list[str] = []

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], length: int | None = None) -> Tensor:
        """(B, length, width) embeddings of `prompts` on the encoder's device and in its dtype."""
        if isinstance(prompts, str):
            raise ValueError("prompts must be a list of strings, got one string; wrap it in a list")
        length = length or self.text.length
        ids, mask = tokenize(self.tokenizer, prompts, self.text.kind, length)
        full = [prompt for prompt, row in zip(prompts, mask, strict=True) if row.all()]
        self.cut += [prompt for prompt in full if is_cut(self.tokenizer, prompt, self.text.kind, length)]
        device = next(self.model.parameters()).device
        states = self.model(
            input_ids=ids.to(device), attention_mask=mask.to(device), output_hidden_states=True, use_cache=False
        ).hidden_states
        return torch.cat([states[layer] for layer in self.text.layers], dim=-1)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a published `tokenizer/` folder.

    Read from tokenizer.json by the plain class: the processor classes that some repositories name also want
    image libraries, and are only needed to put pictures into the text encoder's own prompt. Raises ValueError if it is
    not there or has no chat template.
    """
    from transformers import PreTrainedTokenizerFast

    if not (folder / "tokenizer.json").exists():
        raise ValueError(f"{folder} holds no tokenizer.json")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    if not tokenizer.chat_template:
        raise ValueError(f"{folder} holds no chat template (chat_template.jinja, or in tokenizer_config.json)")
    return tokenizer
