"""Servers of embeddings for tests: one that misbehaves as it is told, and the real one in another process.

A test module says `pytest_plugins = ("remote_helpers",)` to get the fixtures, and imports the rest before that, so
pytest is told: PYTEST_DONT_REWRITE.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import helpers
import pytest
import safetensors.torch
import torch
from process_helpers import ForkedModule
from torch import Tensor

from flux2.prompts.remote_client import TOKEN, Client
from flux2.prompts.remote_protocol import CUT_HEADER, IDENTITY_HEADER

SECRET = "a-secret-token-of-many-signs"
HEX = "0123456789abcdef" * 2
VARIANT = helpers.VARIANTS["dev"]
SHAPE = (1, VARIANT.text.length, VARIANT.transformer.text_width)
PROTOCOLS = pytest.mark.parametrize("protocol", ["flux2", "published"])


def saved(value: object) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


class Harmful:
    """Makes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.file}",)


def harmful_archive(file: Path) -> bytes:
    """What `torch.save` would write of a tensor, but for a pickle that makes `file`."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(saved(torch.zeros(2)))) as honest, zipfile.ZipFile(stream, "w") as changed:
        for name in honest.namelist():
            harmful = name.endswith("data.pkl")
            changed.writestr(name, pickle.dumps(Harmful(file), 2) if harmful else honest.read(name))
    return stream.getvalue()


@dataclass
class FakeServer:
    """Speaks both protocols. `answer` is called with (number of the request from 1, its prompts) before the honest
    answer; what it returns, (status, headers, body), is sent in its place, and None is an honest answer.
    """

    variant: Any
    length: int
    identity: str = f"mistral {HEX} fake"
    token: str | None = None
    answer: Callable[[int, list[str]], tuple[int, dict[str, str], bytes] | None] = lambda number, prompts: None
    asked: list[str] = field(default_factory=list)  # prompts, in the order they came
    given: list[str] = field(default_factory=list)  # prompts that were answered
    most: int = 0  # requests that were under way at once
    url: str = ""
    headers: list[dict[str, str]] = field(default_factory=list)
    _under_way: int = 0

    def embedding(self, prompt: str) -> Tensor:
        generator = torch.Generator().manual_seed(sum(prompt.encode()))
        return torch.randn(self.length, self.variant.transformer.text_width, generator=generator)

    def start(self) -> None:
        fake, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                return

            def send(self, status: int, headers: dict[str, str], body: bytes) -> None:
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def refused(self) -> bool:
                fake.headers.append(dict(self.headers))
                if fake.token is None or self.headers.get("Authorization") == f"Bearer {fake.token}":
                    return False
                # an unkind server says back what it was sent
                said = json.dumps({"error": f"{self.headers.get('Authorization')} is not welcome"}).encode()
                self.send(401, {}, said)
                return True

            def do_GET(self) -> None:
                if self.refused():
                    return
                text = fake.variant.text
                told = {"model": fake.variant.name, "kind": text.kind, "layers": text.layers}
                told |= {"width": fake.variant.transformer.text_width, "identity": fake.identity}
                self.send(200, {}, json.dumps(told).encode())

            def do_POST(self) -> None:
                question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                prompts = question["prompts"] if "prompts" in question else [question["prompt"]]
                with lock:
                    fake.asked.extend(prompts)
                    number = len(fake.asked)
                    fake._under_way += 1
                    fake.most = max(fake.most, fake._under_way)
                try:
                    if self.refused():
                        return
                    if (other := fake.answer(number, prompts)) is not None:
                        self.send(*other)
                        return
                    found = torch.stack([fake.embedding(prompt) for prompt in prompts])
                    if "prompts" in question:
                        headers = {IDENTITY_HEADER: fake.identity, CUT_HEADER: ""}
                        self.send(200, headers, safetensors.torch.save({"embeddings": found}))
                    else:
                        self.send(200, {}, saved(found))
                    fake.given.extend(prompts)
                finally:
                    with lock:
                        fake._under_way -= 1

            def handle(self) -> None:
                try:
                    super().handle()
                except (ConnectionError, TimeoutError, ValueError):  # the client is gone, or the server died
                    return

        port = int(self.url.rpartition(":")[2]) if self.url else 0
        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


Fake = Callable[..., FakeServer]


@pytest.fixture
def fake_server() -> Iterator[Callable[..., FakeServer]]:
    """`fake_server(variant, length, ...)`: a server that runs until the test ends."""
    started: list[FakeServer] = []

    def start(variant: Any, length: int | None = None, **settings: Any) -> FakeServer:
        server = FakeServer(variant, length or variant.text.length, **settings)
        server.start()
        started.append(server)
        return server

    yield start
    for server in started:
        server.stop()


class RealServer:
    """`python -m flux2.serve` in another process."""

    def __init__(self, *arguments: str, token: str | None = None) -> None:
        environment = {key: value for key, value in os.environ.items() if key != TOKEN}
        environment |= {"HF_HUB_OFFLINE": "1"} | ({TOKEN: token} if token else {})
        given = ("--port", "0", "--device", "cpu", *arguments)
        self.process = ForkedModule("flux2.serve", *given, environment=environment)
        self.said = self.process.stdout.readline()
        self.url = next((word.rstrip(",") for word in self.said.split() if word.startswith("http://")), "")
        assert self.url, self.process.stop()

    def stop(self) -> tuple[int, str, str]:
        """Ask it to end; exit code, and what it wrote besides its address."""
        return self.process.stop()


@pytest.fixture(scope="session")
def real_server() -> Iterator[RealServer]:
    """The embedded model's text encoder, which asks for the token `SECRET`."""
    server = RealServer("--model", "tiny", token=SECRET)
    yield server
    server.stop()


@pytest.fixture
def no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment has no token."""
    monkeypatch.delenv(TOKEN, raising=False)


def client(server: FakeServer, protocol: str = "flux2", **settings: object) -> Client:
    quick = {"timeout": 20.0, "wait": 0.01, "attempts": 3} | settings
    return Client(server.url, VARIANT, protocol=protocol, **quick)  # type: ignore[arg-type]
