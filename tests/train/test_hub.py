import itertools
import json
import re
import shlex
import shutil
import socket
from types import SimpleNamespace

import adapter_helpers
import huggingface_hub
import pytest
from huggingface_hub import ModelCard, constants
from huggingface_hub.errors import LocalTokenNotFoundError, RepositoryNotFoundError
from markdown_it import MarkdownIt
from message_helpers import holds
from train_helpers import draw_picture, refusal

from flux2 import adapters
from flux2.export import arguments as export_arguments
from flux2.models.variants import VARIANTS
from train.hub import main
from train.publishing import model_card
from train.publishing.hub import HubSettings, push_or_warn
from train.publishing.model_card import ModelCardData
from train.run import main as training_command

pytest_plugins = ("train_helpers",)

ME = {"name": "jane", "orgs": [{"name": "cards"}], "auth": {"accessToken": {"role": "write"}}}
TOKEN = "hf_" + "Qz7" * 11 + "x"


def not_found():
    response = SimpleNamespace(headers={}, status_code=404, request=None)
    return RepositoryNotFoundError("404", response=response)


class Hub:
    """In the place of HfApi: remembers what it is asked, and fails where it is told to."""

    def __init__(self):
        self.me, self.repos, self.uploaded, self.fails = dict(ME), {}, {}, {}

    def __call__(self):
        return self

    def fail(self, what):
        if what in self.fails:
            raise self.fails[what]

    def whoami(self):
        self.fail("whoami")
        return self.me

    def model_info(self, repo_id):
        self.fail("model_info")
        if repo_id not in self.repos:
            raise not_found()
        return SimpleNamespace(private=self.repos[repo_id])

    def create_repo(self, repo_id, *, private, exist_ok):
        assert exist_ok
        self.fail("create_repo")
        whole = repo_id if "/" in repo_id else f"{self.me['name']}/{repo_id}"
        self.repos.setdefault(whole, private)
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{whole}")

    def upload_folder(self, *, repo_id, folder_path, commit_message, ignore_patterns):
        self.fail("upload_folder")
        self.uploaded[repo_id] = {file.name: file.read_bytes() for file in folder_path.iterdir()}


@pytest.fixture
def there(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "HfApi", found := Hub())
    return found


# ------------------------------------------------------------------ before training


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"push": True}, r"hub\.push=true.*hub\.repo_id="),
        ({"push": "yes"}, r"hub\.push='?yes'?.*true.*false"),
        ({"private": None}, r"hub\.private=(None|null)"),
        ({"repo_id": "a/b/c"}, r"hub\.repo_id='?a/b/c"),
        ({"repo_id": "my cards"}, r"hub\.repo_id='?my cards"),
    ],
)
def test_a_refused_setting_is_named_with_its_value(settings, said):
    with pytest.raises(ValueError, match=said):
        HubSettings(**settings)


@pytest.mark.parametrize("repo", ["jane/tarot", "Jane/tarot", "cards/tarot", "tarot"])
def test_a_login_that_may_write_there_is_enough(there, repo):
    HubSettings(True, repo).check()
    assert there.repos == {}  # nothing is made before there is something to push


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda it: it.fails.update(whoami=LocalTokenNotFoundError("no token found")), "hf auth login"),
        (lambda it: it.fails.update(whoami=ConnectionError(f"no route, {TOKEN}")), "login"),
        (lambda it: it.me.update(auth={"accessToken": {"role": "read"}}), "token ... read"),
        (lambda it: it.me.update(name="john", orgs=[]), "jane/tarot ... john"),
        (lambda it: it.repos.update({"jane/tarot": False}), "hub.private=false"),
        (lambda it: it.fails.update(model_info=OSError("503")), "503"),
    ],
)
def test_what_would_fail_in_the_end_fails_before_training(there, change, said):
    change(there)
    with pytest.raises(ValueError, match=r"hub\.\w+=") as error:
        HubSettings(True, "jane/tarot").check()
    assert holds(str(error.value), said)
    assert TOKEN not in str(error.value)
    HubSettings(False, "jane/tarot").check()  # nothing is asked for what is not pushed


def test_a_public_place_is_taken_if_that_is_asked_for(there):
    there.repos["jane/tarot"] = False
    HubSettings(True, "jane/tarot", private=False).check()


