"""python -m flux2.serve: the real server in another process, and what it refuses to start with."""

import re
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import requests
import safetensors.torch
import torch
from remote_helpers import SECRET, RealServer

from flux2.models.variants import VARIANTS
from flux2.prompts.remote_client import TOKEN, Client
from flux2.serve import command as serve
from flux2.weights.loading import embedding_identity, load_text_encoder, text_encoder_fingerprint
from flux2.weights.sources import TINY_FOLDER, ModelSource

pytest_plugins = ("remote_helpers",)

ROOT = Path(__file__).resolve().parents[3]
TINY = ModelSource(VARIANTS["tiny"], str(TINY_FOLDER))
PROMPTS = ["a small red cup", "", "red " * 100]


def test_embeddings_and_identity_are_those_of_this_machine_bit_for_bit(
    real_server: RealServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TOKEN, SECRET)
    asking = Client(real_server.url, TINY.variant)
    encoder = load_text_encoder(TINY, dtype=torch.float32)
    together = asking.encode(PROMPTS)
    for prompt, embedding in zip(PROMPTS, together, strict=True):
        alone = asking.encode([prompt])[0]
        assert torch.equal(alone, encoder.encode([prompt])[0])
        assert torch.equal(alone, embedding), "whoever else is asked for"
    assert asking.cut == [PROMPTS[2]] * 2
    files = text_encoder_fingerprint(TINY)
    assert asking.identity() == embedding_identity(TINY.variant.text, files, 32, torch.float32)
    shorter = Client(real_server.url, TINY.variant, 11)
    assert shorter.identity() == embedding_identity(TINY.variant.text, files, 11, torch.float32)
    assert torch.equal(shorter.encode(["a cup"]), encoder.encode(["a cup"], 11))


def test_the_server_says_where_it_is_and_asks_for_the_token(real_server: RealServer) -> None:
    assert re.fullmatch(rf"tiny.* {real_server.url}\b.*\bwith a token\n", real_server.said)
    answer = requests.post(f"{real_server.url}/encode", json={"prompts": ["a"]}, timeout=30)
    assert answer.status_code == 401
    assert "bearer token" in answer.json()["error"]


def test_settings_of_the_command_reach_the_encoder_and_sigterm_ends_it_cleanly() -> None:
    server = RealServer("--model", "tiny", "--storage", "int8", "--precision", "bf16", "--max-characters", "5")
    assert re.fullmatch(rf"tiny.* {server.url}\b.*\bwithout a token\n", server.said)
    with requests.Session() as session:  # a connection that stays open does not hold the end up
        answer = session.post(f"{server.url}/encode", json={"prompts": ["a cup"]}, timeout=30)
        refused = session.post(f"{server.url}/encode", json={"prompts": ["a cup!"]}, timeout=30)
        assert server.stop() == (0, "", "")
    assert re.search(r"\b6 characters.*\b5\b", refused.json()["error"])
    (embedding,) = safetensors.torch.load(answer.content)["embeddings"]
    encoder = load_text_encoder(TINY, dtype=torch.bfloat16, storage="int8")
    assert torch.equal(embedding, encoder.encode(["a cup"])[0])


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs the command in this process, to be refused before it loads anything; returns its message."""
    monkeypatch.delenv(TOKEN, raising=False)
    monkeypatch.setattr(serve, "load_text_encoder", lambda *_: pytest.fail("a model was loaded"))

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["serve", "--device", "cpu", *arguments])
        assert serve.main() == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.startswith("error: ")
        assert printed.err.count("\n") == 1
        return printed.err.removeprefix("error: ")

    return run


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.0.7", "::", "myhost"])
def test_an_address_that_others_reach_needs_a_token(host: str, command: Callable[..., str]) -> None:
    assert re.match(rf"--host[= ]{host}\s.*{TOKEN}\b", command("--host", host))


@pytest.mark.parametrize("token", ["short", "sixteen signs and spaces", "ümläütümläütümläüt"])
def test_a_weak_token_is_refused_and_not_shown(
    token: str, command: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TOKEN, token)
    said = command()
    assert re.search(rf"{TOKEN}\b.*\b16\b.*ASCII", said)
    assert token not in said


def test_a_port_that_is_taken_is_told_before_a_model_is_loaded(command: Callable[..., str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        assert re.fullmatch(rf"--host 127\.0\.0\.1 --port {port}\b.*\bin use\b.*\n", command("--port", port))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--port", "70000"], r"--port[= ]70000\b.*\b65535\b"),
        (["--batch", "0"], r"--batch[= ]0\b"),
        (["--max-body", "-1"], r"--max-body[= ]-1\b"),
        (["--path", "/gone"], r"'/gone'"),
        (["--model", "dev"], r"--path /path/to"),
        (["--device", "cuda:7"], r"device='?cuda:7"),
    ],
)
def test_what_is_wrong_is_one_line(arguments: list[str], said: str, command: Callable[..., str]) -> None:
    assert re.search(said, command(*arguments))


def test_without_its_libraries_the_command_names_them(
    command: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert re.fullmatch(r"uvicorn\b.*pip install -e '\.\[serve\]'\n", command())


def test_the_web_libraries_are_not_needed_for_training() -> None:
    users = [
        str(file.relative_to(ROOT))
        for folder in ("flux2", "data", "train")
        for file in (ROOT / folder).rglob("*.py")
        if "import uvicorn" in file.read_text() or "from fastapi" in file.read_text()
    ]
    assert users
    assert all(file.startswith(("flux2/serve/", "train/pages/", "train/studio.py")) for file in users), users
