"""Embeddings of prompts in a file: made where a text encoder fits, used where none is wanted.

One safetensors file: a tensor (T, text_width) a prompt, and in its metadata the prompts, to how many tokens they were
padded, and which text encoder's which layers these are. A file is for the models that read the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flux2.models.variants import Variant
from flux2.utils import checks
from flux2.utils.files import atomic_write
from flux2.utils.text import listed

FORMAT = "flux2-lora embeddings 1"


def encoder_identity(variant: Variant) -> str:
    return f"{variant.text.kind} {variant.text.layers} {variant.transformer.text_width}"


def write(file: Path, variant: Variant, embeddings: Mapping[str, Tensor], length: int) -> None:
    """Keep `embeddings`, (T, text_width) a prompt; the file is whole or not there.

    Raises ValueError if it cannot be written.
    """
    about = {
        "format": FORMAT,
        "encoder": encoder_identity(variant),
        "length": str(length),
        "prompts": json.dumps([*embeddings]),
    }
    tensors = {str(i): embedding.cpu().contiguous() for i, embedding in enumerate(embeddings.values())}
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        with atomic_write(file) as unfinished:
            save_file(tensors, unfinished, about)
    except (OSError, SafetensorError) as error:  # of a full disk safetensors has an error of its own
        raise ValueError(f"{file} could not be written ({error}): make room there, or give another place") from error


class SavedPrompts:
    """The file, opened: an embedding is read when it is asked for.

    Raises ValueError, naming the file, if it cannot be read or is for another model.
    """

    def __init__(self, file: Path, variant: Variant) -> None:
        self.file = file
        if not file.is_file():
            raise ValueError(
                f"embeddings={str(file)!r} is no file: `--save-embeddings` or pipe.save_embeddings makes one"
            )
        try:
            with safe_open(file, "pt") as opened:
                about = opened.metadata() or {}
                names = set(opened.keys())
            if about.get("format") != FORMAT:
                raise ValueError("it is not of `--save-embeddings` or pipe.save_embeddings")
            self.prompts: list[str] = json.loads(about["prompts"])
            self.length = int(about["length"])
            if names != {str(i) for i in range(len(self.prompts))}:
                raise ValueError(f"it holds {len(names)} tensors for {len(self.prompts)} prompts")
            checks.texts("its prompts", self.prompts)
            shapes = self.shapes(names)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"embeddings={str(file)!r} cannot be used ({error})") from error
        if about.get("encoder") != encoder_identity(variant):
            raise ValueError(
                f"embeddings={str(file)!r} are of another model: {about.get('encoder')} (text encoder, layers, width), "
                f"and {variant.name} reads {encoder_identity(variant)}"
            )
        expected = [self.length, variant.transformer.text_width]
        if wrong := [shape for shape in shapes if shape != expected]:
            raise ValueError(
                f"embeddings={str(file)!r} cannot be used (an embedding of {wrong[0]}, where {expected} was expected, "
                "tokens and width): make it again"
            )

    def shapes(self, names: Iterable[str]) -> list[list[int]]:
        with safe_open(self.file, "pt") as opened:
            return [opened.get_slice(name).get_shape() for name in names]

    def check(self, prompts: list[str], length: int) -> None:
        """Raises ValueError unless the file has an embedding of each of `prompts`, of `length` tokens."""
        if length != self.length:
            raise ValueError(f"embeddings={str(self.file)!r} are of {self.length} tokens a prompt, not {length}")
        if absent := [prompt for prompt in prompts if prompt not in self.prompts]:
            known = listed({repr(prompt[:80]) for prompt in self.prompts})
            raise ValueError(
                f"embeddings={str(self.file)!r} has none of {absent[0]!r:.120}; it has {known}. Make it again with "
                "this prompt, or let a text encoder run"
            )

    def get(self, prompt: str) -> Tensor:
        """(1, T, text_width), as stored. Raises ValueError for one that is not finite."""
        with safe_open(self.file, "pt") as opened:
            found = opened.get_tensor(str(self.prompts.index(prompt)))
        if not bool(torch.isfinite(found).all()):
            raise ValueError(f"embeddings={str(self.file)!r}: that of {prompt!r:.120} has NaN or infinite values")
        return found[None]