def test_without_network_by_choice_nothing_can_be_pushed(there, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"HF_HUB_OFFLINE=1 .*python -m train\.hub RUN_FOLDER"):
        HubSettings(True, "jane/tarot").check()
    with pytest.raises(ValueError, match=r"HF_HUB_OFFLINE=1"):
        HubSettings(True, "jane/tarot").check(trained=True)


def test_a_run_asks_the_hub_before_anything_is_loaded(small, there, monkeypatch, tmp_path):
    there.me["name"], there.me["orgs"] = "john", []
    monkeypatch.setattr("train.stages.data.prepare", lambda *_: pytest.fail("the check came too late"))
    settings = [f"output_dir={tmp_path / 'run'}", "hub.push=true", "hub.repo_id=jane/tarot"]
    assert holds(refusal(*small(*settings), task=training_command), "hub.repo_id=jane/tarot ... john")
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------ at the end


@pytest.fixture
def finished(run_command, small, there, tmp_path):
    """A run that has pushed its adapter; gives its folder and what it said."""
    settings = [
        *(f"output_dir={tmp_path / 'run'}", "steps=2", "sample_every=2", "sample.steps=1", "validate_every=2"),
        *("sample.prompts=[a red cup]", "dataset.captions.trigger=trtcrd", "hub.push=true", "hub.repo_id=jane/tarot"),
    ]
    code, out, err = run_command(*small(*settings, kind="klein"))
    assert code == 0, err
    return tmp_path / "run", out


def test_the_adapter_goes_to_the_hub_with_its_card_and_may_go_again(finished, there, capfd):
    run, out = finished
    assert "pushed    https://huggingface.co/jane/tarot\n" in out
    assert there.repos == {"jane/tarot": True}
    sent = there.uploaded["jane/tarot"]
    assert sent == {file.name: file.read_bytes() for file in (run / "adapter").iterdir()}
    assert sent.keys() == {
        *("README.md", "samples.png", "samples_base.png"),
        *("adapter_config.json", "adapter_model.safetensors", "diffusers.safetensors"),
    }
    assert sent["samples.png"] == (run / "samples" / "step_000002.png").read_bytes()
    assert sent["samples_base.png"] == (run / "samples" / "step_000000.png").read_bytes()

    # as a command: only to where it is told, because a run folder may come from someone else
    there.uploaded.clear()
    assert main([str(run)]) == 2
    assert "--repo-id jane/tarot" in capfd.readouterr().err
    assert there.uploaded == {}
    assert main([str(run), "--repo-id", "jane/tarot"]) == 0
    assert main([str(run), "--repo-id", "cards/public", "--public"]) == 0
    assert capfd.readouterr().out.split() == [
        f"https://huggingface.co/{name}" for name in ("jane/tarot", "cards/public")
    ]
    assert there.uploaded.keys() == {"jane/tarot", "cards/public"}
    assert there.repos == {"jane/tarot": True, "cards/public": False}
    assert main([str(run), "--repo-id", "cards/public"]) == 2
    assert "private=false" in capfd.readouterr().err

    there.fails["upload_folder"] = ConnectionError(f"reset, Authorization: Bearer {TOKEN}")
    assert main([str(run), "--repo-id", "jane/tarot"]) == 2
    said = capfd.readouterr().err
    assert holds(said, "jane/tarot ... ConnectionError: reset")
    assert TOKEN not in said
    warning = push_or_warn(run, HubSettings(True, "jane/tarot"))
    assert warning.startswith("warning: ")
    assert f"python -m train.hub {run} --repo-id jane/tarot" in warning
    assert push_or_warn(run, HubSettings(True, "jane/tarot", private=False)).endswith(" --public")

    del there.fails["upload_folder"]
    there.uploaded.clear()
    (run / "adapter" / "notes.txt").symlink_to("/etc/hostname")
    assert main([str(run), "--repo-id", "jane/tarot"]) == 2
    assert holds(capfd.readouterr().err, "link ... notes.txt")
    assert there.uploaded == {}

    there.fails.clear()
    there.uploaded.clear()
    (run / "adapter" / "notes.txt").unlink()
    file = run / "adapter" / "diffusers.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\7")
    assert main([str(run), "--repo-id", "jane/tarot"]) == 2
    assert "diffusers.safetensors was changed since it was saved" in capfd.readouterr().err
    assert not there.uploaded

    shutil.rmtree(run / "adapter")
    assert main([str(run), "--repo-id", "jane/tarot"]) == 2
    assert "adapter" in capfd.readouterr().err
    assert main([str(run / "nowhere")]) == 2


