"""Prompts to embeddings: three stacked hidden states of a language model.

FLUX.2 reads the states after layers 10, 20 and 30 of Mistral Small 3.2 (dev) or after 9, 18 and 27 of Qwen3 (klein),
concatenated to one vector per token, with every prompt padded to the same length. Nothing behind the last of these
layers is built or loaded: no later layers, no vision tower, no output head. The final norm is replaced by the identity,
because transformers applies it to the last returned state, which in the full model is a later one.

The encoder knows which tokens are padding. The transformer does not and attends to all of them, as in training.
Source: github.com/black-forest-labs/flux2, src/flux2/text_encoder.py.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import Tensor, nn

from flux2.layers.selection import linear_names
from flux2.models.variants import TextConfig
from flux2.quantization.base import swap_linears
from flux2.quantization.blockwise_int8 import BlockwiseInt8Linear
from flux2.quantization.nf4 import Nf4Linear, Workspace
from flux2.utils.choices import TEXT_STORAGES, TextStorage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

LAYER_LINEARS = r"layers\.\d+\.(self_attn\.[qkvo]|mlp\.(gate|up|down))_proj"
ADVICE = "Give the tokenizer of the model"
DIRECTIVES = ("attn_implementation", "experts_implementation", "auto_map", "quantization_config", "use_kernels")
MOST_TEMPLATE_STEPS = 200_000  # lines; the published templates take some 20 for a prompt
TEMPLATE_MEMORY = 1 << 29  # bytes that rendering may add to the process
TEMPLATE_LOCK = threading.Lock()  # the limit is that of the process
# The line break belongs to the published message; a space instead of it would change the embeddings.
SYSTEM_MESSAGE = (
    "You are an AI that reasons about image descriptions. You give structured responses focusing on object "
    "relationships, object\nattribution and actions without speculation."
)


def chat(prompt: str, kind: str) -> list[dict[str, Any]]:
    """Return the conversation for a prompt: Mistral gets a system message, Qwen3 only the user turn."""
    if kind == "qwen3":
        return [{"role": "user", "content": prompt}]
    texts = {"system": SYSTEM_MESSAGE, "user": prompt.replace("[IMG]", "")}
    return [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in texts.items()]


def tokenize(
    tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], kind: str, length: int
) -> tuple[Tensor, Tensor]:
    """Return token ids and attention mask (B, length), padded on the tokenizer's own side and truncated to `length`."""
    is_qwen3 = kind == "qwen3"  # the template of Mistral contains the special tokens
    options = {"add_generation_prompt": True, "enable_thinking": False} if is_qwen3 else {}
    with bounded_template():
        texts = [tokenizer.apply_chat_template(chat(prompt, kind), tokenize=False, **options) for prompt in prompts]
    padding: dict[str, Any] = {"padding": "max_length", "truncation": True, "max_length": length}
    batch = tokenizer(texts, **padding, add_special_tokens=is_qwen3, return_tensors="pt")
    return batch["input_ids"], batch["attention_mask"]


class EndlessTemplate(BaseException):
    """Ends a chat template; not an Exception, which Jinja catches when it evaluates constants."""


@contextmanager
def bounded_template() -> Iterator[None]:
    """Context manager in which a chat template that loops, or takes too much memory, is a ValueError.

    A template comes with the model, and Jinja's sandbox bounds `range`, but not loops in loops, macros that call
    themselves, products and widths of strings, or strings that double. Each line is counted that this thread runs in a
    template or in the filters that one calls, also when Jinja compiles it and evaluates constants (`as_const`).
    """
    steps, before = 0, sys.gettrace()

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal steps
        caller = frame.f_back
        is_template = frame.f_code.co_filename == "<template>" or frame.f_code.co_name == "as_const"
        if not is_template and (caller is None or caller.f_trace is not trace):
            return None
        steps += 1
        if steps > MOST_TEMPLATE_STEPS:
            raise EndlessTemplate
        return trace

    with bounded_memory(TEMPLATE_MEMORY):
        sys.settrace(trace)
        try:
            yield
        except EndlessTemplate as error:
            raise ValueError(f"the chat template of the tokenizer does not end. {ADVICE}") from error
        except (MemoryError, RecursionError, OverflowError) as error:
            raise ValueError(f"the chat template of the tokenizer takes too much memory. {ADVICE}") from error
        finally:
            sys.settrace(before)


