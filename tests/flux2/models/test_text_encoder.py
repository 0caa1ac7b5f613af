"""flux2.models.text_encoder: the ids and embeddings of Flux2Pipeline and Flux2KleinPipeline, from a cut model."""

import gc
import json
import shutil
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import helpers
import pytest
import torch
from diffusers import Flux2KleinPipeline, Flux2Pipeline
from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE as PUBLISHED_MESSAGE
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Mistral3ForConditionalGeneration, Qwen3ForCausalLM

from flux2.models.text_encoder import SYSTEM_MESSAGE, TextEncoder, build, chat, load_tokenizer, tokenize
from flux2.models.variants import MISTRAL, TextConfig
from flux2.quantization.base import QuantizedLinear
from flux2.quantization.blockwise_int8 import BlockwiseInt8Linear
from flux2.quantization.nf4 import Nf4Linear
from flux2.weights.loading import load_text_encoder
from flux2.weights.sources import ModelSource, WeightsError

PROMPTS = ["a small red fox, trtcrd", "", "the tarot card\nof a blue [IMG]cup!", "fox " * 100]


def published_embeddings(kind: str, prompts: list[str]) -> Tensor:
    """What diffusers' own function makes of the prompts with the whole model."""
    parts, text = helpers.reference_parts(kind), helpers.TEXTS[kind]
    function = {
        "dev": Flux2Pipeline._get_mistral_3_small_prompt_embeds,
        "klein": Flux2KleinPipeline._get_qwen3_prompt_embeds,
    }[kind]
    with torch.no_grad():
        return function(
            parts["text_encoder"],
            parts["tokenizer"],
            prompts,
            max_sequence_length=text.length,
            hidden_states_layers=list(text.layers),
        )


def kind_of(source: ModelSource) -> str:
    return source.variant.name.removeprefix("small_")


