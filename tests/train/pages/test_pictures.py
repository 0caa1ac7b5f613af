"""The page of pictures: what it shows of a dataset."""

import html
import io
import re
import shutil
import time

import pytest
from picture_helpers import chosen, draw, fields
from PIL import Image

from data.sources import Folder
from data.sources.base import BadData
from train.pages import pictures

pytest_plugins = ("picture_helpers",)

HTML = "</textarea><script>alert(1)</script>"


# ------------------------------------------------------------------ what is shown


def test_it_shows_sizes_buckets_crops_and_problems_as_training_tells_them(studio, cats):
    draw(cats / "wide.png", (200, 64), 5)
    (cats / "wide.txt").write_text("wide")
    draw(cats / "tiny.png", (17, 17))
    (cats / "tiny.txt").write_text("tiny")
    (cats / "broken.png").write_bytes(b"no image")
    (cats / "broken.txt").write_text("broken")
    text = html.unescape(studio().get("/pictures", params={"path": "cats", "resolution": "128"}).text)
    with pytest.raises(BadData) as told:
        Folder("cats")
    assert str(told.value).split("\n")[0] in text
    for bad in told.value.bad:
        assert f"{bad.name} {bad.reason}" in text
    assert {bad.name for bad in told.value.bad} == {"cats/broken.png", "cats/c.png"}
    assert "cats/tiny.png has 17 x 17 pixels, too few for buckets.min_resolution of 32" in text
    assert "200 x 64 → 128 x 64, 36.0 % cropped" in text
    assert 'style="inset: 0.00% 18.00%"' in text
    assert "64 x 48 → 64 x 48<" in text


def test_masks_references_and_rejected_images_are_shown_with_their_image(studio, cats, tmp_path):
    opened = tmp_path / "opened"
    page = studio()
    (cats / "c.txt").write_text("third")
    for name in "abc":
        draw(cats / "masks" / f"{name}.png")
        draw(opened / "edit/target" / f"{name}.png")
        (opened / "edit/target" / f"{name}.txt").write_text("do it")
        draw(opened / "edit/source" / f"{name}.png", (96, 96), 3)
        draw(opened / "better/chosen" / f"{name}.png")
        (opened / "better/chosen" / f"{name}.txt").write_text("a cat")
        draw(opened / "better/rejected" / f"{name}.png", seed=7)

    def shown(**query: str) -> list[str]:
        text = page.get("/pictures", params={"resolution": "64", **query}).text
        roles = re.findall(r"<span>((?:mask|reference|rejected)[^<]*)</span>", text)
        for address in re.findall(r'src="([^"]+)"', text):
            assert page.get(html.unescape(address)).headers["content-type"].startswith(("image/", "text/javascript"))
        return roles

    assert shown(path="cats", settings="dataset.mask=masks") == ["mask, 64 x 48"] * 3
    assert shown(path="edit", dataset="pairs") == ["reference 1, 96 x 96, trained at 64 x 64"] * 3
    assert shown(path="better", dataset="preference") == ["rejected, 64 x 48"] * 3


def test_captions_and_names_are_text(studio, cats):
    draw(cats / "<img src=x onerror=alert(1)>.png")
    (cats / "<img src=x onerror=alert(1)>.txt").write_text(HTML)
    page = studio()
    text = page.get("/pictures", params={"path": "cats", "search": HTML, "trigger": HTML}).text
    assert "<script>alert" not in text
    assert "<img src=x" not in text
    assert html.escape(HTML, quote=False) in text
    shown = page.submit("/pictures/replace", **chosen(), find="alert", by="<b>")["html"]
    assert "<script>" not in shown
    assert "<b>" not in shown


def test_what_looks_like_a_secret_is_not_masked_where_it_would_be_saved(studio, cats):
    secret = "hf_abcdefghijklmnopqrstuvwxyz1234"
    (cats / "a.txt").write_text(f"a sign that says {secret}")
    assert fields(studio())[0]["caption"] == f"a sign that says {secret}"


@pytest.mark.parametrize(
    ("query", "status", "told"),
    [
        ({"path": "none"}, 400, "dataset.path='none' does not exist"),
        ({"path": "/etc"}, 400, "python train/studio.py /etc"),
        ({"path": "cats", "dataset": "none"}, 400, "dataset='none' is not one of"),
        ({"path": "cats", "settings": "dataset.recurive=true"}, 400, "did you mean dataset.recursive?"),
        ({"path": "cats", "settings": "steps=3"}, 400, "is no setting of dataset or buckets"),
        ({"path": "cats", "settings": "dataset._target_=os.system"}, 400, "is no setting"),
        ({"path": "cats", "settings": "'dataset.captions={_target_: os.getcwd}'"}, 400, "_target_ is no setting"),
        ({"path": "cats", "settings": "dataset.prompt=${oc.env:HOME}"}, 400, "work in a shell only"),
        ({"path": "cats", "settings": "dataset.mask=../../secret"}, 400, "is outside of the opened folders"),
        ({"path": "cats", "settings": "'"}, 400, "cannot be read"),
        ({"path": "cats", "resolution": "17"}, 400, "resolution=17"),
        ({"path": "cats", "resolution": "x"}, 400, "must be a side in pixels"),
        ({"path": "owner/name", "dataset": "huggingface"}, 400, "is not on this machine"),
        ({"path": "cats\0"}, 400, "null character"),
        ({"path": "cats", "page": "0"}, 422, "page: "),
    ],
)
def test_what_cannot_be_shown_is_one_message(studio, cats, query, status, told):
    answer = studio().get("/pictures", params=query)
    assert answer.status_code == status
    text = html.unescape(answer.text)
    assert told in text
    assert "Traceback" not in text


