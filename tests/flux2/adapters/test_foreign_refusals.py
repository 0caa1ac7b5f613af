"""flux2.adapters.reading: what cannot be read is refused by what it is, in one sentence and in bounded time."""

import json
import os
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_helpers import fresh
from safetensors.torch import save_file
from torch import Tensor

from flux2 import adapters
from flux2.adapters.formats import AdapterError

LAYER = "single_blocks.0.linear2"  # 192 to 48 features
PUBLISHED = "transformer.single_transformer_blocks.0.attn.to_out"  # the same in diffusers
KEY = f"diffusion_model.{LAYER}"


def pair(prefix: str = KEY, rank: int = 2) -> dict[str, Tensor]:
    return {f"{prefix}.lora_A.weight": torch.ones(rank, 192), f"{prefix}.lora_B.weight": torch.ones(48, rank)}


def refused(file: Path, message: str) -> None:
    """Loading is one AdapterError of the file that says `message`, quickly, and the model is unchanged."""
    model, began = fresh(), time.process_time()
    with pytest.raises(AdapterError, match=message) as error:
        adapters.load(model, file)
    assert time.process_time() - began < 10
    assert str(file) in str(error.value)
    assert len(str(error.value)) < 1000
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), fresh().parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.bool, torch.int64])
@pytest.mark.parametrize("kind", ["lora_A", "lora_B", "lokr_w1", "hada_w1_a", "dora_scale", "magnitude"])
def test_factors_that_are_no_floats_are_quantized_and_refused(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    leaf = ".weight" if kind.startswith("lora") else ""
    save_file(pair() | {f"{KEY}.{kind}{leaf}": torch.ones(2, 2).to(dtype)}, tmp_path / "lora.safetensors")
    refused(
        tmp_path / "lora.safetensors", rf"{kind}.*{str(dtype).removeprefix('torch.')}.*float32, bfloat16 or float16"
    )


def test_a_peft_folder_of_integers_is_refused_too(tmp_path: Path) -> None:
    state = {
        f"base_model.model.{LAYER}.hada_w{i}_{side}": torch.ones(2, 2).to(torch.int8) for i in (1, 2) for side in "ab"
    }
    save_file(state, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LOHA", "r": 2, "alpha": 2}')
    refused(tmp_path, r"hada_w1_a has dtype int8")


@pytest.mark.parametrize(
    "header",
    [
        {"modelspec.architecture": "flux-1-dev/lora", "ss_base_model_version": "flux1"},
        {"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"},
        {"modelspec.architecture": "Qwen-Image"},
        {"modelspec.architecture": "Flux.1-dev"},
        {"ss_base_model_version": "sdxl_base_v1-0"},
        {"ss_base_model_version": "zimage"},
        {"base_model": "black-forest-labs/FLUX.1-dev", "modelspec.architecture": "black-forest-labs/FLUX.1-dev/lora"},
        {"base_model": "/models/flux1-schnell"},
        {"base_model": "stabilityai/stable-diffusion-3.5-large"},
    ],
    ids=lambda header: "-".join(header.values()),
)
def test_an_adapter_of_another_model_is_refused_even_if_it_fits(header: dict[str, str], tmp_path: Path) -> None:
    save_file(pair(), tmp_path / "lora.safetensors", header)
    refused(tmp_path / "lora.safetensors", "for another model.*FLUX.2")


@pytest.mark.parametrize("base", ["black-forest-labs/FLUX.1-dev", "stabilityai/sdxl-turbo"])
def test_a_peft_folder_of_another_model_is_refused(base: str, tmp_path: Path) -> None:
    save_file(pair(f"base_model.model.{LAYER}"), tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "base_model_name_or_path": base}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    refused(tmp_path, "for another model.*FLUX.2")


@pytest.mark.parametrize(
    "header",
    [
        {"modelspec.architecture": "Flux.2-klein-4b/lora", "ss_base_model_version": "flux_2_klein_4b"},
        {"modelspec.architecture": "flux-2-dev/lora"},
        {"ss_base_model_version": "flux2"},
        {"ss_base_model_version": "unknown", "ss_network_alpha": "1", "ss_network_dim": "2"},  # folded in by converters
        {"base_model": "me/mine", "modelspec.architecture": "me/mine/lora"},
        {"base_model": "/home/me/flux1-or-not/FLUX.2-dev"},
    ],
)
def test_headers_of_flux2_are_accepted(header: dict[str, str], tmp_path: Path) -> None:
    save_file(pair(), tmp_path / "lora.safetensors", header)
    assert adapters.load(fresh(), tmp_path / "lora.safetensors").kind == "LoRA"


@pytest.mark.parametrize(
    ("keys", "kind"),
    [
        (["lora_te1_encoder_layers_0_mlp_fc1.lora_down.weight"], "text-encoder layers"),
        (["text_encoder.layers.0.mlp.lora_A.weight"], "text-encoder layers"),
        (["text_encoders.mistral.layers.0.mlp.lora_A.weight"], "text-encoder layers"),
        (["bundle_emb.token.t5_out"], "embeddings"),
        ([f"{KEY}.diff", f"{KEY}.diff_b"], r"full layers \(\.diff\)"),
        (["diffusion_model.double_blocks.0.img_attn.norm.query_norm.w_norm"], "norm layers"),
        (["transformer.transformer_blocks.0.attn.norm_q.weight"], "norm layers"),
        ([f"{KEY}.oft_blocks"], "OFT"),
        ([f"{KEY}.lokr_t2", f"{KEY}.lora_mid.weight"], "Tucker"),
        ([f"{KEY}.a1.weight", f"{KEY}.b1.weight"], "GLoRA"),
        ([f"{KEY}.on_input"], "IA3"),
        ([f"{KEY}.scalar"], "trained scalar"),
        ([f"{KEY}.lora_A.weight_scale", f"{KEY}.lora_B.weight_scale"], "quantized"),
        ([f"{KEY}.lora_A.bias"], "biases"),
        ([f"{KEY}.weight"], "whole layers"),
        (["transformer.transformer_blocks.0.attn.processor.to_q_lora.down.weight"], "attention processors"),
        ([f"{KEY}.LORA_A.weight", f"{KEY}.LORA_B.weight"], "another case than lora_A"),
        ([f"{KEY}.Lora_Down.Weight", f"{KEY}.ALPHA"], "another case than lora_A"),
        ([f"{KEY}.lora_C.weight"], "not LoRA keys"),
    ],
)
def test_keys_that_are_not_read_are_named_by_what_they_are(keys: list[str], kind: str, tmp_path: Path) -> None:
    save_file(pair() | {key: torch.zeros(2, 2) for key in keys}, tmp_path / "lora.safetensors")
    refused(tmp_path / "lora.safetensors", rf"{len(keys)} of its {2 + len(keys)} keys.*{kind}.*{keys[0]}")


FACTORS = {
    f"{KEY}.hada_w{i}_{side}": torch.ones(48, 2) if side == "a" else torch.ones(2, 192) for i in (1, 2) for side in "ab"
}
OTHER = "diffusion_model.single_blocks.1.linear2"


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (pair() | {f"{KEY}.lora_A.one.weight": torch.ones(2, 192)}, "several adapters"),
        (
            {key.replace(".weight", f".{name}.weight"): one for name in ("one", "two") for key, one in pair().items()},
            "several adapters, one, two",
        ),
        (FACTORS | pair(OTHER), "several types, LoHa and LoRA"),
        (FACTORS | pair(), f"{LAYER}.*several types"),
        (FACTORS | {f"{KEY}.dora_scale": torch.ones(48, 1)}, r"DoRA of a LoHa \(it has dora_scale\).*as the base"),
        ({f"{KEY}.lokr_w1": torch.ones(4, 4), f"{KEY}.lokr_w2": torch.ones(12, 47)}, r"188 to 48.*192 to 48"),
        ({f"{KEY}.lokr_w1": torch.ones(4), f"{KEY}.lokr_w2": torch.ones(12, 48)}, r"lokr_w1.*\(4,\)"),
        ({f"{KEY}.lokr_w1": torch.ones(4, 4), f"{KEY}.lokr_w2_a": torch.ones(12, 2)}, "only lokr_w1 and lokr_w2_a"),
        (pair() | {f"{KEY}.dora_scale": torch.ones(3, 1)}, r"dora_scale.*\(3, 1\)"),
        (pair() | {f"{KEY}.alpha": torch.ones(2)}, r"alpha.*\(2,\)"),
        (pair() | {f"{KEY}.alpha": torch.tensor(float("inf"))}, "alpha is inf"),
        (pair() | {f"{KEY}.alpha": torch.tensor(1e30)}, "strength.*5e\\+29"),
        (pair() | {f"{KEY}.lora_B.bias": torch.ones(47)}, r"lora_B\.bias.*\(47,\)"),
        (
            pair(PUBLISHED) | pair("transformer.single_blocks.0.linear2"),
            "twice",
        ),
        ({"x" * 5000 + ".lora_A.weight": torch.ones(2, 2)}, "5014 characters"),
    ],
)
def test_files_that_are_ambiguous_or_damaged_are_refused(state: Any, message: str, tmp_path: Path) -> None:
    save_file(state, tmp_path / "lora.safetensors")
    refused(tmp_path / "lora.safetensors", message)


