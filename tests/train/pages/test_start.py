"""The studio's form for a run: every setting, its command, its plan, and what is refused."""

import re
import shlex
from pathlib import Path

import pytest
from message_helpers import holds

from train.pages import settings as forms
from train.pages.queue import Queue
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


def test_comments_of_the_experiment_are_text(page):
    text = page.get("/start?experiment=style").text
    assert "A style: everything that a prompt" in text
    assert "FLUX Klein Style LoRA System" in text
    assert page.get("/start?experiment=<script>").status_code == 200


def test_an_error_without_a_setting_has_no_field():
    with pytest.raises(SettingError) as error:
        forms.compose(["model=tinny"])
    assert (str(error.value), error.value.field) == ("model=tinny is not a choice; did you mean tiny?", "model")


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
