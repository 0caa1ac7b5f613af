"""The text encoder that memory=auto chooses: what fits, what the cache has, and what a resumed run has."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from planner_helpers import job
from train_helpers import compose, lines

from train.config.run_config import RunConfig
from train.encoding import LocalTextEncoder
from train.planner.gpus import usable
from train.planner.predictor import LIBRARIES
from train.planner.text_encoder_memory import first_fit, text_encoder_choices
from train.planner.workload import TextEncoderChoice
from train.stages.memory import load_config
from train.utils.files import read_yaml

pytest_plugins = ("train_helpers",)

OPEN = {"storage": "auto", "device": "auto"}
AUTO = ("memory=auto", "memory.gpu_memory_gb=8")


@pytest.fixture
def train(train, tmp_path):
    """`train` with a cache of its own, in which no other test encoded a prompt."""
    return lambda name, *overrides: train(name, f"cache_dir={tmp_path / 'cache'}", *overrides)


@pytest.fixture
def cramped(monkeypatch):
    """`cramped(*storages)`: these do not fit the device, and `host=True` host memory has no room either."""

    def set_fits(*storages, host=False):
        def fits(job, choice, limit, free, libraries):
            return choice.storage not in storages and not (host and choice.device)

        monkeypatch.setattr("train.planner.text_encoder_memory.fits", fits)

    return set_fits


@pytest.mark.parametrize(
    ("name", "gpu_memory_gb", "given", "host_gb", "chosen"),
    [
        ("dev", 48, OPEN, 0, TextEncoderChoice()),
        ("dev", 24, OPEN, 64, TextEncoderChoice("int8")),
        ("dev", 16, OPEN, 64, TextEncoderChoice("nf4")),
        ("dev", 8, OPEN, 64, TextEncoderChoice(None, "cpu")),
        ("dev", 8, OPEN, 32, TextEncoderChoice("int8", "cpu")),
        ("dev", 8, OPEN, 8, None),
        ("dev", 24, {"storage": None, "device": None}, 64, None),
        ("dev", 24, {"storage": None, "device": "auto"}, 64, TextEncoderChoice(None, "cpu")),
        ("dev", 24, {"storage": "nf4", "device": "auto"}, 64, TextEncoderChoice("nf4")),
        ("dev", 8, {"storage": "auto", "device": None}, 64, None),
        ("klein_base_4b", 12, OPEN, 0, TextEncoderChoice()),
        ("klein_base_4b", 8, OPEN, 0, TextEncoderChoice("int8")),
    ],
)
def test_the_choice_closest_to_the_published_encoder_that_fits_is_taken(name, gpu_memory_gb, given, host_gb, chosen):
    found = first_fit(job(name), given, usable(gpu_memory_gb), host_gb * 1e9, LIBRARIES)
    assert found == chosen
    if found is not None:
        assert found in list(text_encoder_choices(given, on_gpu=True))


def test_a_storage_whose_prompts_are_all_cached_needs_no_memory():
    asked = []

    def cached(storage):
        asked.append(storage)
        return storage == "int8"

    assert first_fit(job("dev"), OPEN, usable(16), 0, LIBRARIES, cached) == TextEncoderChoice("int8")
    assert asked == [None, "int8"]
    assert first_fit(job("dev"), OPEN, usable(80), 0, LIBRARIES, cached) == TextEncoderChoice()
    assert asked == [None, "int8"], "what fits needs no look into the cache"


def test_on_a_cpu_the_encoder_is_where_the_run_is():
    choices = list(text_encoder_choices(OPEN, on_gpu=False))
    assert choices == [TextEncoderChoice(storage) for storage in (None, "int8", "nf4")]
    assert first_fit(replace(job("dev"), on_gpu=False), OPEN, 15e9, 1e12, 0) == TextEncoderChoice("nf4")


def test_what_is_chosen_is_said_kept_and_used_again_on_resume(train, cramped, capfd, monkeypatch):
    cramped(None, "int8")
    run = train("run", *AUTO, "steps=2", "checkpoint_every=2")
    said = capfd.readouterr().out
    assert "text encoder in nf4, so that it fits" in said
    assert "Set text_encoder.storage" in said
    assert read_yaml(run / "config.yaml")["text_encoder"] | {"_target_": ""} == {
        "_target_": "",
        "length": None,
        "storage": "nf4",
        "device": None,
    }
    monkeypatch.setattr("train.stages.memory.planned_text_encoder", lambda *given: 1 / 0)
    train("run", *AUTO, "steps=3", "checkpoint_every=3", "resume=auto")  # where the whole one fits now
    said = capfd.readouterr().out
    assert "text encoder in nf4, as in the resumed run" in said
    assert "to encode" not in said
    train("run", "steps=4", "resume=auto")  # without memory=auto
    assert [line["step"] for line in lines(run)] == [1, 2, 3, 4]
    assert read_yaml(run / "config.yaml")["text_encoder"]["storage"] == "nf4"
    with pytest.raises(ValueError, match=r"text_encoder\.storage='nf4' there, null here"):
        train("run", "text_encoder.storage=null", "steps=5", f"resume={run}")


def test_with_all_prompts_in_the_cache_the_encoder_stays_as_it_is(train, cramped, capfd):
    run = train("run", "steps=1")
    assert read_yaml(run / "config.yaml")["text_encoder"]["storage"] is None
    assert "to encode" in capfd.readouterr().out
    cramped(None, "int8", "nf4", host=True)
    other = train("other", *AUTO, "steps=1")
    said = capfd.readouterr().out
    assert "text encoder in" not in said
    assert "to encode" not in said
    assert read_yaml(other / "config.yaml")["text_encoder"]["storage"] is None
    with pytest.raises(ValueError, match=r"text encoder in nf4 is predicted to need .*text_encoder=remote"):
        train("third", *AUTO, "steps=1", "dataset.captions.trigger=zebra")


def test_auto_without_memory_auto_is_the_encoder_as_it_is(small):
    config = RunConfig(compose(*small()))
    assert (config.text_encoder.storage, config.text_encoder.device) == (None, None)


@pytest.mark.parametrize("given", ["cuda", "cuda:1", "1", "[cpu]"])
def test_a_device_that_is_none_is_refused(small, given):
    with pytest.raises(ValueError, match=r"text_encoder\.device=.* must be cpu, auto, or null"):
        load_config(compose(*small(f"text_encoder.device={given}")))


@pytest.mark.parametrize(("given", "device"), [("cpu", "cpu"), (None, "cuda:1"), ("auto", "cuda:1")])
def test_the_encoder_is_loaded_onto_its_device(monkeypatch, given, device):
    seen = []

    def load(source, place, dtype, storage):
        seen.append((str(place), storage))
        return SimpleNamespace(cut=[])

    monkeypatch.setattr("train.encoding.text_encoders.load_text_encoder", load)
    LocalTextEncoder(storage="nf4", device=given).load(None, torch.device("cuda:1"), torch.bfloat16)
    assert seen == [(device, "nf4")]
