"""Rewrite prompts in more detail with dev's text encoder, which is a language model ("prompt upsampling").

As in the reference code there is a system message for text-to-image and another for edits, which shows the references
next to each other in one image of at most 768 x 768 pixels; temperature 0.15, up to 512 new tokens. The system messages
are our own. Each prompt is a separate seeded conversation, so an answer depends only on its prompt, references and
seed.

An encoder of embeddings ends after the last layer that they read; rewriting needs all layers, the output head and, for
references, the vision tower.
Source: github.com/black-forest-labs/flux2, src/flux2/text_encoder.py (`upsample_prompt`).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from math import isqrt
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor, nn

from flux2.models.text_encoder import bounded_template, load_tokenizer, quantize_text_encoder, without_directives
from flux2.models.variants import Variant
from flux2.prompts.embeddings import TextSource
from flux2.utils.images import as_rgb
from flux2.utils.json_files import read_json
from flux2.weights.key_names import PublishedTensor
from flux2.weights.loading import expected_shapes, fill, language_prefix, rebuild_rotary
from flux2.weights.safetensors_files import TensorFiles, tensor_files
from flux2.weights.sources import ModelSource, WeightsError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TEMPERATURE = 0.15
NEW_TOKENS = 512
MOST_TOKENS = 2048  # tokens of a conversation before the answer
MOST_PIXELS = 768**2  # pixels of all references together
IMAGE, ROW_END, IMAGE_END = "[IMG]", "[IMG_BREAK]", "[IMG_END]"

TEXT_TO_IMAGE = (
    "You write prompts for FLUX.2, a model that draws pictures from text. The user gives you a short prompt. Answer "
    "with a longer one for the same picture. Keep every subject, number, colour, style and wish that the user names, "
    "and add nothing that contradicts them. Say what can be seen: shapes, materials and surfaces, where things are and "
    "how large, the light and its direction, the background, the camera or the medium. Words that are to be read in "
    "the picture stay as they are, in quotation marks, and what carries writing gets its words. If the prompt is "
    "structured, as JSON or a list is, keep the structure and write more into its fields. Answer in the language of "
    "the prompt, with the new prompt and nothing else."
)
EDIT = (
    "You write instructions for FLUX.2, a model that edits pictures. You see the pictures that are edited, from left "
    "to right, and the user's request. Answer with one instruction of 50 to 80 words. Say exactly what changes, in "
    "things that can be seen, and name what has to stay: faces, pose, composition, light, background. Call things by "
    "what the pictures show. Say what should be there and not what should be missing. Where the request is vague, "
    "choose something concrete. Answer with the instruction and nothing else."
)
log = logging.getLogger(__name__)


def refusal_reason(variant: Variant, text: TextSource) -> str | None:
    """Return why this model's text encoder cannot rewrite prompts; None if it can."""
    if variant.text.kind != "mistral":
        reads = f"{variant.name} reads prompts with Qwen3"
        return f"{reads}, but only dev's Mistral rewrites prompts. Rewrite with model=dev"
    if variant.name == "tiny":
        return "the embedded model's text encoder has random weights and cannot write. Rewrite with model=dev"
    if text.external_source:
        return f"{text.external_source} gives only embeddings, and rewriting needs a text encoder on this machine"
    return None


