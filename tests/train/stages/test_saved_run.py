"""A run folder may come from someone else: what its configuration names is not called, interpolated or contacted."""

import json
import pickle
from contextlib import suppress
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from train_helpers import composed

from flux2.prompts.remote_client import PUBLISHED
from train.checkpoints import resume
from train.config.instantiate import check_own_targets, own_targets
from train.config.paths import CONFIG
from train.evaluate import EvaluationSettings, evaluate_runs
from train.evaluation.features import Latents
from train.stages.saved_run import SavedRun, configuration
from train.utils.files import read_yaml

pytest_plugins = ("train_helpers",)

URL = "http://example.invalid:1"
REMOTE = {"_target_": "train.encoding.RemoteTextEncoder", "url": URL}


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.fixture
def foreign(tmp_path, monkeypatch):
    """`foreign(dataset={...})`: a run folder whose configuration has these groups; the paths in it are relative."""
    monkeypatch.chdir(tmp_path)

    def make(**changes):
        config = OmegaConf.to_container(composed("model=tiny"), resolve=True)
        config |= {"cache_dir": str(tmp_path / "cache"), "quantized_cache_dir": None} | changes
        (tmp_path / "config.yaml").write_text(json.dumps(config))
        return tmp_path

    return make


def opened(folder, **settings):
    return SavedRun(folder, "cpu", {"prompts": ["a cup"]}, [0], **settings)


def calls(ran):
    """Settings of a data set that would make the file `ran` if what they name were called."""
    Path("x.pt").write_bytes(pickle.dumps(Touch(ran)))
    load = {"_target_": "torch.load", "f": "x.pt", "weights_only": False}
    folder = {"_target_": "data.sources.Folder", "path": "pictures"}
    return {
        "as the data set": load,
        "as its captions": folder | {"captions": load},
        "as a source of a mix": {"_target_": "data.sources.Mix", "sources": {"a": {"captions": load}, "b": load}},
        "in a list": folder | {"path": [load]},
        "by a path through our own module": {"_target_": "data.sources.tables.Path.touch", "self": str(ran)},
        "as the arguments of a source": folder | {"_args_": [load]},
        "by no name": folder | {"captions": {"_target_": [load]}},
        "partially": {"_target_": "functools.partial", "_partial_": True, "func": load},
    }


def test_nothing_that_a_data_set_names_is_called(foreign, tmp_path):
    ran = tmp_path / "ran"
    for name, dataset in calls(ran).items():
        run = opened(foreign(dataset=dataset))
        assert not ran.exists(), name
        assert run.samples is None
        assert any("conf/dataset" in note for note in run.notes), (name, run.notes)
    torch_load = calls(ran)["as the data set"]
    with pytest.raises(ValueError, match=r"text_encoder: _target_='torch\.load' .*conf/text_encoder"):
        opened(foreign(text_encoder=torch_load))
    for group in ("optimizer", "adapter", "tracker", "schedule", "preservation"):  # only training needs them
        opened(foreign(**{group: torch_load}))
    assert not ran.exists()


def test_nothing_in_a_folder_is_interpolated(foreign, monkeypatch):
    monkeypatch.setenv("NAME", "a-secret")
    text = "${oc.env:NAME} ${oc.decode:1} ${"
    folder = foreign(name=text, dataset={"_target_": "data.sources.Folder", "path": text}, cache_dir=None)
    run = opened(folder)
    assert run.config.settings.name == text
    assert run.config.composed["dataset"]["path"] == text
    assert text in run.notes[0]
    assert "a-secret" not in str(run.notes)


def test_no_address_that_a_folder_names_is_contacted_unless_it_is_given(foreign, monkeypatch):
    monkeypatch.setattr("requests.Session.request", lambda *_, **__: pytest.fail("contacted"))
    with pytest.raises(ValueError, match=rf"^text_encoder_url is missing.*{URL}.*set text_encoder_url"):
        opened(foreign(text_encoder=REMOTE))
    assert opened(foreign(text_encoder=REMOTE), text_encoder_url=URL).config.text_encoder.url == URL
    other = opened(foreign(text_encoder=REMOTE), text_encoder_url="http://localhost:1")
    assert other.config.text_encoder.url == "http://localhost:1"
    assert configuration(foreign(text_encoder=REMOTE | {"url": PUBLISHED}), "cpu", {})["text_encoder"]["url"]
    with pytest.raises(ValueError, match=r"^text_encoder_url='http://x'"):
        evaluate_runs(EvaluationSettings(str(foreign()), text_encoder_url="http://x"), Latents(32))


def test_all_targets_of_conf_may_be_in_a_run_folder_and_no_other():
    for group in ("dataset", "text_encoder", "adapter", "optimizer", "tracker"):
        for file in (CONFIG / group).glob("[a-z]*.yaml"):
            content = read_yaml(file)
            if "_target_" in content:
                check_own_targets(group, content)
    assert own_targets("text_encoder") == {"": {f"train.encoding.{name}TextEncoder" for name in ("Local", "Remote")}}
    assert own_targets("dataset")["captions"] == {"data.sources.Captions"}
    for given in ({"_target_": "data.sources.Captions"}, {"captions": {"_target_": "data.sources.Folder"}}):
        with pytest.raises(ValueError, match=r"dataset: _target_='data\.sources"):
            check_own_targets("dataset", given)


ODD = ({"_target_": "os.system"}, [[["x"]]], 10**19, -1, float("nan"), True, None, "\x1b", {})
GROUPS = ("model", "precision", "memory", "dataset", "text_encoder", "buckets")


@pytest.mark.parametrize(
    ("group", "values"), [("sample", ODD[:1]), *(pytest.param(one, ODD, marks=pytest.mark.slow) for one in GROUPS)]
)
def test_any_value_of_any_setting_is_one_error_or_works(group, values, foreign):
    config = OmegaConf.to_container(composed("model=tiny"), resolve=True)
    for value in values:
        for key in (None, *config[group]):
            with suppress(ValueError):
                opened(foreign(**{group: value if key is None else config[group] | {key: value}}))
    for wrong in ('{"1": 2, "steps": 3}', '{1: 2, "steps": 3}', '{"steps": 3, "model": 3}', '{"steps": true}'):
        (foreign() / "config.yaml").write_text(wrong)
        with pytest.raises(ValueError, match=r"must be a group"):
            opened(Path.cwd())


def test_a_configuration_with_keys_of_any_type_is_compared(foreign):
    folder = foreign()
    (folder / "config.yaml").write_text("{1: 2, steps: 3, null: 4}")
    assert "1=2 there" in resume.differences(resume.configuration(folder), {"steps": 3, "a": 1})["1"]