def test_a_link_to_a_folder_elsewhere_is_refused(studio, cats, tmp_path):
    draw(tmp_path / "secret/x.png")
    (tmp_path / "secret/x.txt").write_text("secret words")
    (cats / "link").symlink_to(tmp_path / "secret")
    (cats / "one.png").symlink_to(tmp_path / "secret/x.png")
    (cats / "one.txt").write_text("one")
    page = studio()
    text = page.get("/pictures", params={"path": "cats", "settings": "dataset.recursive=true"}).text
    assert "is outside of the opened folders" in text
    assert "secret words" not in text
    answer = page.get("/pictures/image", params={"path": "cats", "name": "cats/one.png"})
    assert (answer.status_code, "outside of the opened folders" in answer.json()["error"]) == (400, True)


def test_folders_with_images_are_offered(studio, cats):
    page = studio()
    assert 'href="/pictures?path=cats"' in page.get("/pictures").text
    shutil.rmtree(cats)
    assert "hold no images" in page.get("/pictures").text


def test_ten_thousand_images_are_sixty_a_page(studio, tmp_path):
    folder = tmp_path / "opened/many"
    draw(folder / "00000.jpg")
    for i in range(10_000):
        if i:
            (folder / f"{i:05d}.jpg").hardlink_to(folder / "00000.jpg")
        (folder / f"{i:05d}.txt").write_text(f"number {i}")
    page = studio()
    start = time.monotonic()
    text = page.get("/pictures", params={"path": "many", "resolution": "64", "page": 167}).text
    assert time.monotonic() - start < 60
    assert "10,000 images, page 167 of 167" in text
    assert text.count("<figure>") == 10_000 - 166 * 60
    assert len(text) < 500_000
    assert (
        page.get("/pictures", params={"path": "many", "resolution": "64", "page": 10**6}).text.count("<figure>") == 40
    )
    found = page.get("/pictures", params={"path": "many", "resolution": "64", "search": "number 9876"}).text
    assert found.count("<figure>") == 1


# ------------------------------------------------------------------ small images


def test_thumbnails_are_small_kept_within_a_limit_and_made_again_when_the_file_changes(studio, cats, monkeypatch):
    draw(cats / "large.png", (2000, 1000))
    page, thumbnails = studio(), pictures.Thumbnails(most_bytes=4000)
    monkeypatch.setattr(pictures, "THUMBNAILS", thumbnails)

    def get(name: str, **query: object) -> Image.Image:
        answer = page.get("/pictures/image", params={"path": "cats", "name": f"cats/{name}", **query})
        assert answer.headers["content-type"] == "image/jpeg", answer.text
        return Image.open(io.BytesIO(answer.content))

    assert get("large.png").size == (320, 160)
    assert get("large.png", side=1600).size == (1600, 800)
    assert sum(map(len, thumbnails._kept.values())) == thumbnails._bytes <= 4000
    before = get("a.png").tobytes()
    draw(cats / "a.png", seed=5)
    assert get("a.png").tobytes() != before
    answer = page.get("/pictures/image", params={"path": "cats", "name": "cats/a.png", "side": 5})
    assert (answer.status_code, answer.json()["error"]) == (400, "side=5 is not one of 320, 1600")


def test_an_image_that_cannot_be_shown_is_one_message(studio, cats):
    draw(cats / "cut.png", (300, 300))
    content = (cats / "cut.png").read_bytes()
    (cats / "cut.png").write_bytes(content[: len(content) // 2])
    (cats / "cut.txt").write_text("cut")
    Image.new("1", (10_000, 6_000)).save(cats / "huge.png")
    (cats / "huge.txt").write_text("huge")
    page = studio()
    page.get("/pictures", params={"path": "cats"})

    def told(name: str) -> str:
        answer = page.get("/pictures/image", params={"path": "cats", "name": name})
        assert answer.status_code == 400
        return answer.json()["error"]

    assert told("cats/cut.png").startswith("cats/cut.png cannot be read (OSError: image file is truncated")
    assert told("cats/huge.png") == "cats/huge.png has 10000 x 6000 pixels, too many to show it small"
    assert told("/etc/passwd") == "/etc/passwd is not in the dataset any more"
    shutil.rmtree(cats)
    assert told("cats/a.png") == "cats/a.png does not exist"
    assert html.unescape(page.get("/pictures", params={"path": "cats"}).text).count("does not exist") == 1


def test_a_caption_that_a_link_leads_to_outside_is_not_shown(studio, cats, tmp_path):
    (tmp_path / "secret").write_text("the secret")
    (cats / "a.txt").unlink()
    (cats / "a.txt").symlink_to(tmp_path / "secret")
    answer = studio().get("/pictures", params={"path": "cats"})
    assert "the secret" not in answer.text
    assert "outside of the opened folders" in answer.text
