"""Each encoder is loaded only for what is missing, one after the other, and freed."""

import gc
import json
import re
import shutil
import signal
import subprocess
import sys
import weakref
from types import SimpleNamespace

import pytest
import torch
from message_helpers import holds
from PIL import Image
from train_helpers import (
    CAPTIONS,
    ROOT,
    compose,
    draw_picture,
    environment,
    execute,
    launch,
    lines,
    refusal,
    refuse_encoders,
    values,
)

from data.buckets import Buckets
from data.cache import Cache
from data.cache.embeddings import plan_embeddings
from data.sources import Folder
from flux2.models.pixels import to_pixels
from flux2.weights.loading import load_autoencoder, load_text_encoder, load_transformer
from train import cache
from train.encoding import text_encoders
from train.encoding.prepare import CacheRequest, fill, prepare
from train.encoding.text_encoders import LocalTextEncoder
from train.stages.data import prepare_samples
from train.stages.memory import load_config

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
    monkeypatch.setattr("train.encoding.prepare.load_autoencoder", watched("autoencoder", load_autoencoder))
    return happened


def prepared(source, pictures, folder, prompts=(), text_encoder=None, resolution=48, embedding_storage="full"):
    encoder = text_encoder or LocalTextEncoder()
    needs = CacheRequest(
        source,
        encoder,
        Cache(folder),
        Folder(pictures),
        list(prompts),
        Buckets(resolution),
        64**2,
        torch.float32,
        embedding_storage,
    )
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
    with pytest.raises(ValueError, match=r"text_encoder\.storage='?4bit.* nf4, int8"):
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


def test_a_run_prepares_captions_prompts_of_grids_and_of_preservation(small, tmp_path):
    config = compose(
        *small("sample.prompts=[a fox]", "preservation=base", "preservation.prompts=[a card]", f"cache_dir={tmp_path}")
    )
    result = prepare_samples(load_config(config)).cached
    assert set(result.prompts) == {*CAPTIONS, "", "a fox", "a card"}


def test_the_command_fills_the_caches_and_the_run_after_it_loads_no_encoder(
    run_command, small, tmp_path, monkeypatch, train
):
    arguments = small(f"cache_dir={tmp_path / 'cache'}")
    code, out, err = run_command(*arguments, task=cache.main)
    assert code == 0, err
    assert str(tmp_path / "cache") in out
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 2 * len(CAPTIONS) + 1
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]  # it trains nothing
    refuse_encoders(monkeypatch)
    train("run", f"cache_dir={tmp_path / 'cache'}", "steps=1")


# ------------------------------------------------------------------ cached and not


CUTS = ["buckets.max_aspect=1.0", "buckets.random_crops=3", "buckets.flip=true", "caption_dropout=0.3"]


def test_a_run_from_the_cache_equals_one_that_keeps_nothing_on_disk_to_the_bit(train, tmp_path):
    cached = train("first", f"cache_dir={tmp_path / 'cache'}", *CUTS)
    again = train("again", f"cache_dir={tmp_path / 'cache'}", *CUTS)
    before = set(tmp_path.rglob("*"))
    uncached = train("uncached", "cache_dir=null", *CUTS)
    new = {path for path in set(tmp_path.rglob("*")) - before if tmp_path / "uncached" not in (path, *path.parents)}
    assert new == set()
    assert lines(cached) == lines(again) == lines(uncached)
    assert values(cached)[0] != values(train("middle", "steps=1", CUTS[0], CUTS[3]))[0]


def test_without_a_cache_folder_copies_of_models_have_none_either():
    assert compose("cache_dir=null").quantized_cache_dir is None
    assert compose("cache_dir=x").quantized_cache_dir == "x/weights"


# ------------------------------------------------------------------ without the encoders


def test_with_a_full_cache_a_run_needs_none_of_the_encoders_files(train, model_folders, tmp_path, caplog):
    model = shutil.copytree(model_folders("dev"), tmp_path / "model")
    settings = [f"model.path={model}", f"cache_dir={tmp_path / 'cache'}", "steps=2"]
    before = train("before", *settings)
    for part in ("text_encoder", "tokenizer", "vae"):
        (model / part).rename(tmp_path / part)
    assert lines(train("after", *settings)) == lines(before)
    for part in ("text_encoder", "tokenizer", "vae"):
        assert re.search(rf"{part} of {model}", caplog.text)
    with pytest.raises(ValueError, match=rf"{model / 'text_encoder'}"):
        train("other", *settings, "sample.prompts=[a fox]")
    (tmp_path / "cache" / "fingerprints.json").unlink()
    with pytest.raises(ValueError, match=rf"{model / 'vae'}"):
        train("unknown", *settings)


