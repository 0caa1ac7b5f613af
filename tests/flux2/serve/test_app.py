"""flux2.serve.app: what the server answers, to whom, and in what order it works."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import requests
import safetensors.torch
import torch
from fastapi import Request
from remote_helpers import SECRET
from serve_helpers import Running, values, wait_until

from flux2.prompts.remote_protocol import CUT_HEADER, IDENTITY_HEADER
from flux2.serve import app as service

pytest_plugins = ("serve_helpers",)


def test_embeddings_come_in_the_order_of_the_prompts_with_what_they_depend_on(running: Callable[..., Running]) -> None:
    server = running()
    answer = server.post({"prompts": ["a", "", "a long one"], "length": 5})
    assert values(answer) == [1, 0, 10]
    assert safetensors.torch.load(answer.content)["embeddings"].shape == (3, 5, 6)
    assert answer.headers[IDENTITY_HEADER] == "fake 5"
    assert answer.headers[CUT_HEADER] == "2"
    told = requests.get(f"{server.url}/identity?length=5", timeout=30).json()
    assert told == {
        "model": "tiny",
        "kind": "mistral",
        "layers": [1, 2, 3],
        "width": 6,
        "length": 5,
        "identity": "fake 5",
    }
    answer = server.post({"prompts": ["a"]})
    assert safetensors.torch.load(answer.content)["embeddings"].shape == (1, 4, 6)
    assert answer.headers[CUT_HEADER] == ""
    assert requests.get(f"{server.url}/health", timeout=30).json() == {"status": "ok", "waiting": 0}


def test_prompts_are_encoded_one_at_a_time_unless_a_batch_is_allowed(running: Callable[..., Running]) -> None:
    prompts = ["a", "b", "c", "d", "e"]
    alone, together = running(), running(batch=2)
    for server in (alone, together):
        assert values(server.post({"prompts": prompts})) == [1] * 5
    assert alone.encoder.calls == [[prompt] for prompt in prompts]
    assert sorted(map(len, together.encoder.calls))[-1] == 2
    assert [prompt for call in together.encoder.calls for prompt in call] == prompts
    assert together.post({"prompts": ["a"]}).headers[IDENTITY_HEADER] == "fake 4 batches of 2"


def test_what_waits_together_is_batched_by_length_across_requests(running: Callable[..., Running]) -> None:
    server = running(batch=3)
    server.encoder.hold.clear()
    answers: dict[str, requests.Response] = {}

    def ask(prompt: str, length: int) -> None:
        answers[prompt] = server.post({"prompts": [prompt], "length": length})

    threads = []
    for i, (prompt, length) in enumerate((("first", 4), ("bb", 4), ("ccc", 4), ("dddd", 2), ("e", 2))):
        threads.append(threading.Thread(target=ask, args=(prompt, length)))
        threads[-1].start()
        if i == 0:
            wait_until(lambda: server.encoder.calls == [["first"]])
        else:
            wait_until(lambda i=i: waiting(server) == i)
    server.encoder.hold.set()
    for thread in threads:
        thread.join(30)
    assert server.encoder.calls == [["first"], ["bb", "ccc"], ["dddd", "e"]]
    assert {prompt: values(answer) for prompt, answer in answers.items()} == {
        prompt: [len(prompt)] for prompt in ("first", "bb", "ccc", "dddd", "e")
    }


def waiting(server: Running) -> int:
    return int(requests.get(f"{server.url}/health", timeout=30).json()["waiting"])


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("content", "status", "reason"),
    [
        ({"prompts": []}, 422, "prompts: List should have at least 1 item"),
        ({"prompts": "a"}, 422, "prompts: Input should be a valid array"),
        ({"prompts": [1]}, 422, "prompts.0: Input should be a valid string"),
        ({}, 422, "prompts: Field required"),
        ([], 422, "Input should be an object"),
        ({"prompts": ["a"], "token": "x"}, 422, "token: Extra inputs are not permitted"),
        ({"prompts": ["a"], "length": 0}, 422, "length: Input should be greater than or equal to 1"),
        ({"prompts": ["a"], "length": 9}, 422, "length=9"),
        ({"prompts": ["a"], "length": 2.5}, 422, "length: Input should be a valid integer"),
        ({"prompts": ["a" * 11]}, 422, "11 characters"),
        ({"prompts": ["a"] * 4}, 422, "4 prompts"),
        ({"prompts": ["a" * 300]}, 413, "200 bytes"),
    ],
)
def test_a_wrong_request_is_refused_with_its_reason_before_anything_is_computed(
    content: Any, status: int, reason: str, running: Callable[..., Running]
) -> None:
    server = running(body=200, characters=10, prompts=3, length=8)
    answer = server.post(content)
    assert answer.status_code == status
    assert set(answer.json()) == {"error"}
    assert reason in answer.json()["error"]
    assert server.encoder.calls == []


def test_requests_that_are_none_are_refused(running: Callable[..., Running]) -> None:
    server = running(body=50_000)

    def post(data: Any, kind: str = "application/json") -> tuple[int, str]:
        answer = requests.post(f"{server.url}/encode", data=data, headers={"Content-Type": kind}, timeout=30)
        return answer.status_code, answer.json()["error"]

    assert post(b"{") == (422, "Invalid JSON: EOF while parsing an object at line 1 column 1")
    assert post(b"[" * 40_000)[0] == 422
    assert post(b'{"prompts": ["\\ud800"]}')[0] == 422
    assert post(b'{"prompts": ["\xff"]}')[0] == 422
    status, reason = post(b'{"prompts": ["a"]}', "text/plain")
    assert status == 415
    assert "application/json" in reason
    status, reason = post(iter([b'{"prompts": ["', b"a" * 60_000, b'"]}']))
    assert status == 413
    assert "50000 bytes" in reason
    for method, path, status in (("GET", "/docs", 404), ("GET", "/encode", 405), ("GET", "/identity?length=x", 422)):
        answer = requests.request(method, server.url + path, timeout=30)
        assert answer.status_code == status
        assert set(answer.json()) == {"error"}
    assert server.encoder.calls == []


def test_a_body_that_does_not_arrive_is_not_waited_for(
    running: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "BODY_SECONDS", 0.2)

    def slowly() -> Iterator[bytes]:
        yield b"{"
        time.sleep(1)
        yield b"}"

    server = running()
    answer = requests.post(
        f"{server.url}/encode", data=slowly(), headers={"Content-Type": "application/json"}, timeout=30
    )
    assert answer.status_code == 408
    assert "0.2 s" in answer.json()["error"]


def test_a_token_is_needed_for_everything_but_health(running: Callable[..., Running]) -> None:
    server = running(token=SECRET)
    assert requests.get(f"{server.url}/health", timeout=30).status_code == 200
    for given in (None, SECRET, f"Bearer {SECRET}x", f"Bearer {SECRET[:-1]}", f"bearer {SECRET}", "Bearer", "Bearer ü"):
        headers = {} if given is None else {"Authorization": given.encode()}
        asked = requests.get(f"{server.url}/identity", headers=headers, timeout=30)
        encode = server.post({"prompts": ["a"]}, headers=headers)
        for answer in (asked, encode):
            assert answer.status_code == 401
            assert "bearer token" in answer.json()["error"]
            assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert server.encoder.calls == []
    headers = {"Authorization": f"Bearer {SECRET}"}
    assert values(server.post({"prompts": ["a"]}, headers=headers)) == [1]
    assert requests.get(f"{server.url}/identity", headers=headers, timeout=30).status_code == 200


def test_more_prompts_than_may_wait_are_told_to_come_back(running: Callable[..., Running]) -> None:
    server = running(waiting=2)
    server.encoder.hold.clear()
    answers = []
    thread = threading.Thread(target=lambda: answers.append(server.post({"prompts": ["a", "bb"]})))
    thread.start()
    wait_until(lambda: server.encoder.calls == [["a"]])
    refused = server.post({"prompts": ["c", "d"]})
    assert refused.status_code == 503
    assert "prompts" in refused.json()["error"]
    assert refused.headers["Retry-After"] == "2"
    server.encoder.hold.set()
    thread.join(30)
    assert values(answers[0]) == [1, 2]


# ------------------------------------------------------------------ what goes wrong, and the end


def test_an_encoder_that_fails_is_an_answer_and_not_the_end(running: Callable[..., Running]) -> None:
    server = running()
    server.encoder.fail = torch.OutOfMemoryError("CUDA out of memory")
    answer = server.post({"prompts": ["a"]})
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "2")
    assert "memory" in answer.json()["error"]
    server.encoder.fail = RuntimeError("secret of the machine")
    answer = server.post({"prompts": ["a"]})
    assert answer.status_code == 500
    assert "RuntimeError" in answer.json()["error"]
    assert "secret" not in answer.json()["error"]
    server.encoder.fail = None
    assert values(server.post({"prompts": ["a"]})) == [1]


def test_prompts_of_a_client_that_is_gone_are_not_encoded(
    running: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    gone, disconnected = threading.Event(), service.wait_for_disconnect

    async def noted(request: Request) -> None:
        await disconnected(request)
        gone.set()

    monkeypatch.setattr(service, "wait_for_disconnect", noted)
    server = running()
    server.encoder.hold.clear()
    body = json.dumps({"prompts": ["first", "second"]})
    head = f"POST /encode HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(server.address) as connection:
        connection.sendall((head + body).encode())
        wait_until(lambda: server.encoder.calls == [["first"]])
    assert gone.wait(30)
    assert waiting(server) == 1  # an answer that comes after what was done about it
    server.encoder.hold.set()
    assert values(server.post({"prompts": ["third"]})) == [5]
    assert server.encoder.calls == [["first"], ["third"]]


def test_stopping_answers_what_is_under_way(running: Callable[..., Running]) -> None:
    server = running()
    server.encoder.hold.clear()
    answers = []
    thread = threading.Thread(target=lambda: answers.append(server.post({"prompts": ["a", "bb", "ccc"]})))
    thread.start()
    wait_until(lambda: server.encoder.calls == [["a"]])
    server.server.should_exit = True
    wait_until(lambda: not server.server.servers or not server.server.servers[0].is_serving())
    with pytest.raises(requests.ConnectionError):
        requests.get(f"{server.url}/health", timeout=5)
    server.encoder.hold.set()
    thread.join(30)
    assert values(answers[0]) == [1, 2, 3]
