"""POST /caption of flux2.serve: the captions are those of this machine, under the limits of the other routes."""

import base64
import io
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import requests
import torch
from PIL import Image
from remote_helpers import SECRET
from serve_helpers import Running, values, wait_until

from flux2.prompts.captioning import RemoteCaptionModel, caption_source, load_caption_model
from flux2.prompts.remote_client import PUBLISHED, TOKEN
from flux2.prompts.remote_protocol import RemoteError
from flux2.serve import command as serve
from flux2.serve.arguments import arguments
from flux2.weights.sources import ModelSource

pytest_plugins = ("serve_helpers", "writer_helpers")

Start = Callable[..., Running]


@dataclass
class Captioner:
    """Answers with the size of the image; `hold` stops it, `fail` is what it raises."""

    calls: list[str] = field(default_factory=list)
    hold: threading.Event = field(default_factory=threading.Event)
    fail: Exception | None = None

    def __post_init__(self) -> None:
        self.hold.set()

    def describe(
        self, images: Sequence[Image.Image], system: str, request: str, *, seed: int, new_tokens: int, name: str
    ) -> str:
        self.calls.append(request)
        assert self.hold.wait(30)
        if self.fail is not None:
            raise self.fail
        (image,) = images
        return f"{image.width} x {image.height} {image.mode}, {seed}"


def encoded(image: Image.Image, kind: str = "PNG") -> str:
    stream = io.BytesIO()
    image.save(stream, kind)
    return base64.b64encode(stream.getvalue()).decode()


SMALL = encoded(Image.new("RGB", (6, 4), "red"))


def ask(server: Running, headers: dict[str, str] | None = None, **changed: Any) -> requests.Response:
    question = {"image": SMALL, "system": "be brief", "request": "a fox", "seed": 3, "new_tokens": 9} | changed
    return requests.post(f"{server.url}/caption", json=question, headers=headers, timeout=30)


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_a_caption_of_a_server_is_that_of_this_machine(running: Start, writer_source: ModelSource) -> None:
    model = load_caption_model(caption_source(writer_source.path), torch.device("cpu"), torch.float32)
    remote = RemoteCaptionModel(running(captioner=model).url)
    found = []
    for images in ([noise(40, 24)], [noise(16, 16), Image.new("RGB", (24, 16), "blue")], [noise(1000, 800)]):
        asked: dict[str, Any] = {"system": "be brief", "request": "a fox", "seed": 2, "new_tokens": 20, "name": "x"}
        found.append(remote.describe(images, **asked))
        assert found[-1] == model.describe(images, **asked)
    assert len(set(found)) == 3


def test_an_answer_that_fails_is_one_of_its_image_and_others_continue(running: Start) -> None:
    server = running(captioner=(captioner := Captioner()))
    assert ask(server).json() == {"caption": "6 x 4 RGB, 3"}
    captioner.fail = ValueError("answered with an empty text")
    with pytest.raises(ValueError, match=r"x\.png.*empty text") as raised:
        RemoteCaptionModel(server.url).describe([noise(4, 4)], "", "", seed=0, new_tokens=1, name="x.png")
    assert not isinstance(raised.value, RemoteError)
    captioner.fail = torch.OutOfMemoryError("CUDA out of memory")
    assert ask(server).status_code == 503
    captioner.fail = RuntimeError("secret")
    assert (ask(server).status_code, "secret" in ask(server).text) == (500, False)
    captioner.fail = None
    assert ask(server).status_code == 200
    assert values(server.post({"prompts": ["abc"]})) == [3]


def test_captions_need_the_token_and_a_server_that_has_them(running: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    closed, without = running(token=SECRET, captioner=Captioner()), running()
    assert ask(closed).status_code == 401
    assert ask(closed, {"Authorization": f"Bearer {SECRET}"}).status_code == 200
    answer = ask(without)
    assert (answer.status_code, "--captions" in answer.json()["error"]) == (404, True)
    monkeypatch.delenv(TOKEN, raising=False)
    asked: dict[str, Any] = {"system": "", "request": "", "seed": 0, "new_tokens": 1, "name": "x"}
    for server, said in ((closed, TOKEN), (without, "--captions")):
        with pytest.raises(RemoteError, match=said):
            RemoteCaptionModel(server.url).describe([noise(4, 4)], **asked)
    monkeypatch.setenv(TOKEN, SECRET)
    assert RemoteCaptionModel(closed.url).describe([noise(4, 4)], **asked) == "4 x 4 RGB, 0"
    with pytest.raises(ValueError, match="only embeddings"):
        RemoteCaptionModel(PUBLISHED)


@pytest.mark.parametrize(
    ("changed", "status", "said"),
    [
        ({"image": encoded(Image.new("RGB", (769, 768)))}, 422, "769 x 768.*589824"),
        ({"image": encoded(Image.new("RGB", (6, 4)), "JPEG")}, 422, "not a PNG"),
        ({"image": SMALL[:40]}, 422, "not a PNG"),
        ({"image": "%" + SMALL}, 422, "not a PNG in base64"),
        ({"image": 3}, 422, "image"),
        ({"seed": -1}, 422, "seed"),
        ({"seed": 2**63}, 422, "seed"),
        ({"new_tokens": 0}, 422, "new_tokens"),
        ({"new_tokens": 2049}, 422, "new_tokens"),
        ({"system": "x" * 101}, 422, "101 characters.*100"),
        ({"request": "x" * 101}, 422, "101 characters.*100"),
        ({"path": "/etc/passwd"}, 422, "path"),
        ({"image": "A" * 20_001}, 413, "20000 bytes"),
    ],
)
def test_what_is_wrong_is_refused_before_the_model_sees_it(
    running: Start, changed: dict[str, Any], status: int, said: str
) -> None:
    server = running(captioner=(captioner := Captioner()), characters=100, image=20_000)
    answer = ask(server, **changed)
    assert answer.status_code == status
    assert re.search(said, answer.json()["error"])
    assert captioner.calls == []
    assert requests.post(f"{server.url}/caption", data=b"{}", timeout=30).status_code == 415


def test_images_and_prompts_wait_in_one_queue(running: Start) -> None:
    server = running(captioner=(captioner := Captioner()), waiting=2)
    captioner.hold.clear()
    answers: list[requests.Response] = []
    threads = [threading.Thread(target=lambda i=i: answers.append(ask(server, request=f"{i}"))) for i in range(3)]
    for i, thread in enumerate(threads):
        thread.start()
        wait_until(lambda i=i: requests.get(f"{server.url}/health", timeout=30).json()["waiting"] == i)
    for refused in (ask(server), server.post({"prompts": ["a"]})):
        assert (refused.status_code, refused.headers["Retry-After"]) == (503, "2")
    assert server.encoder.calls == []
    captioner.hold.set()
    for thread in threads:
        thread.join(30)
    assert [answer.status_code for answer in answers] == [200] * 3
    assert captioner.calls == ["0", "1", "2"]
    assert requests.get(f"{server.url}/health", timeout=30).json()["waiting"] == 0


def test_the_command_loads_the_language_model_for_dev_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "load_text_encoder", lambda *_: pytest.fail("a model was loaded"))
    for model in ("tiny", "klein_4b"):
        with pytest.raises(ValueError, match=f"--captions.*{model}.*--model dev"):
            serve.run(arguments(["--model", model, "--captions", "--device", "cpu"]))
