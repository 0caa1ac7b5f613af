"""The service of flux2.serve in this process, with an encoder that the tests can watch.

A test module says `pytest_plugins = ("serve_helpers",)` to get the fixture, and imports the rest before that, so pytest
is told: PYTEST_DONT_REWRITE.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import requests
import safetensors.torch
import torch
import uvicorn
from torch import Tensor

from flux2.prompts.captioning import CaptionModel
from flux2.serve.app import Limits, ServedEncoder, application
from flux2.serve.connections import server_config


@dataclass
class Watched:
    """Encodes a prompt as its length in characters; `hold` stops it, `fail` is what it raises."""

    calls: list[list[str]] = field(default_factory=list)
    cut: list[str] = field(default_factory=list)
    hold: threading.Event = field(default_factory=threading.Event)
    fail: Exception | None = None

    def __post_init__(self) -> None:
        self.hold.set()

    def encode(self, prompts: Sequence[str], length: int | None = None) -> Tensor:
        self.calls.append(list(prompts))
        assert self.hold.wait(30)
        if self.fail is not None:
            raise self.fail
        self.cut += [prompt for prompt in prompts if "long" in prompt]
        assert length is not None
        return torch.stack([torch.full((length, 6), float(len(prompt))) for prompt in prompts])


class Running:
    """The service on a free port, in a thread."""

    def __init__(
        self, encoder: Watched, limits: Limits, token: str | None, captioner: CaptionModel | None = None
    ) -> None:
        served = ServedEncoder(encoder, "tiny", "mistral", (1, 2, 3), 6, 4, lambda length: f"fake {length}")
        config = server_config(application(served, limits, token, captioner), port=0)
        self.encoder, self.server = encoder, uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        while not self.server.started:
            assert self.thread.is_alive()
            time.sleep(0.01)
        self.address = "127.0.0.1", self.server.servers[0].sockets[0].getsockname()[1]
        self.url = "http://{}:{}".format(*self.address)

    def post(self, content: Any, **options: Any) -> requests.Response:
        return requests.post(f"{self.url}/encode", json=content, timeout=30, **options)

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive()


@pytest.fixture
def running() -> Iterator[Callable[..., Running]]:
    """`running(token=..., body=...)`: a service with these limits, until the test ends."""
    started: list[Running] = []

    def start(token: str | None = None, captioner: CaptionModel | None = None, **limits: int) -> Running:
        started.append(Running(Watched(), Limits(**limits), token, captioner))
        return started[-1]

    yield start
    for one in started:
        one.encoder.hold.set()
        one.stop()


def values(answer: requests.Response) -> list[float]:
    """The first number of each embedding."""
    assert answer.status_code == 200, answer.text
    return [float(embedding[0, 0]) for embedding in safetensors.torch.load(answer.content)["embeddings"]]


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)
