"""flux2.prompts.remote_client: answers, tokens and addresses that a client refuses, and secrets that it keeps."""

import logging
import re
from pathlib import Path

import helpers
import pytest
import safetensors.torch
import torch
from remote_helpers import PROTOCOLS, SECRET, SHAPE, VARIANT, Fake, client, harmful_archive, saved

from flux2.prompts import remote_client
from flux2.prompts.remote_client import PUBLISHED, TOKEN, Client, bearer_token, check_url
from flux2.prompts.remote_protocol import IDENTITY_HEADER, RemoteError

pytest_plugins = ("remote_helpers",)
pytestmark = pytest.mark.usefixtures("no_token")


# ------------------------------------------------------------------ answers that are refused


def test_a_pickle_that_wants_more_than_a_tensor_is_refused_and_not_run(fake_server: Fake, tmp_path: Path) -> None:
    harm = tmp_path / "harm"
    server = fake_server(VARIANT, answer=lambda *_: (200, {}, harmful_archive(harm)))
    with pytest.raises(RemoteError, match=rf"{server.url}\b.*\b\w+\.system\b"):
        client(server, "published").encode(["a cup"])
    assert not harm.exists()
    assert len(server.asked) == 1, "a refused answer is not asked for again"


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (torch.ones(1, 64, 47), r"shape.*\(1, 64, 47\).*\(1, 64, 48\)"),
        (torch.ones(2, 64, 48), r"shape.*\(2, 64, 48\)"),
        (torch.ones(64, 48), r"shape.*\(64, 48\)"),
        (torch.ones(SHAPE, dtype=torch.float64), r"dtype.*torch\.float64"),
        (torch.ones(SHAPE, dtype=torch.int64), r"dtype.*torch\.int64"),
        (torch.ones(SHAPE).index_fill(1, torch.tensor(3), float("nan")), "NaN"),
        (torch.full(SHAPE, float("-inf")), "NaN"),
    ],
    ids=["width", "batch", "rank", "float64", "int64", "nan", "inf"],
)
@PROTOCOLS
def test_a_tensor_that_was_not_asked_for_is_refused(
    protocol: str, tensor: torch.Tensor, said: str, fake_server: Fake
) -> None:
    server = fake_server(VARIANT)
    body = saved(tensor) if protocol == "published" else safetensors.torch.save({"embeddings": tensor})
    server.answer = lambda *_: (200, {IDENTITY_HEADER: server.identity}, body)
    with pytest.raises(RemoteError, match=rf"{server.url}\b.*{said}"):
        client(server, protocol).encode(["a cup"])


