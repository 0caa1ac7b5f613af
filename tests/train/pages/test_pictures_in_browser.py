"""The page of pictures in a browser: forms reach the studio, and what is wrong with an image is in its place."""

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import uvicorn
from browser import CHROMIUM, NONE, Browser
from picture_helpers import draw

from flux2.serve.command import bind_socket
from flux2.serve.connections import server_config
from train.pages.app import application

pytest_plugins = ("picture_helpers",)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=NONE)


@pytest.fixture
def address(studio) -> Iterator[str]:
    """Of a studio that serves."""
    with bind_socket("127.0.0.1", 0) as listening:
        host = f"127.0.0.1:{listening.getsockname()[1]}"
        server = uvicorn.Server(server_config(application(replace(studio().known, hosts=frozenset({host})))))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        yield f"http://{host}"
        server.should_exit = True
        thread.join()


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_captions_are_saved_and_problems_are_shown(address, cats, tmp_path):
    draw(cats / "cut.jpg", (300, 300))
    (cats / "cut.jpg").write_bytes((cats / "cut.jpg").read_bytes()[:1500])
    (cats / "cut.txt").write_text("<script>document.title = 'run'</script>")
    with Browser(tmp_path / "profile") as browser:
        browser.size(500, 900)
        browser.open(f"{address}/pictures?path=cats&resolution=64")
        browser.js("document.querySelector('.pictures').lastElementChild.scrollIntoView()")
        until(lambda: "image file is truncated" in browser.js("document.querySelector('main').innerText"))
        assert browser.js("document.documentElement.scrollWidth <= innerWidth")
        browser.js(
            "{const form = document.querySelector('form[data-post=\"/pictures/caption\"]');"
            "form.elements.caption.value = '<b>new</b>'; form.querySelector('button').click()}"
        )
        until(lambda: (cats / "a.txt").read_text() == "<b>new</b>\n")
        until(lambda: "saved" in browser.js("document.querySelector('figure').innerText"))
        browser.js(
            "{const form = document.querySelector('form[data-post=\"/pictures/trigger\"]');"
            "form.elements.trigger.value = 'sks'; form.querySelector('button').click()}"
        )
        until(lambda: "3 captions change" in browser.js("document.querySelector('#changes').innerText"))
        browser.js("document.querySelector('#changes button').click()")
        until(lambda: (cats / "b.txt").read_text() == "sks, a dog, and a cat\n")
        until(lambda: "3 captions are changed" in browser.js("document.querySelector('#changes').innerText"))
        assert browser.js("document.title").startswith("Pictures")
        shutil.rmtree(cats)
        browser.js("document.querySelector('figure form button').click()")
        until(lambda: browser.js("document.querySelector('figure .said.bad')?.innerText"))
        assert not [text for text in browser.complaints if "Content Security Policy" in text or "exception" in text]
