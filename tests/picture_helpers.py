"""Folders of small pictures, and what the studio's page of them sends."""

import html
import re
from pathlib import Path

import pytest
from PIL import Image, ImageDraw
from studio_helpers import Page

from train.pages import pictures

pytest_plugins = ("studio_helpers",)


def draw(file: Path, size: tuple[int, int] = (64, 48), seed: int = 0) -> None:
    image = Image.new("RGB", size, (40 * seed % 255, 90, 200))
    ImageDraw.Draw(image).ellipse((seed, seed, size[0] // 2, size[1] // 2), fill=(250, 30 * seed % 255, 20))
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file)


@pytest.fixture
def cats(studio_page, tmp_path: Path) -> Path:
    """Three images, of which two have captions."""
    folder = tmp_path / "opened" / "cats"
    for i, name in enumerate("abc"):
        draw(folder / f"{name}.png", seed=i)
    (folder / "a.txt").write_text("a sks cat\n")
    (folder / "b.txt").write_text("a dog, and a cat\n")
    return folder


@pytest.fixture
def studio(studio_page, monkeypatch):
    """`studio()`, with what it keeps of datasets and images empty."""
    monkeypatch.setattr(pictures, "LIBRARY", pictures.Library())
    monkeypatch.setattr(pictures, "THUMBNAILS", pictures.Thumbnails())
    return studio_page


def fields(page: Page, path: str = "cats", **query: object) -> list[dict[str, str]]:
    """The hidden fields and the text of each caption's form."""
    text = page.get("/pictures", params={"path": path, "resolution": "64", **query}).text
    found = []
    for form in re.findall(r'<form data-post="/pictures/caption".*?</form>', text, re.DOTALL):
        pairs = re.findall(r'name="(\w+)" value="([^"]*)"', form)
        values = {name: html.unescape(value) for name, value in pairs}
        values["caption"] = html.unescape(re.search(r"<textarea[^>]*>\n(.*?)</textarea>", form, re.DOTALL)[1])
        found.append(values)
    return found


def chosen(**other: str) -> dict[str, str]:
    return {"dataset": "folder", "path": "cats", "settings": "", "resolution": "64"} | other


def state_in(shown: str) -> str:
    return re.search(r'name="state" value="(\w+)"', shown)[1]