def test_embeddings_are_those_of_diffusers(source: ModelSource) -> None:
    encoder = load_text_encoder(source, dtype=torch.float32)
    wanted = published_embeddings(kind_of(source), PROMPTS)
    ours = encoder.encode(PROMPTS)
    assert ours.shape == (4, source.variant.text.length, source.variant.transformer.text_width)
    for i, prompt in enumerate(PROMPTS):
        assert helpers.relative_error(ours[i], wanted[i]) <= 1e-5, prompt[:30]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embeddings_are_the_whole_models_hidden_states_bit_for_bit(source: ModelSource, dtype: torch.dtype) -> None:
    """The published model has more layers, a head and a vision tower, and norms its last state; none of it matters."""
    text, encoder = source.variant.text, load_text_encoder(source, dtype=dtype)
    whole_class = Mistral3ForConditionalGeneration if text.kind == "mistral" else Qwen3ForCausalLM
    whole = whole_class.from_pretrained(source.folder("text_encoder"), dtype=dtype).eval()
    for prompts in (PROMPTS, *([prompt] for prompt in PROMPTS)):
        ids, mask = tokenize(encoder.tokenizer, prompts, text.kind, text.length)
        states = whole(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
        assert torch.equal(encoder.encode(prompts), torch.cat([states[layer] for layer in text.layers], dim=-1))


def test_an_embedding_does_not_depend_on_the_other_prompts(source: ModelSource) -> None:
    encoder = load_text_encoder(source, dtype=torch.float32)
    together = encoder.encode(PROMPTS)
    for prompt, embedding in zip(PROMPTS, together, strict=True):
        assert helpers.relative_error(encoder.encode([prompt])[0], embedding) <= 1e-5
    assert helpers.relative_error(together[0], together[1]) > 0.01


def test_only_the_layers_that_are_read_are_there(source: ModelSource) -> None:
    names = set(load_text_encoder(source).model.state_dict())
    layers = max(source.variant.text.layers)
    whole = helpers.reference_parts(kind_of(source))["text_encoder"]
    assert {name.split(".")[1] for name in names if name.startswith("layers.")} == {str(i) for i in range(layers)}
    assert not {name for name in names if name == "norm.weight" or "head" in name or "vision" in name}
    assert whole.config.get_text_config().num_hidden_layers == layers + 1, "the test needs a longer model to cut"


@torch.no_grad()
def test_the_last_state_read_is_not_normed(source: ModelSource) -> None:
    text = source.variant.text
    whole = helpers.reference_parts(kind_of(source))["text_encoder"]
    encoder = load_text_encoder(source, dtype=torch.float32)
    ids, mask = tokenize(encoder.tokenizer, PROMPTS[:1], text.kind, text.length)
    wanted = whole(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[text.layers[-1]]
    language_model = whole.model.language_model if text.kind == "mistral" else whole.model
    last = encoder.encode(PROMPTS[:1]).chunk(3, dim=-1)[-1]
    assert helpers.relative_error(last, wanted) <= 1e-5
    assert helpers.relative_error(language_model.norm(wanted), wanted) > 0.1, "norming must matter"


def test_the_system_message_is_the_published_one_line_break_included() -> None:
    assert SYSTEM_MESSAGE == PUBLISHED_MESSAGE
    assert "object\nattribution" in SYSTEM_MESSAGE


def test_prompts_are_sent_with_the_published_roles() -> None:
    assert [message["role"] for message in chat("x", "mistral")] == ["system", "user"]
    assert chat("a [IMG] cup", "mistral")[1]["content"] == [{"type": "text", "text": "a  cup"}]
    assert chat("a [IMG] cup", "qwen3") == [{"role": "user", "content": "a [IMG] cup"}]


def test_prompts_are_padded_on_the_tokenizers_own_side_and_cut_at_the_length(source: ModelSource) -> None:
    tokenizer, text = load_tokenizer(source.folder("tokenizer")), source.variant.text
    ids, mask = tokenize(tokenizer, ["a cup", "fox " * 100], text.kind, text.length)
    assert ids.shape == mask.shape == (2, text.length)
    assert mask[1].all(), "a long prompt fills every place"
    padded = mask[0] == 0
    assert padded.any()
    assert (ids[0][padded] == tokenizer.pad_token_id).all()
    assert padded[0 if text.kind == "mistral" else -1], "left for Mistral's, right for Qwen3's tokenizer"
    assert not padded[-1 if text.kind == "mistral" else 0]


def test_qwen3_prompts_ask_for_an_answer_without_thinking(model_folders: Callable[[str], Path]) -> None:
    tokenizer = load_tokenizer(model_folders("klein") / "tokenizer")
    ids, mask = tokenize(tokenizer, ["a cup"], "qwen3", 24)
    words = tokenizer.convert_ids_to_tokens(ids[0][mask[0].bool()])
    assert words[-8:] == ["assistant", "\n", "<think>", "\n", "\n", "</think>", "\n", "\n"]


def test_prompts_that_are_cut_are_known(source: ModelSource) -> None:
    encoder = load_text_encoder(source, torch.device("cpu"), torch.float32)
    encoder.encode(["a cup", "fox " * 100])
    assert encoder.cut == ["fox " * 100]
    _, mask = tokenize(encoder.tokenizer, ["a cup"], source.variant.text.kind, 64)
    exact = int(mask.sum())
    encoder.encode(["a cup"], length=exact)
    assert len(encoder.cut) == 1, "a prompt that just fits is whole"
    encoder.encode(["a cup"], length=exact - 1)
    assert encoder.cut == ["fox " * 100, "a cup"]


def test_a_length_can_be_given_a_call(source: ModelSource) -> None:
    encoder = load_text_encoder(source, dtype=torch.float32)
    assert encoder.encode(["a cup"], length=50).shape[1] == 50


def test_one_string_for_prompts_is_an_error(source: ModelSource) -> None:
    with pytest.raises(ValueError, match="list"):
        load_text_encoder(source).encode("a cup")


def test_a_language_model_with_too_few_layers_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"\b4 layers\b.*\blayer 30\b"):
        build({"num_hidden_layers": 4}, MISTRAL)


def test_the_error_of_a_wrong_text_encoder_names_its_folder(model_folders: Callable[[str], Path]) -> None:
    deeper = TextConfig(kind="mistral", layers=(1, 2, 9), length=8)
    source = ModelSource(replace(helpers.VARIANTS["dev"], text=deeper), str(model_folders("dev")))
    with pytest.raises(WeightsError, match=r"/text_encoder\b.*\b4 layers\b.*\blayer 9\b"):
        load_text_encoder(source)


def test_the_text_encoder_of_another_model_is_an_error(model_folders: Callable[[str], Path]) -> None:
    variant = helpers.VARIANTS["klein"]
    source = ModelSource(replace(variant, text=helpers.TEXTS["dev"]), "", text_encoder=str(model_folders("dev")))
    with pytest.raises(WeightsError, match=r"\b48\b.*small_klein.*\b72\b"):
        load_text_encoder(source)


def test_configurations_written_by_transformers_4_are_understood(
    model_folders: Callable[[str], Path], tmp_path: Path
) -> None:
    """The published files say rope_theta and torch_dtype, and nothing of rope_parameters."""
    folder = tmp_path / "model"
    shutil.copytree(model_folders("dev"), folder)
    file = folder / "text_encoder" / "config.json"
    config = json.loads(file.read_text())
    text = config["text_config"]
    text |= {"rope_theta": text.pop("rope_parameters")["rope_theta"], "rope_scaling": None, "torch_dtype": "bfloat16"}
    assert text["rope_theta"] == 500.0, "the test needs another value than the default"
    file.write_text(json.dumps(config))

    encoder = load_text_encoder(ModelSource(helpers.VARIANTS["dev"], str(folder)), dtype=torch.float32)
    whole = Mistral3ForConditionalGeneration.from_pretrained(folder / "text_encoder", dtype=torch.float32)
    wanted = Flux2Pipeline._get_mistral_3_small_prompt_embeds(
        whole, encoder.tokenizer, PROMPTS[:1], max_sequence_length=64, hidden_states_layers=[1, 2, 3]
    )
    assert helpers.relative_error(encoder.encode(PROMPTS[:1]), wanted.detach()) <= 1e-5


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model.", "model.", ""])
def test_the_language_model_is_found_under_every_published_prefix(
    prefix: str, model_folders: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folders("dev"), folder)
    file = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    language = {name.split("language_model.model.")[-1].split("model.language_model.")[-1]: name for name in tensors}
    assert "embed_tokens.weight" in language
    save_file({prefix + short: tensors[name].clone() for short, name in language.items()}, file)
    encoder = load_text_encoder(ModelSource(helpers.VARIANTS["dev"], str(folder)), dtype=torch.float32)
    assert torch.equal(
        encoder.encode(PROMPTS[:1]),
        load_text_encoder(ModelSource(helpers.VARIANTS["dev"], str(model_folders("dev"))), dtype=torch.float32).encode(
            PROMPTS[:1]
        ),
    )


def test_weights_without_a_language_model_are_an_error(model_folders: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folders("dev"), folder)
    save_file({"vision.weight": torch.zeros(1)}, folder / "text_encoder" / "model.safetensors")
    with pytest.raises(WeightsError, match="embed_tokens"):
        load_text_encoder(ModelSource(helpers.VARIANTS["dev"], str(folder)))


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("tokenizer/tokenizer.json", r"/tokenizer\b.*tokenizer\.json"),
        ("tokenizer/chat_template.jinja", r"/tokenizer\b.*chat.template"),
        ("text_encoder/config.json", r"/text_encoder\b.*config\.json"),
        ("text_encoder/model.safetensors", r"/text_encoder\b.*\.safetensors"),
    ],
)
def test_a_missing_file_is_named(gone: str, message: str, model_folders: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folders("dev"), folder)
    (folder / gone).unlink()
    with pytest.raises(ValueError, match=message):
        load_text_encoder(ModelSource(helpers.VARIANTS["dev"], str(folder)))


