"""Class pictures that the base draws: one model at a time, where it stopped, and into the caches."""

import gc
import json
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from prior_helpers import WORDS
from safetensors.torch import save_file
from train_helpers import compose, values

import train.encoding.class_pictures
import train.stages.class_data
from flux2 import load
from train.cache import main as fill_caches
from train.encoding.class_pictures import ClassImageRecipe
from train.stages.class_data import class_cache_requests
from train.stages.data import cache_request, prepare_samples
from train.stages.memory import load_config

pytest_plugins = ("train_helpers", "prior_helpers")


def pictures(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*/*.png"))}


# ------------------------------------------------------------------ drawing


class Watch:
    """Counts what is drawn, and sees to it that one model is in memory at a time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sampled, self.decoded, self.stop_after = 0, 0, 10**6
        self.models: list[weakref.ref] = []
        sample, decode, pipeline = (
            train.encoding.class_pictures.sample,
            train.encoding.class_pictures.to_images,
            train.stages.class_data.Pipeline,
        )
        autoencoder = train.stages.class_data.load_autoencoder

        def counted_sample(*arguments, **options):
            if self.sampled == self.stop_after:
                raise ValueError("stopped here")
            self.sampled += 1
            return sample(*arguments, **options)

        def counted_decode(pixels):
            self.decoded += 1
            return decode(pixels)

        def alone(model):
            gc.collect()
            assert not [other for other in self.models if other() is not None], "two models are in memory"
            self.models.append(weakref.ref(model))
            return model

        class Watched(pipeline):
            @property
            def transformer(self):
                return alone(super().transformer)

        monkeypatch.setattr(train.encoding.class_pictures, "sample", counted_sample)
        monkeypatch.setattr(train.encoding.class_pictures, "to_images", counted_decode)
        monkeypatch.setattr(train.stages.class_data, "Pipeline", Watched)
        monkeypatch.setattr(train.stages.class_data, "load_autoencoder", lambda *given: alone(autoencoder(*given)))


@pytest.fixture
def watch(monkeypatch):
    return Watch(monkeypatch)


def test_the_base_draws_what_is_missing_one_model_at_a_time_and_the_next_run_finds_it(
    small, drawn, tmp_path, watch, capsys
):
    prepare_samples(load_config(compose(*small(*drawn(3, tmp_path)))))
    assert (watch.sampled, watch.decoded, len(watch.models)) == (3, 3, 2)
    said = capsys.readouterr()
    assert "drawing 3 class" in said.out
    assert sum(line.strip().startswith("Buckets") for line in said.out.splitlines()) == 2
    assert "\r" not in said.err
    (folder,) = tmp_path.iterdir()
    assert sorted(file.name for file in folder.iterdir()) == ["00000.png", "00001.png", "00002.png", "recipe.json"]
    assert json.loads((folder / "recipe.json").read_text())["prompts"] == WORDS
    first = pictures(tmp_path)

    data = prepare_samples(load_config(compose(*small(*drawn(3, tmp_path)))))
    assert (watch.sampled, watch.decoded, len(watch.models)) == (3, 3, 2)
    source, ready = data.classes
    assert [sample.caption for sample in source] == [WORDS[0], WORDS[1], WORDS[0]]
    assert len(ready.entries) == 3
    assert "drawing" not in capsys.readouterr().out

    prepare_samples(load_config(compose(*small(*drawn(4, tmp_path)))))  # one more, beside those
    assert watch.sampled == 4
    assert pictures(tmp_path).items() >= first.items()
    fewer = prepare_samples(load_config(compose(*small(*drawn(2, tmp_path)))))
    assert (watch.sampled, len(fewer.classes[0])) == (4, 2)
    prepare_samples(load_config(compose(*small(*drawn(2, tmp_path), "preservation.seed=7"))))
    assert (watch.sampled, len(list(tmp_path.iterdir()))) == (6, 2)


def test_a_stopped_drawing_goes_on_where_it_was_and_gives_the_same_pictures(small, drawn, drawings, tmp_path, watch):
    prepare_samples(load_config(compose(*small(*drawn(3)))))
    straight, watch.sampled = pictures(drawings), 0
    watch.stop_after, watch.decoded = 2, 0
    with pytest.raises(ValueError, match="stopped here"):
        prepare_samples(load_config(compose(*small(*drawn(3, tmp_path)))))
    watch.models.clear()  # the traceback holds it
    (folder,) = tmp_path.iterdir()
    assert {file.suffix for file in folder.iterdir()} == {".safetensors", ".json"}
    watch.stop_after = 10**6
    prepare_samples(load_config(compose(*small(*drawn(3, tmp_path)))))
    assert (watch.sampled, watch.decoded) == (3, 3)  # one was missing
    assert pictures(tmp_path) == straight


@pytest.mark.parametrize("damage", ["cut", "emptied", "of another shape"])
def test_latents_that_a_stopped_drawing_left_damaged_are_made_again(small, drawn, drawings, tmp_path, watch, damage):
    prepare_samples(load_config(compose(*small(*drawn(3)))))
    folder = tmp_path / next(drawings.iterdir()).name
    folder.mkdir()
    file = folder / "00001.safetensors"
    save_file({"latents": torch.zeros(128, 3, 2)}, file)
    if damage != "of another shape":
        file.write_bytes(file.read_bytes()[: 100 if damage == "cut" else 0])
    watch.sampled = 0
    prepare_samples(load_config(compose(*small(*drawn(3, tmp_path)))))
    assert watch.sampled == 3
    assert pictures(tmp_path) == pictures(drawings)


def test_they_are_the_pictures_that_the_pipeline_makes(small, drawn, drawings, model_folders):
    prepare_samples(load_config(compose(*small(*drawn(3)))))
    pipe = load("small_dev", model_folders("dev"), device="cpu")
    made = pipe.generate([WORDS[0], WORDS[1]], seed=0, width=48, height=48, steps=2)
    (folder,) = drawings.iterdir()
    for index, image in enumerate(made):
        kept = Image.open(folder / f"{index:05d}.png")
        assert kept.size == (48, 48)
        assert np.abs(np.asarray(kept).astype(int) - np.asarray(image).astype(int)).max() <= 1


def test_they_are_drawn_from_projected_embeddings_too(small, drawn, tmp_path, drawings):
    prepare_samples(load_config(compose(*small(*drawn(3)))))
    projected = small(*drawn(3, tmp_path), "embedding_storage=projected", f"cache_dir={tmp_path / 'c'}")
    prepare_samples(load_config(compose(*projected)))
    pairs = zip(sorted(drawings.glob("*/*.png")), sorted(tmp_path.glob("*/*.png")), strict=True)
    for one, other in pairs:
        difference = np.asarray(Image.open(one)).astype(int) - np.asarray(Image.open(other)).astype(int)
        assert np.abs(difference).max() <= 2


def test_training_with_drawn_pictures_trains_them(train, drawn):
    folder = train("run", *drawn(3), "steps=1")
    assert values(folder, "prior_loss")[0] > 0


def test_a_drawn_picture_that_is_damaged_is_named_and_drawn_again_once_it_is_deleted(tmp_path):
    recipe = ClassImageRecipe("model", "fp32", ("a red cup",), 0, 32, 32, 2, 1.0)
    files = [train.encoding.class_pictures.picture_file(tmp_path, index) for index in range(2)]
    for file in files:
        Image.new("RGB", (32, 32)).save(file)
    files[1].write_bytes(b"")
    with pytest.raises(ValueError, match=r"(?s)\b1 class.*00001\.png"):
        train.encoding.class_pictures.ClassPictureFolder(tmp_path, recipe, 2)
    files[1].unlink()
    Image.new("RGB", (32, 32)).save(files[1])
    assert len(train.encoding.class_pictures.ClassPictureFolder(tmp_path, recipe, 2)) == 2


def test_everything_that_a_picture_depends_on_is_in_the_name_of_its_folder():
    recipe = ClassImageRecipe("model", "fp32", ("a", "b"), 0, 64, 48, 4, 2.0)
    others = [
        ClassImageRecipe("other", "fp32", ("a", "b"), 0, 64, 48, 4, 2.0),
        ClassImageRecipe("model", "bf16", ("a", "b"), 0, 64, 48, 4, 2.0),
        ClassImageRecipe("model", "fp32", ("b", "a"), 0, 64, 48, 4, 2.0),
        ClassImageRecipe("model", "fp32", ("a", "b"), 1, 64, 48, 4, 2.0),
        ClassImageRecipe("model", "fp32", ("a", "b"), 0, 48, 64, 4, 2.0),
        ClassImageRecipe("model", "fp32", ("a", "b"), 0, 64, 48, 5, 2.0),
        ClassImageRecipe("model", "fp32", ("a", "b"), 0, 64, 48, 4, 2.5),
    ]
    assert len({recipe.name, *(other.name for other in others)}) == 8
    assert recipe.name == ClassImageRecipe("model", "fp32", ("a", "b"), 0, 64, 48, 4, 2.0).name


# ------------------------------------------------------------------ caches


def test_filling_the_caches_draws_and_pruning_keeps_what_class_pictures_need(small, drawn, tmp_path, capsys):
    settings = [*small(*drawn(3)), f"cache_dir={tmp_path}"]
    fill_caches(compose(*settings))
    data = prepare_samples(load_config(compose(*settings)))
    keys = {key for entry in data.classes[1].entries for key in entry.keys}
    cache = data.classes[1].cache
    del data
    gc.collect()  # as long as it is there, nothing is pruned
    fill_caches(compose(*settings, "+prune=true"))
    assert "nothing" in capsys.readouterr().out
    assert keys
    assert all(cache.get(key) for key in keys)
    fill_caches(compose(*small(), f"cache_dir={tmp_path}", "+prune=true"))  # a run without them
    assert not any(cache.path(key).exists() for key in keys)


def test_nothing_is_to_be_cached_of_pictures_that_are_not_drawn_yet(small, drawn, tmp_path):
    for settings in (drawn(3, tmp_path), []):
        run = load_config(compose(*small(*settings)))
        assert class_cache_requests(run, cache_request(run)) == []
