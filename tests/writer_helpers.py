"""A small random Mistral3 that sees and writes, with its tokenizer: what the tests of upsampling and captions share.

A test module says `pytest_plugins = ("writer_helpers",)` to get the fixtures.
"""

from collections.abc import Callable
from pathlib import Path

import helpers
import pytest
import torch
from transformers import Mistral3Config, Mistral3ForConditionalGeneration, PreTrainedTokenizerFast

from flux2.weights.sources import ModelSource

CONTROL = ["[IMG]", "[IMG_BREAK]", "[IMG_END]"]
TEMPLATE = helpers.MISTRAL_TEMPLATE.replace(
    "{{ part['text'] }}", "{% if part['type'] == 'image' %}[IMG]{% else %}{{ part['text'] }}{% endif %}"
).replace("{% if add_generation_prompt %}{{ eos_token }}{% endif %}", "")
DEV = helpers.VARIANTS["dev"]


@pytest.fixture(scope="session")
def writer_tokenizer() -> PreTrainedTokenizerFast:
    made = helpers.make_tokenizer("dev")
    made.add_special_tokens({"extra_special_tokens": [*helpers.MISTRAL_CONTROL[4:], *CONTROL]})
    made.chat_template = TEMPLATE
    return made


@pytest.fixture(scope="session")
def writer(writer_tokenizer: PreTrainedTokenizerFast) -> Mistral3ForConditionalGeneration:
    """A whole Mistral3 of random weights, with 4 x 4 patches of which 2 x 2 are one token: a token is 8 x 8 pixels."""
    text = {"model_type": "mistral", "hidden_size": 16, "num_hidden_layers": 4, "rope_theta": 500.0, "head_dim": 8}
    text |= {
        "vocab_size": len(writer_tokenizer),
        "intermediate_size": 40,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    text |= {"max_position_embeddings": 4096, "tie_word_embeddings": False}
    vision = {"model_type": "pixtral", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "head_dim": 8}
    vision |= {"num_attention_heads": 1, "image_size": 64, "patch_size": 4}
    image = writer_tokenizer.convert_tokens_to_ids("[IMG]")
    config = Mistral3Config(
        text_config=text, vision_config=vision, image_token_index=image, spatial_merge_size=2, tie_word_embeddings=False
    )
    model = helpers.randomize(Mistral3ForConditionalGeneration(config), 3)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.4)  # at a temperature of 0.15 words are then likely, not certain
        model.lm_head.weight[writer_tokenizer.eos_token_id] *= 1.6  # and answers end
    return model  # type: ignore[return-value]


@pytest.fixture(scope="session")
def writer_source(
    writer: Mistral3ForConditionalGeneration,
    writer_tokenizer: PreTrainedTokenizerFast,
    model_folders: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> ModelSource:
    folder = tmp_path_factory.mktemp("writer")
    writer.save_pretrained(folder / "text_encoder")
    writer_tokenizer.save_pretrained(folder / "tokenizer")
    for part in ("transformer", "vae"):
        (folder / part).symlink_to(model_folders("dev") / part)
    return ModelSource(DEV, str(folder))