@adapter_helpers.EACH_TYPE
def test_an_adapter_of_any_type_can_be_pushed(there, tmp_path, kind):
    adapters.save(adapter_helpers.attached(kind, adapter_helpers.base()), tmp_path / "adapter", base="small")
    assert main([str(tmp_path), "--repo-id", "jane/tarot"]) == 0
    assert "adapter_model.safetensors" in there.uploaded["jane/tarot"]


def test_a_push_that_fails_is_a_warning_with_the_command_that_does_it_later(run_command, small, there, tmp_path):
    there.fails["create_repo"] = OSError("the Hub is down")
    settings = [f"output_dir={tmp_path / 'run'}", "steps=1", "hub.push=true", "hub.repo_id=tarot"]
    code, out, err = run_command(*small(*settings))
    assert code == 0, err
    assert f"python -m train.hub {tmp_path / 'run'}" in out
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()


# ------------------------------------------------------------------ the card


def test_the_card_of_a_run_says_what_it_is_and_how_it_is_used(finished):
    run, _ = finished
    text = (run / "adapter" / "README.md").read_text()
    data = ModelCard(text).data
    assert data.license == "apache-2.0"
    assert data.pipeline_tag == "text-to-image"
    assert data.instance_prompt == "trtcrd"
    assert data.tags == ["flux2", "lora", "text-to-image"]
    assert "**Trigger**: `trtcrd`" in text
    assert "![With the adapter](samples.png)" in text
    assert "1. a red cup" in text
    assert "--adapter lora --prompt 'a red cup'" in text
    assert "python train/run.py " in text
    assert "hub.repo_id=jane/tarot" in text
    assert "| steps | 2 of 2 images |" in text
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"| validation loss | {last['validation_loss']:.4f} on 6 training samples" in text


@pytest.fixture
def described(tmp_path):
    """`described("dev")`: the card of an adapter of that model, and its metadata."""
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json", "diffusers.safetensors"):
        (adapter / name).touch()

    def describe(variant, *, plain=True, **facts):
        if not plain:
            (adapter / "diffusers.safetensors").unlink()
        config = {
            "model": {"path": None},
            "dataset": {"sources": {"cats": {"captions": {"trigger": "felix"}}, "dogs": {"captions": {}}}},
            "buckets": {"resolution": 1024},
            "steps": 10,
            "adapter": {"_target_": "flux2.adapters.attach", "rank": 16, "targets": ["a|b"]},
            "optimizer": {"_target_": "torch.optim.AdamW", "lr": 1e-4},
            "schedule": {"_target_": "train.optim.Constant"},
            "validation": {"held_out": 4},
            "seed": 0,
        }
        given = {"config": config, "samples": 24, "images": 2, "device": "NVIDIA H100", "precision": "bf16"} | facts
        model_card.write(ModelCardData(**{"name": "cards", "variant": VARIANTS[variant]} | given), tmp_path)
        text = (adapter / "README.md").read_text()
        return text, ModelCard(text).data

    return describe


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "tiny"])
def test_the_license_and_the_pipeline_are_those_of_the_base(described, name):
    text, data = described(name, prompts=['say "felix"'], place="jane/felix")
    variant = VARIANTS[name]
    assert data.base_model == variant.repo
    assert data.base_model_relation == "adapter"
    free = name in ("klein_4b", "klein_base_4b")
    assert data.license == ("apache-2.0" if free else "other")
    assert getattr(data, "license_name", None) == (None if free else "flux-non-commercial-license")
    assert ("FLUX Non-Commercial License" in text) != free
    if not free:
        assert data.license_link == f"https://huggingface.co/{variant.repo}/blob/main/LICENSE.md"
    pipeline = "Flux2Pipeline" if name == "dev" else "Flux2KleinPipeline"
    code = text.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert f'{pipeline}.from_pretrained("{variant.repo}"' in code
    assert 'load_lora_weights("jane/felix", weight_name="diffusers.safetensors")' in code
    assert 'prompt="say \\"felix\\""' in code
    (command,) = re.findall(r"^python -m flux2\.export (.*)$", text, re.MULTILINE)
    read = export_arguments.arguments(shlex.split(command))  # it ends the program if an option is not one
    assert (read.format, str(read.out)) == ("comfyui", "cards.safetensors")
    assert "**Trigger**: `felix`" in text
    assert "| adapter | `LoRA, rank=16, targets=['a\\|b']` |" in text


