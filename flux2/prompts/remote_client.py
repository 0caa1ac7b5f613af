"""Client of a text encoder on another machine: prompts to embeddings over HTTP.

There are two protocols. `flux2` is that of `python -m flux2.serve`: several prompts per request, answered by a
safetensors file, and the server reports what its embeddings depend on. `published` is that of the endpoint that Hugging
Face offers for dev: `{"prompt": "..."}`, answered by a tensor as `torch.save` writes it.

A request that may succeed later is repeated, a bounded number of times, after growing and jittered waits. Answers are
checked by flux2/prompts/remote_protocol.py. The loop is written here because urllib3.Retry cannot do it: it retries no
body that breaks off or is late, its waits cannot be interrupted, and its jitter uses the global random state.

The bearer token is the value of the environment variable FLUX2_TEXT_ENCODER_TOKEN; without it, addresses of Hugging
Face receive the token of the hub login, and no other address does. It is stored only in the request's header: not in
the configuration, and it is removed from every text that a server sends back.
"""

import ipaddress
import json
import logging
import math
import os
import random
import re
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args
from urllib.parse import urlsplit

import huggingface_hub
import requests
import torch
import urllib3
from torch import Tensor

from flux2.models.variants import Variant
from flux2.prompts.deadline import TimedSession, within
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
from flux2.utils.json_files import parse_json

PUBLISHED = "https://remote-text-encoder-flux-2.huggingface.co/predict"
TOKEN = "FLUX2_TEXT_ENCODER_TOKEN"
HUB_HOSTS = ("huggingface.co", "hf.space", "endpoints.huggingface.cloud")

ProtocolName = Literal["flux2", "published"]
PROTOCOLS = get_args(ProtocolName)
RETRY_STATUSES = (408, 425, 429, 500, 502, 503, 504)
CONNECT_SECONDS = 10.0
LONGEST_WAIT = 30.0  # seconds between two attempts, if the server does not ask for more
LONGEST_ASKED = 600.0  # longest wait in seconds that a server may ask for
FIRST_CONTACT = 3  # attempts of the first request, so that a wrong address is reported soon
OVERHEAD = 1 << 20  # bytes of an answer in addition to its tensor
TEXT = 64 << 10  # bytes that are read of a textual answer

log = logging.getLogger(__name__)


