"""Every file of conf/ composes and makes its objects; experiments hold only differences."""

import inspect
import re
from dataclasses import fields
from functools import partial
from pathlib import Path

import hydra
import pytest
import torch
from hydra.utils import get_object
from hydra.utils import instantiate as hydra_instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf
from train_helpers import CONF, compose, slow_but

from data.sources import Folder, HuggingFace
from data.sources.captions import Captions
from flux2.adapters.tuners import attach
from flux2.quantization.precision import Precision, precision_from_name
from train.cli.errors import all_keys
from train.config.instantiate import instantiate, parse_settings
from train.config.run_config import GROUPS, own_names
from train.evaluate import EvaluationSettings
from train.stages.data import cache_request, paths
from train.stages.memory import load_config

pytest_plugins = ("train_helpers",)

# a file that begins with "_" is a part of those beside it, and no choice
FILES = sorted(file.relative_to(CONF) for file in CONF.rglob("[!_]*.yaml") if file.parent != CONF)
FILES = [file for file in FILES if file.parent.name != "accelerate"]  # for accelerate launch, no group of Hydra's
EXPERIMENTS = [file.stem for file in FILES if file.parent.name == "experiment"]
CHOICES = [(str(file.parent), file.stem) for file in FILES if file.parts[0] not in ("experiment", "hydra", "features")]
FEATURES = [file.stem for file in FILES if file.parts[0] == "features"]  # of conf/evaluate.yaml
HYDRA = [(file.parent.name, file.stem) for file in FILES if file.parts[0] == "hydra"]  # how a sweep is run
# what a choice asks for
NEEDS = {
    ("text_encoder", "remote"): ["model=dev"],  # whose endpoint it is
    ("dataset", "folder"): ["dataset.path=/pictures"],
    ("dataset", "huggingface"): ["dataset.path=someone/cards"],
    ("dataset", "table"): ["dataset.path=cards.parquet"],
    ("dataset", "mix"): ["+dataset@dataset.sources.cats=folder", "dataset.sources.cats.path=/pictures"],
    ("dataset", "pairs"): ["dataset.path=/pictures"],
    ("dataset", "preference"): ["dataset.path=/pictures"],
    ("dataset", "webdataset"): ["dataset.path=/shards"],
    ("target", "contrastive"): ["model=klein_base_4b", "device=cpu"],
    ("target", "slider"): ["target.positive=old", "target.negative=young", "validate_every=0"],
    ("target", "slider_images"): ["dataset=preference", "dataset.path=/pictures"],
    ("preservation", "base"): ["preservation.prompts=[a cup]"],
    ("preservation", "class"): ["preservation.trigger=trtcrd"],
    ("preservation", "prior"): ["preservation.prompts=[a cup]"],
}
OBJECTS = {
    "adapter": "make_adapter",
    "optimizer": "make_optimizer",
    "schedule": "schedule",
    "timesteps": "timesteps",
    "target": "target",
    "loss": "loss",
    "weighting": "weighting",
    "preservation": "_preservation",
    "text_encoder": "text_encoder",
    "tracker": "tracker",
}


def test_every_group_of_the_defaults_has_a_folder_and_every_folder_is_a_group():
    folders = {group for group, _ in CHOICES}
    assert folders == set(GROUPS) - {"buckets", "validation", "sample", "hub"}
    assert {"debug", "demo", "demo_edit", "relighting", "tarot"} <= set(EXPERIMENTS)


PRESETS = [choice for choice in CHOICES if re.fullmatch(r"\d+gb", choice[1])]  # each is planned for seconds
FAST = [choice for choice in CHOICES if choice not in PRESETS or choice == ("memory", "24gb")]