def test_an_adapter_that_diffusers_cannot_read_is_not_offered_to_it(described):
    text, data = described("dev", plain=False)
    assert data.library_name == "peft"
    assert "diffusers.safetensors" not in text
    assert "```python" not in text
    assert "--format comfyui" in text  # which converts it


def test_edits_are_shown_as_such(described):
    text, data = described("dev", edits=True)
    assert data.pipeline_tag == "image-to-image"
    assert "--image image.png" in text
    assert "pipe(image=picture, prompt=" in text


def test_a_card_has_the_command_without_secrets_and_says_nothing_of_the_machine(described, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "planted-key-of-wandb")
    text, _ = described(
        "dev",
        overrides=[
            "+experiment=tarot",
            "resume=auto",
            "output_dir=/home/x",
            f"sample.prompts=[{TOKEN}]",
            "tracker.entity=planted-key-of-wandb",
        ],
        prompts=[f"a card {TOKEN}"],
        processes=2,
    )
    command = "accelerate launch --num_processes 2 train/run.py +experiment=tarot 'sample.prompts=[***]'"
    assert f"{command} tracker.entity='***'\n```" in text or f"{command} 'tracker.entity=***'\n```" in text
    assert TOKEN not in text
    assert "planted-key" not in text
    assert socket.gethostname() not in text


def test_a_card_has_no_markup_of_others(described):
    """Names, prompts and settings are text, in the card as in its blocks of code."""
    evil = "<img src=x onerror=alert(1)> ``` [a](b:c) *c* | `d` &lt; &#60;\n```\n<script>alert(1)</script>\n# e"
    config = {"model": {"path": None}, "dataset": {"captions": {"trigger": evil}}, "buckets": {"resolution": 1}}
    config |= {key: {"_target_": "x.y", "value": evil} for key in ("adapter", "optimizer", "schedule")}
    config |= {"steps": 1, "validation": {"held_out": 0}, "seed": 0}
    text, data = described(
        "dev", name=evil, config=config, prompts=[evil, evil], overrides=[f"name={evil}"], place="jane/x"
    )
    parsed = MarkdownIt("commonmark", {"html": True}).enable("table").parse(text.split("---\n", 2)[2])
    tokens = [token for outer in parsed for token in [outer, *(outer.children or [])]]
    kinds = {token.type for token in tokens}
    assert not {"html_block", "html_inline", "em_open", "image"} & kinds
    assert {link.attrs["href"] for link in tokens if link.type == "link_open"} == {
        f"https://huggingface.co/{VARIANTS['dev'].repo}"
    }
    headings = [two.content for one, two in itertools.pairwise(parsed) if one.type == "heading_open"]
    assert headings[1:] == ["Use", "Training", "Files"]
    assert "".join(child.content for child in parsed[1].children) == " ".join(evil.split())
    fences = [token for token in parsed if token.type == "fence"]
    assert [token.info for token in fences] == ["sh", "python", "sh", "sh"]
    assert evil in fences[0].content
    compile(fences[1].content, "card", "exec")
    assert data.instance_prompt == evil


def test_the_grids_of_an_earlier_end_are_replaced(described, tmp_path):
    (tmp_path / "samples").mkdir()
    for step in (0, 10, 20):
        draw_picture(step, (16, 16)).save(tmp_path / "samples" / f"step_{step:06d}.png")
        described("dev", prompts=["a cup"])
        last = (tmp_path / "samples" / f"step_{step:06d}.png").read_bytes()
        assert (tmp_path / "adapter" / "samples.png").read_bytes() == last
    assert "Without it, from the same seeds" in (tmp_path / "adapter" / "README.md").read_text()
    (tmp_path / "samples" / "step_000000.png").unlink()
    assert "Without it" not in described("dev", prompts=["a cup"])[0]
