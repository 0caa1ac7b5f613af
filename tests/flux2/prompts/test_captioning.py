"""flux2.prompts.captioning: captions are what the models of transformers answer, and they see the images."""

import json
import re
import shutil
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPImageProcessorPil,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Mistral3ForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from flux2.prompts.captioning import TEMPLATES, CaptionModel, caption_source, load_caption_model
from flux2.prompts.upsampling import TEMPERATURE, side_by_side
from flux2.quantization.nf4 import Nf4Linear
from flux2.utils.choices import TextStorage
from flux2.weights.sources import ModelSource, WeightsError

pytest_plugins = ("writer_helpers",)

CPU = torch.device("cpu")
ASKED = {"system": "be brief", "request": "a fox"}
IMAGES = [Image.new("RGB", (16, 16), "red"), Image.new("RGB", (24, 16), "blue")]


@pytest.fixture(scope="module")
def tokenizer(writer_tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    return writer_tokenizer


@pytest.fixture(scope="module")
def source(writer_source: ModelSource) -> ModelSource:
    return writer_source


def load(folder: Path | str, storage: TextStorage | None = None) -> CaptionModel:
    return load_caption_model(caption_source(str(folder)), CPU, torch.float32, storage)


def sampled(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, inputs: dict, seed: int) -> str:
    """What transformers' own model writes."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = model.generate(**inputs, max_new_tokens=20, do_sample=True, temperature=TEMPERATURE)
    return tokenizer.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


@pytest.fixture(scope="module")
def llava(
    writer: Mistral3ForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A whole LLaVA of random weights with its processor: an image is 16 tokens."""
    vision = {"model_type": "clip_vision_model", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 1, "image_size": 32, "patch_size": 8, "projection_dim": 8}
    text = writer.config.text_config.to_dict()
    image = tokenizer.convert_tokens_to_ids("[IMG]")
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=image, tie_word_embeddings=False)
    folder = tmp_path_factory.mktemp("llava")
    helpers.randomize(LlavaForConditionalGeneration(config), 3).save_pretrained(folder)
    square = {"height": 32, "width": 32}
    made = LlavaProcessor(
        CLIPImageProcessorPil(size=square, crop_size=square),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        image_token="[IMG]",
        chat_template=tokenizer.chat_template,
        num_additional_image_tokens=1,
    )
    made.save_pretrained(folder)
    return folder


# ------------------------------------------------------------------ the answer


def test_devs_text_encoder_answers_as_the_whole_model_does(source, writer, tokenizer) -> None:
    """Two images of 16 x 16 and 24 x 16 pixels are one of 40 x 16: two rows of five tokens."""
    model = load(source.path)
    found = model.describe(IMAGES, **ASKED, seed=5, new_tokens=20, name="x.png")
    row = "[IMG]" * 5
    sent = f"<s>[SYSTEM_PROMPT]be brief[/SYSTEM_PROMPT][INST]{row}[IMG_BREAK]{row}[IMG_END]a fox[/INST]"
    seen = model.inputs("a fox", IMAGES)
    inputs = dict(tokenizer(sent, add_special_tokens=False, return_tensors="pt"))
    inputs |= {key: seen[key] for key in ("pixel_values", "image_sizes")}
    assert found == sampled(writer, tokenizer, inputs, 5)
    assert model.describe(IMAGES[::-1], **ASKED, seed=5, new_tokens=20, name="x.png") != found


def test_a_model_of_transformers_answers_as_it_does_by_itself(llava, tokenizer) -> None:
    found = load(llava).describe(IMAGES, **ASKED, seed=5, new_tokens=20, name="x.png")
    processor = LlavaProcessor.from_pretrained(llava)
    sent = f"<s>[INST][IMG]{ASKED['system']}\n\n{ASKED['request']}[/INST]"
    inputs = dict(processor(text=[sent], images=[side_by_side(IMAGES)], add_special_tokens=False, return_tensors="pt"))
    assert (inputs["input_ids"] == tokenizer.convert_tokens_to_ids("[IMG]")).sum() == 16
    assert found == sampled(LlavaForConditionalGeneration.from_pretrained(llava), tokenizer, inputs, 5)


