"""The whole way in a browser: images, a caption, a plan, a run that outlives the studio, an image, a file to export."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from browser import CHROMIUM, NONE, Browser
from safetensors import safe_open

from train.config.paths import CONFIG

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason=NONE)]

ROOT = CONFIG.parent
SIZES = [(1400, 900), (500, 900)]


class Served:
    """A studio in a process of its own, in the folder `here`, which can be killed and started again."""

    def __init__(self, here: Path) -> None:
        self.here, self.port = here, 0
        self.start()

    def start(self) -> None:
        command = [sys.executable, str(ROOT / "train" / "studio.py"), "--port", str(self.port)]
        self.process = subprocess.Popen(
            command,
            cwd=self.here,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT), "XDG_STATE_HOME": str(self.here / "state")},
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith("studio at http://127.0.0.1:"), line
        self.port = int(line.rpartition(":")[2])

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def end(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)
        self.process.wait(30)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    here = tmp_path / "here"
    (here / "cards").mkdir(parents=True)
    for file in sorted((ROOT / "data/demo").glob("*.png"))[:8]:
        shutil.copy(file, here / "cards")
        (here / "cards" / f"{file.stem}.txt").write_text(file.stem[3:].replace("_", " ") + "\n")
    studio = Served(here)
    yield studio
    studio.end()


def until(condition: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.2)


def fill(browser: Browser, name: str, value: str) -> None:
    """Type into the field of that name in the page's last form that has one."""
    browser.js(
        f"{{const field = [...document.querySelectorAll('main [name=\"{name}\"]')].at(-1); field.value = {value!r};"
        "field.dispatchEvent(new Event('change', {bubbles: true}))}"
    )


def press(browser: Browser, text: str) -> None:
    browser.js(f"[...document.querySelectorAll('main button')].find(one => one.innerText === {text!r}).click()")


def shown(browser: Browser) -> str:
    return browser.js("document.querySelector('main')?.innerText") or ""


def look(browser: Browser, folder: Path, name: str) -> None:
    """Keep the page as it is at both widths; nothing is wider than a narrow screen."""
    for width, height in SIZES:
        browser.size(width, height)
        assert browser.js("document.documentElement.scrollWidth") <= width, name
        browser.screenshot(folder / f"{name}_{width}.png", whole=True)
    browser.size(*SIZES[0])


def test_from_a_folder_of_images_to_a_file_for_another_program(served, tmp_path):
    shots = tmp_path / "shots"
    shots.mkdir()
    with Browser(tmp_path / "profile") as browser, Browser(tmp_path / "second") as second:
        browser.size(*SIZES[0])
        # pictures: a caption is written in place
        browser.open(f"{served.address}/pictures?path=cards&resolution=128")
        until(lambda: browser.js("document.querySelectorAll('.pictures figure').length") == 8)
        browser.js(
            "{const form = document.querySelector('form[data-post=\"/pictures/caption\"]');"
            "form.elements.caption.value = 'a red cup, a card'; form.querySelector('button').click()}"
        )
        caption = next((served.here / "cards").glob("01*.txt"))
        until(lambda: caption.read_text() == "a red cup, a card\n")
        look(browser, shots, "pictures")

        # a plan, with an error beside its field before
        browser.open(f"{served.address}/start?experiment=style")
        fill(browser, "model", "tiny")
        for name, value in {"dataset.path": "cards", "steps": "none", "optimizer.lr": "2e-3"}.items():
            fill(browser, name, value)
        press(browser, "Plan")
        until(lambda: browser.js("document.querySelector('[name=steps]').getAttribute('aria-invalid')") == "true")
        assert "steps='none' must be an integer" in shown(browser)
        fill(browser, "steps", "20")
        press(browser, "Plan")
        until(lambda: "each is trained 2.5 times" in shown(browser))
        press(browser, "Look at a batch")
        until(lambda: browser.js("document.querySelector('#batch img')?.naturalWidth") == 1596)
        assert "each is trained 2.5 times" in shown(browser)
        look(browser, shots, "start")

        # a run, which goes on while the studio is killed and started again
        press(browser, "Start")
        until(lambda: browser.js("location.pathname") == "/jobs/1")
        second.open(f"{served.address}/runs")
        served.end(signal.SIGKILL)
        served.start()
        second.open(f"{served.address}/jobs/1")
        until(lambda: "best checkpoint" in shown(browser), 240)  # the first page goes on by itself
        until(lambda: browser.js("document.querySelector('main .state')?.innerText") == "done")
        until(lambda: "best checkpoint" in shown(second))
        look(browser, shots, "job")
        (run,) = (served.here / "outputs/style").iterdir()
        folder = f"outputs/style/{run.name}"
        browser.open(f"{served.address}/runs")
        until(lambda: "finished" in shown(browser))
        look(browser, shots, "runs")
        browser.open(f"{served.address}/runs/one?folder={folder}")
        until(lambda: browser.js("document.querySelectorAll('main canvas').length") >= 2)
        until(lambda: "train/run.py +experiment=style" in shown(browser))
        assert "take it away" in shown(browser)
        look(browser, shots, "run")

        # an image with its adapter, and a file for ComfyUI
        browser.open(f"{served.address}/try?adapter={folder}/adapter")
        assert browser.js("document.querySelector('[name=model]').value") == "tiny"
        fill(browser, "prompts", "a red cup")
        press(browser, "Generate")
        until(lambda: browser.js("document.querySelectorAll('main figure img').length") == 1, 120)
        until(lambda: browser.js("document.querySelector('main figure img').naturalWidth") == 128)
        look(browser, shots, "try")
        browser.open(f"{served.address}/export?adapter={folder}/adapter")
        press(browser, "Export")
        file = served.here / "exports/style.safetensors"
        until(file.is_file, 120)
        with safe_open(file, "pt") as opened:
            assert any(name.startswith("diffusion_model.") for name in opened.keys())  # noqa: SIM118
        look(browser, shots, "export")

        # a folder that disappears is one message
        shutil.rmtree(run)
        browser.open(f"{served.address}/runs/one?folder={folder}")
        assert folder in shown(browser)
        assert not [text for text in browser.complaints if "Content Security Policy" in text or "exception" in text]
