"""A run that goes on trains on the samples that it was trained on, or says what is other."""

import json
import shutil
from types import SimpleNamespace

import pytest
from message_helpers import holds
from safetensors.torch import load_file, save_file
from train_helpers import CAPTIONS, draw_picture, lines

from data.cache.latents import LatentEntry
from train.checkpoints.checkpoint import checkpoints, read_state
from train.checkpoints.data_manifest import TrainedData
from train.stages.data import TrainingData

pytest_plugins = ("train_helpers",)


def data(**captions):
    """Samples of these names and captions; a name's content is itself."""
    samples = [SimpleNamespace(name=name, captions=(text,), weight=1.0) for name, text in captions.items()]
    return TrainedData.from_samples(samples, [LatentEntry((16, 16), f"key of {name}") for name in captions])


BEFORE = {"a": "one", "b": "two", "c": "three"}


@pytest.mark.parametrize(
    ("now", "said"),
    [
        (BEFORE, None),
        ({**BEFORE, "b": "other"}, "3 samples ... 1 changed (b)"),
        ({**BEFORE, "d": "new"}, "3 samples ... 1 new (d)"),
        ({"a": "one"}, "3 samples ... 2 gone (b, c)"),
        ({"b": "x", "c": "three", "e": ""}, "3 samples ... 1 changed (b) ... 1 new (e) ... 1 gone (a)"),
        ({"b": "two", "a": "one", "c": "three"}, "3 samples ... order"),
        ({str(i): "" for i in range(7)}, "3 samples ... 7 new (0, 1, 2, 3, 4 and 2 more) ... 3 gone (a, b, c)"),
    ],
)
def test_what_differs_is_counted_and_the_first_are_named(tmp_path, now, said):
    before = data(**BEFORE)
    before.write(tmp_path)
    found = data(**now).difference(tmp_path, before.digest)
    assert found is None if said is None else holds(found, said)


@pytest.mark.parametrize("kept", [None, "garbage", "[]", '{"names": ["a"], "marks": ["x"]}'])
def test_where_the_marks_are_lost_the_digest_still_tells(tmp_path, kept):
    if kept is not None:
        (tmp_path / "data.json").write_text(kept)
    assert "samples" in data(**BEFORE).difference(tmp_path, data(a="x").digest)
    assert data(**BEFORE).difference(tmp_path, data(**BEFORE).digest) is None


def test_everything_of_a_sample_that_is_learned_is_in_its_mark():
    entry = LatentEntry((16, 16), "key")
    one = [
        TrainedData.from_samples([SimpleNamespace(name="a", captions=captions, weight=weight)], [changed]).digest
        for changed, captions, weight in (
            (entry, ["x"], 1.0),
            (LatentEntry((16, 16), "other"), ["x"], 1.0),
            (LatentEntry((16, 16), "key", ((16, 16),), ("reference",)), ["x"], 1.0),
            (LatentEntry((16, 16), "key", mask_key="mask"), ["x"], 1.0),
            (LatentEntry((16, 16), "key", others=(LatentEntry((16, 16), "mirrored"),)), ["x"], 1.0),
            (entry, ["x", "y"], 1.0),
            (entry, ["x"], 2.0),
        )
    ]
    assert len(set(one)) == len(one)


def test_a_run_goes_on_with_changed_samples_only_if_it_may(train, pictures, tmp_path, capfd):
    folder = shutil.copytree(pictures, tmp_path / "own")
    run = train("run", f"dataset.path={folder}", "steps=2", "checkpoint_every=2")
    kept = json.loads((run / "data.json").read_text())
    assert len(kept["marks"]) == len(CAPTIONS)
    (place,) = checkpoints(run)
    before = read_state(place)["data"]

    (folder / "1.txt").write_text("the cup")
    draw_picture(77, (48, 48)).save(folder / "2.png")
    with pytest.raises(ValueError, match=r"step_000002.* 6 samples.*2 changed.*1\.png.*2\.png"):
        train("run", f"dataset.path={folder}", "steps=4", "resume=auto")
    assert [line["step"] for line in lines(run)] == [1, 2]
    capfd.readouterr()
    train("run", f"dataset.path={folder}", "steps=4", "checkpoint_every=2", "resume=auto", "allow_changed_data=true")
    assert holds(capfd.readouterr().out, "6 samples ... 2 changed")
    assert read_state(checkpoints(run)[-1])["data"] != before
    assert json.loads((run / "data.json").read_text())["marks"] != kept["marks"]


@pytest.mark.parametrize(
    ("part", "said"), [("transformer", "the transformer of"), ("text_encoder", "the text encoder in float32 of")]
)
def test_a_run_goes_on_with_other_models_at_the_same_place_only_if_it_may(
    train, model_folders, tmp_path, part, said, capfd, monkeypatch
):
    models = shutil.copytree(model_folders("dev"), tmp_path / "models")
    settings = f"model.path={models}", "checkpoint_every=1"
    run = train("run", *settings, "steps=1")
    assert read_state(checkpoints(run)[-1])["models"].keys() == {"the transformer", "the text encoder in float32"}
    file = sorted((models / part).glob("*.safetensors"))[0]
    save_file({name: tensor + 0.01 for name, tensor in load_file(file).items()}, file)
    with pytest.raises(ValueError, match=rf"models differ .*step_000001.*{said}.*allow_changed_data=true"):
        train("run", *settings, "steps=2", "resume=auto")
    train("run", *settings, "steps=2", "resume=auto", "allow_changed_data=true")
    assert f"resuming with changed models: {said}" in capfd.readouterr().out
    other = {"models": {"the text encoder in bfloat16": "of a run on a GPU"}}
    for steps, models in ((3, {}), (5, other)):  # as older versions wrote it
        with monkeypatch.context() as before:
            before.setattr(
                TrainingData, "state", property(lambda data, models=models: {"data": data.manifest.digest} | models)
            )
            train("run", *settings, f"steps={steps}", "resume=auto")
        train("run", *settings, f"steps={steps + 1}", "resume=auto")
