import pytest
from omegaconf import OmegaConf
from train_helpers import compose

from train.config.settings import RunSettings
from train.publishing.hub import HubSettings
from train.stages import finish
from train.stages.memory import load_config
from train.tracking import WandbTracker
from train.utils.redact import MASK, is_secret, masked, masked_command, masked_settings, masked_text, may_be_secret

HUB = "hf_" + "aB3" * 11 + "x"
KEY = "0123456789abcdef" * 2 + "01234567"  # as wandb's: what a commit looks like too


@pytest.mark.parametrize(
    "key",
    "token hub_token HF_TOKEN wandb_api_key WANDB_API_KEY apikey access-key AWS_SECRET_ACCESS_KEY password db.passwd "
    "Authorization headers credentials X-Amz-Signature accessToken hftoken "
    "secretkey passwort passwords apikeys hfauth oauth basicauth".split(),
)
def test_names_of_secrets_are_known(key):
    assert is_secret(key)


def test_errors_and_tables_do_not_show_what_only_resembles_a_secret():
    assert all(may_be_secret(key) for key in ("tokens", "headersx", "auth2", "hub.token"))
    assert not any(may_be_secret(key) for key in ("steps", "adapter.rank", "cache_dir"))


@pytest.mark.parametrize(
    "key",
    "autoencoder author keep_tags tokens keep_tokens key keys private repo_id url monkey tokenizer heads".split(),
)
def test_other_names_are_left_alone(key):
    assert not is_secret(key)


@pytest.mark.parametrize(
    "text",
    [
        HUB,
        f"git clone https://jane:{KEY}@example.com/cards",
        f"https://{KEY}@example.com",
        f"Authorization: Bearer {KEY}",
        f"Authorization: Basic {KEY}",
        f"https://bucket.example.com/cards.tar?part=1&X-Amz-Signature={KEY}",
        f"https://example.com/?token={KEY}&page=2",
        "ghp_" + KEY,
        "github_pat_" + KEY,
        "sk-" + KEY,
        "glpat-" + KEY,
        "AKIA" + KEY[:16].upper(),
        "eyJ" + KEY + "." + KEY + "." + KEY,
    ],
)
def test_what_has_the_form_of_a_secret_is_masked_within_a_text(text):
    shown = masked_text(f"before {text} after")
    assert shown.startswith("before ")
    assert shown.endswith(" after")
    assert MASK in shown
    assert KEY[:16] not in shown.lower()
    assert HUB not in shown
    assert masked_text(shown) == shown


@pytest.mark.parametrize(
    "text",
    [
        KEY,  # a commit
        "black-forest-labs/FLUX.2-dev",
        "hf_transfer",
        "a basic understanding of the bearer who carries the torch",
        "https://remote-text-encoder-flux-2.huggingface.co/predict",
        "the secret: a garden, and a token of love",
        "hf://datasets/jane/cards@main/data.parquet",
        "cards?page=2",
    ],
)
def test_other_texts_stay_as_they_are(text):
    assert masked_text(text) == text


def test_values_of_the_environment_are_masked_wherever_they_are(monkeypatch, tmp_path):
    monkeypatch.setenv("MY_PASSWORD", "correct horse")
    monkeypatch.setenv("SHORT_TOKEN", "demo")
    monkeypatch.setenv("SOME_TOKEN_FILE", str(tmp_path))
    monkeypatch.setenv("PLAIN", "a plain value")
    given = {"a": f"xcorrect horsex demo {tmp_path} a plain value"}
    assert masked(given) == {"a": f"x{MASK}x demo {tmp_path} a plain value"}


def test_the_login_of_the_hub_is_masked_in_whatever_form_it_is(monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "an odd kind of login")
    assert masked_text("with an odd kind of login.") == f"with {MASK}."


def test_a_configuration_keeps_its_shape():
    given = {
        "token": "abc",
        "nested": {"api_key": "abc", "steps": 3, "list": ["x", HUB], "password": 1234},
        "headers": {"X-Any": "abc", "flag": True},
        "secret": None,
        "private": True,
        "auth": "",
    }
    assert masked(given) == {
        "token": MASK,
        "nested": {"api_key": MASK, "steps": 3, "list": ["x", MASK], "password": MASK},
        "headers": {"X-Any": MASK, "flag": True},
        "secret": None,
        "private": True,
        "auth": "",
    }
    assert masked(masked(given)) == masked(given)
    assert given["token"] == "abc"


@pytest.mark.parametrize("experiment", ["demo", "demo_edit", "tarot", "relighting", "debug"])
def test_nothing_of_the_configurations_here_is_a_secret(experiment):
    config = OmegaConf.to_container(compose(f"+experiment={experiment}", "text_encoder=remote"), resolve=True)
    assert masked(config) == config


def test_a_command_line_is_shown_without_secrets_and_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    words = [
        "steps=3",
        f"+tracker.api_key={KEY}",
        f"hub={{push: true, token: {KEY}}}",
        f"dataset.path={tmp_path}/cards",
    ]
    words += ["--token", KEY, "sample.prompts=[a cup]", f"path=https://jane:{KEY}@x.org"]
    shown = masked_command(words)
    assert KEY not in shown
    assert shown.startswith("steps=3 '+tracker.api_key=***' ")
    assert "dataset.path=~/cards" in shown.replace("'", "")
    assert "'sample.prompts=[a cup]'" in shown
    assert "hub={push: true, token: ***}" in shown
    assert str(tmp_path) not in shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("+text_encoder.token=abcdef1 steps=3", "+text_encoder.token=*** steps=3"),
        ("hub.api_key='a b', name=x", "hub.api_key=***, name=x"),
        ("text_encoder.url=http://jane:pw@host/x", "text_encoder.url=http://***@host/x"),
        ("the token may only read: run `hf auth login`", "the token may only read: run `hf auth login`"),
    ],
)
def test_of_settings_in_a_text_no_secret_is_shown(text, shown):
    assert masked_settings(text) == shown
    assert masked_settings(shown) == shown


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda value: WandbTracker(project=value), "tracker.project"),
        (lambda value: WandbTracker(entity=value), "tracker.entity"),
        (lambda value: HubSettings(repo_id=f"me/{value}"), "hub.repo_id"),
        (lambda value: RunSettings(name=value), "name"),
    ],
)
def test_a_name_that_a_mask_would_change_is_refused_if_it_holds_a_secret(make, key, monkeypatch):
    make("cards")
    monkeypatch.setenv("WANDB_API_KEY", "planted-key")
    for secret in (HUB, "planted-key", "my-planted-key-1"):
        with pytest.raises(ValueError, match=rf"^{key} holds a secret.*another name") as error:
            make(secret)
        assert secret not in str(error.value)


def test_the_command_at_the_end_of_a_run_shows_no_secret_of_a_prompt(monkeypatch, tmp_path):
    monkeypatch.setenv("SOME_TOKEN", "planted-key")
    run, said = load_config(compose("model=tiny", "device=cpu", "sample.prompts=[a planted-key]")), []
    monkeypatch.setattr(run, "say", said.append)
    monkeypatch.setattr(finish, "format_notes", lambda _: [])
    finish.announce(run, tmp_path / "adapter", "a caption")
    assert any(f"--prompt 'a {MASK}'" in text for text in said)
    assert "planted-key" not in "".join(said)