GOOD = {"transformer.r": 2, "transformer.lora_alpha": 1}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("{", "lora_adapter_metadata is not JSON"),
        ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
        ("[1]", "is a list"),
        (json.dumps({"transformer.x": "y" * (1 << 20)}), "larger than"),
        (json.dumps({"unet.r": 2, "unet.lora_alpha": 2}), "adapter of unet"),
        (json.dumps(GOOD | {"transformer.r": 8}), r"rank 2 instead of 8.*lora_adapter_metadata"),
        (json.dumps(GOOD | {"transformer.r": "2"}), "r='2'"),
        (json.dumps(GOOD | {"transformer.lora_alpha": 1e400}), "lora_alpha=inf"),
        (json.dumps(GOOD | {"transformer.use_rslora": "no"}), "use_rslora='no' must be true or false"),
        (json.dumps(GOOD | {"transformer.use_dora": True}), r"use_dora=True.*no lora_magnitude_vector"),
        (json.dumps(GOOD | {"transformer.init_lora_weights": "pissa"}), "init_lora_weights='pissa' changes the base"),
        (json.dumps(GOOD | {"transformer.peft_type": "LOHA"}), "does not give alpha"),
        (json.dumps(GOOD | {"transformer.peft_type": "LOHA", "transformer.alpha": 2}), "tensors are those of a LoRA"),
        ("{}", "does not give r and lora_alpha"),
        (json.dumps({"transformer.r": 2, "transformer.alpha": 4}), "does not give lora_alpha"),
        (json.dumps({"default": {"r": 2, "lora_alpha": 4}}), "does not give r and lora_alpha"),
        (json.dumps(GOOD | {"transformer.use_newthing": True}), r"does not know \(use_newthing\).*newer PEFT"),
        (json.dumps(GOOD | {"transformer.newthing_config": {"a": 1}}), r"does not know \(newthing_config\)"),
        (json.dumps(GOOD | {"transformer.alpha_pattern": {"(a+)+$": 4}}), "repeats a group"),
    ],
)
def test_a_header_that_cannot_be_used_is_refused(header: str, message: str, tmp_path: Path) -> None:
    state = pair(PUBLISHED)
    save_file(state, tmp_path / "lora.safetensors", {"lora_adapter_metadata": header})
    refused(tmp_path / "lora.safetensors", message)


