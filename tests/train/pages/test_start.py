"""The studio's form for a run: every setting, its command, its plan, and what is refused."""

import re
import shlex
import sys
from base64 import b64decode
from html import unescape
from io import BytesIO
from pathlib import Path

import pytest
from message_helpers import holds
from PIL import Image
from train_helpers import draw_picture

from train.pages import settings as forms
from train.pages import start
from train.pages.queue import ROOT, Queue, is_known
from train.pages.settings import SettingError

pytest_plugins = ("studio_helpers",)


@pytest.fixture
def page(studio_page, tmp_path):
    return studio_page()


def test_every_setting_of_the_choices_is_there_with_what_it_does():
    found = {one.name: one for one in forms.settings(["+experiment=style", "optimizer=prodigy"])}
    assert found["steps"].comment == "number of optimizer steps"
    assert found["dataset.captions.trigger"].value == "ohwx"
    assert found["dataset.path"].value == "???"
    assert "multiplied by the schedule" in found["optimizer.lr"].comment  # prodigy's own comment
    assert "headroom" in "".join(found)
    assert found["memory.headroom_gb"].comment.startswith("GiB left to other programs")
    assert found["embedding_storage"].comment.startswith("Form in which prompt embeddings are cached")
    assert not [name for name in found if "_target_" in name or name.startswith("hydra")]
    without = [name for name, one in found.items() if not one.comment and "." not in name]
    assert without == []


@pytest.mark.parametrize(
    "value", ["a, b", "it's", 'say "x"', "[a, b]", "0.5", "null", "x=y", "{a}", "a: b", "C:\\a", "trailing\\", "ü 1"]
)
def test_a_value_reaches_the_command_as_it_was_typed(value):
    word = forms.override("dataset.captions.trigger", value)
    found = forms.compose(["dataset=folder", "dataset.path=x", word]).dataset.captions.trigger
    read = {"[a, b]": ["a", "b"], "0.5": 0.5, "null": None}.get(value, value)
    assert (list(found) if value == "[a, b]" else found) == read
    assert shlex.split(forms.typed_command([word]))[-1] == word


@pytest.mark.parametrize(
    ("sent", "field", "said"),
    [
        ({"values": {"steps": "ten"}}, "steps", "steps='ten' must be an integer"),
        ({"values": {"adapter.rank": "-3"}}, "adapter.rank", "adapter.rank=-3"),
        ({"values": {"stepz": "1"}}, "stepz", "no setting"),
        ({"values": {"model._target_": "os.system"}}, "model._target_", "no setting"),
        ({"values": {"name": "${oc.env:HOME}"}}, "name", "interpolations"),
        ({"groups": {"hydra": "x"}}, "hydra", "no group"),
        ({"groups": {"model": "../../x"}}, "model", "not one of ... tiny"),
        ({"groups": {"dataset": "folder"}, "values": {"dataset.path": "/etc"}}, "", "outside of the opened folders"),
        ({"groups": {"dataset": "folder"}, "values": {"dataset.path": "~"}}, "", "outside of the opened folders"),
        ({"values": {"sample.references": "[[/etc/x.png]]"}}, "", "outside of the opened folders"),
        ({"values": {"output_dir": "../x"}}, "", "outside of the opened folders"),
        ({"values": {}, "card": 0.1}, "card", "greater"),
    ],
)
@pytest.mark.parametrize("address", ["/start/plan", "/start/run"])
def test_what_cannot_be_trained_is_said_beside_its_field(page, monkeypatch, address, sent, field, said):
    monkeypatch.setattr(Queue, "start_next", lambda self: None)
    answer = page.submit(address, **sent)
    assert answer["status"] in (400, 403, 422), answer
    assert holds(answer["error"], said)
    assert answer["field"] == field
    assert page.known.queue.jobs() == []


def test_a_plan_is_drawn_with_its_command(page):
    answer = page.submit("/start/plan", groups={"model": "klein_base_4b"}, values={"name": "my run"}, card=24)
    assert answer["status"] == 200
    text = answer["html"]
    assert "It fits 24 GB" in text
    assert "train/run.py model=klein_base_4b &#39;name=my run&#39;" in text
    assert "+card=24" in text
    assert text.count('class="phase"') >= 4
    assert "Lighter on the same GPU" not in text
    assert "prompts of 7.9 MB each" in text
    assert re.search(r"Host memory: \d+\.\d GB \(", text)


def test_a_plan_that_fits_badly_names_what_is_lighter_and_what_encodes(page):
    values = {"batch_size": "1", "name": "<b>"}
    text = page.submit("/start/plan", groups={"model": "dev"}, values=values, card=24)["html"]
    assert re.search(r"Lighter on the same GPU: model=klein_base_4b: [\d.]+ GB and [\d.]+ of host memory", text)
    assert re.search(r"train/run\.py batch_size=1 \S*name=\S*&lt;b&gt;\S* model=klein_base_4b memory=auto", text)
    assert "memory=auto would take text_encoder.storage=int8" in text


