"""Prompts rewritten in more detail, by dev's text encoder as the language model that it is ("prompt upsampling").

As the reference code does it: a system message for text-to-image and another for edits, to which the references are
shown, side by side in one picture of at most 768 x 768 pixels; temperature 0.15, up to 512 new tokens. The system
messages here are our own, in our words. Each prompt is a conversation of its own, seeded, so that an answer depends on
its prompt, references and seed alone.

An encoder of embeddings is cut behind the last layer that they read; this needs all layers, the output head and, for
references, the vision tower.
Source: github.com/black-forest-labs/flux2, src/flux2/text_encoder.py (`upsample_prompt`).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from math import isqrt
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor, nn

from flux2.models.text_encoder import load_tokenizer, quantize
from flux2.models.variants import Variant
from flux2.prompts.embeddings import TextSource
from flux2.utils.images import as_rgb
from flux2.weights.key_names import Published
from flux2.weights.loading import fill, language_prefix, rebuild_rotary, taken
from flux2.weights.safetensors_files import TensorFiles, tensor_files
from flux2.weights.sources import ModelSource, WeightsError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TEMPERATURE = 0.15
NEW_TOKENS = 512
MOST_TOKENS = 2048  # of a conversation before the answer
MOST_PIXELS = 768**2  # of the references together
IMAGE, ROW_END, IMAGE_END = "[IMG]", "[IMG_BREAK]", "[IMG_END]"

TEXT_TO_IMAGE = (
    "You write prompts for FLUX.2, a model that draws pictures from text. The user gives you a short prompt. Answer "
    "with a longer one for the same picture. Keep every subject, number, color, style and wish that the user names, "
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


def refusal(variant: Variant, text: TextSource) -> str | None:
    """Why prompts cannot be rewritten by this model's text encoder; None if they can."""
    if variant.text.kind != "mistral":
        return (
            f"{variant.name} reads prompts with Qwen3, and only dev's Mistral rewrites prompts: rewrite with model=dev"
        )
    if variant.name == "tiny":
        return "the embedded model's text encoder is random weights that write no language: rewrite with model=dev"
    if text.elsewhere:
        return f"{text.elsewhere} gives embeddings alone, and prompts are rewritten by the text encoder on this machine"
    return None


