"""flux2.prompts.remote_client: what a client asks, and how often it tries again."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate

import pytest
import safetensors.torch
import torch
from remote_helpers import PROTOCOLS, SHAPE, VARIANT, Fake, FakeServer, client, saved

from flux2.prompts.remote_client import Client
from flux2.prompts.remote_protocol import IDENTITY_HEADER, RemoteError, retry_after

pytest_plugins = ("remote_helpers",)
pytestmark = pytest.mark.usefixtures("no_token")


# ------------------------------------------------------------------ honest answers


@PROTOCOLS
def test_embeddings_arrive_as_they_were_sent(protocol: str, fake_server: Fake) -> None:
    server = fake_server(VARIANT)
    found = client(server, protocol).encode(["a cup", ""])
    assert found.shape == (2, *SHAPE[1:])
    assert torch.equal(found, torch.stack([server.embedding("a cup"), server.embedding("")]))
    assert server.asked == ["a cup", ""]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_servers_dtype_is_kept(dtype: torch.dtype, fake_server: Fake) -> None:
    server = fake_server(VARIANT, answer=lambda *_: (200, {}, saved(torch.ones(SHAPE, dtype=dtype))))
    assert client(server, "published").encode(["a cup"]).dtype == dtype


def test_our_servers_identity_is_taken_word_for_word(fake_server: Fake) -> None:
    assert client(fake_server(VARIANT, identity="mistral 123")).identity() == "mistral 123"


def test_the_published_endpoint_is_known_by_address_model_and_length(fake_server: Fake) -> None:
    server = fake_server(VARIANT)
    assert client(server, "published").identity() == f"published {server.url} small_dev 64"
    assert server.headers == [], "it is not asked"


def test_prompts_that_the_server_cut_are_known(fake_server: Fake) -> None:
    server = fake_server(VARIANT)
    body = safetensors.torch.save({"embeddings": torch.ones(3, *SHAPE[1:])})
    server.answer = lambda *_: (200, {IDENTITY_HEADER: server.identity, "Flux2-Cut": "0,2,7"}, body)
    asking = client(server)
    asking.encode(["long", "b", "longer"])
    assert asking.cut == ["long", "longer"]


def test_several_threads_ask_at_once_and_get_their_own_answers(fake_server: Fake) -> None:
    server, together = fake_server(VARIANT), threading.Barrier(4, timeout=30)

    def wait_for_others(*_: object) -> None:
        together.wait()

    server.answer = wait_for_others
    asking = client(server)
    prompts = [f"prompt {i}" for i in range(8)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda prompt: asking.encode([prompt])[0], prompts))
    assert server.most == 4
    for prompt, embedding in zip(prompts, found, strict=True):
        assert torch.equal(embedding, server.embedding(prompt))


def test_requests_are_as_the_published_endpoint_takes_them(fake_server: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    server, seen = fake_server(VARIANT), []
    handler = server._server.RequestHandlerClass

    def look(self) -> None:
        seen.append(
            (self.path, self.headers["Content-Type"], json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        )
        self.send(200, {}, saved(torch.ones(SHAPE)))

    monkeypatch.setattr(handler, "do_POST", look)
    Client(f"{server.url}/predict", VARIANT, protocol="published").encode(["ein Größenwahn"])
    assert seen == [("/predict", "application/json", {"prompt": "ein Größenwahn"})]


# ------------------------------------------------------------------ trying again


@PROTOCOLS
def test_every_third_request_may_fail(protocol: str, fake_server: Fake) -> None:
    server = fake_server(VARIANT)
    server.answer = lambda number, _: (503, {}, b"busy") if number % 3 == 0 else None
    asking = client(server, protocol)
    for i in range(7):
        assert torch.equal(asking.encode([f"prompt {i}"])[0], server.embedding(f"prompt {i}"))
    assert len(server.asked) == 10


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_after_the_last_attempt_the_error_says_what_the_server_said(status: int, fake_server: Fake) -> None:
    server = fake_server(VARIANT, answer=lambda *_: (status, {}, b'{"error": "no room\\nnow"}'))
    with pytest.raises(RemoteError, match=rf"{server.url}\b.*\b3 attempts\b.*HTTP {status}, no room now"):
        client(server).encode(["a cup"])
    assert server.asked == ["a cup"] * 3


def test_several_requests_that_wait_for_one_server_warn_once_for_each_attempt(
    fake_server: Fake, caplog: pytest.LogCaptureFixture
) -> None:
    server = fake_server(VARIANT, answer=lambda *_: (503, {}, b"busy"))
    asking = client(server, attempts=4)
    with ThreadPoolExecutor(4) as pool:
        found = [pool.submit(asking.encode, [f"prompt {i}"]) for i in range(4)]
    assert all(isinstance(each.exception(), RemoteError) for each in found)
    warnings = [record.getMessage() for record in caplog.records]
    assert [text.rpartition("; ")[2][:14] for text in warnings] == [f"attempt {i} of 4" for i in (2, 3, 4)]
    assert len(server.asked) == 16
    server.answer = lambda *_: None
    asking.encode(["a cup"])
    server.answer = lambda *_: (503, {}, b"busy again")
    with pytest.raises(RemoteError):
        asking.encode(["another cup"])
    assert caplog.text.count("busy again") == 3


@pytest.mark.parametrize("status", [400, 404, 413, 422])
def test_a_request_that_is_wrong_is_not_sent_again(status: int, fake_server: Fake) -> None:
    server = fake_server(VARIANT, answer=lambda *_: (status, {}, b'{"error": "a prompt has 9 characters"}'))
    with pytest.raises(RemoteError, match=rf"{server.url}\b.*HTTP {status}, a prompt has 9 characters"):
        client(server).encode(["a cup"])
    assert server.asked == ["a cup"]


def test_waits_double_with_jitter_and_what_the_server_asks_for_comes_on_top(
    fake_server: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = fake_server(VARIANT, answer=lambda *_: (503, {}, b""))
    waits: list[float] = []
    asking = client(server, attempts=6, wait=8.0)
    monkeypatch.setattr(asking._closed, "wait", waits.append)
    with pytest.raises(RemoteError):
        asking.encode(["a cup"])
    assert len(waits) == 5
    for wait, longest in zip(waits, (8, 16, 30, 30, 30), strict=True):
        assert longest / 2 <= wait <= longest
    assert len({wait / longest for wait, longest in zip(waits, (8, 16, 30, 30, 30), strict=True)}) == 5

    for header in ("7", formatdate(time.time() + 7.9, usegmt=True)):
        waits.clear()
        server.answer = lambda *_, header=header: (503, {"Retry-After": header}, b"")
        with pytest.raises(RemoteError):
            asking.encode(["a cup"])
        assert all(6 + 4 <= wait <= 8 + 30 for wait in waits), (header, waits)
        assert waits[0] > 6 + 4


@pytest.mark.parametrize(("header", "seconds"), [(None, 0), ("", 0), ("3.5", 3.5), ("-4", 0), ("nan", 0), ("x", 0)])
def test_retry_after_is_read(header: str | None, seconds: float) -> None:
    assert retry_after(header) == seconds


def test_a_server_that_asks_to_wait_for_long_is_not_waited_for(fake_server: Fake) -> None:
    server = fake_server(VARIANT, answer=lambda *_: (429, {"Retry-After": "3600"}, b""))
    with pytest.raises(RemoteError, match=r"\b3600 s\b"):
        client(server).encode(["a cup"])
    assert len(server.asked) == 1


def test_waiting_does_not_touch_the_randomness_of_a_run(fake_server: Fake) -> None:
    import random

    random.seed(3)
    before = random.getstate(), torch.get_rng_state()
    server = fake_server(VARIANT, answer=lambda number, _: (503, {}, b"") if number == 1 else None)
    client(server).encode(["a cup"])
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


def test_a_slow_server_is_waited_for_until_the_time_is_over(fake_server: Fake) -> None:
    server = fake_server(VARIANT)
    server.answer = lambda *_: time.sleep(0.6)
    assert torch.equal(client(server).encode(["a cup"])[0], server.embedding("a cup"))
    with pytest.raises(RemoteError, match=r"\b2 attempts\b.*\b0\.2 s\b"):
        client(server, timeout=0.2, attempts=2).encode(["a cup"])


def test_an_answer_that_trickles_in_is_not_waited_for_forever(
    fake_server: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each byte comes in time, the whole does not."""
    server = fake_server(VARIANT)

    def trickle(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", "100000")
        self.end_headers()
        for _ in range(200):
            self.wfile.write(b"x")
            self.wfile.flush()
            time.sleep(0.05)

    monkeypatch.setattr(server._server.RequestHandlerClass, "do_POST", trickle)
    before = time.monotonic()
    with pytest.raises(RemoteError, match=rf"{server.url}\b"):
        client(server, timeout=0.5, attempts=1).encode(["a cup"])
    assert time.monotonic() - before < 5


def test_an_answer_that_breaks_off_is_asked_for_again(fake_server: Fake) -> None:
    server = fake_server(VARIANT)
    whole = safetensors.torch.save({"embeddings": server.embedding("a cup")[None]})
    headers = {IDENTITY_HEADER: server.identity, "Content-Length": str(len(whole)), "Connection": "close"}
    server.answer = lambda number, _: (200, headers, whole[:-100]) if number == 1 else None
    assert torch.equal(client(server).encode(["a cup"])[0], server.embedding("a cup"))
    assert len(server.asked) == 2


def test_nobody_at_the_address_is_said_soon() -> None:
    gone = FakeServer(VARIANT, 64)
    gone.start()
    gone.stop()
    with pytest.raises(RemoteError, match=rf"{gone.url}\b.*\b3 attempts\b.*Connection refused"):
        client(gone, attempts=50).identity()


def test_closing_ends_what_waits(fake_server: Fake) -> None:
    server = fake_server(VARIANT, answer=lambda *_: (503, {}, b""))
    asking = client(server, wait=30.0)
    asking.identity()
    threading.Timer(0.3, asking.close).start()
    before = time.monotonic()
    with pytest.raises(RemoteError, match=rf"{server.url}\b"):
        asking.encode(["a cup"])
    assert time.monotonic() - before < 10
    assert len(server.asked) == 1