@pytest.mark.parametrize(("group", "choice"), slow_but(CHOICES, fast=FAST), ids=["/".join(names) for names in CHOICES])
def test_every_choice_composes_and_makes_its_objects(group, choice):
    config = compose(f"{group}={choice}", *NEEDS.get((group, choice), []))
    run = load_config(config)
    given = OmegaConf.to_container(config[group], resolve=True)
    if group == "memory" and "gpu_memory_gb" in given:  # the planner gives what is null its value
        assert all(run.composed[group][key] == value for key, value in given.items() if value not in (None, "free"))
        assert run.composed[group]["checkpointing"] is not None
    else:
        assert run.composed[group] == given
    if group in OBJECTS:
        made, target = getattr(run, OBJECTS[group]), get_object(config[group]._target_)
        elsewhere = own_names(group)
        given = run.composed[group].items()
        settings = {key: value for key, value in given if not key.startswith("_") and key not in elsewhere}
        if config[group].get("_partial_"):
            assert isinstance(made, partial)
            assert made.func is target
            assert made.keywords == settings
        else:
            assert type(made) is target
            undecided = {key: None for key, value in settings.items() if value == "auto"}  # memory=auto decides later
            assert all(getattr(made, key) == value for key, value in (settings | undecided).items())
    if group == "model":
        assert run.variant.name == choice
        assert run.buckets.resolution == run.settings.reference_resolution == run.variant.resolution


@pytest.mark.parametrize(("kind", "choice"), HYDRA, ids=["/".join(names) for names in HYDRA])
def test_every_way_to_run_a_sweep_composes_and_makes_its_object(kind, choice):
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        config = hydra.compose("train", [f"hydra/{kind}={choice}"], return_hydra_config=True).hydra
    given = OmegaConf.load(CONF / "hydra" / kind / f"{choice}.yaml")
    assert config[kind].keys() == given.keys()
    module, _, name = given._target_.rpartition(".")
    made = getattr(pytest.importorskip(module, reason=f"the extra `{choice}`"), name)
    if kind == "sweeper":
        assert given.keys() - {"_target_"} == inspect.signature(made).parameters.keys()
        assert type(hydra_instantiate(config.sweeper.sampler)).__name__ == "TPESampler"
    else:
        known = {
            field.name for field in fields(get_object("hydra_plugins.hydra_submitit_launcher.config.SlurmQueueConf"))
        }
        assert given.keys() == known | {"_target_"}
        config.launcher.submitit_folder = "jobs"  # in place of the folder of the sweep, which is asked of a running one
        assert hydra_instantiate(config.launcher).params["gpus_per_node"] == 1


def test_hydras_own_choices_are_both_there():
    assert {("sweeper", "optuna"), ("launcher", "slurm")} <= set(HYDRA)


@pytest.mark.parametrize("choice", FEATURES)
def test_every_choice_of_an_evaluation_composes_and_makes_its_object(choice):
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        config = hydra.compose("evaluate", [f"features={choice}", "run=outputs/demo/0"])
    given = OmegaConf.to_container(config, resolve=True)
    features = instantiate("features", given.pop("features"))
    assert type(features) is get_object(config.features._target_)
    assert features.side == config.features.side
    settings = parse_settings("", given, EvaluationSettings)
    assert set(given) == {field.name for field in fields(EvaluationSettings)}
    assert settings == EvaluationSettings("outputs/demo/0", seeds=[0, 1], strengths=[0, 0.5, 1, 1.5])


def test_the_adapter_covers_the_layers_that_attach_does_by_default():
    assert compose().adapter.targets == attach.__kwdefaults__["targets"] == "blocks"


@pytest.mark.parametrize(
    ("choice", "storage"), [("auto", None), ("fp32", None), ("fp8", "fp8"), ("int8", "int8"), ("nf4", "nf4")]
)
def test_a_precision_is_the_one_of_that_name_in_the_library(choice, storage):
    run = load_config(compose(f"precision={choice}", "device=cpu"))
    assert run.precision == precision_from_name(choice, torch.device("cpu"))
    assert run.precision.storage == storage
    assert not run.precision.cache_transposed_weights