def test_the_encoder_is_frozen_and_in_the_dtype_asked_for(source: ModelSource) -> None:
    encoder = load_text_encoder(source, dtype=torch.bfloat16)
    assert not encoder.model.training
    assert not [name for name, parameter in encoder.model.named_parameters() if parameter.requires_grad]
    assert encoder.encode(["a cup"]).dtype == torch.bfloat16


# ------------------------------------------------------------------ 4 and 8 bits


def linears(encoder: TextEncoder) -> dict[str, torch.nn.Linear]:
    return {name: module for name, module in encoder.model.named_modules() if isinstance(module, torch.nn.Linear)}


@pytest.mark.parametrize(("storage", "layer", "limit"), [("nf4", Nf4Linear, 0.5), ("int8", BlockwiseInt8Linear, 0.05)])
def test_quantized_layers_compute_with_their_rounded_weights(
    source: ModelSource, storage: str, layer: type[QuantizedLinear], limit: float
) -> None:
    plain = load_text_encoder(source, dtype=torch.float32)
    quantized = load_text_encoder(source, dtype=torch.float32, storage=storage)
    wanted, rounded = plain.encode(PROMPTS), linears(quantized)
    assert rounded.keys() == linears(plain).keys()
    assert len(rounded) == 7 * max(source.variant.text.layers)
    assert {type(module) for module in rounded.values()} == {layer}
    for name, tensor in plain.model.state_dict().items():
        if name.removesuffix(".weight") not in rounded:
            assert torch.equal(tensor, quantized.model.get_parameter(name)), f"{name} is no linear of a layer"
    ours = quantized.encode(PROMPTS)
    assert 1e-3 < helpers.relative_error(ours, wanted) < limit
    for name, module in linears(plain).items():
        module.weight.data = rounded[name].dequantize(torch.float32)
    assert torch.equal(ours, plain.encode(PROMPTS)), "the same numbers, but for where the weight comes from"


