"""Sweeps: what jobs share, that it changes nothing, and what is left of those that fail."""

import pytest
import torch
from message_helpers import holds
from sweep_helpers import LOOKS, same_runs
from train_helpers import adapter, compose, same_tensors

import train.stages.data
import train.stages.model
from train.encoding.text_encoders import LocalTextEncoder
from train.stages.memory import load_config
from train.stages.model import load_base
from train.sweeps import records, reuse
from train.sweeps.reuse import SHARED, Base, SharedObjects, checksum, state_of

pytest_plugins = ("train_helpers", "sweep_helpers")

USED = "transformer of the previous job"


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        (LOOKS, "dev"),
        pytest.param(["adapter=dora", "adapter.dropout=0.2", *LOOKS], "klein", marks=pytest.mark.slow),
        pytest.param(["precision=nf4", "memory.checkpointing=selective"], "dev", marks=pytest.mark.slow),
        pytest.param(["embedding_storage=projected", "cache_dir=null"], "dev", marks=pytest.mark.slow),
        (["memory.offload_blocks=0.5", "memory.offload_activations=true"], "dev"),
    ],
    ids=["samples", "dora", "nf4", "projected", "streaming"],
)
def test_jobs_load_once_and_give_what_they_give_alone(grid, train, loads, tmp_path, settings, kind):
    code, out, err = grid("adapter.rank=2,4", *settings, kind=kind)
    assert code == 0, err
    assert loads.count("load_transformer") == 1
    assert loads.count("load_autoencoder") == ("sample_every=2" in settings)
    assert out.count("loading the transformer") == 1
    assert out.count(USED) == 1
    assert out.count("data of the previous job") == 1
    same_runs(tmp_path / "sweep" / "1", train("alone", "adapter.rank=4", *settings, kind=kind))
    assert not same_tensors(adapter(tmp_path / "sweep" / "0"), adapter(tmp_path / "sweep" / "1"))
    assert SHARED.held(torch.device("cpu")) == 0  # when the sweep is over


@pytest.mark.slow
def test_another_precision_frees_the_old_transformer_before_it_is_loaded(grid, loads, monkeypatch):
    held = []
    load = train.stages.model.load_transformer
    monkeypatch.setattr(
        train.stages.model,
        "load_transformer",
        lambda *a, **o: (held.append(SHARED.held(torch.device("cpu"))), load(*a, **o))[1],
    )
    code, out, err = grid("precision=fp32,bf16", "steps=1")
    assert code == 0, err
    assert loads.count("load_transformer") == 2
    assert held == [0, 0]
    assert USED not in out


@pytest.mark.slow
def test_what_a_job_left_is_freed_before_an_encoder_is_loaded(grid, monkeypatch):
    held, at_start = [], []
    load, prepare = LocalTextEncoder.load, train.stages.data.prepare_samples

    def spied(*arguments):
        held.append(SHARED.held(torch.device("cpu")))
        return load(*arguments)

    def prepared(run):
        at_start.append(SHARED.held(torch.device("cpu")))
        return prepare(run)

    monkeypatch.setattr(LocalTextEncoder, "load", spied)
    monkeypatch.setattr(train.stages.data, "prepare_samples", prepared)
    code, out, err = grid("sample.prompts=[a fox],[a red fox]", "cache_dir=null", "steps=1")
    assert code == 0, err
    assert held == [0, 0]
    assert at_start[0] == 0 < at_start[1]
    assert USED not in out


def test_nothing_is_kept_outside_of_a_sweep(train, loads):
    train("one", "steps=1")
    train("two", "steps=1")
    assert loads == ["load_transformer"] * 2


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        pytest.param(ValueError("x"), marks=pytest.mark.slow),
    ],
    ids=["memory", "value"],
)
def test_after_a_job_that_failed_while_training_nothing_of_it_is_used(grid, train, at_step, loads, tmp_path, error):
    def fail():
        raise error

    at_step(2, fail)
    code, out, err = grid("adapter.rank=2,4")
    assert code == 2
    assert holds(err, "error: ... job 0 ... adapter.rank=2")
    assert loads.count("load_transformer") == 2
    assert USED not in out
    same_runs(tmp_path / "sweep" / "1", train("alone", "adapter.rank=4"))
    assert [job.status for job in records.read_jobs(tmp_path / "sweep")] == ["failed", "done"]