def test_every_setting_of_fp8_and_int8_is_in_its_file():
    chosen_with_memory = {"cache_transposed_weights"}
    every = {field.name for field in fields(Precision)} - chosen_with_memory
    assert set(compose("precision=fp8").precision) == every - {"rotate"}
    assert set(compose("precision=int8").precision) == every - {"rowwise"}
    assert set(compose("memory=default").memory) >= chosen_with_memory


@pytest.mark.parametrize("choice", ["folder", "huggingface", "mix", "pairs", "preference", "table", "webdataset"])
def test_the_settings_of_a_dataset_are_the_arguments_of_its_class(choice):
    given = compose(f"dataset={choice}").dataset
    parameters = inspect.signature(get_object(given._target_)).parameters
    assert given.keys() - {"_target_"} == parameters.keys()
    for key, parameter in parameters.items():
        if OmegaConf.is_missing(given, key):
            assert parameter.default is parameter.empty
        elif key == "captions":
            assert hydra_instantiate(compose(f"dataset={choice}").dataset.captions) == Captions()
        else:
            value = given[key]
            assert (tuple(value) if isinstance(value, ListConfig) else value) == parameter.default


def test_whether_the_hub_can_be_reached_is_asked_for_every_dataset_of_a_mix(monkeypatch):
    asked = []
    monkeypatch.setattr("train.stages.data.is_offline", asked.extend)
    mix = ["dataset=mix", "+dataset@dataset.sources.cats=folder", "dataset.sources.cats.path=/no/pictures"]
    more = ["+dataset@dataset.sources.dogs=huggingface", "dataset.sources.dogs.path=someone/dogs"]
    with pytest.raises(ValueError, match=r"path='?/no/pictures"):
        cache_request(load_config(compose(*mix, *more)))
    assert {"/no/pictures", "someone/dogs"} < set(asked)
    assert paths(compose().dataset) == ["data/demo"]


def test_the_datasets_are_made_from_their_files(pictures, parquet):
    folder = load_config(compose("dataset=folder", f"dataset.path={pictures}")).instantiate("dataset")
    table = load_config(compose("dataset=table", f"dataset.path={parquet}")).instantiate("dataset")
    assert (type(folder), type(table)) == (Folder, HuggingFace)
    assert [sample.caption for sample in folder] == [sample.caption for sample in table]
    cards = load_config(compose()).instantiate("dataset")
    assert len(cards) == 24
    assert all("trtcrd" in sample.caption for sample in cards)


def composed(name, *overrides):
    """An experiment, with the images that it asks for."""
    given = {"dataset.path": "/pictures", "target.positive": "old", "target.negative": "young"}
    missing = OmegaConf.missing_keys(compose(f"+experiment={name}"))
    return compose(f"+experiment={name}", *(f"{key}={given[key]}" for key in sorted(missing)), *overrides)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_composes_and_makes_its_objects(name):
    run = load_config(composed(name, "memory=default"))  # auto depends on the machine
    assert run.settings.name == name
    assert set(run.composed) - set(GROUPS) == set(run.settings.__dataclass_fields__)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_holds_only_differences(name):
    raw = OmegaConf.load(CONF / "experiment" / f"{name}.yaml")
    standard = OmegaConf.load(CONF / "train.yaml").defaults
    usual = {
        str(group): choice for entry in standard if isinstance(entry, DictConfig) for group, choice in entry.items()
    }
    choices = [
        (str(group).removeprefix("override /"), choice)
        for entry in raw.pop("defaults", [])
        for group, choice in entry.items()
    ]
    assert [(group, choice) for group, choice in choices if usual[group] == choice] == []
    needed = ["dataset.path=/pictures"] * (dict(choices).get("dataset") in ("folder", "pairs"))
    without = compose(*(f"{group}={choice}" for group, choice in choices), *needed)
    same = []
    for key in all_keys(raw):
        value = OmegaConf.select(raw, key)
        if not isinstance(value, DictConfig) and not OmegaConf.is_missing(without, key):
            assert key in all_keys(without), f"{key} is no setting"
            if OmegaConf.select(without, key) == value:
                same.append(key)
    assert same == []


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_rate_of_an_experiment_belongs_to_its_optimizer(name):
    raw = OmegaConf.load(CONF / "experiment" / f"{name}.yaml")
    written = OmegaConf.to_container(raw).get("optimizer", {}).get("lr")
    if written is None:
        return
    rated = re.fullmatch(r"\$\{rate_for:([\w ]+),(\S+)\}", str(written))
    assert rated, f"{name}: whose rate is {written}?"
    for optimizer in ("adamw_8bit", "lion", "prodigy"):
        own = OmegaConf.load(CONF / "optimizer" / f"{optimizer}.yaml").lr
        expected = float(rated[2]) if optimizer in rated[1].split() else own
        assert compose(f"+experiment={name}", f"optimizer={optimizer}").optimizer.lr == expected
    assert compose(f"+experiment={name}", "optimizer=lion", "optimizer.lr=5e-5").optimizer.lr == 5e-5


