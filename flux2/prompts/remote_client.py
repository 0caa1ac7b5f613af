"""Prompts to embeddings over HTTP: the client of a text encoder that runs elsewhere.

Two protocols. `flux2` is that of `python -m flux2.serve`: several prompts a request, the answer a safetensors file, and
the server tells what its embeddings depend on. `published` is that of the endpoint that Hugging Face offers for dev:
`{"prompt": "..."}`, the answer a tensor as `torch.save` writes it.

A request that may succeed later is tried again, a bounded number of times, after growing and jittered waits. What comes
back is checked by flux2/prompts/remote_protocol.py.

The bearer token is what the environment variable FLUX2_TEXT_ENCODER_TOKEN holds; without it, addresses of Hugging Face
get the token of the hub login, and no other address does. It is kept in the request's header alone: not in the
configuration, and cut out of every text that a server sends back.
"""

from __future__ import annotations

import ipaddress
import json
import logging
import math
import os
import random
import re
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args
from urllib.parse import urlsplit

import huggingface_hub
import requests
import torch
import urllib3
from requests.auth import AuthBase
from torch import Tensor

from flux2.models.variants import Variant
from flux2.prompts.remote_protocol import (
    CUT_HEADER,
    IDENTITY_HEADER,
    RemoteError,
    RetryLater,
    Unreachable,
    check_embeddings,
    error_text,
    read_body,
    read_safetensors,
    read_serialized,
    retry_after,
)
from flux2.utils import checks

PUBLISHED = "https://remote-text-encoder-flux-2.huggingface.co/predict"
TOKEN = "FLUX2_TEXT_ENCODER_TOKEN"
HUB_HOSTS = ("huggingface.co", "hf.space", "endpoints.huggingface.cloud")

ProtocolName = Literal["flux2", "published"]
PROTOCOLS: tuple[ProtocolName, ...] = get_args(ProtocolName)
RETRY_STATUSES = (408, 425, 429, 500, 502, 503, 504)  # HTTP answers that may be others later
CONNECT_SECONDS = 10.0
LONGEST_WAIT = 30.0  # seconds between two attempts, if the server does not ask for more
LONGEST_ASKED = 600.0  # seconds that a server may ask to wait
FIRST_CONTACT = 3  # attempts: a wrong address should say so soon
OVERHEAD = 1 << 20  # bytes of an answer beside its tensor
TEXT = 64 << 10  # bytes that are read of an answer in words

log = logging.getLogger(__name__)


# ------------------------------------------------------------------ addresses and tokens