def is_loopback(host: str) -> bool:
    """Return whether `host` can only be this machine."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def check_url(url: object) -> str:
    """Return `url` without its last slash. Raises ValueError unless it is a plain http(s) address without secrets."""
    if not isinstance(url, str):
        raise ValueError(f"url={url!r} must be a string such as http://127.0.0.1:8700")
    try:
        parts = urlsplit(url)
        is_valid = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:  # invalid brackets or port
        is_valid = False
    if is_valid and ("@" in parts.netloc or parts.query or parts.fragment):
        raise ValueError(
            f"url={parts.scheme}://{parts.hostname}/... must have no user, password, `?` or `#`, because addresses are "
            f"written to configurations and logs. Put a token into the environment variable {TOKEN}"
        )
    if not is_valid or re.search(r"\s", url):
        raise ValueError(f"url={url!r} is not an address such as http://127.0.0.1:8700")
    return url.rstrip("/")


def bearer_token(url: str) -> str | None:
    """Return the token for `url`, or None. Raises ValueError, without showing it, if no header can hold the token."""
    parts = urlsplit(url)
    token = os.environ.get(TOKEN, "").strip()
    host = parts.hostname or ""
    if not token and parts.scheme == "https" and any(host == hub or host.endswith(f".{hub}") for hub in HUB_HOSTS):
        return huggingface_hub.get_token()
    if token and not re.fullmatch(r"[!-~]+", token):
        raise ValueError(f"the environment variable {TOKEN} must hold ASCII characters without spaces")
    return token or None


class Client:
    """Requests embeddings of one model's prompts from one server. Several threads may use it at once.

    Args:
        variant: The model that the embeddings are for; embeddings of another shape are refused.
        length: Tokens that prompts are padded to; by default the variant's.
        protocol: By default `published` for the published endpoint and `flux2` for any other address.
        timeout: Seconds until an answer must be complete.
        attempts: Number of attempts per request.
        wait: Seconds before the second attempt; doubled for each further attempt.
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
        self.cut: list[str] = []  # prompts that the server truncated; the published endpoint does not report them
        self._token = bearer_token(self.url)
        self._identity: str | None = None
        self._random = random.Random()  # not the global one: failures of a server must not change a run
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._warned = 0  # the last attempt that a warning has named since the server answered
        self._local = threading.local()
        self._host = urlsplit(self.url).hostname or ""
        if self.protocol == "published" and self.length != variant.text.length:
            raise ValueError(f"length={length} must be {variant.text.length}, to which the published protocol pads")
        if self._token and self.url.startswith("http://") and not is_loopback(self._host):
            log.warning("the token in %s is sent unencrypted to %s: use https or a tunnel", TOKEN, self._host)

    def identity(self) -> str:
        """Return what the embeddings depend on besides their prompts.

        For our server it is the text that an encoder with the same files and settings has on this machine, so both
        share cache entries. The published endpoint reports nothing: its address and the model are used instead.

        Raises Unreachable if the server does not answer, RemoteError if it serves another text encoder.
        """
        if self._identity is None:
            known = f"published {self.url} {self.variant.name} {self.length}"
            self._identity = known if self.protocol == "published" else self._fetch_identity()
        return self._identity

    def _fetch_identity(self) -> str:
        path = f"/identity?length={self.length}"
        body, _ = self._request("GET", path, None, TEXT, min(self.attempts, FIRST_CONTACT))
        try:
            answer = parse_json(body)
            found = (answer["kind"], tuple(answer["layers"]), answer["width"])
            model, identity = str(answer["model"]), answer["identity"]
            if not re.fullmatch(r"[ -~]{1,300}", identity) or (self._token and self._token in identity):
                raise ValueError("identity")  # with the token it must not be stored next to the cache
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise RemoteError(f"{self.url} is not a `python -m flux2.serve`: {path} gave another answer") from error
        text = self.variant.text
        if found != (text.kind, text.layers, self.variant.transformer.text_width):
            raise RemoteError(
                f"{self.url} serves the text encoder of {self._redact(model)}, not that of {self.variant.name}. Start "
                f"it with --model {self.variant.name}"
            )
        return identity

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Return embeddings (B, length, text_width) on the CPU, in the dtype that the server computes in.

        Raises Unreachable after all attempts, RemoteError for a refusal or an invalid answer.
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
                f"{self.url} serves another text encoder than at the start of this run. Start again to use that one"
            )
        try:
            tensor = check_embeddings(read_serialized(body) if published else read_safetensors(body), shape)
        except ValueError as error:
            raise RemoteError(f"the answer of {self.url} is refused: {self._redact(str(error))}") from error
        indices = [int(index) for index in re.findall(r"\d{1,6}", headers.get(CUT_HEADER) or "")]
        self.cut += [prompts[index] for index in indices if index < len(prompts)]
        return tensor

    def ask(self, path: str, question: Any) -> Any:
        """Return the JSON value that our server answers with. Raises as `encode` does."""
        body, _ = self._request("POST", path, question, TEXT, self.attempts)
        try:
            return parse_json(body)
        except ValueError as error:
            raise RemoteError(f"the answer of {self.url} is refused: it is not JSON") from error

    def close(self) -> None:
        """Stop waiting for further attempts; no request is sent after this."""
        self._closed.set()

    def _authorize(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        """Add the token. It is called even without one, or requests would look for one in ~/.netrc."""
        if self._token:
            request.headers["Authorization"] = f"Bearer {self._token}"
        return request

    def _session(self) -> requests.Session:
        session: requests.Session | None = getattr(self._local, "session", None)
        if session is None:
            session = self._local.session = TimedSession()  # one per thread: sessions are not thread-safe
            session.trust_env = not is_loopback(self._host)  # no proxy for the local machine
            session.auth = self._authorize
        return session

    def _request(
        self, method: str, path: str, question: Any, limit: int, attempts: int
    ) -> tuple[bytes, Mapping[str, str]]:
        """Return body and headers of a successful answer, after up to `attempts` attempts."""
        data = None if question is None else json.dumps(question).encode()
        for attempt in range(1, attempts + 1):
            if self._closed.is_set():
                raise RemoteError(f"{self.url} was not asked again: the client is closed")
            try:
                answer = self._send(method, path, data, limit)
                self._warned = 0
                return answer
            except RetryLater as again:
                reason = self._redact(str(again))
                if again.after > LONGEST_ASKED:
                    text = f"{self.url} asks to wait {again.after:.0f} s ({reason}). Start again later"
                    raise RemoteError(text) from None
                if attempt < attempts:
                    longest = min(self.wait * 2 ** (attempt - 1), LONGEST_WAIT)
                    seconds = again.after + longest * self._random.uniform(0.5, 1.0)  # so that clients spread out
                    self._warn(attempt, f"{reason}; attempt {attempt + 1} of {attempts} in {seconds:.1f} s")
                    self._closed.wait(seconds)
        raise Unreachable(
            f"{self.url} gave no answer in {attempts} attempts, the last one: {reason}. Check that the server runs and "
            "start again: what was received is kept"
        )

    def _warn(self, attempt: int, text: str) -> None:
        """Log `text`, unless another thread has done so for as many attempts since the server last answered."""
        with self._lock:
            is_new, self._warned = attempt > self._warned, max(attempt, self._warned)
        if is_new:
            log.warning("%s: %s", self.url, text)

    def _send(self, method: str, path: str, data: bytes | None, limit: int) -> tuple[bytes, Mapping[str, str]]:
        headers = {"Accept-Encoding": "identity", "Content-Type": "application/json"}
        late = RetryLater(f"no complete answer within {self.timeout:g} s")
        with within(self.timeout) as deadline:
            try:
                with self._session().request(
                    method,
                    self.url + path,
                    data=data,
                    headers=headers,
                    timeout=(min(CONNECT_SECONDS, self.timeout), self.timeout),
                    allow_redirects=False,  # the token is for this server only
                    stream=True,
                ) as response:
                    if response.status_code == 200:
                        body = read_body(response, limit)
                        if deadline.passed:  # an end by shutting down may look like that of the body
                            raise late
                        return body, response.headers
                    raise self._refusal(response, read_body(response, TEXT, whole=False))
            except RemoteError:
                raise
            except (requests.Timeout, urllib3.exceptions.TimeoutError):
                raise late from None
            except (RetryLater, requests.RequestException, urllib3.exceptions.HTTPError, ValueError, OSError) as error:
                if deadline.passed:  # shutting a connection down may end in any of these
                    raise late from None
                if isinstance(error, RetryLater):
                    raise
                if isinstance(error, requests.exceptions.SSLError):
                    raise RemoteError(f"{self.url}: this machine does not accept its certificate") from None
                raise RetryLater(f"the connection failed ({root_cause(error)})") from None

    def _refusal(self, response: requests.Response, body: bytes) -> RetryLater | RemoteError:
        """Return the error that an answer other than 200 means."""
        status, text = response.status_code, error_text(body)
        what = f"HTTP {status}" + (f", {text}" if text else "")
        if status in RETRY_STATUSES:
            return RetryLater(what, retry_after(response.headers.get("Retry-After")))
        if status in (401, 403):
            state = "the token was refused" if self._token else "a token is required"
            hint = ", or run `hf auth login`" if self.protocol == "published" else " to the token that the server has"
            what = f"{state} ({self._redact(what)}): set the environment variable {TOKEN}{hint}"
            return RemoteError(f"{self.url}: {what}")
        if 300 <= status < 400:
            return RemoteError(f"{self.url} redirects to another address ({status}). Use that address")
        return RemoteError(f"{self.url} refused the request: {self._redact(what)}")

    def _redact(self, text: str) -> str:
        """Return `text` on one line, without the token."""
        text = text.replace(self._token, "***") if self._token else text
        return " ".join(re.sub(r"[^ -~]", " ", text).split())[:300]


def root_cause(error: BaseException) -> str:
    """Return the system's message behind an error of the HTTP library."""
    current: BaseException | None = error
    while current is not None:
        if isinstance(current, OSError) and current.strerror:
            return current.strerror
        inner = next((part for part in current.args if isinstance(part, BaseException)), None)
        current = getattr(current, "reason", None) or inner or current.__cause__ or current.__context__
        current = current if isinstance(current, BaseException) else None
    return type(error).__name__


def pick_protocol(url: str, protocol: ProtocolName | None) -> ProtocolName:
    """Return `protocol`, by default that of the address. Raises ValueError for an unknown one."""
    if protocol is None:
        return "published" if url == PUBLISHED else "flux2"
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol={protocol!r} must be one of {', '.join(PROTOCOLS)}, or null")
    return protocol


def check_patience(timeout: object, attempts: object, wait: object) -> tuple[float, int, float]:
    """Return the three as numbers. Raises ValueError, which names the argument, for one that is out of range."""
    try:
        seconds, first = checks.number("timeout", timeout), checks.number("wait", wait)
        count = checks.integer("attempts", attempts, 1, 100)
    except TypeError as error:
        raise ValueError(str(error)) from error
    if not 0 < seconds <= 24 * 3600:
        raise ValueError(f"timeout={seconds:g} must be a number of seconds above 0, at most a day")
    if not 0 <= first <= LONGEST_WAIT:
        raise ValueError(f"wait={first:g} must be a number of seconds from 0 to {LONGEST_WAIT:g}")
    return seconds, count, first