@pytest.mark.parametrize("storage", ["nf4", "int8"])
def test_each_linear_is_quantized_before_the_next_but_one_is_read(
    storage: str, source: ModelSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In whole the float weights are never in memory: at most what is read ahead beside the one that is quantized."""
    layer, alive, most = {"nf4": Nf4Linear, "int8": BlockwiseInt8Linear}[storage], [], []
    store = layer.store

    def watched(self: QuantizedLinear, weight: Tensor) -> None:
        alive.append(weakref.ref(weight.untyped_storage()))
        most.append(sum(reference() is not None for reference in alive))
        store(self, weight)

    monkeypatch.setattr(layer, "store", watched)
    encoder = load_text_encoder(source, dtype=torch.float32, storage=storage)
    gc.collect()
    assert len(most) == len(linears(encoder))
    assert max(most) <= 2
    assert not any(reference() is not None for reference in alive)


def test_a_folder_that_is_in_4_bits_is_taken_over_as_it_is(
    model_folders: Callable[[str], Path], tmp_path: Path
) -> None:
    whole = ModelSource(helpers.VARIANTS["dev"], str(model_folders("dev")))
    folder = tmp_path / "model"
    shutil.copytree(model_folders("dev"), folder)
    file = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    four = load_text_encoder(whole, dtype=torch.float32, storage="nf4")
    for name, module in linears(four).items():
        (key,) = [found for found in tensors if found.endswith(f"{name}.weight") and "vision" not in found]
        del tensors[key]
        prefix = key.removesuffix("weight")
        tensors |= {prefix + part: tensor.clone() for part, tensor in module.storage().items()}
    save_file(tensors, file)
    source = ModelSource(helpers.VARIANTS["dev"], str(folder))
    wanted = four.encode(PROMPTS)
    assert torch.equal(load_text_encoder(source, dtype=torch.float32, storage="nf4").encode(PROMPTS), wanted)
    dequantized = load_text_encoder(source, dtype=torch.float32)
    assert {type(module) for module in linears(dequantized).values()} == {torch.nn.Linear}
    assert torch.equal(dequantized.encode(PROMPTS), wanted)


@pytest.mark.parametrize("storage", ["int4", "4bit", 8, True, ""])
def test_a_storage_that_there_is_not_is_refused(storage: object, source: ModelSource) -> None:
    with pytest.raises(ValueError, match=rf"storage={storage!r}.*nf4, int8"):
        load_text_encoder(source, storage=storage)  # type: ignore[arg-type]
