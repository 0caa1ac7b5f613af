"""What a text encoder's server answered: bounded, then checked, before anything believes it.

An answer is foreign. Its size is bounded while it is read; it must hold one finite tensor of the shape that was asked
for; and a pickle is read by `weights_only`, which calls nothing of what it names.
"""

from __future__ import annotations

import io
import json
import math
import re
import time
import zipfile
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

import requests
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

IDENTITY_HEADER = "Flux2-Identity"  # what an embedding depends on beside its prompt
CUT_HEADER = "Flux2-Cut"  # indices of the prompts of which a part was left out, as in 0,3
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class RemoteError(ValueError):
    """A remote text encoder gave no answer, or none that can be used."""


class Unreachable(RemoteError):  # noqa: N818
    """After all attempts there was no answer."""


class RetryLater(Exception):  # noqa: N818
    """This attempt failed; another may not. `after`: seconds that the server asked to wait."""

    def __init__(self, reason: str, after: float = 0.0) -> None:
        super().__init__(reason)
        self.after = after


def read_safetensors(body: bytes) -> Tensor:
    """The tensor `embeddings` of a safetensors file. Raises ValueError for anything else."""
    try:
        tensors = safetensors.torch.load(body)
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"it is no safetensors file ({error})") from error
    if set(tensors) != {"embeddings"}:
        raise ValueError(f"it holds {', '.join(sorted(tensors))[:80] or 'nothing'} instead of embeddings")
    return tensors["embeddings"]


def read_serialized(body: bytes) -> Tensor:
    """The tensor that `torch.save` wrote. Raises ValueError for anything else; nothing that a pickle names is called.

    An archive is not opened if it would become larger, as a compressed one can by a thousand times.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(body)) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, OSError) as error:
        raise ValueError("it is no tensor as torch.save writes it") from error
    if sum(member.file_size for member in members) > len(body):
        raise ValueError("it unpacks to more than it is, which a file of torch.save never does")
    try:
        found = torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)
    except Exception as error:  # foreign bytes fail in any way that a parser can
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it wants {named[1]}, which is no tensor" if named else "it cannot be read as a tensor"
        raise ValueError(f"{what}. Nothing of it was run") from error
    if type(found) is not Tensor:
        raise ValueError(f"it holds {type(found).__name__}, not a tensor")
    return found


def check_embeddings(tensor: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """`tensor` in memory of its own. Raises ValueError unless it has `shape`, a float dtype and finite values."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        raise ValueError(f"its tensor is {tensor.layout} on {tensor.device}, not plain numbers")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"its shape is {tuple(tensor.shape)} instead of {shape}")
    if tensor.dtype not in DTYPES:
        raise ValueError(f"its dtype is {tensor.dtype} instead of one of {', '.join(map(str, DTYPES))}")
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError("it has NaN or infinite values")
    return tensor.detach().contiguous()


def retry_after(value: str | None) -> float:
    """Seconds that the header `Retry-After` asks for: a number, or a date. 0 if there is none that can be read."""
    if not value:
        return 0.0
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return 0.0
    return max(0.0, seconds) if math.isfinite(seconds) else 0.0


def read_body(response: requests.Response, limit: int, deadline: float, whole: bool = True) -> bytes:
    """Up to `limit` bytes. A longer body is an error, or if not `whole` is wanted, is cut.

    Raises RemoteError for a body that is too long or encoded, Again for one that breaks off or is too slow.
    """
    where = urlsplit(response.url).netloc
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise RemoteError(f"the answer of {where} is refused: it is compressed, which was not asked for")
    length = response.headers.get("Content-Length", "")
    expected = int(length) if re.fullmatch(r"\d{1,15}", length) else None
    body = bytearray()
    while chunk := response.raw.read1(1 << 20):
        body += chunk
        if len(body) > limit:
            break
        if time.monotonic() > deadline:
            raise RetryLater("the answer came too slowly")
    if len(body) > limit or (expected or 0) > limit:
        if whole:
            raise RemoteError(f"the answer of {where} is refused: it has more than the {limit} bytes that it may have")
        return bytes(body[:limit])
    if expected is not None and len(body) != expected:
        raise RetryLater(f"the answer broke off after {len(body)} of {expected} bytes")
    return bytes(body)


def error_text(body: bytes) -> str:
    """The reason in an answer that is an error: in its JSON, else its text."""
    text = body.decode(errors="replace")
    try:
        told = json.loads(text)
    except (ValueError, RecursionError):
        return text
    if isinstance(told, dict):
        told = next((told[key] for key in ("error", "detail", "message") if key in told), told)
    return told if isinstance(told, str) else json.dumps(told)