def test_a_rate_of_an_experiment_is_not_taken_for_an_optimizer_without_a_file():
    other = ["+experiment=demo", "optimizer._target_=torch.optim.RAdam", "~optimizer.fused"]
    with pytest.raises(ValueError, match=r"optimizer\.lr=0\.002.*adamw.*torch\.optim\.RAdam.*optimizer\.lr="):
        load_config(compose(*other))
    assert load_config(compose(*other, "optimizer.lr=1e-3")).make_optimizer.keywords["lr"] == 1e-3


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_is_headed_by_what_it_is_and_its_command(name):
    head, _, rest = (CONF / "experiment" / f"{name}.yaml").read_text().partition("\n\n")
    assert head.startswith("# @package _global_\n# ")
    assert f"train/run.py +experiment={name}" in head
    assert rest


def test_the_tarot_experiment_has_the_settings_of_the_published_example():
    config = compose("+experiment=tarot")
    assert (config.model.name, config.dataset.path) == (
        "dev",
        "multimodalart/1920-raider-waite-tarot-public-domain",
    )
    assert (config.adapter.rank, config.batch_size, config.steps, config.seed) == (8, 2, 1000, 0)
    assert (config.optimizer._target_, config.optimizer.lr) == ("bitsandbytes.optim.AdamW8bit", 1e-4)
    assert (config.schedule._target_, config.schedule.warmup_steps) == ("train.optim.Constant", 200)
    assert (config.guidance, config.memory.checkpointing, config.precision.dtype) == (1.0, "full", "bf16")
    assert "trtcrd" in config.sample.prompts[0]


def test_the_relighting_experiment_has_the_settings_of_the_published_example():
    config = compose("+experiment=relighting")
    dataset = config.dataset
    assert (config.model.name, dataset.path) == ("dev", "kontext-community/relighting")
    assert (dataset.image_column, dataset.caption_column) == ("output", "instruction")
    assert list(dataset.reference_columns) == ["file_name"]
    assert (config.adapter.rank, config.steps, config.seed) == (16, 1000, 0)
    assert config.batch_size * config.gradient_accumulation == 4
    assert (config.optimizer._target_, config.optimizer.lr) == ("bitsandbytes.optim.AdamW8bit", 1e-4)
    assert (config.schedule._target_, config.schedule.warmup_steps) == ("train.optim.Constant", 200)
    assert (config.guidance, config.memory.checkpointing, config.precision.dtype) == (1.0, "full", "bf16")
    assert config.buckets.resolution == config.reference_resolution == 1024


def test_the_demo_preserves_plain_prompts_that_it_does_not_show():
    config = compose("+experiment=demo")
    assert len(config.preservation.prompts) >= config.preservation.samples
    assert not any("trtcrd" in prompt for prompt in config.preservation.prompts)
    assert not set(config.sample.prompts) & set(config.preservation.prompts)


def test_the_configuration_is_found_from_any_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert compose("steps=7").steps == 7
    assert Path(compose().dataset.path) == CONF.parent / "data" / "demo"
