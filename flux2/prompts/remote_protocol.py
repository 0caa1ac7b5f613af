"""Answers of a text encoder's server: limited in size, then checked before use.

An answer is not trusted. Its size is limited while it is read; it must hold one finite tensor of the requested shape;
and a pickle is read with `weights_only`, which calls nothing that the pickle names.
"""

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

IDENTITY_HEADER = "Flux2-Identity"  # what an embedding depends on besides its prompt
CUT_HEADER = "Flux2-Cut"  # indices of truncated prompts, for example 0,3
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class RemoteError(ValueError):
    """A remote text encoder gave no answer, or an invalid one."""


class Unreachable(RemoteError):  # noqa: N818
    """The server gave no answer after all attempts."""


class RetryLater(Exception):  # noqa: N818
    """This attempt failed; another may succeed. `after`: seconds that the server asked to wait."""

    def __init__(self, reason: str, after: float = 0.0) -> None:
        super().__init__(reason)
        self.after = after


def read_safetensors(body: bytes) -> Tensor:
    """Return the tensor `embeddings` of a safetensors file. Raises ValueError for anything else."""
    try:
        tensors = safetensors.torch.load(body)
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"it is not a safetensors file ({error})") from error
    if set(tensors) != {"embeddings"}:
        raise ValueError(f"it holds {', '.join(sorted(tensors))[:80] or 'nothing'} instead of embeddings")
    return tensors["embeddings"]


def read_serialized(body: bytes) -> Tensor:
    """Return the tensor that `torch.save` wrote. Raises ValueError for anything else, calling nothing a pickle names.

    An archive that would unpack to more bytes is not opened: a compressed one can grow a thousandfold.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(body)) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, OSError) as error:
        raise ValueError("it is not a tensor as torch.save writes it") from error
    if sum(member.file_size for member in members) > len(body):
        raise ValueError("it unpacks to more bytes than it has, which a file of torch.save never does")
    try:
        loaded = torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)
    except Exception as error:  # untrusted bytes make a parser fail with any exception
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it names {named[1]}, which is not a tensor" if named else "it cannot be read as a tensor"
        raise ValueError(f"{what}. Nothing in it was executed") from error
    if type(loaded) is not Tensor:
        raise ValueError(f"it holds {type(loaded).__name__}, not a tensor")
    return loaded


def check_embeddings(tensor: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Return `tensor`, contiguous. Raises ValueError unless it has `shape`, a float dtype and finite values."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        raise ValueError(f"its tensor is {tensor.layout} on {tensor.device}, not dense on the CPU")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"its shape is {tuple(tensor.shape)} instead of {shape}")
    if tensor.dtype not in DTYPES:
        raise ValueError(f"its dtype is {tensor.dtype} instead of one of {', '.join(map(str, DTYPES))}")
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError("it has NaN or infinite values")
    return tensor.detach().contiguous()


def retry_after(value: str | None) -> float:
    """Return the seconds that the header `Retry-After` asks for, as a number or date; 0 if absent or unreadable."""
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


def read_body(response: requests.Response, limit: int, whole: bool = True) -> bytes:
    """Return up to `limit` bytes. A longer body is an error, or truncated if not `whole`.

    Raises RemoteError for a body that is too long or compressed, RetryLater for an answer that breaks off. One that
    breaks off in its headers is taken by the HTTP library as one with fewer headers, and has no length.
    """
    where = urlsplit(response.url).netloc
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise RemoteError(f"the answer of {where} is refused: it is compressed, which was not requested")
    length = response.headers.get("Content-Length", "")
    expected = int(length) if re.fullmatch(r"\d{1,15}", length) else None
    body = bytearray()
    while chunk := response.raw.read1(1 << 20):
        body += chunk
        if len(body) > limit:
            break
    if len(body) > limit or (expected or 0) > limit:
        if whole:
            raise RemoteError(f"the answer of {where} is refused: it has more than {limit} bytes")
        return bytes(body[:limit])
    if whole and expected is None and "chunked" not in response.headers.get("Transfer-Encoding", "").lower():
        raise RetryLater("the answer has no length, as if it broke off in its headers")
    if expected is not None and len(body) != expected:
        raise RetryLater(f"the answer broke off after {len(body)} of {expected} bytes")
    return bytes(body)


def error_text(body: bytes) -> str:
    """Return the reason in an answer that is an error: from its JSON, or its text."""
    text = body.decode(errors="replace")
    try:
        answer = json.loads(text)
    except (ValueError, RecursionError):
        return text
    if isinstance(answer, dict):
        answer = next((answer[key] for key in ("error", "detail", "message") if key in answer), answer)
    return answer if isinstance(answer, str) else json.dumps(answer)