@contextmanager
def bounded_memory(room: int) -> Iterator[None]:
    """Context manager in which the process gets at most `room` bytes more on Linux; beyond it is a MemoryError.

    The limit is on the address space, and holds for all threads, so it must be short and wide.
    """
    if sys.platform != "linux":
        yield
        return
    import resource  # Windows has none

    with TEMPLATE_LOCK:
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        limit = psutil.Process().memory_info().vms + room
        others = [bound for bound in (soft, hard) if bound != resource.RLIM_INFINITY]
        resource.setrlimit(resource.RLIMIT_AS, (min([limit, *others]), hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def without_directives(config: dict[str, Any]) -> dict[str, Any]:
    """Return a published configuration without what tells the library to load more than a model has.

    For example, `_attn_implementation` may name a repository with kernels, which are code.
    """
    kept = {key: value for key, value in config.items() if key[:1] != "_" and key not in DIRECTIVES}
    return {key: without_directives(value) if isinstance(value, dict) else value for key, value in kept.items()}


def build(config: dict[str, Any], text: TextConfig) -> nn.Module:
    """Return the language model of a published `text_encoder/config.json` up to the last layer that is read.

    Raise ValueError if it has fewer layers.
    """
    from transformers import MistralConfig, MistralModel, Qwen3Config, Qwen3Model  # takes two seconds

    config = without_directives(config)
    values, layers = config.get("text_config", config), max(text.layers)
    if values["num_hidden_layers"] < layers:
        raise ValueError(
            f"the text encoder has {values['num_hidden_layers']} layers, but layer {layers} is needed: "
            "this is not the text encoder of this model"
        )
    values = values | {"num_hidden_layers": layers}
    if values.get("layer_types"):
        values["layer_types"] = values["layer_types"][:layers]
    model = MistralModel(MistralConfig(**values)) if text.kind == "mistral" else Qwen3Model(Qwen3Config(**values))
    model.norm = nn.Identity()
    return model


def check_storage(storage: object, setting: str, others: str = "or null") -> None:
    """Raise ValueError, naming `setting` and `others` that it can be, unless `storage` is None or a known one."""
    if storage is not None and storage not in TEXT_STORAGES:
        raise ValueError(f"{setting}={storage!r} must be one of {', '.join(TEXT_STORAGES)}, {others}")


def quantize_text_encoder(model: nn.Module, storage: TextStorage, dtype: torch.dtype) -> None:
    """Swap the linears of all layers for ones that store their weight in `storage`; embeddings and norms do not change.

    `model` is on the meta device: each weight is quantized when it is loaded.
    """
    nf4, int8 = partial(Nf4Linear, dtype=dtype, workspace=Workspace()), partial(BlockwiseInt8Linear, dtype=dtype)
    names = linear_names(model, [LAYER_LINEARS], "layers of the text encoder")
    swap_linears(model, names, nf4 if storage == "nf4" else int8)


class TextEncoder:
    """Prompts -> embeddings, with the layers and the length of a variant; calls can override the length.

    Attributes:
        cut: The prompts that were truncated so far.
    """

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerFast, text: TextConfig) -> None:
        self.model, self.tokenizer, self.text = model.requires_grad_(False).eval(), tokenizer, text
        self.cut: list[str] = []

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], length: int | None = None) -> Tensor:
        """Return the embeddings (B, length, width) of `prompts` on the encoder's device and in its dtype."""
        if isinstance(prompts, str):
            raise ValueError("prompts must be a list of strings, got one string; wrap it in a list")
        length = length or self.text.length
        ids, mask = tokenize(self.tokenizer, prompts, self.text.kind, length)
        for prompt, row in zip(prompts, mask, strict=True):
            # the prompt fills its row; it was truncated if it also fills a longer one
            if row.all() and tokenize(self.tokenizer, [prompt], self.text.kind, length + 1)[1].all():
                self.cut.append(prompt)
        device = next(self.model.parameters()).device
        ids, mask = ids.to(device), mask.to(device)
        outputs = self.model(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
        return torch.cat([outputs.hidden_states[layer] for layer in self.text.layers], dim=-1)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a published `tokenizer/` folder.

    The plain class reads tokenizer.json. The processor classes that some repositories name also need image libraries,
    and are only useful for images in the text encoder's own prompt. Raise ValueError if the file or its chat template
    is missing.
    """
    from transformers import PreTrainedTokenizerFast

    if not (folder / "tokenizer.json").exists():
        raise ValueError(f"{folder} contains no tokenizer.json")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    if not tokenizer.chat_template:
        raise ValueError(f"{folder} contains no chat template (chat_template.jinja, or in tokenizer_config.json)")
    return tokenizer
