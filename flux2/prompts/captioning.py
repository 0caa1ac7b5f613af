"""Write captions of images with a language model that sees: dev's text encoder, or a local one of transformers.

A caption teaches what a prompt must say to get the image, so it leaves out what the adapter is to add by itself: the
style of a style, the looks of a subject. `TEMPLATES` says that to the model; the wordings are our own. A caption of an
edit is the instruction that leads from the references to the image, which the model sees at their right.

As prompts are rewritten (upsampling.py): images next to each other in one image of at most 768 x 768 pixels,
temperature 0.15, and a seeded conversation for each, so that a caption depends only on its images and settings.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from PIL import Image

from flux2.models.text_encoder import TextStorage, bounded_template, without_directives
from flux2.models.variants import VARIANTS
from flux2.prompts.embeddings import TextSource
from flux2.prompts.remote_client import PUBLISHED, Client
from flux2.prompts.remote_protocol import RemoteError
from flux2.prompts.upsampling import TEMPERATURE, load_upsampler, sampled_answer, side_by_side
from flux2.utils.files import user_path
from flux2.utils.json_files import read_json
from flux2.weights.sources import ModelSource, WeightsError, model_source

DEV = "dev"  # the name that stands for the published repository of FLUX.2-dev
NEEDED = "Give dev, a folder with text_encoder/ and tokenizer/ of FLUX.2-dev, or an image-text-to-text model"

IMAGE = {"type": "image"}  # in a turn of a conversation
MOST_TOKENS = 2048  # of an answer
REMOTE_SECONDS = 600.0  # until the answer of a server must be complete
# of a model of transformers; a key in them may name code
CONFIGURATIONS = ("config.json", "processor_config.json", "preprocessor_config.json", "tokenizer_config.json")


class Template(NamedTuple):
    """What a captioning model is asked for: the system message, and the request in the user's turn."""

    system: str
    request: str


ANSWER = (
    "Answer in one or two plain sentences, with the caption and nothing else: no heading, no quotes, no 'image of'."
)
TEMPLATES = {
    "style": Template(
        "You write captions of pictures from which an image model learns their common style. Say what can be seen: the "
        "subjects and how many they are, what they do and wear, where things are, the setting, the view. Leave out all "
        "that belongs to the style: the medium and the technique, lines, brush strokes, palette, shading, texture, "
        f"mood, period and artist. {ANSWER}",
        "Write the caption.",
    ),
    "subject": Template(
        "You write captions of pictures from which an image model learns one person, animal or thing that all of them "
        "show. Call this main subject by its kind alone, such as a woman, a dog or a bottle, and leave out what stays "
        "the same from picture to picture: face, hair, build, shape, markings, its own colors and materials. Say what "
        "may differ: what it does and wears, its pose and expression, the view and the framing, other things, the "
        f"background, the light, the medium. {ANSWER}",
        "Write the caption.",
    ),
    "edit": Template(
        "You write instructions from which an image model learns to edit pictures. You see one image: on its left what "
        "is edited, and as the last picture on its right the result. Write the instruction that leads to the result. "
        "Name every change in things that can be seen, and nothing that stays as it is. Do not mention left, right, or "
        "that there are several pictures. Answer with one or two imperative sentences and nothing else.",
        "Write the instruction.",
    ),
}


class CaptionModel(Protocol):
    """A language model that sees."""

    def describe(
        self, images: Sequence[Image.Image], system: str, request: str, *, seed: int, new_tokens: int, name: str
    ) -> str:
        """Return the answer to `request` about the images. `name` is that of the last image, for messages."""


def conversation_text(processor: Any, turn: Sequence[dict[str, str]]) -> str:
    """Return the text of a conversation of one turn of the user, at which the model answers."""
    with bounded_template():
        text: str = processor.apply_chat_template([{"role": "user", "content": turn}], add_generation_prompt=True)
    return text


