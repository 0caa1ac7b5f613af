"""Captions that are edited on the page of pictures: one, many, by a command, and none is lost."""

import html
import json
import os
import re
import shutil
import threading
import time
from pathlib import Path

import pytest
from picture_helpers import chosen, draw, fields, state_in
from PIL import Image
from studio_helpers import HOST

from flux2.prompts.captioning import TEMPLATES
from train.pages import pictures
from train.utils import caption_files

pytest_plugins = ("picture_helpers",)


# ------------------------------------------------------------------ captions


def test_a_caption_is_saved_in_place_and_shown_as_saved(studio, cats):
    page = studio()
    a, _, c = fields(page)
    answer = page.submit("/pictures/caption", **{**a, "caption": "  a new <caption>\n"})
    assert (cats / "a.txt").read_text() == "a new <caption>\n"
    assert "saved" in answer["html"]
    assert "a new &lt;caption&gt;" in answer["html"]
    state = re.search(r'name="state" value="(\w+)"', answer["html"])[1]
    page.submit("/pictures/caption", **{**a, "caption": "again", "state": state})
    assert (cats / "a.txt").read_text() == "again\n"
    page.submit("/pictures/caption", **{**c, "caption": "the first of c"})
    assert (cats / "c.txt").read_text() == "the first of c\n"
    before = (cats / "b.txt").stat().st_mtime_ns
    b = fields(page)[1]
    assert "nothing to save" in page.submit("/pictures/caption", **b)["html"]
    assert (cats / "b.txt").stat().st_mtime_ns == before


