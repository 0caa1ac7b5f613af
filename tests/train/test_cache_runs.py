"""Runs and the cache command: cached and not, with smaller embeddings, damaged pictures, pruning and kills."""

import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

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

from data.cache import Cache, store
from train import cache
from train.stages.data import prepare_samples
from train.stages.memory import load_config

pytest_plugins = ("train_helpers", "encoder_helpers")


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


def test_a_run_from_packs_equals_one_from_files_to_the_bit(train, tmp_path, monkeypatch):
    files = train("files", f"cache_dir={tmp_path / 'files'}", *CUTS)
    monkeypatch.setattr(store, "PACK_ABOVE", 0)
    packed = train("packed", f"cache_dir={tmp_path / 'packs'}", *CUTS)
    mixed = train("mixed", f"cache_dir={tmp_path / 'files'}", *CUTS)
    assert lines(files) == lines(packed) == lines(mixed)
    assert entries(tmp_path / "packs") == {}
    assert len(list((tmp_path / "packs").rglob("*.pack"))) == 2  # embeddings and latents
    assert list((tmp_path / "files").rglob("*.pack")) == []


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


# ------------------------------------------------------------------ storage of embeddings


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


@pytest.mark.parametrize("option", ["+share=1/2", "+prune=true", "+share=1/1"])
def test_a_cache_that_is_not_on_disk_is_not_filled_or_pruned(small, events, option):
    refused = refusal(*small("cache_dir=null"), option, task=cache.main)
    assert refused.startswith("cache_dir=null stores nothing on disk")
    assert events == []


def test_a_cache_folder_that_is_not_there_is_not_pruned(small, tmp_path):
    arguments = small(f"cache_dir={tmp_path / 'typo'}", "+prune=true")
    assert holds(refusal(*arguments, task=cache.main), f"cache_dir='{tmp_path / 'typo'}' does not exist")
    assert list(tmp_path.iterdir()) == []


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


def test_shares_of_starts_that_know_nothing_of_each_other_fill_what_one_does(run_command, small, tmp_path, events):
    found = {}
    for name, shares in {"one": ["1/1"], "three": ["1/3", "3/3", "2/3"]}.items():
        counts = []
        for share in shares:
            code, out, err = run_command(*small(f"cache_dir={tmp_path / name}"), f"+share={share}", task=cache.main)
            assert code == 0, err
            counts.append(len(entries(tmp_path / name)))
        assert sorted(set(counts)) == counts, "each share adds to the others"
        found[name] = {path.name: path.read_bytes() for path in entries(tmp_path / name)}
        assert (f"share {share} of the cache" in out) is (name == "three")
    assert found["one"] == found["three"]
    assert len(found["one"]) == 2 * len(CAPTIONS) + 1


def test_a_share_that_is_complete_loads_no_encoder(run_command, small, tmp_path, events):
    for expected in (["text encoder loaded", "autoencoder loaded"], []):
        run_command(*small(f"cache_dir={tmp_path / 'cache'}"), "+share=1/3", task=cache.main)
        assert [event for event in events if "loaded" in event] == expected
        events.clear()


@pytest.mark.parametrize("share", ["0/2", "3/2", "2", "1/0", "a/b", "1/2/3", "[1,2]", "true"])
def test_a_wrong_share_is_refused(small, tmp_path, share):
    arguments = small(f"cache_dir={tmp_path / 'cache'}", f"+share={share}")
    assert holds(refusal(*arguments, task=cache.main), "share= ... must be I/N ... 2/8")
    assert not (tmp_path / "cache").exists()
    pruning = small(f"cache_dir={tmp_path / 'cache'}", "+share=1/2", "+prune=true")
    assert holds(refusal(*pruning, task=cache.main), "share=1/2 has no effect with prune=true")


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


PACKED = """
import sys
from data.cache import store
from train.cli.app import command
from train.cache import main

store.PACK_ABOVE = 0
sys.argv[0] = "train/cache.py"
command(main)
"""


@pytest.mark.slow
def test_four_processes_fill_packs_with_the_entries_of_one(tmp_path):
    script = tmp_path / "packed.py"
    script.write_text(PACKED)
    command = [*launch(str(script), processes=4), f"cache_dir={tmp_path / 'four'}"]
    done = execute(command, ACCELERATE_USE_CPU="true", PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    done = execute([sys.executable, str(ROOT / "train" / "cache.py"), f"cache_dir={tmp_path / 'one'}"])
    assert done.returncode == 0, done.stderr
    one, four = entries(tmp_path / "one"), Cache(tmp_path / "four")
    assert entries(tmp_path / "four") == {}
    assert len(list((tmp_path / "four").rglob("*.pack"))) == 8  # of each process for embeddings, and for latents
    assert len(one) == 49
    for path in one:
        assert four.place(path.stem).read() == path.read_bytes()


def test_each_picture_is_trained_at_every_resolution_that_it_fills_and_a_resumed_run_goes_on_alike(train, small):
    settings = ["buckets.resolution=[32,48]", "buckets.each_resolution=true", "steps=6", "checkpoint_every=3"]
    run = train("run", *settings)
    data = prepare_samples(load_config(compose(*small(*settings))))
    found = zip(data.samples, data.cached.entries, strict=True)
    sizes = [(Path(sample.name).name, entry.size) for sample, entry in found]
    assert sizes == [(f"{i}.png", size) for i in range(6) for size in [(48, 48) if i < 4 else (64, 32), (32, 32)]]
    again = train("again", *settings, f"resume={run / 'checkpoints' / 'step_000003'}")
    assert lines(again)[-3:] == lines(run)[-3:]
    largest = train("largest", *settings[:1], *settings[2:])
    assert lines(largest) != lines(run)


def test_a_picture_that_cannot_be_decoded_is_one_bad_sample_at_all_its_resolutions(train, pictures, tmp_path, caplog):
    folder = tmp_path / "pictures"
    shutil.copytree(pictures, folder)
    content = (folder / "0.png").read_bytes()
    (folder / "0.png").write_bytes(content[: len(content) // 2])
    settings = [f"dataset.path={folder}", "buckets.resolution=[32,48]", "buckets.each_resolution=true", "steps=1"]
    train("run", *settings, "dataset.max_bad=1", f"cache_dir={tmp_path / 'cache'}")
    assert "1 of 11 samples" in caplog.text