def is_loopback(host: str) -> bool:
    """Whether only this machine can be meant by `host`."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def check_url(url: object) -> str:
    """`url` without its last slash. Raises ValueError unless it is a plain http(s) address without secrets in it."""
    if not isinstance(url, str):
        raise ValueError(f"url={url!r} must be a text such as http://127.0.0.1:8700")
    try:
        parts = urlsplit(url)
        whole = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:  # brackets or a port that is none
        whole = False
    if whole and ("@" in parts.netloc or parts.query or parts.fragment):
        raise ValueError(
            f"url={parts.scheme}://{parts.hostname}/... must hold no user, password, `?` or `#`: addresses are written "
            f"to configurations and logs. A token belongs into the environment variable {TOKEN}"
        )
    if not whole or re.search(r"\s", url):
        raise ValueError(f"url={url!r} is not an address: give one such as http://127.0.0.1:8700")
    return url.rstrip("/")


def bearer_token(url: str) -> str | None:
    """The token for `url`, or None. Raises ValueError, not showing it, for one that no header can hold."""
    parts = urlsplit(url)
    token = os.environ.get(TOKEN, "").strip()
    host = parts.hostname or ""
    if not token and parts.scheme == "https" and any(host == hub or host.endswith(f".{hub}") for hub in HUB_HOSTS):
        return huggingface_hub.get_token()
    if token and not re.fullmatch(r"[!-~]+", token):
        raise ValueError(f"the environment variable {TOKEN} holds a space or a sign that is not ASCII: give another")
    return token or None


class _Bearer(AuthBase):
    """Sets the header. Given even without a token, or requests would look for one in ~/.netrc."""

    def __init__(self, token: str | None) -> None:
        self.token = token

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self.token:
            request.headers["Authorization"] = f"Bearer {self.token}"
        return request


# ------------------------------------------------------------------ the client


class Client:
    """Asks one server for the embeddings of one model's prompts. May be called by several threads at once.

    Args:
        url: of the server, or of the published endpoint.
        variant: the model that the embeddings are for; they have its shape, or are refused.
        length: tokens that prompts are padded to; the variant's own by default.
        protocol: by default `published` for the published endpoint and `flux2` for any other address.
        timeout: seconds until an answer must be there.
        attempts: that are made in all for one request.
        wait: seconds before the second attempt; doubled for each one after it.

    Attributes:
        cut: prompts of which the server left out a part, being longer than `length`. The published endpoint tells none.
    """

    def __init__(
        self,
        url: str,
        variant: Variant,
        length: int | None = None,
        *,
        protocol: ProtocolName | None = None,
        timeout: float = 120.0,
        attempts: int = 8,
        wait: float = 1.0,
    ) -> None:
        self.url = check_url(url)
        self.variant = variant
        self.length = length or variant.text.length
        self.protocol = pick_protocol(self.url, protocol)
        self.timeout, self.attempts, self.wait = check_patience(timeout, attempts, wait)
        self.cut: list[str] = []
        self._token = bearer_token(self.url)
        self._identity: str | None = None
        self._random = random.Random()  # not the global one: how often a server fails must not change a run
        self._closed = threading.Event()
        self._local = threading.local()
        self._host = urlsplit(self.url).hostname or ""
        if self.protocol == "published" and self.length != variant.text.length:
            raise ValueError(f"length={length}: the published protocol always pads to {variant.text.length} tokens")
        if self._token and self.url.startswith("http://") and not is_loopback(self._host):
            log.warning("the token of %s travels unencrypted to %s: use https or a tunnel", TOKEN, self._host)

    def identity(self) -> str:
        """What the embeddings depend on beside their prompts.

        Of our server the very text that an encoder of the same files and settings has on this machine; so both share
        cache entries. The published endpoint tells nothing: its address and the model stand for it.

        Raises Unreachable if the server gives no answer, RemoteError if it serves another text encoder.
        """
        if self._identity is None:
            known = f"published {self.url} {self.variant.name} {self.length}"
            self._identity = known if self.protocol == "published" else self._fetch_identity()
        return self._identity

    def _fetch_identity(self) -> str:
        path = f"/identity?length={self.length}"
        body, _ = self._request("GET", path, None, TEXT, min(self.attempts, FIRST_CONTACT))
        try:
            told = json.loads(body)
            found = (told["kind"], tuple(told["layers"]), told["width"])
            model, identity = str(told["model"]), told["identity"]
            if not isinstance(identity, str) or not re.fullmatch(r"[ -~]{1,300}", identity):
                raise ValueError("identity")
            if self._token and self._token in identity:  # it is kept beside the cache
                raise ValueError("identity")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise RemoteError(f"{self.url} is no `python -m flux2.serve`: {path} answered something else") from error
        text = self.variant.text
        if found != (text.kind, text.layers, self.variant.transformer.text_width):
            raise RemoteError(
                f"{self.url} serves the text encoder of {self._redact(model)}, which is not that of {self.variant.name}:"
                f" start it with --model {self.variant.name}"
            )
        return identity

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """(B, length, text_width) embeddings on the CPU, in the dtype that the server computes in.

        Raises Unreachable after all attempts, RemoteError for a refusal, or an answer that is not what was asked for.
        """
        if self.protocol == "published":
            return torch.cat([self._encode([prompt]) for prompt in prompts])
        return self._encode(list(prompts))

    def _encode(self, prompts: list[str]) -> Tensor:
        identity = self.identity()
        shape = (len(prompts), self.length, self.variant.transformer.text_width)
        published = self.protocol == "published"
        question = {"prompt": prompts[0]} if published else {"prompts": prompts, "length": self.length}
        limit = 4 * math.prod(shape) + OVERHEAD
        body, headers = self._request("POST", "" if published else "/encode", question, limit, self.attempts)
        if not published and headers.get(IDENTITY_HEADER) != identity:
            raise RemoteError(
                f"{self.url} serves another text encoder than when this began; start again to use that one"
            )
        try:
            tensor = check_embeddings(read_serialized(body) if published else read_safetensors(body), shape)
        except ValueError as error:
            raise RemoteError(f"the answer of {self.url} is refused: {self._redact(str(error))}") from error
        indices = [int(index) for index in re.findall(r"\d{1,6}", headers.get(CUT_HEADER) or "")]
        self.cut += [prompts[index] for index in indices if index < len(prompts)]
        return tensor

    def close(self) -> None:
        """End what waits for its next attempt; no request is sent after this."""
        self._closed.set()

    # -------------------------------------------------------------- requests

    def _session(self) -> requests.Session:
        if not hasattr(self._local, "session"):
            self._local.session = requests.Session()  # one a thread: they are not made to be shared
            self._local.session.trust_env = not is_loopback(self._host)  # no proxy for this machine
            self._local.session.auth = _Bearer(self._token)
        session: requests.Session = self._local.session
        return session

    def _request(
        self, method: str, path: str, question: Any, limit: int, attempts: int
    ) -> tuple[bytes, Mapping[str, str]]:
        """Body and headers of a good answer, after up to `attempts` attempts."""
        data = None if question is None else json.dumps(question).encode()
        for attempt in range(1, attempts + 1):
            if self._closed.is_set():
                raise RemoteError(f"{self.url} was not asked any more")
            try:
                return self._send(method, path, data, limit)
            except RetryLater as again:
                reason = self._redact(str(again))
                if again.after > LONGEST_ASKED:
                    raise RemoteError(
                        f"{self.url} asks to wait {again.after:.0f} s ({reason}): start again later"
                    ) from None
                if attempt < attempts:
                    seconds = self._wait_seconds(attempt, again.after)
                    log.warning("%s: %s; attempt %d of %d in %.1f s", self.url, reason, attempt + 1, attempts, seconds)
                    self._closed.wait(seconds)
        raise Unreachable(
            f"{self.url} gave no answer in {attempts} attempts, the last one: {reason}. Is the server running there? "
            "What was answered is kept: start again, and only the rest is asked for"
        )

    def _wait_seconds(self, failed: int, after: float) -> float:
        """Seconds to wait after `failed` attempts: doubling, with jitter so that clients do not come back together."""
        longest = min(self.wait * 2 ** (failed - 1), LONGEST_WAIT)
        return after + longest * self._random.uniform(0.5, 1.0)

    def _send(self, method: str, path: str, data: bytes | None, limit: int) -> tuple[bytes, Mapping[str, str]]:
        deadline = time.monotonic() + self.timeout
        headers = {"Accept-Encoding": "identity", "Content-Type": "application/json"}
        try:
            with self._session().request(
                method,
                self.url + path,
                data=data,
                headers=headers,
                timeout=(min(CONNECT_SECONDS, self.timeout), self.timeout),
                allow_redirects=False,  # the token is for this server
                stream=True,
            ) as response:
                if response.status_code == 200:
                    return read_body(response, limit, deadline), response.headers
                self._raise_for_status(response, read_body(response, TEXT, deadline, whole=False))
        except (requests.Timeout, urllib3.exceptions.TimeoutError):
            raise RetryLater(f"no answer within {self.timeout:g} s") from None
        except requests.exceptions.SSLError:
            raise RemoteError(f"{self.url}: its certificate is not accepted by this machine") from None
        except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
            raise RetryLater(f"the connection failed ({root_cause(error)})") from None
        raise AssertionError("an answer is good or an error")

    def _raise_for_status(self, response: requests.Response, body: bytes) -> None:
        """Raises what an answer other than 200 means."""
        status = response.status_code
        text = error_text(body)
        what = f"HTTP {status}" + (f", {text}" if text else "")
        if status in RETRY_STATUSES:
            raise RetryLater(what, retry_after(response.headers.get("Retry-After")))
        if status in (401, 403):
            hint = f"set the environment variable {TOKEN}" + (
                ", or run `hf auth login`" if self.protocol == "published" else " to the token that the server has"
            )
            given = "the token was refused" if self._token else "it asks for a token"
            raise RemoteError(f"{self.url}: {given} ({self._redact(what)}): {hint}")
        if 300 <= status < 400:
            raise RemoteError(f"{self.url} redirects to another address ({status}): give that one")
        raise RemoteError(f"{self.url} refused the request: {self._redact(what)}")

    def _redact(self, text: str) -> str:
        """`text` on one line, without the token."""
        text = text.replace(self._token, "***") if self._token else text
        return " ".join(re.sub(r"[^ -~]", " ", text).split())[:300]


def root_cause(error: BaseException) -> str:
    """What the system said behind an error of the HTTP library, in a few words."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, OSError) and found.strerror:
            return found.strerror
        inner = next((part for part in found.args if isinstance(part, BaseException)), None)
        found = getattr(found, "reason", None) or inner or found.__cause__ or found.__context__
        found = found if isinstance(found, BaseException) else None
    return type(error).__name__


def pick_protocol(url: str, protocol: object) -> ProtocolName:
    """`protocol`, or by default the one of the address. Raises ValueError for one that there is not."""
    if protocol is not None and protocol not in PROTOCOLS:
        raise ValueError(f"protocol={protocol!r} must be one of {', '.join(PROTOCOLS)}, or null")
    default: ProtocolName = "published" if url == PUBLISHED else "flux2"
    return next((choice for choice in PROTOCOLS if choice == protocol), default)


def check_patience(timeout: object, attempts: object, wait: object) -> tuple[float, int, float]:
    """The three as numbers. Raises ValueError that names what is out of range."""
    try:
        seconds, first = checks.number("timeout", timeout), checks.number("wait", wait)
        count = checks.whole("attempts", attempts, 1, 100)
    except TypeError as error:
        raise ValueError(str(error)) from error
    if not 0 < seconds <= 24 * 3600:
        raise ValueError(f"timeout={seconds:g} must be a number of seconds above 0, at most a day")
    if not 0 <= first <= LONGEST_WAIT:
        raise ValueError(f"wait={first:g} must be a number of seconds from 0 to {LONGEST_WAIT:g}")
    return seconds, count, first
