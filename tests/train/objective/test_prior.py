import gc
import json
import math
import shutil
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from train_helpers import adapter, compose, draw_picture, lines, same_tensors, values

import train.encoding.class_pictures
import train.stages.class_data
from flux2 import load
from train.cache import main as fill_caches
from train.config.memory import choice_of
from train.encoding.class_pictures import Recipe
from train.objective import objective
from train.objective.prior import ClassPictures, PriorPreservation
from train.planner.from_config import workload_of
from train.planner.predictor import Planner
from train.stages.class_data import class_cache_requests, class_loader
from train.stages.data import cache_request, prepare_samples
from train.stages.memory import load_config

pytest_plugins = ("train_helpers",)

WORDS = ["a red cup", "a blue fox"]
SGD = ["optimizer._target_=torch.optim.SGD", "~optimizer.betas", "optimizer.fused=false", "optimizer.lr=1.0"]


@pytest.fixture(scope="session")
def class_folder(tmp_path_factory):
    """Five captioned class pictures of another shape than any of the samples'."""
    folder = tmp_path_factory.mktemp("class")
    for i in range(5):
        draw_picture(70 + i, (50, 100)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(WORDS[i % 2])
    return folder


@pytest.fixture
def given(class_folder):
    return ["preservation=prior", "+dataset@preservation.dataset=folder", f"preservation.dataset.path={class_folder}"]


@pytest.fixture(scope="session")
def drawings(tmp_path_factory):
    return tmp_path_factory.mktemp("drawings")


@pytest.fixture
def drawn(drawings):
    def settings(count=3, folder=drawings):
        own = [f"preservation.prompts=[{','.join(WORDS)}]", f"preservation.count={count}", "preservation.steps=2"]
        return ["preservation=prior", f"preservation.folder={folder}", *own]

    return settings


def pictures(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*/*.png"))}


# ------------------------------------------------------------------ in training


def test_class_pictures_are_an_exact_share_of_what_is_trained_however_a_step_is_cut(small, given):
    run = load_config(compose(*small("preservation.share=0.5", "batch_size=4", *given)))
    classes = prepare_samples(run).classes

    def indices(step, processes, accumulation):
        found, cut = {}, run.settings
        micro = 16 // processes // accumulation
        run.settings = replace(cut, batch_size=micro)
        for index in range(processes):
            own = {"gradient_accumulation": accumulation, "num_processes": processes, "process_index": index}
            reader = class_loader(run, classes, **own)
            batches = reader.micro_batches(step)
            assert len(batches) == accumulation  # one beside each micro-batch
            for batch in batches:
                assert len(batch.latents) == micro / 2
                found |= dict(zip(batch.positions, batch.indices, strict=True))
        run.settings = cut
        return [found[position] for position in sorted(found)]

    whole = [indices(step, 2, 2) for step in range(10)]
    assert all(len(step) == 8 for step in whole)  # beside 16
    assert whole == [indices(step, 1, 8) for step in range(10)] == [indices(step, 4, 1) for step in range(10)]
    counted = np.bincount(np.concatenate(whole), minlength=5)
    assert (counted == 16).all()  # two passes of 5 x 8
    run.settings = replace(run.settings, seed=1)
    assert whole != [indices(step, 2, 2) for step in range(10)]


def test_their_noise_is_another_than_that_of_the_samples_beside_them(train, given, monkeypatch):
    noised, draw = [], objective.draw

    def noted(batch, timesteps, seed, step):
        noised.append((step, batch.positions, draw(batch, timesteps, seed, step).times))
        return draw(batch, timesteps, seed, step)

    monkeypatch.setattr(objective, "draw", noted)
    train("run", *given, "steps=2")
    assert [(step, positions) for step, positions, _ in noised] == [(0, [0, 1])] * 2 + [(1, [0, 1])] * 2
    for own, beside in (noised[:2], noised[2:]):
        assert (own[2] != beside[2]).all()
    made = [ClassPictures(lambda seed: seed, seed, 1.0, []) for seed in (0, 0, 1)]
    assert made[0].seed == made[1].seed == made[0].loader != made[2].seed


def test_their_loss_is_added_with_its_weight_to_an_unchanged_one(train, given):
    """The second factor starts at zero, so after a step of 1.0 along the gradient it is the gradient."""
    weights = {0.0: [], 1.0: given, 3.0: [*given, "preservation.weight=3.0"]}
    runs = {}
    for weight, settings in weights.items():
        runs[weight] = train(f"{weight}", *settings, *SGD, "max_grad_norm=0", "gradient_accumulation=2", "steps=1")
    losses = {weight: lines(folder)[0] for weight, folder in runs.items()}
    assert losses[0.0]["loss"] == losses[1.0]["loss"] == losses[3.0]["loss"]
    assert "prior_loss" not in losses[0.0]
    assert losses[3.0]["prior_loss"] == pytest.approx(3 * losses[1.0]["prior_loss"], rel=1e-6)
    none, one, three = (adapter(runs[weight]) for weight in (0.0, 1.0, 3.0))
    seconds = [name for name in none if "lora_B" in name]
    assert max((one[name] - none[name]).abs().max().item() for name in seconds) > 1e-4
    for name in seconds:
        torch.testing.assert_close(three[name] - none[name], 3 * (one[name] - none[name]), rtol=1e-3, atol=1e-6)


def test_a_run_with_class_pictures_goes_on_to_the_bit(train, given):
    whole = train("whole", *given, "checkpoint_every=2")
    rest = train("rest", *given, "checkpoint_every=2", f"resume={whole / 'checkpoints' / 'step_000002'}")
    assert lines(rest) == [line for line in lines(whole) if line["step"] > 2]
    assert same_tensors(adapter(rest), adapter(whole))
    assert len(values(whole, "prior_loss")) == 4


def test_a_run_with_other_class_pictures_does_not_go_on_unasked(train, given, class_folder, tmp_path):
    whole = train("whole", *given, "checkpoint_every=2")
    moved = tmp_path / "moved"
    shutil.copytree(class_folder, moved)
    again = [*given[:2], f"preservation.dataset.path={class_folder}", f"resume={whole / 'checkpoints' / 'step_000002'}"]
    draw_picture(90, (50, 100)).save(moved / "3.png")
    try:
        class_folder.rename(tmp_path / "kept")
        moved.rename(class_folder)
        with pytest.raises(ValueError, match=r"samples.*1 changed.*3\.png"):
            train("rest", *again, "checkpoint_every=2")
    finally:
        class_folder.rename(moved)
        (tmp_path / "kept").rename(class_folder)


def test_class_pictures_are_among_the_samples_of_a_bad_step(train, given, monkeypatch):
    def ruined(model, noised, *rest):
        losses = training_loss(model, noised, *rest)
        return replace(losses, total=losses.total * math.nan)

    training_loss = objective.training_loss
    monkeypatch.setattr(objective, "training_loss", ruined)
    with pytest.raises(ValueError, match=r"class0/\d\.png"):
        train("run", *given, "max_nonfinite_steps=1")


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
    recipe = Recipe("model", "fp32", ("a red cup",), 0, 32, 32, 2, 1.0)
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
    recipe = Recipe("model", "fp32", ("a", "b"), 0, 64, 48, 4, 2.0)
    others = [
        Recipe("other", "fp32", ("a", "b"), 0, 64, 48, 4, 2.0),
        Recipe("model", "bf16", ("a", "b"), 0, 64, 48, 4, 2.0),
        Recipe("model", "fp32", ("b", "a"), 0, 64, 48, 4, 2.0),
        Recipe("model", "fp32", ("a", "b"), 1, 64, 48, 4, 2.0),
        Recipe("model", "fp32", ("a", "b"), 0, 48, 64, 4, 2.0),
        Recipe("model", "fp32", ("a", "b"), 0, 64, 48, 5, 2.0),
        Recipe("model", "fp32", ("a", "b"), 0, 64, 48, 4, 2.5),
    ]
    assert len({recipe.name, *(other.name for other in others)}) == 8
    assert recipe.name == Recipe("model", "fp32", ("a", "b"), 0, 64, 48, 4, 2.0).name


# ------------------------------------------------------------------ caches, planner, settings


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


def test_the_planner_counts_their_pass_and_their_drawing(small, given, drawn):
    def planned(*settings):
        run = load_config(compose(*small("batch_size=4", *settings)))
        planner = Planner(workload_of(run, on_gpu=True))
        return planner, planner.predict(choice_of(run.config["memory"]))

    (_, plain), (planner, read), (_, made) = planned(), planned(*given, "preservation.share=0.5"), planned(*drawn(3))
    assert planner.class_share == 0.5
    assert sum(read.work.flops.values()) == pytest.approx(1.5 * sum(plain.work.flops.values()))
    assert read.phases["step"] == plain.phases["step"]  # one after the other, and never the larger
    assert "class pictures" not in read.phases
    assert 0 < made.total("class pictures") < made.total("step")
    assert not planner.job.usual


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, r"prompts=\[\].*dataset=(None|null)"),
        ({"prompts": ["a"], "dataset": {"path": "x"}}, r"prompts=\['?a'?\].*dataset="),
        ({"prompts": "a"}, r"preservation\.prompts='?a'?"),
        ({"dataset": "x"}, r"preservation\.dataset='?x'?"),
        ({"prompts": ["a"], "weight": 0}, r"preservation\.weight=0"),
        ({"prompts": ["a"], "share": 0}, r"preservation\.share=0"),
        ({"prompts": ["a"], "share": 1.5}, r"preservation\.share=1\.5"),
        ({"prompts": ["a"], "count": 0}, r"preservation\.count=0"),
        ({"prompts": ["a"], "count": 10**9}, r"preservation\.count=1000000000"),
        ({"prompts": ["a"], "seed": -1}, r"preservation\.seed=-1"),
        ({"prompts": ["a"], "width": 50}, r"preservation\.width=50"),
        ({"prompts": ["a"], "steps": 0}, r"preservation\.steps=0"),
        ({"prompts": ["a"], "steps": 10**6}, r"preservation\.steps=1000000"),
        (
            {"prompts": ["a"], "width": 1 << 20, "height": 1 << 20},
            r"preservation\.width=1048576.*8192 x 8192",
        ),
        ({"prompts": ["a"], "guidance": 1e9}, r"preservation\.guidance=1000000000\.0"),
        ({"prompts": ["a"], "seed": 2**63}, r"preservation\.seed=9223372036854775808"),
        ({"prompts": ["a"], "seed": 1.0}, r"preservation\.seed=1\.0"),
        ({"prompts": ["a", " "]}, r"preservation\.prompts=\['?a"),
        ({"prompts": ["a", "b", "a "]}, r"preservation\.prompts=\['?a'?, '?b"),
        ({"prompts": ["a"], "guidance": "x"}, r"preservation\.guidance='?x'?"),
        ({"prompts": ["a"], "folder": ""}, r"preservation\.folder='?'?"),
    ],
)
def test_a_refused_setting_is_named_with_its_value(settings, said):
    with pytest.raises(ValueError, match=said):
        PriorPreservation(**settings)


@pytest.mark.parametrize(("share", "what"), [(0.25, "0.5"), (0.3, "0.6"), (0.75, "1.5")])
def test_a_share_that_is_no_whole_number_of_pictures_is_refused_before_anything_is_loaded(small, given, share, what):
    with pytest.raises(ValueError, match=rf"preservation\.share={share}\b.*batch_size=2.*\b{what}\b"):
        load_config(compose(*small(*given, f"preservation.share={share}")))
    assert PriorPreservation(prompts=["a"], share=1 / 3).images_per_batch(3) == 1


def test_a_misspelt_setting_of_their_dataset_is_named(small, given):
    run = load_config(compose(*small(*given, "+preservation.dataset.recursiv=true")))
    with pytest.raises(ValueError, match=r"preservation\.dataset\.recursiv.* did you mean .*recursive"):
        prepare_samples(run)
