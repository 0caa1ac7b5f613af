"""flux2.weights.sources: fingerprints change with weights and configurations, and not with folders."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import helpers
import pytest
import torch
from safetensors.torch import load_file, save_file

from flux2.weights.sources import ModelSource, WeightsError, fingerprint

DEV = helpers.VARIANTS["dev"]


def test_a_fingerprint_stays_when_the_folder_moves(copied: Path, model_folders: Callable[[str], Path]) -> None:
    for part in ("transformer", "vae", "text_encoder", "tokenizer"):
        here, there = ModelSource(DEV, str(copied)), ModelSource(DEV, str(model_folders("dev")))
        assert fingerprint(here, part) == fingerprint(there, part)


def test_fingerprints_of_parts_differ(model_folders: Callable[[str], Path]) -> None:
    source = ModelSource(DEV, str(model_folders("dev")))
    assert len({fingerprint(source, part) for part in ("transformer", "vae", "text_encoder", "tokenizer")}) == 4


def test_a_fingerprint_changes_with_a_weight(copied: Path) -> None:
    source = ModelSource(DEV, str(copied))
    file = copied / "vae" / "diffusion_pytorch_model.safetensors"
    before = fingerprint(source, "vae")
    tensors = load_file(file)
    tensors["decoder.conv_out.bias"][1] += 1e-3
    save_file(tensors, file, metadata={"format": "pt"})
    assert fingerprint(source, "vae") != before


def test_a_fingerprint_changes_with_the_configuration_beside_the_weights(copied: Path) -> None:
    source = ModelSource(DEV, str(copied))
    before = fingerprint(source, "text_encoder")
    file = copied / "text_encoder" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"dtype": "bfloat16"}))
    assert fingerprint(source, "text_encoder") != before


def test_the_fingerprint_of_a_single_file_changes_with_its_weights_and_not_with_its_folder(tmp_path: Path) -> None:
    state = helpers.transformer("klein").state_dict()
    prints = []
    for place, value in (("a", 0.0), ("b", 0.0), ("c", 1.0)):
        (tmp_path / place).mkdir()
        state["final_layer.linear.weight"][0, 0] = value
        save_file(state, tmp_path / place / "flux.safetensors")
        prints.append(fingerprint(ModelSource(DEV, str(tmp_path / place / "flux.safetensors")), "transformer"))
    assert prints[0] == prints[1] != prints[2]
    with pytest.raises(WeightsError, match=r"/gone\.safetensors\b"):
        fingerprint(ModelSource(DEV, str(tmp_path / "gone.safetensors")), "transformer")


def test_what_was_cached_without_scales_that_are_read_now_is_not_used(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    for key, is_kept in (("a.weight_scale", True), ("a.weight_scale_inv", False)):
        save_file({"a.weight": torch.ones(2, 2), key: torch.ones(1)}, file)
        before = hashlib.sha256(f"{file.name} {file.stat().st_size}".encode() + file.read_bytes()).hexdigest()[:16]
        assert (fingerprint(ModelSource(DEV, str(file)), "transformer") == before) == is_kept