def side_by_side(images: Sequence[Image.Image]) -> Image.Image:
    """Return the references in one image of at most `MOST_PIXELS`, from left to right, smaller ones on white."""
    images = [as_rgb(image) for image in images]
    width, height = sum(image.width for image in images), max(image.height for image in images)
    canvas = Image.new("RGB", (width, height), "white")
    left = 0
    for image in images:
        canvas.paste(image, (left, (height - image.height) // 2))
        left += image.width
    if width * height > MOST_PIXELS:
        smaller = isqrt(MOST_PIXELS * width // height), isqrt(MOST_PIXELS * height // width)
        canvas = canvas.resize((max(1, smaller[0]), max(1, smaller[1])), Image.Resampling.LANCZOS)
    return canvas


def conversation(system: str, prompt: str, has_image: bool) -> list[dict[str, Any]]:
    """Return the system message and the user's turn, which shows the image, if there is one, before the prompt."""
    words = {"type": "text", "text": prompt.replace(IMAGE, "")}
    content = [{"type": "image"}, words] if has_image else [words]
    return [{"role": "system", "content": [{"type": "text", "text": system}]}, {"role": "user", "content": content}]


@torch.no_grad()
def sampled_answer(
    model: Any,
    tokenizer: Any,
    inputs: dict[str, Tensor],
    *,
    seed: int,
    temperature: float,
    new_tokens: int,
    ends: list[int],
    pad: int | None,
    name: str,
) -> str:
    """Return what `model` writes after `inputs` (ids are (1, T)) until a token of `ends`, without control tokens.

    `name` stands for the question in messages. A truncated answer is a warning. Raises ValueError for an empty one.
    """
    device = next(model.parameters()).device
    inputs = {key: tensor.to(device) for key, tensor in inputs.items()}
    with torch.random.fork_rng([device] if device.type == "cuda" else []):  # keeps the random state of the caller
        torch.manual_seed(seed)
        special = {"eos_token_id": ends, "pad_token_id": pad}
        limits = {"max_new_tokens": new_tokens, "temperature": temperature, "do_sample": True, "use_cache": True}
        generated = model.generate(**inputs, **limits, **special)[0, inputs["input_ids"].shape[1] :]
    if generated.shape[0] == new_tokens and int(generated[-1]) not in ends:
        log.warning("the answer of the language model was truncated to %d tokens: %.300s", new_tokens, name)
    answer = str(tokenizer.decode(generated, skip_special_tokens=True)).strip()
    if not answer:
        raise ValueError(
            f"the language model answered with an empty text to {name:.300}. Rephrase it, or set another seed"
        )
    return answer


class Upsampler:
    """The language model with its tokenizer. `model` is frozen, in evaluation mode."""

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerFast) -> None:
        self.model = model.requires_grad_(False).eval()
        self.tokenizer = tokenizer

    def inputs(
        self, prompt: str, references: Sequence[Image.Image] = (), system: str | None = None
    ) -> dict[str, Tensor]:
        """Return ids and mask, (1, T); with references also their pixels (1, 3, H, W) and `image_sizes` (1, 2).

        The system message is by default the one that asks for a prompt. Raises ValueError for more than `MOST_TOKENS`.
        """
        if system is None:
            system = EDIT if references else TEXT_TO_IMAGE
        messages = conversation(system, prompt, bool(references))
        with bounded_template():
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        image_inputs: dict[str, Tensor] = {}
        if references:
            image_inputs = self._seen(side_by_side(references))
            height, width = (int(side) // self._cell for side in image_inputs["image_sizes"][0])
            row = IMAGE * width
            if text.count(IMAGE) != 1:
                problem = "the tokenizer's chat template has no place for an image"
                raise WeightsError(f"{problem}. Give the tokenizer of FLUX.2-dev, or no images")
            text = text.replace(IMAGE, ROW_END.join([row] * height) + IMAGE_END)
        tokens = self.tokenizer(text, add_special_tokens=False, return_tensors="pt")
        if (count := tokens["input_ids"].shape[1]) > MOST_TOKENS:
            raise ValueError(f"{count} tokens are too many, the limit is {MOST_TOKENS}: {prompt!r:.80}")
        return {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"], **image_inputs}

    @property
    def _cell(self) -> int:
        """Side in pixels of the square that is one token of an image."""
        config = self.model.config
        return int(config.vision_config.patch_size * config.spatial_merge_size)

    def _seen(self, picture: Image.Image) -> dict[str, Tensor]:
        from transformers import PixtralImageProcessorPil  # of newer versions, and needed only here

        side = {"height": self._cell, "width": self._cell}
        longest = {"longest_edge": self.model.config.vision_config.image_size}
        processed = PixtralImageProcessorPil(size=longest, patch_size=side)([[picture]], return_tensors="pt")
        dtype = next(self.model.parameters()).dtype
        return {"pixel_values": processed["pixel_values"].to(dtype), "image_sizes": processed["image_sizes"]}

    def rewrite(
        self,
        prompt: str,
        references: Sequence[Image.Image] = (),
        *,
        seed: int = 0,
        temperature: float = TEMPERATURE,
        new_tokens: int = NEW_TOKENS,
    ) -> str:
        """Return the prompt in more detail. Raises ValueError if the model answers with an empty text."""
        sampling = {"seed": seed, "temperature": temperature, "new_tokens": new_tokens}
        return self._answer(self.inputs(prompt, references), f"{prompt!r:.80}", **sampling)

    def describe(
        self, images: Sequence[Image.Image], system: str, request: str, *, seed: int, new_tokens: int, name: str
    ) -> str:
        """Return the answer to `request` about images, shown side by side; `name` stands for them in messages."""
        sampling = {"seed": seed, "temperature": TEMPERATURE, "new_tokens": new_tokens}
        return self._answer(self.inputs(request, images, system), name, **sampling)

    def _answer(self, inputs: dict[str, Tensor], name: str, **sampling: Any) -> str:
        special = {"ends": [self.tokenizer.eos_token_id], "pad": self.tokenizer.pad_token_id}
        return sampled_answer(self.model, self.tokenizer, inputs, name=name, **special, **sampling)


def load_upsampler(
    source: ModelSource, device: torch.device, dtype: torch.dtype, text: TextSource, pictures: bool
) -> Upsampler:
    """Return the complete text encoder on `device` in `dtype`, its language layers' linears in `text.storage`.

    With `pictures` it has the vision tower for references, whose weights stay in `dtype`. Raises ValueError if prompts
    cannot be rewritten (`refusal_reason`), WeightsError for files of another model.
    """
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration, MistralConfig, MistralForCausalLM

    if reason := refusal_reason(source.variant, text):
        raise ValueError(f"prompts cannot be rewritten: {reason}")
    folder = source.folder("text_encoder")
    if not (folder / "config.json").is_file():
        raise WeightsError(f"{folder} holds no config.json")
    try:
        config = without_directives(read_json(folder / "config.json"))
    except (ValueError, TypeError, AttributeError) as error:
        raise WeightsError(f"{folder}: its config.json does not describe a language model ({error})") from error
    files = tensor_files(source, "text_encoder")
    if pictures and "vision_config" not in config:
        raise WeightsError(f"{folder} is a language model without vision tower. Rewrite prompts without references")
    with torch.device("meta"):
        model: Any
        if pictures:
            model = Mistral3ForConditionalGeneration(Mistral3Config.from_dict(config))
            language = model.model.language_model
        else:
            model = MistralForCausalLM(MistralConfig(**config.get("text_config", config)))
            language = model.model
        if text.storage is not None:
            quantize_text_encoder(language, text.storage, dtype)
    tied = bool(config.get("tie_word_embeddings"))
    published = {name: PublishedTensor((place,)) for name, place in places(model, language, files, tied).items()}
    fill(model, files, published, f"the language model of {source.variant.name}", device, dtype, lambda name: True)
    rebuild_rotary(language, device)
    if pictures:
        tower = model.model.vision_tower
        with torch.device(device):
            tower.patch_positional_embedding = type(tower.patch_positional_embedding)(tower.config)
    model.generation_config.max_length = None  # `rewrite` sets the limit
    return Upsampler(model, load_tokenizer(source.folder("tokenizer")))


def places(model: nn.Module, language: nn.Module, files: TensorFiles, tied: bool) -> dict[str, str]:
    """Return where each tensor of `model` is in `files`, for all versions of transformers that may have written them.

    With `tied` the embeddings are the output head if there is no other.
    """
    inside = language_prefix(files)
    prefix = next(f"{name}." for name, module in model.named_modules() if module is language)
    heads: list[str] = [name for name in ("lm_head.weight", "language_model.lm_head.weight") if name in files.names]
    heads += [f"{inside}embed_tokens.weight"] if tied else []
    if not heads:
        missing = f"{files.place} has no output head (lm_head.weight), which writing needs"
        raise WeightsError(f"{missing}. Use a complete text encoder, as published")
    outer = "model." if "model.vision_tower.patch_conv.weight" in files.names else ""
    locations = {}
    for name in expected_shapes(model):
        if name.startswith(prefix):
            locations[name] = inside + name.removeprefix(prefix)
        elif name == "lm_head.weight":
            locations[name] = heads[0]
        else:  # vision tower and projector
            locations[name] = outer + name.removeprefix("model.")
    return locations