@pytest.mark.parametrize("kind", ["dev", "llava"])
def test_an_answer_depends_on_its_images_its_words_and_its_seed_alone(kind, source, llava) -> None:
    model = load(source.path if kind == "dev" else llava)
    limits = {"new_tokens": 20, "name": "x.png"}
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    found = model.describe(IMAGES, **ASKED, seed=0, **limits)
    assert torch.equal(torch.random.get_rng_state(), state), "what is drawn elsewhere has changed"
    torch.rand(3)
    assert model.describe(IMAGES, **ASKED, seed=0, **limits) == found
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 40, 3), dtype=np.uint8))
    assert model.describe([noise], **ASKED, seed=0, **limits) != found
    assert model.describe(IMAGES, "be brief", "a cup", seed=0, **limits) != found
    assert model.describe(IMAGES, "the tarot card", "a fox", seed=0, **limits) != found
    assert any(model.describe(IMAGES, **ASKED, seed=seed, **limits) != found for seed in range(1, 9))


def test_a_truncated_answer_is_a_warning_and_an_empty_one_an_error(llava, caplog, monkeypatch) -> None:
    model = load(llava)
    model.describe(IMAGES, **ASKED, seed=0, new_tokens=1, name="x.png")
    assert re.search(r"\b1 tokens?\b.*x\.png", caplog.text)
    end = torch.tensor([[model.processor.tokenizer.eos_token_id]])
    monkeypatch.setattr(model.model, "generate", lambda input_ids, **_: torch.cat([input_ids, end], 1))
    with pytest.raises(ValueError, match=r"empty.*x\.png.*seed"):
        model.describe(IMAGES, **ASKED, seed=0, new_tokens=1, name="x.png")


def test_devs_language_layers_can_be_quantized(source) -> None:
    model = load(source.path, "nf4")
    linears = [m for m in model.model.model.language_model.layers.modules() if isinstance(m, torch.nn.Linear)]
    assert len(linears) == 4 * 7
    assert all(isinstance(m, Nf4Linear) for m in linears)
    assert model.describe(IMAGES, **ASKED, seed=0, new_tokens=20, name="x.png")


def test_each_template_says_what_to_leave_out() -> None:
    assert {
        name: bool(re.search("leave out|nothing that stays", one.system.lower())) for name, one in TEMPLATES.items()
    }
    assert "style" in TEMPLATES["style"].system
    assert "kind alone" in TEMPLATES["subject"].system
    assert "instruction" in TEMPLATES["edit"].request


# ------------------------------------------------------------------ what cannot be done


def test_dev_stands_for_the_published_repository() -> None:
    found = caption_source("dev")
    assert isinstance(found, ModelSource)
    assert found.path == "black-forest-labs/FLUX.2-dev"


def test_folders_of_other_things_are_refused(llava, model_folders, tmp_path) -> None:
    def changed(name: str, **config: object) -> Path:
        folder = shutil.copytree(llava, tmp_path / name)
        known = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(known | config))
        return folder

    lacking = changed("lacking")
    state = load_file(lacking / "model.safetensors")
    save_file({key: value for key, value in state.items() if "vision" not in key}, lacking / "model.safetensors")
    processor = changed("processor")
    (processor / "processor_config.json").write_text(json.dumps({"auto_map": {"AutoProcessor": "own.Processor"}}))
    wordless = changed("wordless")
    (wordless / "chat_template.jinja").unlink()
    sightless = changed("sightless")
    (sightless / "chat_template.jinja").write_text(
        "{% for message in messages %}{{ message['content'][-1]['text'] }}{% endfor %}"
    )
    for folder, said in (
        (tmp_path / "nowhere", "nowhere.*not a folder"),
        (tmp_path, "neither.*config.json"),
        (model_folders("klein"), "does not see images"),
        (changed("quantized", quantization_config={"bits": 4}), r"config\.json.*quantized"),
        (changed("own", auto_map={"AutoConfig": "own.Config"}), r"config\.json.*code of its own"),
        (changed("unknown", model_type="own"), "cannot be loaded.*own"),
        (processor, r"processor_config\.json.*code of its own"),
        (changed("typeless", model_type="mistral"), "cannot be loaded"),
        (lacking, r"lack.*vision"),
        (wordless, "no chat template"),
        (sightless, r"does not see images.*chat template has no place.*Give dev"),
    ):
        with pytest.raises(WeightsError, match=said):
            load(folder)
    with pytest.raises(WeightsError, match=r"storage='nf4'.*dev"):
        load(llava, "nf4")