def test_what_is_remembered_of_encoders_counts_only_where_their_files_are_gone(source, pictures, tmp_path, events):
    prepared(source, pictures, tmp_path)
    events.clear()
    file = tmp_path / "fingerprints.json"
    right = json.loads(file.read_text())
    file.write_text(json.dumps(dict.fromkeys(right, "of another encoder")))
    prepared(source, pictures, tmp_path)
    assert events == []
    assert json.loads(file.read_text()) == right


# ------------------------------------------------------------------ storage of embeddings


def test_projected_embeddings_are_what_the_first_layer_gives(source, pictures, tmp_path):
    full = prepared(source, pictures, tmp_path)
    small = prepared(source, pictures, tmp_path, embedding_storage="projected")
    model = load_transformer(source)
    with torch.no_grad():
        expected = model.txt_in(full.embeddings(CAPTIONS[:2]))
    torch.testing.assert_close(small.embeddings(CAPTIONS[:2]), expected)
    assert not set(full.prompts.values()) & set(small.prompts.values())


@pytest.mark.parametrize(("storage", "limit"), [("projected", 1e-5), ("fp8", 0.02), ("projected_fp8", 0.02)])
def test_training_on_smaller_embeddings_is_nearly_the_same(train, reference, storage, limit):
    grids = ["sample.prompts=[a fox]", "sample.steps=1", "sample_every=4", "validate_every=4"]
    full, small = reference(*grids), train("small", f"embedding_storage={storage}", *grids)
    for key in ("loss", "validation_loss"):
        one, other = torch.tensor(values(full, key)), torch.tensor(values(small, key))
        assert (one / other - 1).abs().max() < limit
        if storage != "projected":  # which is the same computation, done earlier
            assert not torch.equal(one, other)
    assert (small / "samples" / "step_000004.png").exists()


def test_embeddings_are_not_stored_behind_a_layer_that_is_trained(small):
    message = refusal(*small("adapter.targets=[txt_in]", "embedding_storage=projected_fp8"))
    assert holds(message, "embedding_storage=projected_fp8 ... txt_in")
    assert holds(refusal(*small("embedding_storage=half")), "embedding_storage=half ... projected_fp8")


# ------------------------------------------------------------------ room, and what is left out


def test_the_size_to_come_is_told_and_must_fit(source, pictures, tmp_path, events, monkeypatch, capsys):
    monkeypatch.setattr(Cache, "free", lambda self: 2500)
    with pytest.raises(ValueError, match=r"cache_dir=.*\b7 .* MB.*\b6 .* MB.*embedding_storage=projected.* fp8"):
        prepared(source, pictures, tmp_path)
    assert events == []
    assert list(tmp_path.rglob("*.safetensors")) == []
    monkeypatch.undo()
    prepared(source, pictures, tmp_path)
    said = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("to encode: "))
    text, latents = (sum(path.stat().st_size for path in found) for found in sorted_by_kind(tmp_path))
    for size in (text, latents):  # what was told is the content, without headers
        assert any(abs(float(number) - size / 1e6) < 0.11 for number in re.findall(r"\(([\d.]+) MB\)", said)), said


def sorted_by_kind(folder):
    files = list(folder.rglob("*.safetensors"))
    return [[file for file in files if name in file.read_bytes()[:400]] for name in (b'"embeddings"', b'"latents"')]