def test_a_look_at_a_batch_shows_what_is_trained_first_and_its_command(page, tmp_path, monkeypatch):
    folder = page.known.workspace.folders[0] / "cards"
    folder.mkdir()
    for i in range(3):
        Image.effect_noise((160, 200), 90).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("a <b>card</b>")
    sent = {"groups": {"model": "tiny", "dataset": "folder"}, "values": {"dataset.path": "cards"}}
    answer = page.submit("/start/batch", **sent)
    assert answer["status"] == 200, answer
    kind, _, content = re.search(r'src="data:image/(\w+);base64(,)([^"]+)"', answer["html"]).groups()
    with Image.open(BytesIO(b64decode(content))) as image:
        assert (kind, image.width) == ("jpeg", 1596)
    assert "train/plan.py model=tiny dataset=folder dataset.path=cards +preview=batch.png" in answer["html"]
    assert 'data-post="/start/batch"' in page.get("/start").text
    assert page.known.queue.jobs() == []

    (folder / "1.txt").write_text("")
    answer = page.submit("/start/batch", **sent)
    assert (answer["status"], holds(answer["error"], "1.png has an empty caption")) == (400, True)
    (folder / "1.txt").unlink()
    (tmp_path / "secret.txt").write_text("a secret")
    (folder / "1.txt").symlink_to(tmp_path / "secret.txt")
    assert page.submit("/start/batch", **sent)["status"] == 403
    (folder / "1.txt").unlink()
    (folder / "1.txt").write_text("a card")
    (folder / "2.png").rename(tmp_path / "2.png")
    (folder / "2.png").symlink_to(tmp_path / "2.png")
    assert page.submit("/start/batch", **sent)["status"] == 403
    (folder / "2.png").unlink()
    (folder / "2.txt").unlink()
    monkeypatch.setattr(start, "MOST_SAMPLES", 1)
    answer = page.submit("/start/batch", **sent)
    assert holds(answer["error"], "2 images are too many ... Type: python ... +preview=batch.png")


def test_a_started_run_is_in_the_queue_with_its_folder_and_what_differs_alone(page, monkeypatch):
    monkeypatch.setattr(Queue, "start_next", lambda self: None)
    same = {one.name: one.value for one in forms.settings([]) if one.name in ("seed", "log_every")}
    sent = {"groups": {"model": "tiny"}, "values": {"steps": "7", "name": "mine", **same}}
    answer = page.submit("/start/run", **sent)
    assert answer == {"status": 200, "redirect": "/jobs/1"}
    job = page.known.queue.job(1)
    assert Path(job.command[1]).parts[-2:] == ("train", "run.py")
    assert job.command[2:-1] == ["model=tiny", "steps=7", "name=mine"]
    assert job.command[-1].startswith("output_dir=outputs/mine/")
    assert job.folder.startswith(str(page.known.workspace.outputs / "mine"))
    assert (job.state, job.title) == ("waiting", "train mine")


def test_prompts_are_lines_of_a_list(page, monkeypatch):
    monkeypatch.setattr(Queue, "start_next", lambda self: None)
    assert '<textarea name="sample.prompts"' in page.get("/start").text
    prompts = ["a fox, red", 'say "x" \\', "[a]", "it's"]
    assert page.submit("/start/run", lists={"sample.prompts": prompts})["status"] == 200
    word = page.known.queue.job(1).command[2]
    assert list(forms.compose([word]).sample.prompts) == prompts
    for name, line, said in (
        ("sample.promptz", "a", "no setting"),
        ("sample.prompts", "${oc.env:HOME}", "interpolations"),
        ("sample.references", "/etc/x.png", "outside of the opened folders"),
    ):
        answer = page.submit("/start/run", lists={name: [line]})
        assert answer["status"] in (400, 403), answer
        assert holds(answer["error"], said)
    twice = page.submit("/start/run", lists={"sample.prompts": ["a"]}, values={"sample.prompts": "[b]"})
    assert holds(twice["error"], "given twice")


def test_the_pictures_that_were_looked_at_are_chosen(page, tmp_path):
    text = page.get("/start", params={"experiment": "style", "dataset": "folder", "path": 'a"b'}).text
    assert 'name="dataset.path" value="a&#34;b" data-default=""' in text
    assert 'href="/start?experiment=character&amp;dataset=folder&amp;path=a%22b"' in text
    text = page.get("/start", params={"dataset": "pairs", "path": "x"}).text
    assert re.search(r'<select name="dataset" data-in="groups" data-default="demo"', text)
    assert "<option selected>pairs</option>" in text
    assert page.get("/start", params={"dataset": "../x", "path": "x"}).status_code == 200


def test_the_link_below_pictures_leads_to_a_run_on_them(page):
    folder = page.known.workspace.folders[0] / "my cards & more"
    draw_picture(0, (64, 64)).save(folder.with_suffix(".png"))
    folder.mkdir()
    folder.with_suffix(".png").rename(folder / "a.png")
    text = page.get("/pictures", params={"path": folder.name}).text
    address = unescape(re.search(r'href="(/start[^"]*)"[^>]*>Train on these', text)[1])
    text = page.get(address).text
    assert 'name="dataset.path" value="my cards &amp; more" data-default=""' in text
    assert "<option selected>folder</option>" in text


