"""Embeddings of prompts in a file: written where a text encoder fits, used where none is available.

It is one safetensors file: a tensor (T, text_width) per prompt, and in its metadata the prompts, the number of tokens
that they are padded to, and the text encoder and its layers. It can be used with every model that reads the same.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flux2.models.variants import Variant
from flux2.utils import checks
from flux2.utils.files import NotWritten, atomic_write
from flux2.utils.json_files import parse_json
from flux2.utils.text import listed

FORMAT = "flux2-lora embeddings 1"


def encoder_identity(variant: Variant) -> str:
    """Return what the embeddings depend on besides the prompts, as text."""
    return f"{variant.text.kind} {variant.text.layers} {variant.transformer.text_width}"


def write(file: Path, variant: Variant, embeddings: Mapping[str, Tensor], length: int) -> None:
    """Write `embeddings`, (T, text_width) per prompt, atomically. Raises ValueError if `file` cannot be written."""
    about = {"format": FORMAT, "encoder": encoder_identity(variant)}
    about |= {"length": str(length), "prompts": json.dumps([*embeddings])}
    tensors = {str(i): embedding.cpu().contiguous() for i, embedding in enumerate(embeddings.values())}
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        with atomic_write(file) as unfinished:
            save_file(tensors, unfinished, about)
    except NotWritten as error:
        raise ValueError(str(error)) from error
    except OSError as error:
        raise ValueError(f"{file} cannot be written ({error}). Choose another path") from error


class SavedPrompts:
    """A file of embeddings, each read on request. Raises ValueError, naming the file, if it cannot be used."""

    def __init__(self, file: Path, variant: Variant) -> None:
        self.file = file
        if not file.is_file():
            raise ValueError(
                f"embeddings={str(file)!r} is not a file. `--save-embeddings` or pipe.save_embeddings writes one"
            )
        try:
            with safe_open(file, "pt") as opened:
                about = opened.metadata() or {}
                shapes = {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118
            if about.get("format") != FORMAT:
                raise ValueError("it was not written by `--save-embeddings` or pipe.save_embeddings")
            self.prompts: list[str] = parse_json(about["prompts"])
            self.length = int(about["length"])
            if shapes.keys() != {str(i) for i in range(len(self.prompts))}:
                raise ValueError(f"it holds {len(shapes)} tensors for {len(self.prompts)} prompts")
            checks.strings("its prompts", self.prompts)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"embeddings={str(file)!r} cannot be used ({error})") from error
        if about.get("encoder") != encoder_identity(variant):
            raise ValueError(
                f"embeddings={str(file)!r} belong to another model: {about.get('encoder')} (text encoder, layers, "
                f"width), but {variant.name} reads {encoder_identity(variant)}"
            )
        expected = [self.length, variant.transformer.text_width]
        if wrong := [shape for shape in shapes.values() if shape != expected]:
            raise ValueError(
                f"embeddings={str(file)!r} cannot be used (an embedding has shape {wrong[0]}, not {expected}). "
                "Write the file again"
            )

    def check(self, prompts: list[str], length: int) -> None:
        """Raise ValueError unless the file has an embedding of each of `prompts`, with `length` tokens."""
        if length != self.length:
            raise ValueError(f"embeddings={str(self.file)!r} have {self.length} tokens per prompt, not {length}")
        if absent := [prompt for prompt in prompts if prompt not in self.prompts]:
            known = listed({repr(prompt[:80]) for prompt in self.prompts})
            raise ValueError(
                f"embeddings={str(self.file)!r} has no embedding of {absent[0]!r:.120}, only of {known}. Write it "
                "again with this prompt, or use a text encoder"
            )

    def get(self, prompt: str) -> Tensor:
        """Return the embedding (1, T, text_width), as stored. Raises ValueError if it is not finite."""
        with safe_open(self.file, "pt") as opened:
            embedding = opened.get_tensor(str(self.prompts.index(prompt)))
        if not bool(torch.isfinite(embedding).all()):
            raise ValueError(f"embeddings={str(self.file)!r}: {prompt!r:.120} has NaN or infinite values")
        return embedding[None]