class TransformersModel:
    """An image-text-to-text model of transformers with its processor. `model` is frozen, in evaluation mode."""

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model.requires_grad_(False).eval(), processor

    def describe(
        self, images: Sequence[Image.Image], system: str, request: str, *, seed: int, new_tokens: int, name: str
    ) -> str:
        """Return the answer, as `CaptionModel` does. The system message is in the user's turn: not all models have one.

        Raises ValueError for a model whose chat template takes no image, and for an empty answer.
        """
        turn = [IMAGE, {"type": "text", "text": f"{system}\n\n{request}"}]
        text = conversation_text(self.processor, turn)
        tokenizer = self.processor.tokenizer
        begins = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
        tokens = {"add_special_tokens": False} if begins else {}
        found = self.processor(text=[text], images=[side_by_side(images)], return_tensors="pt", **tokens)
        dtype = next(self.model.parameters()).dtype
        inputs = {key: value.to(dtype) if value.is_floating_point() else value for key, value in found.items()}
        config = self.model.generation_config
        ends = tokenizer.eos_token_id if config.eos_token_id is None else config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        pad = ends[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        sampling: dict[str, Any] = {"seed": seed, "temperature": TEMPERATURE, "new_tokens": new_tokens}
        return sampled_answer(self.model, tokenizer, inputs, ends=ends, pad=pad, name=name, **sampling)


class RemoteCaptionModel:
    """The language model of `python -m flux2.serve --model dev --captions` at `url`.

    Raises ValueError for an address that is none. `describe` raises `RemoteError` if the server does not answer, and
    another ValueError if the model has no answer for these images.
    """

    def __init__(self, url: str) -> None:
        if url.rstrip("/") == PUBLISHED:
            raise ValueError(f"{url} gives only embeddings. Give the address of a `python -m flux2.serve --captions`")
        self._client = Client(url, VARIANTS[DEV], protocol="flux2", timeout=REMOTE_SECONDS)

    def describe(
        self, images: Sequence[Image.Image], system: str, request: str, *, seed: int, new_tokens: int, name: str
    ) -> str:
        content = BytesIO()
        side_by_side(images).save(content, "PNG")
        image = base64.b64encode(content.getvalue()).decode()
        asked = {"image": image, "system": system, "request": request, "seed": seed, "new_tokens": new_tokens}
        answer = self._client.ask("/caption", asked)
        caption = answer.get("caption") if isinstance(answer, dict) else None
        if caption is None and isinstance(answer, dict) and isinstance(answer.get("error"), str):
            raise ValueError(f"{name}: {answer['error']}")
        if not isinstance(caption, str) or not caption.strip():
            raise RemoteError(f"the answer of {self._client.url} is refused: it is no caption")
        return caption


def is_address(where: str) -> bool:
    """Return whether a model is at the address of a server."""
    return where.startswith(("http://", "https://"))


def caption_source(where: str) -> ModelSource | Path:
    """Return the files of a captioning model: dev's text encoder, or the folder of a model of transformers.

    Raises WeightsError if `where` is neither `dev` nor a folder of one of the two.
    """
    if where == DEV:
        return model_source(DEV)
    folder = user_path(where)
    if (folder / "text_encoder").is_dir():
        return ModelSource(VARIANTS[DEV], str(folder))
    if not (folder / "config.json").is_file():
        problem = "holds neither text_encoder/ nor config.json" if folder.is_dir() else "is not a folder"
        raise WeightsError(f"{where!r} {problem}. {NEEDED}")
    return folder


def load_caption_model(
    source: ModelSource | Path, device: torch.device, dtype: torch.dtype, storage: TextStorage | None = None
) -> CaptionModel:
    """Return the model on `device` in `dtype`, the linears of dev's language layers in `storage`.

    Raises WeightsError for files of a model that does not see images, or that needs code of its own.
    """
    if isinstance(source, ModelSource):
        config = source.folder("text_encoder") / "config.json"
        if config.is_file() and "vision_config" not in read_json(config):
            raise WeightsError(f"{config.parent} is a language model that does not see images. {NEEDED}")
        return load_upsampler(source, device, dtype, TextSource(storage=storage), pictures=True)
    if storage is not None:
        raise WeightsError(f"storage={storage!r} is for the text encoder of dev. Omit it, or give a smaller model")
    return load_transformers_model(source, device, dtype)


def load_transformers_model(folder: Path, device: torch.device, dtype: torch.dtype) -> TransformersModel:
    """Return the image-text-to-text model in `folder`, from safetensors files and without code of its own.

    Raises WeightsError if transformers has no such model, and for files that are incomplete or quantized.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    for file in filter(Path.is_file, (folder / name for name in CONFIGURATIONS)):
        described = read_json(file)
        if not isinstance(described, dict) or "auto_map" in described or "quantization_config" in described:
            problem = "names code of its own or is quantized, neither of which is loaded here"
            raise WeightsError(f"{file} {problem}. Give a model that transformers has itself, as published")
    given = without_directives(read_json(folder / "config.json"))
    if "model_type" not in given:
        raise WeightsError(f"{folder}: its config.json names no model_type. {NEEDED}")
    local: dict[str, Any] = {"local_files_only": True}
    try:
        processor = AutoProcessor.from_pretrained(folder, **local)
        files: dict[str, Any] = {"config": AutoConfig.for_model(**given), "dtype": dtype, "use_safetensors": True}
        model, found = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True, **files, **local)
    except (ValueError, OSError, ImportError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise WeightsError(f"{folder} cannot be loaded as an image-text-to-text model ({reason:.500})") from error
    if missing := sorted({*found["missing_keys"], *map(str, found["mismatched_keys"])}):
        raise WeightsError(f"{folder}: its files lack {missing[0]} and {len(missing) - 1} more. Download them again")
    if not getattr(processor, "chat_template", None):
        raise WeightsError(f"{folder} has no chat template, with which instructions are written. Give another model")
    if conversation_text(processor, [IMAGE, {"type": "text", "text": "x"}]) == conversation_text(
        processor, [{"type": "text", "text": "x"}]
    ):
        raise WeightsError(f"{folder} does not see images: its chat template has no place for one. {NEEDED}")
    return TransformersModel(model.to(device), processor)