def test_a_run_on_a_folder_that_is_not_there_is_not_started(page, monkeypatch):
    monkeypatch.setattr(Queue, "start_next", lambda self: None)
    sent = {"groups": {"model": "tiny", "dataset": "folder"}, "values": {"dataset.path": "nowhere"}}
    answer = page.submit("/start/run", **sent)
    assert (answer["status"], answer["field"]) == (400, "dataset.path")
    assert "dataset.path='nowhere' does not exist on this machine" in answer["error"]
    assert page.known.queue.jobs() == []
    assert "&#39;nowhere&#39; does not exist on this machine" in page.submit("/start/plan", **sent)["html"]


def test_a_field_of_null_is_empty_and_stays_null(page, monkeypatch):
    monkeypatch.setattr(Queue, "start_next", lambda self: None)
    assert re.search(r'name="dataset.captions.trigger" value="" data-default="" data-in="values" placeholder="none"',
                     page.get("/start").text)  # fmt: skip
    assert page.submit("/start/run", values={"dataset.captions.trigger": " ", "steps": "3"})["status"] == 200
    assert page.known.queue.job(1).command[2] == "steps=3"


def test_comments_of_the_experiment_are_text(page):
    text = page.get("/start?experiment=style").text
    assert "A style: everything that a prompt" in text
    assert "FLUX Klein Style LoRA System" in text
    assert page.get("/start?experiment=<script>").status_code == 200


def test_an_error_without_a_setting_has_no_field():
    with pytest.raises(SettingError) as error:
        forms.compose(["model=tinny"])
    assert holds(str(error.value), "model=tinny is not one of ... tiny")
    assert error.value.field == "model"


@pytest.mark.parametrize(
    "word",
    [
        "tracker=../../../x/evil",
        "+experiment=../x",
        "config=evil.yaml",
        "hydra/launcher=slurm",
        "+hydra.searchpath=[/x]",
        "defaults=[x]",
        "optimizer._target_=os.system",
        "dataset.captions={_target_:os.system,command:id}",
        "sample.prompts=[{_target_:os.system}]",
        "adapter.targets={a:{_target_:os.system}}",
        "name=${oc.env:HOME}",
        "name=$\\{oc.env\\:HOME\\}",
        "name='${oc.env:HOME}'",
        "~optimizer",
        "steps=1,2",
        "name=a\0b",
        "name=" + "x" * 30_000,
        "--config-dir=/x",
    ],
)
def test_a_word_that_is_not_of_conf_is_refused_everywhere(page, monkeypatch, tmp_path, word):
    with pytest.raises(SettingError):
        forms.check_word(word)
    with pytest.raises(SettingError):
        forms.compose([word])
    assert not is_known([sys.executable, str(ROOT / "train/run.py"), word])
    name, _, value = word.lstrip("+~").partition("=")
    monkeypatch.setattr(Queue, "start_next", lambda self: None)
    for address in ("/start/plan", "/start/run"):
        answer = page.submit(address, groups={"dataset": "folder"}, values={"dataset.path": ".", name: value})
        assert answer["status"] in (400, 403), answer
    assert page.known.queue.jobs() == []


def test_a_path_is_checked_as_it_is_read_in_the_end(page, monkeypatch):
    monkeypatch.setattr(Queue, "start_next", lambda self: None)
    for value in ("'/etc'", '"/etc"'):
        sent = {"dataset.path": value, "dataset.prompt": "x"}
        answer = page.submit("/start/run", groups={"dataset": "folder"}, values=sent)
        assert answer["status"] in (400, 403), answer


def test_nothing_that_a_form_names_is_called(page, tmp_path):
    called = tmp_path / "called"
    for name in ("dataset.captions.trigger", "dataset.mask", "optimizer.lr", "adapter.targets", "adapter.rank"):
        value = f"{{_target_: pathlib.Path.touch, self: {{_target_: pathlib.Path, _args_: ['{called}']}}}}"
        answer = page.submit(
            "/start/plan",
            groups={"dataset": "folder"},
            values={"dataset.path": ".", "dataset.prompt": "x", name: value},
        )
        assert answer["status"] in (400, 403)
    assert not called.exists()


def test_what_has_to_be_given_is_asked_for_first(page):
    text = page.get("/start?experiment=slider").text
    asked = text.partition("All choices")[0]
    for name in ("target.positive", "target.negative", "dataset.path"):
        assert f'name="{name}"' in asked
    assert 'name="target.guidance"' not in asked


def test_a_part_of_the_memory_has_one_color_in_all_phases(page):
    text = page.submit("/start/plan", groups={"model": "klein_base_4b"}, card=24)["html"]
    for name in ("weights of blocks", "libraries (assumed)", "optimizer"):
        colors = set(re.findall(rf'class="part (c\d)"[^>]*title="{re.escape(name)}:', text))
        assert len(colors) == 1
        assert set(re.findall(rf'class="key (c\d)"></span>{re.escape(name)} ', text)) <= colors