def test_settings_that_switch_nothing_on_are_named_at_most(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    header = {
        "r": 2,
        "lora_alpha": 2,
        "init_lora_weights": "orthogonal",
        "use_newthing": False,
        "newthing_config": {},
        "newthing_path": None,
    }
    for more, said in (({}, []), ({"newthing_groups": 16}, ["newthing_groups"])):
        save_file(pair(LAYER), tmp_path / "lora.safetensors", {"lora_adapter_metadata": json.dumps(header | more)})
        assert adapters.load(fresh(), tmp_path / "lora.safetensors").ranks == (2,)
        assert ("they are ignored: ['newthing_groups']" in caplog.text) == bool(said)
        assert "newthing_config" not in caplog.text


def test_patterns_in_another_spelling_than_the_keys_are_refused(tmp_path: Path) -> None:
    """They match nothing by the keys: a converter renamed the tensors and kept the header."""
    header = {"r": 2, "lora_alpha": 2, "alpha_pattern": {"attn.to_out": 8}}
    save_file(pair(LAYER), tmp_path / "lora.safetensors", {"lora_adapter_metadata": json.dumps(header)})
    refused(
        tmp_path / "lora.safetensors", r"alpha_pattern has 'attn\.to_out'.*another spelling.*single_blocks\.0\.linear2"
    )
    header["alpha_pattern"] = {"attn.to_q": 8}  # of no layer of the file: harmless
    save_file(pair(LAYER), tmp_path / "lora.safetensors", {"lora_adapter_metadata": json.dumps(header)})
    assert adapters.load(fresh(), tmp_path / "lora.safetensors").ranks == (2,)


def test_a_strength_that_is_given_twice_is_refused(tmp_path: Path) -> None:
    state = pair(PUBLISHED)
    state[f"{PUBLISHED}.alpha"] = torch.tensor(1.0)
    save_file(state, tmp_path / "lora.safetensors", {"lora_adapter_metadata": json.dumps(GOOD)})
    refused(tmp_path / "lora.safetensors", r"twice.*to_out\.alpha.*lora_adapter_metadata")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 1}')
    (tmp_path / "adapter_model.safetensors").write_bytes((tmp_path / "lora.safetensors").read_bytes())
    refused(tmp_path, r"twice.*adapter_config\.json.*header")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("[" * 100_000, "adapter_config.json is not JSON, or nested too deeply"),
        ('{"a":' * 50_000 + "1" + "}" * 50_000, "adapter_config.json is not JSON, or nested too deeply"),
        (b"\xff\xfe{}", "adapter_config.json is not JSON"),
        (" " * (1 << 21), "adapter_config.json is larger"),
        (json.dumps({"r": 2, "rank_pattern": {"(a|a)*$": 2}}), "rank_pattern.*repeats a group"),
        (json.dumps({"r": 2, "rank_pattern": {"(.*)(.*)(.*)(.*)(.*)x": 2}}), "rank_pattern.*very long"),
        (json.dumps({"r": 2, "alpha_pattern": {"(.|.)" * 60 + "x": 2}}), "alpha_pattern.*very long"),
        (json.dumps({"r": 2, "alpha_pattern": {f".*.*x{i}": 2 for i in range(4000)}}), "alpha_pattern.*very long"),
        (json.dumps({"r": 2, "alpha_pattern": {str(i): 2 for i in range(5000)}}), "alpha_pattern has 5000 entries"),
        (json.dumps({"r": 2, "alpha_pattern": {"(?=a)b": 2}}), "a reference or a condition"),
        (json.dumps({"r": 2, "alpha_pattern": {"x" * 501: 2}}), "longer than 500"),
        (
            json.dumps({"peft_type": "OFT", "r": 0, "oft_block_size": 8, "num_cayley_neumann_terms": 10**9}),
            "from 1 to 100",
        ),
    ],
)
def test_a_configuration_that_would_hang_or_overflow_is_refused(config: Any, message: str, tmp_path: Path) -> None:
    save_file(pair(f"base_model.model.{LAYER}"), tmp_path / "adapter_model.safetensors")
    content = config if isinstance(config, bytes) else config.encode()
    (tmp_path / "adapter_config.json").write_bytes(content)
    refused(tmp_path, message)