def side_by_side(images: Sequence[Image.Image]) -> Image.Image:
    """The references in one picture of at most `MOST_PIXELS`, from left to right, smaller ones amid white."""
    pictures = [as_rgb(image) for image in images]
    width, height = sum(picture.width for picture in pictures), max(picture.height for picture in pictures)
    whole = Image.new("RGB", (width, height), "white")
    left = 0
    for picture in pictures:
        whole.paste(picture, (left, (height - picture.height) // 2))
        left += picture.width
    if width * height > MOST_PIXELS:
        smaller = isqrt(MOST_PIXELS * width // height), isqrt(MOST_PIXELS * height // width)
        whole = whole.resize((max(1, smaller[0]), max(1, smaller[1])), Image.Resampling.LANCZOS)
    return whole


def conversation(prompt: str, edit: bool) -> list[dict[str, Any]]:
    """What is sent: the system message, and one turn with the picture, if there is one, before the prompt."""
    words = {"type": "text", "text": prompt.replace(IMAGE, "")}
    system = {"type": "text", "text": EDIT if edit else TEXT_TO_IMAGE}
    content = [{"type": "image"}, words] if edit else [words]
    return [{"role": "system", "content": [system]}, {"role": "user", "content": content}]


class Upsampler:
    """The language model with its tokenizer. `model` is frozen, in evaluation mode."""

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerFast) -> None:
        self.model = model.requires_grad_(False).eval()
        self.tokenizer = tokenizer

    def inputs(self, prompt: str, references: Sequence[Image.Image] = ()) -> dict[str, Tensor]:
        """Ids and mask, (1, T); with references their pixels (1, 3, H, W) and `image_sizes` (1, 2) too.

        Raises ValueError for more than `MOST_TOKENS`.
        """
        text = self.tokenizer.apply_chat_template(
            conversation(prompt, bool(references)), tokenize=False, add_generation_prompt=True
        )
        seen: dict[str, Tensor] = {}
        if references:
            seen = self._seen(side_by_side(references))
            height, width = (int(side) // self._cell for side in seen["image_sizes"][0])
            row = IMAGE * width
            if text.count(IMAGE) != 1:
                raise WeightsError("the tokenizer's chat template has no place for a picture: prompts can be rewritten "
                                   "without references alone")  # fmt: skip
            text = text.replace(IMAGE, ROW_END.join([row] * height) + IMAGE_END)
        found = self.tokenizer(text, add_special_tokens=False, return_tensors="pt")
        if (count := found["input_ids"].shape[1]) > MOST_TOKENS:
            raise ValueError(f"{count} tokens are too many to rewrite, at most {MOST_TOKENS} fit: {prompt!r:.80}")
        return {"input_ids": found["input_ids"], "attention_mask": found["attention_mask"], **seen}

    @property
    def _cell(self) -> int:
        """Pixels of the side of a square that is one token of a picture."""
        config = self.model.config
        return int(config.vision_config.patch_size * config.spatial_merge_size)

    def _seen(self, picture: Image.Image) -> dict[str, Tensor]:
        from transformers import PixtralImageProcessorPil  # of newer versions, and needed here alone

        side = {"height": self._cell, "width": self._cell}
        longest = {"longest_edge": self.model.config.vision_config.image_size}
        found = PixtralImageProcessorPil(size=longest, patch_size=side)([[picture]], return_tensors="pt")
        dtype = next(self.model.parameters()).dtype
        return {"pixel_values": found["pixel_values"].to(dtype), "image_sizes": found["image_sizes"]}

    @torch.no_grad()
    def rewrite(
        self,
        prompt: str,
        references: Sequence[Image.Image] = (),
        *,
        seed: int = 0,
        temperature: float = TEMPERATURE,
        new_tokens: int = NEW_TOKENS,
    ) -> str:
        """The prompt in more words. Raises ValueError if the model answers with none."""
        device = next(self.model.parameters()).device
        given = {name: tensor.to(device) for name, tensor in self.inputs(prompt, references).items()}
        end = self.tokenizer.eos_token_id
        with torch.random.fork_rng([device] if device.type == "cuda" else []):  # what else is drawn does not change
            torch.manual_seed(seed)
            made = self.model.generate(
                **given,
                max_new_tokens=new_tokens,
                do_sample=True,
                temperature=temperature,
                use_cache=True,
                eos_token_id=end,
                pad_token_id=self.tokenizer.pad_token_id,
            )[0, given["input_ids"].shape[1] :]
        if made.shape[0] == new_tokens and made[-1] != end:
            log.warning("the rewritten prompt was cut at %d tokens: %.80r", new_tokens, prompt)
        answer = str(self.tokenizer.decode(made, skip_special_tokens=True)).strip()
        if not answer:
            raise ValueError(f"the text encoder answered with no words to {prompt!r:.80}: give it in other words")
        return answer


def load_upsampler(
    source: ModelSource, device: torch.device, dtype: torch.dtype, text: TextSource, pictures: bool
) -> Upsampler:
    """The whole text encoder on `device` in `dtype`, its language layers' linears in `text.storage`.

    Args:
        pictures: whether it will see references; then with the vision tower, whose weights stay in `dtype`.

    Raises ValueError where prompts cannot be rewritten (`refusal`), WeightsError for files that are not such a model's.
    """
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration, MistralConfig, MistralForCausalLM

    if reason := refusal(source.variant, text):
        raise ValueError(f"prompts cannot be rewritten: {reason}")
    folder = source.folder("text_encoder")
    if not (folder / "config.json").is_file():
        raise WeightsError(f"{folder} holds no config.json")
    config = json.loads((folder / "config.json").read_text())
    files = tensor_files(source, "text_encoder")
    if pictures and "vision_config" not in config:
        raise WeightsError(f"{folder} is a language model without a vision tower: rewrite prompts without references")
    with torch.device("meta"):
        model: Any
        if pictures:
            model = Mistral3ForConditionalGeneration(Mistral3Config.from_dict(config))
            language = model.model.language_model
        else:
            model = MistralForCausalLM(MistralConfig(**config.get("text_config", config)))
            language = model.model
        if text.storage is not None:
            quantize(language, text.storage, dtype)
    tied = bool(config.get("tie_word_embeddings"))
    published = {name: Published((place,)) for name, place in places(model, language, files, tied).items()}
    fill(model, files, published, f"the language model of {source.variant.name}", device, dtype, lambda name: True)
    rebuild_rotary(language, device)
    if pictures:
        tower = model.model.vision_tower
        with torch.device(device):
            tower.patch_positional_embedding = type(tower.patch_positional_embedding)(tower.config)
    model.generation_config.max_length = None  # `rewrite` says how many tokens
    return Upsampler(model, load_tokenizer(source.folder("tokenizer")))


def places(model: nn.Module, language: nn.Module, files: TensorFiles, tied: bool) -> dict[str, str]:
    """Where each tensor of `model` is in `files`, whichever version of transformers wrote them.

    With `tied` the embeddings are the output head where there is no other.
    """
    inside = language_prefix(files)
    own = next(f"{name}." for name, module in model.named_modules() if module is language)
    heads: list[str] = [name for name in ("lm_head.weight", "language_model.lm_head.weight") if name in files.names]
    heads += [f"{inside}embed_tokens.weight"] if tied else []
    if not heads:
        raise WeightsError(
            f"{files.place} has no output head (lm_head.weight), without which it writes nothing: prompts are "
            "rewritten by a whole text encoder, as the published one is"
        )
    outer = "model." if "model.vision_tower.patch_conv.weight" in files.names else ""
    found = {}
    for name in taken(model):
        if name.startswith(own):
            found[name] = inside + name.removeprefix(own)
        elif name == "lm_head.weight":
            found[name] = heads[0]
        else:  # vision tower and projector
            found[name] = outer + name.removeprefix("model.")
    return found
