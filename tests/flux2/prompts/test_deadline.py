"""flux2.prompts.deadline: no server holds a client for longer than its timeout, or makes it read what is not asked."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest
import safetensors.torch
from remote_helpers import VARIANT, FakeServer

from flux2.prompts.remote_client import Client
from flux2.prompts.remote_protocol import IDENTITY_HEADER, RemoteError

pytest_plugins = ("remote_helpers",)
pytestmark = pytest.mark.usefixtures("no_token")

Script = Callable[[socket.socket], None]


class RawServer:
    """Runs a script with each connection, after its request has been read unless `reads` is False."""

    def __init__(self, script: Script, reads: bool = True) -> None:
        self.script, self.reads, self.count, self.ended = script, reads, 0, threading.Event()
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.port = self.listening.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        with suppress(OSError):  # closed at the end
            while True:
                connection, _ = self.listening.accept()
                self.count += 1
                threading.Thread(target=self.serve, args=(connection,), daemon=True).start()

    def serve(self, connection: socket.socket) -> None:
        with connection, suppress(OSError):
            if self.reads:
                connection.recv(1 << 16)
            self.script(connection)

    def drip(self, head: bytes, part: bytes) -> Script:
        """Sends `head` at once, then `part` every 50 ms for as long as the client takes it."""

        def script(connection: socket.socket) -> None:
            connection.sendall(head)
            while not self.ended.wait(0.05):
                connection.sendall(part)

        return script

    def stop(self) -> None:
        self.ended.set()
        self.listening.close()


@pytest.fixture
def raw() -> Iterator[RawServer]:
    server = RawServer(lambda _: None)
    yield server
    server.stop()


def ask(url: str, protocol: str = "published", timeout: float = 0.4, attempts: int = 1) -> None:
    Client(url, VARIANT, protocol=protocol, timeout=timeout, attempts=attempts, wait=0.0).encode(["a cup"])  # type: ignore[arg-type]


HOLDS = {
    "headers that never end": (b"HTTP/1.1 200 OK\r\n", b"X-More: y\r\n"),
    "one header, a byte at a time": (b"HTTP/1.1 200 OK\r\nX-Long: ", b"y"),
    "a status line, a byte at a time": (b"HTTP/1.1 20", b"0"),
    "100 Continue again and again": (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "a body that trickles": (b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\n", b"x"),
    "chunks that trickle": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
    "the size of a chunk, a digit at a time": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"0"),
    "trailers without end": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n", b"X: y\r\n"),
    "an error that trickles": (b"HTTP/1.1 503 Busy\r\nContent-Length: 99999\r\n\r\n", b"x"),
    "nothing": (b"", b""),
}


@pytest.mark.parametrize("kind", HOLDS)
def test_the_time_is_that_of_the_whole_answer(kind: str, raw: RawServer) -> None:
    raw.script = raw.drip(*HOLDS[kind])
    before = time.monotonic()
    with pytest.raises(RemoteError, match=rf"{raw.url}\b.*within 0\.4 s"):
        ask(raw.url)
    assert time.monotonic() - before < 2


def test_the_handshake_of_tls_is_part_of_it(raw: RawServer) -> None:
    raw.reads = False
    raw.script = raw.drip(b"\x16\x03\x03\x40\x00", b"\x02")  # the record of a handshake, which takes for ever
    before = time.monotonic()
    with pytest.raises(RemoteError, match=r"within 0\.4 s"):
        ask(raw.url.replace("http", "https"))
    assert time.monotonic() - before < 2


def test_a_connection_that_is_used_again_is_shut_down_as_well(fake_server: Callable[..., FakeServer]) -> None:
    server = fake_server(VARIANT)
    asking = Client(server.url, VARIANT, protocol="flux2", timeout=0.4, attempts=1, wait=0.0)
    asking.encode(["a cup"])

    def late(self: object, *_: object) -> None:
        wfile = self.wfile  # type: ignore[attr-defined]
        wfile.write(b"HTTP/1.1 200 OK\r\n")
        for _ in range(60):
            wfile.write(b"X: y\r\n")
            time.sleep(0.05)

    server._server.RequestHandlerClass.do_POST = late  # type: ignore[attr-defined]
    before = time.monotonic()
    with pytest.raises(RemoteError, match=r"within 0\.4 s"):
        asking.encode(["a fox"])
    assert time.monotonic() - before < 2


@pytest.mark.parametrize(
    "location", ["http://[::1", "http://a:b:c/", "//", "http://\xff", "https://example.invalid/", "x" * 5000, ""]
)
def test_a_redirect_is_refused_wherever_it_leads_and_its_body_is_not_read(location: str, raw: RawServer) -> None:
    head = f"HTTP/1.1 302 Found\r\nLocation: {location}\r\n".encode("latin-1")
    raw.script = lambda connection: connection.sendall(head + b"Content-Length: 10000000000\r\n\r\n" + b"x" * 100_000)
    with pytest.raises(RemoteError, match=rf"{raw.url}\b.*redirects.*302"):
        ask(raw.url, timeout=10.0)
    assert raw.count == 1


def test_an_answer_cut_at_any_place_is_asked_for_again_and_taken_for_no_other(
    raw: RawServer, fake_server: Callable[..., FakeServer]
) -> None:
    honest = fake_server(VARIANT)
    body = safetensors.torch.save({"embeddings": honest.embedding("a cup")[None]})
    head = (
        f"HTTP/1.1 200 OK\r\n{IDENTITY_HEADER}: {honest.identity}\r\nContent-Length: {len(body)}\r\nFlux2-Cut: \r\n\r\n"
    )
    swapped = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n{IDENTITY_HEADER}: {honest.identity}\r\n\r\n"
    for whole in (head.encode() + body, swapped.encode() + body):
        asking = Client(raw.url, VARIANT, protocol="flux2", timeout=10.0, attempts=1, wait=0.0)
        asking._identity = honest.identity
        for cut in [*range(0, len(head) + 2, 3), len(whole) - 1]:
            raw.script = lambda connection, cut=cut, whole=whole: connection.sendall(whole[:cut])  # type: ignore[misc]
            with pytest.raises(RemoteError, match="gave no answer in 1 attempts"):
                asking.encode(["a cup"])
        raw.script = lambda connection, whole=whole: connection.sendall(whole)  # type: ignore[misc]
        assert asking.encode(["a cup"]).shape[0] == 1
