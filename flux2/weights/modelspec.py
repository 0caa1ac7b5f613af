"""Metadata of safetensors files after ModelSpec (github.com/Stability-AI/ModelSpec, version 1.0.1).

It requires `sai_model_spec`, `architecture`, `implementation` and `title`. Its list of architectures ends before FLUX:
no name is registered for FLUX.2. The names here are those that kohya's musubi-tuner writes and, in lower case, SwarmUI
knows: `Flux.2-dev`, `Flux.2-klein-4b`, `Flux.2-klein-9b`, for base and distilled models alike, with `/lora` for a LoRA.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

from flux2.models.variants import find_variant

PREFIX = "modelspec."
VERSION = "1.0.1"
HASH = f"{PREFIX}hash_sha256"
OWN_HASH = "flux2_lora.hash_sha256"  # the same: tools that edit tensors and copy the header leave HASH of others stale
COMFY_DORA = "flux2_lora.dora_scale"  # key of a file whose dora_scale is ComfyUI's; other programs write m there
NO_HASH = "0x" + "0" * 64
BFL = "https://github.com/black-forest-labs/flux2"
ARCHITECTURES = {
    "dev": "Flux.2-dev",
    "klein_base_9b": "Flux.2-klein-9b",
    "klein_9b": "Flux.2-klein-9b",
    "klein_9b_kv": "Flux.2-klein-9b",
    "klein_base_4b": "Flux.2-klein-4b",
    "klein_4b": "Flux.2-klein-4b",
    "tiny": "flux2-lora-tiny",  # ours, with sizes that no other program knows
}


def metadata(*, base: str, title: str, lora: bool, diffusers: bool, license: str = "", **more: str) -> dict[str, str]:
    """Return the metadata of a safetensors file, except the hash.

    Args:
        base: A variant or a repository; empty if it is not known. The file then has no `architecture`, which makes it
            none of ModelSpec's (no `sai_model_spec`).
        lora: Whether the file is a LoRA; otherwise it is a full checkpoint.
        diffusers: Whether the tensors have diffusers' names; otherwise they have Black Forest Labs'.
        more: Other fields of ModelSpec; empty ones are left out.
    """
    variant = find_variant(base)
    name = variant.name if variant else base
    spec = {
        "sai_model_spec": VERSION if name else "",
        "architecture": ARCHITECTURES.get(name, name) + ("/lora" if lora and name else ""),
        "implementation": "diffusers" if diffusers else BFL,
        "title": title,
        **more,
        "license": license,
    }
    kept = {key: value for key, value in {"base_model": base, "base_model_license": license}.items() if value}
    return {"format": "pt"} | kept | {PREFIX + key: value for key, value in spec.items() if value}


def data_hash(file: Path) -> str:
    """Return ModelSpec's `hash_sha256` of a file: of all bytes after the header."""
    with file.open("rb") as handle:
        handle.seek(8 + int.from_bytes(handle.read(8), "little"))
        return f"0x{hashlib.file_digest(handle, 'sha256').hexdigest()}"


def header_hash(about: Mapping[str, str], key: str = HASH) -> str | None:
    """Return the hash in a file's metadata as `data_hash` writes it; None if there is none, or not one of SHA-256."""
    digits = str(about.get(key, "")).lower().removeprefix("0x")
    return f"0x{digits}" if re.fullmatch("[0-9a-f]{64}", digits) else None
