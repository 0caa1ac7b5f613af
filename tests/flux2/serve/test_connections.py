"""flux2.serve.connections: clients that send nothing, too little, too much or two lengths keep nobody else out."""

import gc
import logging
import resource
import socket
import time
from collections.abc import Callable

import pytest
import requests
from serve_helpers import Running, values, wait_until

from flux2.serve import connections
from flux2.serve.connections import BACKLOG, MOST_CONNECTIONS, most_connections

pytest_plugins = ("serve_helpers",)

HEAD = b"POST /encode HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


def is_closed(connection: socket.socket) -> bool:
    """Whether the server closes the connection, which it does without an answer."""
    connection.settimeout(10)
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEADER_SECONDS", 0.3)


@pytest.mark.parametrize(
    "sent",
    [
        [b""],
        [b"POST /encode HTTP/1.1\r\n", b"A: b\r\n"] + [b"X: y\r\n"] * 20,
        [b"\r\n"] * 20,
        [b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n", b"GET /hea"] + [b"l"] * 20,
        [b"GET /health HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n"] + [b"x"] * 20,
    ],
    ids=["nothing", "headers that drip", "empty lines", "a second request that drips", "a body that nobody reads"],
)
@pytest.mark.usefixtures("quick")
def test_a_request_that_does_not_come_ends_the_connection(sent: list[bytes], running: Callable[..., Running]) -> None:
    server = running()
    with socket.create_connection(server.address) as connection:
        began = time.monotonic()
        try:
            for part in sent:
                connection.sendall(part)
                time.sleep(0.05)
            wait_until(lambda: not server.server.server_state.connections)
        except (BrokenPipeError, ConnectionResetError):
            pass
        assert time.monotonic() - began < 3


@pytest.mark.usefixtures("quick")
def test_a_connection_that_asks_now_and_then_stays(running: Callable[..., Running]) -> None:
    server = running()
    with requests.Session() as session:
        for _ in range(3):
            assert session.get(f"{server.url}/health", timeout=30).status_code == 200
            (one,) = server.server.server_state.connections
            time.sleep(0.4)
        assert server.server.server_state.connections == {one}


def test_silent_connections_keep_nobody_out(running: Callable[..., Running], monkeypatch: pytest.MonkeyPatch) -> None:
    server = running()
    monkeypatch.setattr(connections.BoundedProtocol, "most", 4)
    body = b'{"prompts": ["held"]}'
    with socket.create_connection(server.address) as busy:
        server.encoder.hold.clear()
        busy.sendall(HEAD + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        wait_until(lambda: server.encoder.calls == [["held"]])
        silent = [socket.create_connection(server.address) for _ in range(12)]
        try:
            assert all(is_closed(one) for one in silent[:9])  # the oldest make room
            assert requests.get(f"{server.url}/health", timeout=30).status_code == 200
            assert len(server.server.server_state.connections) <= 4
        finally:
            for one in silent:
                one.close()
        server.encoder.hold.set()
        assert busy.recv(12) == b"HTTP/1.1 200"  # what was asked is answered


def test_a_client_that_does_not_read_is_cut_off(
    running: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "STALLED_SECONDS", 0.3)
    server = running(length=2_000_000)
    body = b'{"prompts": ["a"], "length": 1000000}'  # 24 MB of answer
    with socket.create_connection(server.address) as connection:
        connection.sendall(HEAD + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        wait_until(lambda: bool(server.encoder.calls))
        wait_until(lambda: not server.server.server_state.connections)


def test_two_lengths_are_refused(running: Callable[..., Running]) -> None:
    server = running()
    lengths = b"Content-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n"
    for path in (b"/encode", b"/nowhere"):
        with socket.create_connection(server.address) as connection:
            connection.sendall(b"POST " + path + b" HTTP/1.1\r\nHost: x\r\n" + lengths + b"0\r\n\r\nGET /health ")
            connection.settimeout(10)
            answer = b""
            while part := connection.recv(4096):
                answer += part
        assert answer.startswith(b"HTTP/1.1 400")
        assert answer.count(b"HTTP/1.1") == 1


def test_faults_of_clients_are_not_logged(
    running: Callable[..., Running], caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.WARNING)
    server = running(body=100_000)
    server.encoder.hold.clear()
    for sent in (
        b"nonsense\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n",
        HEAD + b"Content-Length: 90000\r\n\r\n{",  # and leaves
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{",
        HEAD + b"Content-Length: 1000000\r\nExpect: 100-continue\r\n\r\n",
        HEAD + b"Content-Length: 17\r\n\r\n" + b'{"prompts":["a"]}',
    ):
        with socket.create_connection(server.address) as connection:
            connection.sendall(sent)
        wait_until(lambda: not server.server.server_state.connections)
    wait_until(lambda: not server.server.server_state.tasks)
    gc.collect()  # what was not looked at is reported now
    server.encoder.hold.set()
    assert values(server.post({"prompts": ["abc"]})) == [3]
    assert (caplog.text, capsys.readouterr().err) == ("", "")  # uvicorn has handlers of its own


def test_the_number_of_connections_leaves_files_for_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    for files, most in ((256, 128), (1024, MOST_CONNECTIONS), (resource.RLIM_INFINITY, MOST_CONNECTIONS), (64, 8)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, files=files: (files, files))
        assert most_connections() == most
    assert 128 + BACKLOG < 256
