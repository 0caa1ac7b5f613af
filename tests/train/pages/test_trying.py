"""The studio's pages to try adapters and to take them away: the commands, the history, and what is refused."""

import pytest
from message_helpers import holds
from PIL import Image

from flux2.generate.metadata import Record
from train.pages.queue import Queue

pytest_plugins = ("studio_helpers",)

WISH = {"model": "tiny", "prompts": ["a red cup"], "seed": 3, "count": 2}


@pytest.fixture
def page(studio_page, monkeypatch):
    monkeypatch.setattr(Queue, "start_next", lambda self: None)
    return studio_page()


def made(page, name: str, **values) -> str:
    """An image of the history, by its path as the page shows it."""
    record = {"model": "tiny", "prompt": "a red cup", "seed": 1, "width": 64, "height": 64, "steps": 4, "guidance": 1.0}
    folder = page.known.workspace.outputs / "studio/images" / name
    folder.mkdir(parents=True)
    Image.new("RGB", (64, 64)).save(
        folder / "image.png", pnginfo=Record(**{**record, "precision": "fp32", **values}).chunk()
    )
    return page.known.workspace.show(folder / "image.png")


def test_a_wish_is_the_command_of_a_shell(page, tmp_path):
    (tmp_path / "opened" / "cup.png").write_bytes(b"")
    sent = {**WISH, "adapters": ["outputs/a/adapter:0.5", "b.safetensors"], "images": ["cup.png"], "strength": 0.6}
    answer = page.submit("/try", **sent)
    assert answer["status"] == 200, answer
    job = page.known.queue.job(1)
    words = job.shown.split(" --out ")
    assert words[0] == (
        "python -m flux2.generate --model tiny --prompt 'a red cup' --adapter outputs/a/adapter:0.5 "
        "--adapter b.safetensors --image cup.png --strength 0.6 --seed 3 --count 2"
    )
    assert words[1].startswith("outputs/studio/images/")
    assert words[1].endswith("/image.png")
    assert job.shown in answer["message"]
    page.submit("/try", **WISH)
    folders = {page.known.queue.job(number).folder for number in (1, 2)}
    assert len(folders) == 2  # nothing is overwritten, also within one second


def test_a_prompt_is_never_read_as_an_option(page):
    page.submit("/try", **{**WISH, "prompts": ["--out=/etc/passwd"], "seed": 0})
    assert "--prompt=--out=/etc/passwd" in page.known.queue.job(1).command


@pytest.mark.parametrize(
    ("sent", "status", "said"),
    [
        ({"model": "../x"}, 400, "must be one of tiny"),
        ({"prompts": []}, 422, "prompts"),
        ({"adapters": ["/etc/x:0.5"]}, 403, "outside of the opened folders"),
        ({"images": ["../x.png"]}, 403, "outside"),
        ({"mask": "~/x.png"}, 403, "outside"),
        ({"path": "/etc"}, 403, "outside"),
        ({"precision": "fp7"}, 400, "precision"),
        ({"count": 1000}, 422, "count"),
    ],
)
def test_a_wish_that_cannot_be_made_is_one_message(page, sent, status, said):
    answer = page.submit("/try", **{**WISH, **sent})
    assert answer["status"] == status
    assert holds(answer["error"], said)
    assert page.known.queue.jobs() == []


def test_every_image_gives_back_its_settings(page):
    path = made(page, "one", seed=17, prompt="<b>a cup</b>")
    made(page, "two", model="dev")
    folder = page.known.workspace.outputs / "studio/images/broken"
    folder.mkdir()
    (folder / "image.png").write_bytes(b"\x89PNG")
    text = page.get("/try/live").text
    assert text.count("<figure>") == 2
    assert "&lt;b&gt;a cup" in text
    assert "<b>a cup" not in text
    again = page.get("/try", params={"image": path}).text
    assert 'value="17"' in again
    assert "&lt;b&gt;a cup&lt;/b&gt;</textarea>" in again
    assert page.get("/try", params={"image": "outputs/studio/images/broken/image.png"}).status_code == 400


def test_adapters_are_exported_by_the_command_and_nothing_is_overwritten(page, tmp_path):
    sent = {"adapter": "outputs/a/adapter", "format": "comfyui", "out": "exports/mine.safetensors", "strength": 0.5}
    assert page.submit("/export", **sent)["status"] == 200
    assert page.known.queue.job(1).shown == (
        "python -m flux2.export outputs/a/adapter:0.5 --format comfyui --out exports/mine.safetensors"
    )
    (tmp_path / "opened/exports/mine.safetensors").write_bytes(b"")
    for change, field in (({}, "out"), ({"out": "x.txt"}, "out"), ({"format": "zip"}, "format"), ({"out": ""}, "out")):
        answer = page.submit("/export", **{**sent, **change})
        assert (answer["status"], answer["field"]) == (400, field)
    assert page.submit("/export", **{**sent, "out": "/tmp/x.safetensors"})["status"] == 403
    assert page.submit("/export", **{**sent, "adapter": "/etc"})["status"] == 403


def test_a_push_names_its_repository_and_no_token(page, tmp_path):
    answer = page.submit("/export/push", run="outputs/a", repo_id="me/mine", private=False)
    assert answer["status"] == 200
    assert page.known.queue.job(1).shown == "python -m train.hub outputs/a --repo-id me/mine --public"
    assert page.submit("/export/push", run="outputs/a", repo_id="not a name", private=True)["status"] == 400


def test_pages_without_runs_say_so(page):
    assert "no finished adapter" in page.get("/export").text
    assert page.get("/try").status_code == 200
    assert page.get("/export", params={"adapter": "outputs/gone/adapter"}).status_code == 400


@pytest.mark.parametrize(
    ("trained", "drawn"), [("klein_base_4b", "klein_4b"), ("klein_4b", "klein_4b"), ("dev", "dev")]
)
def test_an_adapter_is_tried_with_the_fast_model_that_it_fits(page, trained, drawn):
    run = page.known.workspace.outputs / "mine" / "1"
    (run / "adapter").mkdir(parents=True)
    (run / "config.yaml").write_text(f"steps: 1\nmodel: {{name: {trained}}}\n")
    assert f"<option selected>{drawn}</option>" in page.get("/try", params={"adapter": "outputs/mine/1/adapter"}).text
