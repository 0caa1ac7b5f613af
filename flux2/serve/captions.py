"""The route POST /caption of the service: an answer of the language model about an image.

    POST /caption   {"image": "<base64 of a PNG>", "system": "...", "request": "...", "seed": 0, "new_tokens": 256}
                    -> {"caption": "..."}, or {"caption": null, "error": reason} if the model has no answer

The image is one of at most 768 x 768 pixels, as a client makes it (flux2/prompts/captioning.py); a larger one is
refused by its header, before it is decoded.
"""

import base64
import binascii
import logging
from collections.abc import Callable
from io import BytesIO
from typing import Any

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from flux2.prompts.captioning import MOST_TOKENS, CaptionModel
from flux2.prompts.upsampling import MOST_PIXELS

log = logging.getLogger(__name__)


class CaptionRequest(BaseModel):
    """The body of POST /caption."""

    model_config = ConfigDict(extra="forbid", strict=True)
    image: str
    system: str
    request: str
    seed: int = Field(ge=0, lt=2**63)
    new_tokens: int = Field(ge=1, le=MOST_TOKENS)


def decode_png(text: str) -> Image.Image:
    """Return the image (RGB) of a PNG in base64. Raises ValueError for anything else, and for too many pixels."""
    try:
        image = Image.open(BytesIO(base64.b64decode(text, validate=True)), formats=("PNG",))
        if image.width * image.height > MOST_PIXELS:
            size = f"{image.width} x {image.height}"
            raise ValueError(f"image: {size} pixels are more than {MOST_PIXELS}")
        return image.convert("RGB")
    except (binascii.Error, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"image: it is not a PNG in base64 ({type(error).__name__})") from error


def caption_work(model: CaptionModel, question: CaptionRequest) -> Callable[[], dict[str, Any]]:
    """Return the function that makes the answer to a request. Raises ValueError for an image that is refused."""
    image = decode_png(question.image)

    def work() -> dict[str, Any]:
        asked: dict[str, Any] = {"seed": question.seed, "new_tokens": question.new_tokens, "name": "an image"}
        try:
            return {"caption": model.describe([image], question.system, question.request, **asked)}
        except ValueError as error:  # an empty answer, or too many tokens
            return {"caption": None, "error": str(error)}
        except Exception:
            log.exception("an image could not be captioned")
            raise

    return work