def test_captions_of_metadata_are_saved_in_their_lines(studio, cats):
    rows = [{"file_name": "a.png", "text": "one"}, {"file_name": "b.png", "text": ["x", "y"]}, {"file_name": "c.png"}]
    (cats / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = studio()
    a, b, c = fields(page)
    assert b["caption"] == "x\ny"
    for form, text in ((a, "two"), (b, "x\n\nz\nu"), (c, "three")):
        assert page.submit("/pictures/caption", **{**form, "caption": text})["status"] == 200
    found = [json.loads(line) for line in (cats / "metadata.jsonl").read_text().splitlines()]
    assert [row["text"] for row in found] == ["two", ["x", "z", "u"], "three"]


def test_two_pages_that_edit_one_caption_lose_nothing(studio, cats):
    page = studio()
    first, second = fields(page)[0], fields(page)[0]
    assert page.submit("/pictures/caption", **{**first, "caption": "of the first"})["status"] == 200
    answer = page.submit("/pictures/caption", **{**second, "caption": "of the second"})
    assert (answer["status"], answer["field"]) == (409, "caption")
    assert "cats/a.txt was changed since this page read it, and is kept" in answer["error"]
    assert (cats / "a.txt").read_text() == "of the first\n"
    (cats / "b.txt").write_text("of an editor")
    assert page.submit("/pictures/caption", **{**fields(page)[1], "caption": "mine"})["status"] == 200
    forms, answers = fields(page), list[dict]()
    threads = [
        threading.Thread(
            target=lambda i=i: answers.append(page.submit("/pictures/caption", **{**forms[0], "caption": f"text {i}"}))
        )
        for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answer["status"] for answer in answers).count(200) == 1


@pytest.mark.parametrize("change", ["edited", "gone", "new", "line", "unreadable"])
def test_a_file_that_changed_since_the_page_read_it_is_kept(studio, cats, change):
    if change == "line":
        rows = [json.dumps({"file_name": f"{name}.png", "text": name}) for name in "abc"]
        (cats / "metadata.jsonl").write_text("\n".join(rows))
    page = studio()
    a, _, c = fields(page)
    if change == "edited":
        (cats / "a.txt").write_text("of an editor")
    elif change == "gone":
        shutil.rmtree(cats)
    elif change == "new":
        a, _ = c, (cats / "c.txt").write_text("of an editor")
    elif change == "line":
        (cats / "metadata.jsonl").write_text("\n".join([rows[2], *rows[:2]]))
    else:
        (cats / "a.txt").write_bytes(b"\xff")
    before = {file: file.read_bytes() for file in cats.glob("*")}
    answer = page.submit("/pictures/caption", **{**a, "caption": "mine"})
    assert answer["status"] in (400, 409)
    assert answer["error"].count("cats") == 1
    assert {file: file.read_bytes() for file in cats.glob("*")} == before


@pytest.mark.parametrize("text", ["", " \n", "a\0b", "\ud800", "x" * 100_001])
def test_a_caption_that_training_could_not_use_is_not_saved(studio, cats, text):
    page = studio()
    body = json.dumps({**fields(page)[0], "caption": text})
    headers = {"Origin": f"http://{HOST}", "Content-Type": "application/json"}
    answer = page.post("/pictures/caption", content=body, headers=headers)
    assert answer.status_code in (400, 422)
    assert (cats / "a.txt").read_text() == "a sks cat\n"


def test_a_folder_that_cannot_be_written_is_one_message(studio, cats, monkeypatch):
    page = studio()
    a, _, c = fields(page)

    def read_only(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(caption_files, "atomic_write", read_only)
    for form, name in ((a, "a"), (c, "c")):
        answer = page.submit("/pictures/caption", **{**form, "caption": "mine"})
        assert (answer["status"], answer["field"]) == (400, "caption")
        assert answer["error"] == f"cats/{name}.txt cannot be written (Permission denied)"
    shown = page.submit("/pictures/trigger", **chosen(), trigger="word")["html"]
    answer = page.submit("/pictures/trigger", **chosen(), trigger="word", state=state_in(shown))
    told = "0 captions of 2 are changed, and no more: cats/a.txt cannot be written (Permission denied)"
    assert (answer["status"], answer["error"]) == (400, told)
    assert (cats / "a.txt").read_text() == "a sks cat\n"


def test_a_file_that_cannot_be_written_keeps_all_as_they_are(studio, cats, monkeypatch):
    page = studio()
    shown = page.submit("/pictures/trigger", **chosen(), trigger="word")["html"]
    before = {file: file.read_bytes() for file in cats.glob("*")}
    access = os.access
    monkeypatch.setattr(os, "access", lambda file, mode: Path(file).name != "b.txt" and access(file, mode))
    answer = page.submit("/pictures/trigger", **chosen(), trigger="word", state=state_in(shown))
    assert answer["error"] == f"nothing is written: {cats / 'b.txt'} is read-only, and is kept"
    assert {file: file.read_bytes() for file in cats.glob("*")} == before


def test_captions_that_are_in_no_file_are_shown_and_not_written(studio, cats):
    page = studio()
    assert fields(page, settings="dataset.prompt='one for all'") == []
    (cats / "metadata.csv").write_text("file_name,text\na.png,of a table\n")
    assert fields(page) == []
    assert "of a table" in page.get("/pictures", params={"path": "cats"}).text
    shown = page.submit("/pictures/replace", **chosen(), find="table", by="x")["html"]
    assert "1 more would change" in shown


def test_what_is_trained_is_shown_where_it_differs(studio, cats):
    text = studio().get("/pictures", params={"path": "cats", "settings": "dataset.captions.trigger=sks"}).text
    assert "Trained as: sks, a dog, and a cat" in text
    assert "Trained as: a sks cat" not in text


# ------------------------------------------------------------------ many captions


def test_a_trigger_word_is_put_into_all_captions_that_lack_it(studio, cats):
    page = studio()
    assert len(fields(page, show="trigger", trigger="sks")) == 1
    shown = page.submit("/pictures/trigger", **chosen(), trigger="sks")["html"]
    assert "1 caption changes" in shown
    assert "sks, a dog, and a cat" in shown
    assert (cats / "b.txt").read_text() == "a dog, and a cat\n"
    done = page.submit("/pictures/trigger", **chosen(), trigger="sks", state=state_in(shown))["html"]
    assert "1 caption is changed" in done
    assert (cats / "b.txt").read_text() == "sks, a dog, and a cat\n"
    assert (cats / "a.txt").read_text() == "a sks cat\n"
    assert "No caption changes" in page.submit("/pictures/trigger", **chosen(), trigger="sks")["html"]
    assert page.submit("/pictures/trigger", **chosen(), trigger=" ")["field"] == "trigger"


def test_a_replacement_is_shown_and_then_made_everywhere(studio, cats):
    page = studio()
    shown = page.submit("/pictures/replace", **chosen(), find="cat", by="lynx")["html"]
    assert "2 captions change" in shown
    page.submit("/pictures/replace", **chosen(), find="cat", by="lynx", state=state_in(shown))
    assert (cats / "a.txt").read_text() == "a sks lynx\n"
    assert (cats / "b.txt").read_text() == "a dog, and a lynx\n"
    assert page.submit("/pictures/replace", **chosen(), find="", by="x")["field"] == "find"
    answer = page.submit("/pictures/replace", **chosen(), find="a sks lynx", by="")
    assert answer["error"].startswith("nothing is written: cats/a.png then has an empty caption")


def test_a_change_of_many_that_was_shown_otherwise_is_not_made(studio, cats):
    page = studio()
    shown = page.submit("/pictures/replace", **chosen(), find="cat", by="lynx")["html"]
    (cats / "b.txt").write_text("three cats")
    answer = page.submit("/pictures/replace", **chosen(), find="cat", by="lynx", state=state_in(shown))
    assert (answer["status"], "were changed since they were shown" in answer["error"]) == (409, True)
    assert (cats / "a.txt").read_text() == "a sks cat\n"


def test_lines_of_one_metadata_file_are_changed_together(studio, cats, monkeypatch):
    rows = [{"file_name": f"{name}.png", "text": f"{name} cat"} for name in "abc"]
    (cats / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    page, written = studio(), []
    shown = page.submit("/pictures/trigger", **chosen(), trigger="sks")["html"]
    monkeypatch.setattr(
        caption_files,
        "_replace",
        lambda file, text, write, real=caption_files._replace: (
            written.extend([file] * write),
            real(file, text, write=write),
        ),
    )
    page.submit("/pictures/trigger", **chosen(), trigger="sks", state=state_in(shown))
    assert len(written) == 1
    found = [json.loads(line)["text"] for line in (cats / "metadata.jsonl").read_text().splitlines()]
    assert found == ["sks, a cat", "sks, b cat", "sks, c cat"]


# ------------------------------------------------------------------ commands


def test_missing_captions_are_written_by_the_command_in_the_queue(studio, cats, monkeypatch):
    assert set(TEMPLATES) == set(pictures.TEMPLATES)
    page = studio()
    text = html.unescape(page.get("/pictures", params={"path": "cats"}).text)
    command = "train/caption.py dataset=folder dataset.path=cats caption.template=subject"
    assert command in text
    monkeypatch.setattr(page.known.queue, "start_next", lambda: None)
    form = chosen(settings="dataset.recursive=true buckets.step=32")
    more = "caption.model=my model\ndevice=cuda:1"
    answer = page.submit("/pictures/write", **form, template="style", more=more, action="show")
    wanted = "dataset.recursive=true caption.template=style 'caption.model=my model' device=cuda:1"
    assert wanted in html.unescape(answer["html"])
    assert page.known.queue.jobs() == []
    page.submit("/pictures/write", **form, template="style", more=more, action="queue")
    (job,) = page.known.queue.jobs()
    assert job.shown.endswith(wanted)
    assert (job.title, job.device) == ("captions for 1 image of cats", "cuda:1")
    for other, field in (("steps=3", "more"), ("caption.model=${oc.env:HOME}", "more")):
        assert page.submit("/pictures/write", **form, template="style", more=other, action="queue")["field"] == field
    assert page.submit("/pictures/write", **form, template="x", more="", action="queue")["field"] == "template"
    (cats / "c.txt").write_text("third")
    answer = page.submit("/pictures/write", **form, template="style", more="", action="queue")
    assert "nothing to write" in answer["error"]


def test_near_duplicates_are_marked_after_the_search(studio, cats):
    Image.open(cats / "a.png").resize((128, 96)).save(cats / "copy.jpg", quality=70)
    page = studio()
    answer = page.submit("/pictures/near", **chosen())
    assert "job 1 is in the queue" in answer["message"]
    until = time.monotonic() + 60
    while page.known.queue.job(1).is_active:
        assert time.monotonic() < until
        time.sleep(0.1)
    assert "4 images compared: 2 look alike, in 1 group" in page.known.queue.tail(1)
    text = page.get("/pictures", params={"path": "cats", "show": "alike"}).text
    assert text.count("alike 1") == text.count("<figure>") == 2
    draw(cats / "copy.jpg", seed=6)
    text = page.get("/pictures", params={"path": "cats"}).text
    assert "alike 1" not in text
    assert "1 are new or changed since" in text
