"""Each encoder is loaded only for what is missing, one after the other, and freed."""

import gc
import sys
import weakref
from types import SimpleNamespace

import pytest
import torch
from train_helpers import CAPTIONS, ROOT, compose, execute

from data.buckets import Buckets
from data.cache import Cache
from data.embeddings import plan_embeddings
from data.samples import Folder
from flux2.pipeline import to_pixels
from flux2.weights import load_autoencoder, load_text_encoder
from train import cache, text_encoders
from train.cache import Needs, fill, prepare
from train.run import Run
from train.text_encoders import LocalTextEncoder

pytest_plugins = ("train_helpers",)

ALONE = SimpleNamespace(
    is_main_process=True,
    process_index=0,
    num_processes=1,
    device=torch.device("cpu"),
    wait_for_everyone=lambda: None,
)


@pytest.fixture
def events(monkeypatch):
    """What is loaded and freed, in order."""
    happened = []

    def watched(name, load):
        def spy(*arguments):
            gc.collect()
            part = load(*arguments)
            happened.append(f"{name} loaded")
            weakref.finalize(part, happened.append, f"{name} freed")
            return part

        return spy

    monkeypatch.setattr(text_encoders, "load_text_encoder", watched("text encoder", load_text_encoder))
    monkeypatch.setattr(cache, "load_autoencoder", watched("autoencoder", load_autoencoder))
    return happened


def prepared(source, pictures, folder, prompts=(), text_encoder=None, resolution=48):
    encoder = text_encoder or LocalTextEncoder()
    samples, buckets = Folder(pictures), Buckets(resolution)
    needs = Needs(source, encoder, Cache(folder), samples, list(prompts), buckets, 64**2, torch.float32)
    return prepare(ALONE, needs)


def test_one_encoder_is_in_memory_at_a_time_and_none_afterwards(source, pictures, tmp_path, events):
    prepared(source, pictures, tmp_path)
    gc.collect()
    assert events == ["text encoder loaded", "text encoder freed", "autoencoder loaded", "autoencoder freed"]


def test_what_is_there_is_not_computed_again(source, pictures, tmp_path, events):
    prepared(source, pictures, tmp_path, ["a fox"])
    events.clear()
    prepared(source, pictures, tmp_path, ["a fox"])
    assert events == []
    prepared(source, pictures, tmp_path, ["the blue cup"])
    assert events[0] == "text encoder loaded"
    assert "autoencoder loaded" not in events
    events.clear()
    prepared(source, pictures, tmp_path, resolution=64)
    assert "text encoder loaded" not in events
    assert events[0] == "autoencoder loaded"


def test_entries_are_what_the_encoders_give(source, pictures, tmp_path):
    result = prepared(source, pictures, tmp_path, ["a fox"])
    encoder = load_text_encoder(source, "cpu", torch.float32)
    asked = [CAPTIONS[2], "", "a fox"]
    expected = torch.cat([encoder.encode([prompt]) for prompt in asked])
    torch.testing.assert_close(result.embeddings(asked), expected, atol=0, rtol=0)
    autoencoder = load_autoencoder(source, "cpu", torch.float32)
    sample = Folder(pictures)[4]  # 100 x 50 pixels
    assert result.entries[4].size == (64, 32)
    stored = result.cache.get(result.entries[4].key)["latents"]
    resized = sample.target.load().resize((64, 32), resample=1)
    with torch.no_grad():
        latents = autoencoder.encode(to_pixels([resized]))[0]
    assert stored.shape == latents.shape == (128, 2, 4)
    torch.testing.assert_close(stored, latents, atol=0.05, rtol=0.05)


def test_every_caption_the_empty_prompt_and_the_prompts_asked_for_have_an_embedding(source, pictures, tmp_path):
    result = prepared(source, pictures, tmp_path, ["a fox"])
    assert set(result.prompts) == {*CAPTIONS, "", "a fox"}
    assert len(set(result.prompts.values())) == len(CAPTIONS) + 2
    assert len(result.entries) == len(CAPTIONS)


