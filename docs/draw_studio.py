"""Draw docs/studio.gif: the studio in a browser, from a folder of images to an image with the adapter.

    python docs/draw_studio.py     # needs Chromium; some minutes on two cores

Trains the embedded model for 200 steps on the demo's cards, in a temporary folder, and writes a frame of each page.
"""

import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from browser import Browser
from PIL import Image

FILE = ROOT / "docs" / "studio.gif"
SIZE, SCALE = (1200, 760), 0.75
SECONDS = 2.4  # of a frame
COLORS = 200


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 900
    while not condition():
        if time.monotonic() > end:
            raise SystemExit("error: the studio does not go on")
        time.sleep(0.5)


def frame(browser: Browser, folder: Path, place: str = "body") -> Image.Image:
    """Return the page as it is, scrolled to the last element of a selector."""
    browser.js(f"[...document.querySelectorAll({place!r})].at(-1).scrollIntoView()")
    time.sleep(0.7)
    browser.screenshot(folder / "frame.png")
    image = Image.open(BytesIO((folder / "frame.png").read_bytes())).convert("RGB")
    return image.resize((round(SIZE[0] * SCALE), round(SIZE[1] * SCALE)), Image.Resampling.LANCZOS)


def fill(browser: Browser, **values: str) -> None:
    for name, value in values.items():
        browser.js(
            f"{{const field = [...document.querySelectorAll('main [name=\"{name}\"]')].at(-1); field.value = {value!r};"
            "field.dispatchEvent(new Event('change', {bubbles: true}))}"
        )


def press(browser: Browser, text: str) -> None:
    browser.js(f"[...document.querySelectorAll('main button')].find(one => one.innerText === {text!r}).click()")


def draw(browser: Browser, address: str, folder: Path) -> list[Image.Image]:
    """Go the whole way and return a frame of each page."""

    def has(text: str) -> Callable[[], object]:
        return lambda: text in (browser.js("document.querySelector('main')?.innerText") or "")

    browser.size(*SIZE)
    browser.open(f"{address}/pictures?path=cards&resolution=128")
    until(lambda: browser.js("[...document.images].slice(0, 8).every(image => image.naturalWidth)"))
    frames = [frame(browser, folder)]
    browser.open(f"{address}/start?experiment=style")
    fill(browser, **{"model": "tiny", "dataset.path": "cards", "dataset.captions.trigger": "trtcrd"})
    fill(browser, **{"steps": "200", "optimizer.lr": "2e-3", "buckets.resolution": "128"})
    fill(browser, **{"sample.prompts": "[trtcrd of a green fish, trtcrd of a pink heart, trtcrd of a brown tree]"})
    frames.append(frame(browser, folder))
    press(browser, "Plan")
    until(has("each is trained"))
    frames.append(frame(browser, folder, "#plan"))
    press(browser, "Start")
    until(lambda: browser.js("location.pathname") == "/jobs/1")
    until(has("best checkpoint"))
    (run,) = (folder / "outputs/style").iterdir()
    name = f"outputs/style/{run.name}"
    browser.open(f"{address}/runs/one?folder={name}")
    until(lambda: browser.js("document.querySelectorAll('main canvas').length") >= 2)
    frames += [frame(browser, folder), frame(browser, folder, "main h2")]
    browser.open(f"{address}/try?adapter={name}/adapter")
    fill(browser, prompts="trtcrd of a purple bell\ntrtcrd of a green wheel")
    press(browser, "Generate")
    until(lambda: browser.js("document.querySelectorAll('main figure img').length") == 2)
    frames.append(frame(browser, folder))
    browser.open(f"{address}/export?adapter={name}/adapter")
    return [*frames, frame(browser, folder)]


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        shutil.copytree(ROOT / "data/demo", folder / "cards", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
        for name in ("train", "flux2", "data", "conf"):  # as in a checkout, whose commands have short names
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        command = [sys.executable, "train/studio.py", "--port", "0"]
        server = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True)
        try:
            assert server.stdout is not None
            address = server.stdout.readline().split()[-1]
            with Browser(folder / "profile") as browser:
                frames = draw(browser, address, folder)
        finally:
            server.terminate()
            server.wait(30)
    palette = Image.new("RGB", (frames[0].width, frames[0].height * len(frames)))
    for place, one in enumerate(frames):
        palette.paste(one, (0, place * one.height))
    palette = palette.quantize(COLORS, dither=Image.Dither.NONE)
    drawn = [one.quantize(palette=palette, dither=Image.Dither.NONE) for one in frames]
    drawn[0].save(FILE, save_all=True, append_images=drawn[1:], duration=round(1000 * SECONDS), loop=0, optimize=True)
    print(f"{FILE}: {len(frames)} frames, {FILE.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