@pytest.mark.slow
def test_a_job_refused_for_its_settings_costs_no_second_load(grid, loads):
    code, out, _ = grid("adapter.rank=2,0,8", "steps=1")
    assert code == 2
    assert loads == ["load_transformer"]
    assert out.count(USED) == 1


def test_a_transformer_that_is_not_as_it_was_is_not_used_again(grid, loads, monkeypatch):
    detach = reuse.adapters.detach

    def careless(wrapped):
        model = detach(wrapped)
        with torch.no_grad():
            next(model.parameters()).view(-1)[0] += 1e-3
        return model

    monkeypatch.setattr(reuse.adapters, "detach", careless)
    code, out, err = grid("adapter.rank=2,4", "steps=1")
    assert code == 0, err
    assert loads == ["load_transformer"] * 2
    assert USED not in out


def test_the_state_of_a_model_is_its_modules_and_the_bits_of_its_tensors():
    def model():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4)).requires_grad_(False)

    assert state_of(model()) == state_of(model())
    for change in (
        lambda m: m[0].weight.data.mul_(1.000001),
        lambda m: m[1].running_mean.add_(1e-9),
        lambda m: m[0].requires_grad_(True),
        lambda m: m.append(torch.nn.Identity()),
        lambda m: m.to(torch.bfloat16),
    ):
        changed = model()
        change(changed)
        assert state_of(changed) != state_of(model())
    for dtype in (torch.float8_e4m3fn, torch.bfloat16, torch.uint8, torch.bool, torch.float64):
        assert checksum(torch.ones(3, 2, dtype=dtype).t()) == checksum(torch.ones(2, 3, dtype=dtype)) != 0


def test_things_are_taken_by_their_key_and_kept_only_by_jobs_that_end_well():
    store, said = SharedObjects(), []

    def job(key, made, fails=False):
        with store.job(keeps=True):
            thing = store.take("thing", key, lambda: made, said.append)
            if fails:
                raise RuntimeError
            return thing

    assert job([1], "a") == "a"
    assert job([1], "b") == "a"
    assert [holds(text, "the thing ... previous job") for text in said] == [True]
    assert job([2], "c") == "c"
    with pytest.raises(RuntimeError):
        job([2], "d", fails=True)
    assert job([2], "e") == "e"
    assert len(said) == 2
    with store.job(keeps=True):
        store.drop("thing")
        store.take("thing", [2], lambda: "f", said.append)
        store.drop("thing")
    assert job([2], "g") == "g"


def test_the_free_memory_counts_what_the_job_before_left(model_folders, small):
    from train.planner.from_config import free_bytes

    run = load_config(compose(*small()))
    before = SHARED.held(torch.device("cpu"))
    with SHARED.job(keeps=True):
        base = SHARED.take("transformer", "key", lambda: load_base(run), str)
    try:
        assert isinstance(base, Base)
        weights = sum(tensor.nbytes for tensor in base.transformer.parameters())
        assert before == 0
        assert SHARED.held(torch.device("cpu")) >= weights > 0
        assert free_bytes(torch.device("cpu")) > weights
    finally:
        SHARED.free()
    assert SHARED.held(torch.device("cpu")) == 0


def test_jobs_of_a_slider_with_other_prompts_encode_them(grid, train, tmp_path):
    settings = ["target=slider", "target.negative=a small cup"]
    code, out, err = grid("target.positive=a large cup,a red cup", *settings)
    assert code == 0, err
    assert "data of the previous job" not in out
    alone = train("alone", *settings, "target.positive=a red cup")
    assert same_tensors(adapter(tmp_path / "sweep" / "1"), adapter(alone))