def test_what_an_embedding_depends_on_is_in_its_key(source):
    keys = {
        LocalTextEncoder().identity(source, torch.float32),
        LocalTextEncoder().identity(source, torch.bfloat16),
        LocalTextEncoder(7).identity(source, torch.float32),
        LocalTextEncoder(storage="nf4").identity(source, torch.float32),
        LocalTextEncoder(storage="int8").identity(source, torch.float32),
    }
    assert len(keys) == 5
    own = LocalTextEncoder(source.variant.text.length).identity(source, torch.float32)
    assert own == LocalTextEncoder().identity(source, torch.float32)


def test_prompts_are_padded_to_the_length_asked_for(source, pictures, tmp_path):
    result = prepared(source, pictures, tmp_path, text_encoder=LocalTextEncoder(11))
    assert result.embeddings([""]).shape[1] == 11


def test_the_storage_asked_for_is_what_computes(source, pictures, tmp_path):
    plain = prepared(source, pictures, tmp_path)
    for storage in ("nf4", "int8"):
        result = prepared(source, pictures, tmp_path, text_encoder=LocalTextEncoder(storage=storage))
        expected = load_text_encoder(source, "cpu", torch.float32, storage).encode([""])
        assert torch.equal(result.embeddings([""]), expected)
        assert not torch.equal(result.embeddings([""]), plain.embeddings([""]))


def test_a_refused_storage_is_named():
    with pytest.raises(ValueError, match=r"text_encoder\.storage='4bit' must be one of nf4, int8, or null"):
        LocalTextEncoder(storage="4bit")


@pytest.mark.parametrize("length", [0, -1, 1.5, True, "x"])
def test_a_refused_length_is_named(length):
    with pytest.raises(ValueError, match=r"text_encoder\.length="):
        LocalTextEncoder(length)


def test_processes_share_the_work(tmp_path):
    plan = plan_embeddings(Cache(tmp_path), [f"prompt {i}" for i in range(7)], "encoder")
    encoded = [], []

    def load(share):
        def encode(prompts):
            encoded[share].extend(prompts)
            return torch.ones(1, 2, 3)

        return lambda: encode

    for share in (0, 1):
        process = SimpleNamespace(**{**vars(ALONE), "process_index": share, "num_processes": 2})
        fill(plan, load(share), "prompts", process)
    assert [len(prompts) for prompts in encoded] == [4, 3]
    assert {*encoded[0], *encoded[1]} == set(plan.keys)
    assert plan.missing == 0


def test_a_process_looks_for_missing_entries_before_any_other_can_have_filled_them(tmp_path):
    """Else a slow process finds nothing missing, does not load its encoder, and its share is computed by nobody."""
    order = []

    class Plan:
        @property
        def missing(self):
            order.append("look")
            return 1

        def fill(self, *rest):
            order.append("fill")

    process = SimpleNamespace(**{**vars(ALONE), "wait_for_everyone": lambda: order.append("wait")})
    fill(Plan(), lambda: None, "prompts", process)
    assert order == ["look", "wait", "fill", "wait"]


def test_a_run_prepares_captions_prompts_of_sheets_and_of_preservation(small, tmp_path):
    config = compose(
        *small("sample.prompts=[a fox]", "preservation=base", "preservation.prompts=[a card]", f"cache_dir={tmp_path}")
    )
    _, result = Run(config).prepare()
    assert set(result.prompts) == {*CAPTIONS, "", "a fox", "a card"}


def test_the_command_fills_the_caches_and_the_run_after_it_loads_no_encoder(
    run_command, small, tmp_path, monkeypatch, train
):
    arguments = small(f"cache_dir={tmp_path / 'cache'}")
    code, out, err = run_command(*arguments, task=cache.main)
    assert code == 0, err
    assert f"the caches in {tmp_path / 'cache'} are complete" in out
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 2 * len(CAPTIONS) + 1
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]  # it trains nothing
    for module, name in ((text_encoders, "load_text_encoder"), (cache, "load_autoencoder")):
        monkeypatch.setattr(module, name, lambda *rest: pytest.fail("an encoder was loaded"))
    train("run", f"cache_dir={tmp_path / 'cache'}")


def test_the_command_is_an_entry_file_of_its_own(tmp_path):
    done = execute([sys.executable, str(ROOT / "train" / "cache.py"), "dataset=folder", "dataset.path=/nowhere"])
    assert done.returncode == 2
    assert done.stderr == "error: dataset.path='/nowhere' does not exist: give a folder of pictures\n"