def raw_file(file: Path, header: str, data: bytes = b"") -> Path:
    file.write_bytes(struct.pack("<Q", len(header)) + header.encode() + data)
    return file


ENTRY = '{"dtype":"F32","shape":[1],"data_offsets":[%d,%d]}'


@pytest.mark.parametrize(
    ("header", "size"),
    [
        ('{"a":{"dtype":["F32"],"shape":[1],"data_offsets":[0,4]}}', 4),
        ('{"a":' * 5000 + "1" + "}" * 5000, 0),
        ('{"__metadata__":{"a":' * 5000 + "1" + "}}" * 5000, 0),
        ("{" + ",".join(f'"{i}":' + ENTRY % (4 * i, 4 * i + 4) for i in [*range(60_000), 59_999]) + "}", 240_000),
        ("{" + ",".join(f'"{i}":' + ENTRY % (4 * i, 4 * i + 4) for i in range(20_001)) + "}", 80_004),
    ],
    ids=["dtype list", "deep", "deep metadata", "twice", "many"],
)
def test_a_header_of_a_wrong_form_is_one_error_in_bounded_time(header: str, size: int, tmp_path: Path) -> None:
    refused(raw_file(tmp_path / "lora.safetensors", header, bytes(size)), "damaged or incomplete|more than the 20000")


def test_a_dora_whose_lengths_are_comfyuis_is_refused(tmp_path: Path) -> None:
    """ComfyUI divides by the rows of W: read as the lengths of a trainer, they are another model."""
    state = pair() | {f"{KEY}.dora_scale": torch.ones(48, 1)}
    save_file(state, tmp_path / "lora.safetensors", {"flux2_lora.dora_scale": "comfyui"})
    refused(tmp_path / "lora.safetensors", "DoRA for ComfyUI only.*exported")
    save_file(state, tmp_path / "lora.safetensors")
    assert adapters.load(fresh(), tmp_path / "lora.safetensors").kind == "DoRA"


@pytest.mark.parametrize("pipe", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_pipe_in_the_place_of_a_file_does_not_block(pipe: str, tmp_path: Path) -> None:
    save_file(pair(f"base_model.model.{LAYER}"), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2}')
    (tmp_path / pipe).unlink()
    os.mkfifo(tmp_path / pipe)
    refused(tmp_path, f"{pipe}.*(missing|not a file)")


def test_a_folder_without_an_adapter_names_the_files_that_may_be_one(tmp_path: Path) -> None:
    save_file(pair(), tmp_path / "tarot.safetensors")
    with pytest.raises(AdapterError, match=r"no adapter was found.*tarot\.safetensors"):
        adapters.load(fresh(), tmp_path)


def test_an_alpha_of_another_adapter_than_the_layers_is_refused(tmp_path: Path) -> None:
    linear = fresh().get_submodule(LAYER)
    state = {f"{KEY}.lora_A.weight": torch.ones(1, linear.in_features)}
    state |= {f"{KEY}.lora_B.weight": torch.ones(linear.out_features, 1), f"{KEY}.alpha.0": torch.tensor(0.5)}
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(AdapterError, match=r"alpha\.0 is of another adapter than the layers"):
        adapters.load(fresh(), tmp_path / "x.safetensors")