@PROTOCOLS
@pytest.mark.parametrize("declared", [True, False])
def test_an_answer_may_not_be_larger_than_what_was_asked_for(
    protocol: str, declared: bool, fake_server: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = fake_server(VARIANT)
    handler = server._server.RequestHandlerClass
    sent = []

    def flood(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header(*(("Content-Length", str(1 << 40)) if declared else ("Connection", "close")))
        self.end_headers()
        for _ in range(1000):
            self.wfile.write(bytes(1 << 20))
            sent.append(1)

    monkeypatch.setattr(handler, "do_POST", flood)
    with pytest.raises(RemoteError, match=r"\b1060864 bytes\b"):
        client(server, protocol).encode(["a cup"])
    assert len(sent) < 200


def test_a_compressed_answer_is_refused(fake_server: Fake) -> None:
    server = fake_server(VARIANT, answer=lambda *_: (200, {"Content-Encoding": "gzip"}, b"x"))
    with pytest.raises(RemoteError, match="compressed"):
        client(server).encode(["a cup"])


def test_a_redirect_is_not_followed(fake_server: Fake) -> None:
    other = fake_server(VARIANT)
    server = fake_server(VARIANT, answer=lambda *_: (307, {"Location": other.url}, b""))
    with pytest.raises(RemoteError, match=r"redirect.*307"):
        client(server).encode(["a cup"])
    assert other.headers == []


def test_a_server_that_changes_its_encoder_is_noticed(fake_server: Fake) -> None:
    server = fake_server(VARIANT)
    asking = client(server)
    asking.encode(["a cup"])
    server.identity = "another"
    with pytest.raises(RemoteError, match=rf"{server.url}\b.*text encoder"):
        asking.encode(["a cup"])


def test_the_text_encoder_of_another_model_is_refused_before_anything_is_encoded(fake_server: Fake) -> None:
    server = fake_server(helpers.VARIANTS["klein"])
    with pytest.raises(RemoteError, match=r"small_klein.*small_dev.*--model"):
        client(server).encode(["a cup"])
    assert server.asked == []


@pytest.mark.parametrize("body", [b"<html>", b"[]", b"{}", b'{"identity": 3}', b"\xff", b'{"a":' * 9000])
def test_another_kind_of_server_is_told(body: bytes, fake_server: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    server = fake_server(VARIANT)
    monkeypatch.setattr(server._server.RequestHandlerClass, "do_GET", lambda self: self.send(200, {}, body))
    with pytest.raises(RemoteError, match=r"python -m flux2\.serve.*/identity\?length=64"):
        client(server).identity()


# ------------------------------------------------------------------ tokens and addresses


def test_an_identity_with_the_token_in_it_is_not_taken(fake_server: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be written beside the cache."""
    server = fake_server(VARIANT, token=SECRET)
    monkeypatch.setenv(TOKEN, SECRET)
    server.identity = f"mistral Bearer {SECRET}"
    with pytest.raises(RemoteError, match=rf"{server.url}\b") as refused:
        client(server).identity()
    assert SECRET not in str(refused.value)


def test_the_token_of_the_environment_is_sent_and_shown_nowhere(
    fake_server: Fake, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    server = fake_server(VARIANT, token=SECRET)
    monkeypatch.setenv(TOKEN, f" {SECRET}\n")
    asking = client(server)
    assert torch.equal(asking.encode(["a cup"])[0], server.embedding("a cup"))
    server.token = "another"
    with pytest.raises(RemoteError, match=r"token.*HTTP 401, Bearer \*\*\* is not welcome") as refused:
        asking.encode(["a cup"])
    server.answer = lambda *_: (503, {}, f"not you, {SECRET}".encode())
    server.token = SECRET
    with pytest.raises(RemoteError, match=r"HTTP 503, not you, \*\*\*"):
        asking.encode(["a cup"])
    assert SECRET not in caplog.text + repr(refused.getrepr(style="long", showlocals=False)) + repr(vars(asking).keys())
    assert caplog.text.count("not you, ***") == 2


def test_a_server_that_wants_a_token_and_gets_none_says_where_it_belongs(fake_server: Fake) -> None:
    server = fake_server(VARIANT, token=SECRET)
    with pytest.raises(RemoteError, match=rf"token.*\b{TOKEN}\b"):
        client(server).identity()
    with pytest.raises(RemoteError, match=r"token.*`hf auth login`"):
        client(server, "published").encode(["a cup"])
    assert [headers.get("Authorization") for headers in server.headers] == [None, None]


def test_a_password_file_of_the_machine_is_not_asked(
    fake_server: Fake, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "netrc").write_text("default login someone password hidden\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    # for this machine nothing of the kind is read
    monkeypatch.setattr(remote_client, "is_loopback", lambda host: False)
    server = fake_server(VARIANT)
    client(server).identity()
    assert "Authorization" not in server.headers[0]


def test_a_server_on_this_machine_is_asked_without_a_proxy(fake_server: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert client(fake_server(VARIANT)).identity()


def test_the_login_of_the_hub_is_for_the_hub_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_client.huggingface_hub, "get_token", lambda: "hf_login")
    for url in (PUBLISHED, "https://huggingface.co", "https://me-mine.hf.space/encode"):
        assert bearer_token(url) == "hf_login"
    for url in (
        PUBLISHED.replace("https", "http"),
        "https://nothuggingface.co/x",
        "https://huggingface.co.evil.org/x",
        "https://evil.org/huggingface.co",
        "http://127.0.0.1:8700",
    ):
        assert bearer_token(url) is None
    monkeypatch.setenv(TOKEN, "mine")
    assert bearer_token(PUBLISHED) == bearer_token("http://127.0.0.1:8700") == "mine"


@pytest.mark.parametrize("token", ["two words", "line\nbreak", "ümlaut"])
def test_a_token_that_no_header_can_hold_is_refused_and_not_shown(token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN, token)
    with pytest.raises(ValueError, match=rf"\b{TOKEN}\b") as error:
        bearer_token(PUBLISHED)
    assert token not in str(error.value)


def test_a_token_that_travels_unencrypted_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(TOKEN, SECRET)
    for url in ("https://192.168.0.7:8700", "http://127.0.0.1:8700", "http://localhost:8700", "http://[::1]:8700"):
        Client(url, VARIANT)
    assert caplog.text == ""
    Client("http://192.168.0.7:8700", VARIANT)
    assert re.search(r"192\.168\.0\.7\b.*https", caplog.text)
    assert SECRET not in caplog.text


@pytest.mark.parametrize(
    "url",
    [
        "",
        "127.0.0.1:8700",
        "ftp://host/x",
        "http://",
        "http:///x",
        "http://host:99999",
        "http://[::1",
        "http://a b",
        7,
        None,
    ],
)
def test_what_is_no_address_is_named(url: object) -> None:
    with pytest.raises(ValueError, match=r"^url="):
        check_url(url)


@pytest.mark.parametrize(
    "url", ["https://me:hidden@host/x", "https://hidden@host", "https://host/x?token=hidden", "https://host/#hidden"]
)
def test_an_address_with_a_secret_in_it_is_refused_and_not_shown(url: str) -> None:
    with pytest.raises(ValueError, match=r"^url=.*password") as error:
        check_url(url)
    assert "hidden" not in str(error.value)


def test_the_published_protocol_has_one_length() -> None:
    with pytest.raises(ValueError, match=r"length=32\b.*\b64\b"):
        Client(PUBLISHED, VARIANT, 32)
    assert Client(PUBLISHED, VARIANT).protocol == "published"
    assert Client("http://127.0.0.1:1/", VARIANT, 32).protocol == "flux2"
