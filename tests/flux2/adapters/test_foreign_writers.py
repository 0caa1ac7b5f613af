"""flux2.adapters.reading: files that diffusers and PEFT themselves write for diffusers' model compute the same here."""

from pathlib import Path
from typing import Any

import helpers
import peft
import pytest
import torch
from adapter_helpers import fresh, predict
from diffusers import Flux2Pipeline
from diffusers.training_utils import _collate_lora_metadata
from torch import nn

from flux2 import adapters

TARGETS = ["attn.to_q", "attn.to_v", "attn.add_k_proj", "to_qkv_mlp_proj", "ff.linear_in", "norm_out.linear"]
PATTERNS: dict[str, Any] = {"rank_pattern": {"attn.to_v": 2, "norm_out.linear": 5}}
LORA = {"r": 4, "target_modules": TARGETS, **PATTERNS, "alpha_pattern": {"to_qkv_mlp_proj": 12, "ff.linear_in": 0.5}}


def stir(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("lora_", "hada_", "lokr_")):
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def check(reference: nn.Module, place: Path, kind: str) -> None:
    model = fresh()
    assert adapters.load(model, place).kind == kind
    assert helpers.relative_error(predict(model), predict(reference)) <= 1e-5
    assert helpers.relative_error(predict(fresh()), predict(model)) > 0.01
    adapters.merge(model)
    assert helpers.relative_error(predict(model), predict(reference)) <= 1e-5


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"lora_alpha": 1}, "LoRA"),
        ({"lora_alpha": 9, "use_rslora": True}, "rsLoRA"),
        ({"lora_alpha": 8, "init_lora_weights": "gaussian", "lora_dropout": 0.1}, "LoRA"),
        (
            {
                "lora_alpha": 2,
                "use_dora": True,
                "target_modules": ["to_qkv_mlp_proj", "ff.linear_in", "norm_out.linear"],
            },
            "DoRA",
        ),
    ],
)
def test_what_diffusers_saves(options: dict[str, Any], kind: str, tmp_path: Path) -> None:
    reference = helpers.transformers("dev")[1]
    reference.add_adapter(peft.LoraConfig(**(LORA | options)), "default")
    stir(reference.eval())
    layers = peft.get_peft_model_state_dict(reference)
    about = _collate_lora_metadata({"transformer": reference})
    Flux2Pipeline.save_lora_weights(tmp_path / "pipeline", transformer_lora_layers=layers, **about)
    reference.save_lora_adapter(tmp_path / "model")
    for place in ("pipeline", "pipeline/pytorch_lora_weights.safetensors", "model"):
        check(reference, tmp_path / place, kind)


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (peft.LoraConfig(lora_alpha=3, **LORA), "LoRA"),
        (peft.LoHaConfig(r=4, alpha=3, target_modules=TARGETS, **PATTERNS), "LoHa"),
        (peft.LoKrConfig(r=2, alpha=6, target_modules=TARGETS[3:], decompose_factor=4), "LoKr"),
        (peft.LoKrConfig(r=2, alpha=6, target_modules=TARGETS, decompose_factor=4, decompose_both=True), "split LoKr"),
        (peft.LoKrConfig(r=100, alpha=30, target_modules=TARGETS), "split LoKr"),
    ],
)
def test_what_peft_saves_of_diffusers_model(config: peft.PeftConfig, kind: str, tmp_path: Path) -> None:
    wrapped = peft.get_peft_model(helpers.transformers("dev")[1], config)
    stir(wrapped.eval())
    wrapped.save_pretrained(str(tmp_path), save_embedding_layers=False)
    check(wrapped.get_base_model(), tmp_path, kind)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "mystyle.safetensors")
    check(wrapped.get_base_model(), tmp_path / "mystyle.safetensors", kind)