def damaged_folder(folder):
    """Four pictures, two of which end in the middle of their pixels."""
    folder.mkdir()
    for i in range(4):
        draw_picture(i, (48, 48)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(CAPTIONS[i])
        if i in (1, 2):
            content = (folder / f"{i}.png").read_bytes()
            (folder / f"{i}.png").write_bytes(content[: len(content) // 2])
    return folder


def test_all_pictures_that_cannot_be_decoded_are_told_at_once(run_command, small, tmp_path):
    folder = damaged_folder(tmp_path / "pictures")
    settings = [f"dataset.path={folder}", f"cache_dir={tmp_path / 'cache'}", f"output_dir={tmp_path / 'run'}"]
    code, _, err = run_command(*small(*settings))
    assert code == 2
    for name, bad in (("0", False), ("1", True), ("2", True), ("3", False)):
        assert (f"{folder / name}.png" in err) is bad, err
    assert "dataset.max_bad=2" in err


def test_pictures_that_cannot_be_decoded_are_left_out_if_so_many_may_be(train, tmp_path):
    folder = damaged_folder(tmp_path / "pictures")
    settings = ["steps=2", f"dataset.path={folder}", f"cache_dir={tmp_path / 'cache'}", "dataset.max_bad=2"]
    run = train("run", *settings)
    for i in (1, 2):
        (folder / f"{i}.png").unlink()
        (folder / f"{i}.txt").unlink()
    assert lines(train("good", *settings[:3])) == lines(run)


def test_pictures_that_cannot_be_decoded_load_no_encoder_at_the_next_start(train, tmp_path, events):
    settings = [f"dataset.path={damaged_folder(tmp_path / 'pictures')}", f"cache_dir={tmp_path / 'cache'}", "steps=1"]
    train("run", *settings, "dataset.max_bad=2")
    assert "autoencoder loaded" in events
    events.clear()
    train("again", *settings, "dataset.max_bad=2")
    assert "autoencoder loaded" not in events


def test_masks_change_what_is_learned_and_are_in_the_validation_loss(train, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(4):
        picture = draw_picture(i, (48, 48)).convert("RGBA")
        alpha = Image.new("L", (48, 48), 0)
        alpha.paste(255, (0, 0, 16, 48))
        picture.putalpha(alpha)
        picture.save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(CAPTIONS[i])
    settings = [f"dataset.path={folder}", f"cache_dir={tmp_path / 'cache'}", "validate_every=2", "steps=2"]
    plain, masked = train("plain", *settings), train("masked", *settings, "dataset.mask=alpha")
    for key in ("loss", "validation_loss"):
        assert values(plain, key) != values(masked, key)
    assert values(train("uncached", settings[0], *settings[2:], "dataset.mask=alpha", "cache_dir=null")) == values(
        masked
    )


# ------------------------------------------------------------------ the command


def test_pruning_keeps_what_the_configuration_uses_and_says_what_went(run_command, small, tmp_path, events):
    settings = small(f"cache_dir={tmp_path / 'cache'}", "sample.prompts=[a fox]")
    run_command(*settings, task=cache.main)
    kept = {path.name for path in (tmp_path / "cache").rglob("*.safetensors")}
    run_command(*settings, "buckets.resolution=32", "sample.prompts=[a cup]", task=cache.main)
    more = {path.name for path in (tmp_path / "cache").rglob("*.safetensors")}
    assert len(more) == len(kept) + len(CAPTIONS) + 1
    events.clear()
    code, out, err = run_command(*settings, "+prune=true", task=cache.main)
    assert (code, events) == (0, []), err
    assert holds(out, f"{tmp_path / 'cache'} ... 1 embedding ... {len(CAPTIONS)} latents")
    assert {path.name for path in (tmp_path / "cache").rglob("*.safetensors")} == kept
    assert "nothing" in run_command(*settings, "+prune=true", task=cache.main)[1]
    assert holds(refusal(*settings, "+prune=maybe", task=cache.main), "prune=maybe ... true ... false")


def test_nothing_is_pruned_while_a_run_is_prepared(run_command, small, tmp_path):
    settings = small(f"cache_dir={tmp_path / 'cache'}")
    result = prepare_samples(load_config(compose(*settings))).cached
    before = entries(tmp_path)
    assert str(tmp_path / "cache") in refusal(*settings, "buckets.resolution=32", "+prune=true", task=cache.main)
    assert entries(tmp_path) == before
    result.lease.close()
    code, out, _ = run_command(*settings, "buckets.resolution=32", "+prune=true", task=cache.main)
    assert code == 0
    assert "latents (" in out
    assert entries(tmp_path).keys() < before.keys()


def entries(folder):
    return {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in folder.rglob("*.safetensors")}


KILLED = """
import os, signal, sys
from data.cache import store as cache
from train.cli.app import command
from train.cache import main

replace, count = os.replace, 0


def replaced(source, target):
    global count
    count += str(target).endswith(".safetensors")
    if count == 31:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)


cache.os.replace = replaced
sys.argv[0] = "train/cache.py"
command(main)
"""


@pytest.mark.slow
def test_a_fill_that_is_killed_leaves_whole_entries_and_only_the_missing_are_computed(tmp_path):
    """Killed where an entry, of 49, is written and not yet in its place."""
    folder = tmp_path / "cache"
    arguments = [sys.executable, str(ROOT / "train" / "cache.py"), f"cache_dir={folder}"]
    cut = subprocess.run([sys.executable, "-c", KILLED, arguments[-1]], cwd=ROOT, env=environment(), timeout=300)
    assert cut.returncode == -signal.SIGKILL
    assert any(file.stat().st_size > 0 for file in folder.rglob(".*.tmp"))
    before = entries(folder)
    assert 30 <= len(before) < 49  # threads write
    for path in before:
        assert Cache(folder).get(path.stem)
    done = execute(arguments)
    assert done.returncode == 0, done.stderr
    assert f"to encode: {49 - len(before)} images (" in done.stdout
    after = entries(folder)
    assert len(after) == 49
    assert {path: after[path] for path in before} == before
    for path in after:
        assert Cache(folder).get(path.stem)


@pytest.mark.slow
def test_two_processes_fill_what_one_does(tmp_path):
    done = execute([*launch("train/cache.py", processes=2), f"cache_dir={tmp_path / 'two'}"], ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr
    done = execute([sys.executable, str(ROOT / "train" / "cache.py"), f"cache_dir={tmp_path / 'one'}"])
    assert done.returncode == 0, done.stderr
    one, two = ({path.name: path.read_bytes() for path in entries(tmp_path / name)} for name in ("one", "two"))
    assert len(one) == 49
    assert one == two
