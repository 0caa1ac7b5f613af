"""Out of memory: what was being done, what was asked and free, and the setting that takes less."""

import weakref
from pkgutil import resolve_name

import pytest
import torch
from message_helpers import holds
from train_helpers import adapter, compose, one_message, refusal, same_tensors

from flux2.utils.cli import is_out_of_memory
from train.planner.from_config import advice
from train.planner.gpus import GIB
from train.run import main
from train.stages.memory import load_config
from train.utils.memory import OutOfMemory, explain_oom, parse_amounts

pytest_plugins = ("train_helpers",)


def raise_for_cpu(*arguments, **options):
    torch.empty(2**60, dtype=torch.uint8)


def raise_for_gpu(*arguments, **options):
    raise torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 23.64 GiB of which 1.50 GiB is "
        "free. Including non-PyTorch memory, this process has 21 GiB memory in use."
    )


def test_the_amounts_are_read_from_pytorchs_messages():
    for cause, asked, free in ((raise_for_gpu, 2.5 * GIB, 1.5 * GIB), (raise_for_cpu, 2**60, 0)):
        with pytest.raises(RuntimeError) as caught:
            cause()
        assert is_out_of_memory(caught.value)
        assert parse_amounts(str(caught.value)) == (asked, free)
    assert not is_out_of_memory(RuntimeError("shapes do not match"))


@pytest.mark.parametrize(("gpus", "where"), [(2, "in a step on cuda:0:"), (1, "in a step:")])
def test_one_of_several_gpus_is_named(monkeypatch, gpus, where):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(OutOfMemory) as caught, explain_oom("in a step", "step", torch.device("cuda")):
        raise_for_gpu()
    assert str(caught.value).startswith(f"out of memory {where} 2.68 GB asked for, 1.61 GB free.")


def test_other_errors_pass_and_the_step_is_let_go():
    with pytest.raises(RuntimeError, match=r"^shapes$"), explain_oom("", "step", torch.device("cpu")):
        raise RuntimeError("shapes")
    held = []

    def work():
        big = torch.zeros(1000)
        held.append(weakref.ref(big))
        raise_for_cpu()

    with pytest.raises(OutOfMemory) as caught, explain_oom("while testing", "step", torch.device("cpu")):
        work()
    assert held[0]() is None
    assert caught.value.asked == 2**60
    assert holds(str(caught.value), f"out of memory while testing ... {2**60 / 1e9:.2f} GB")


@pytest.fixture
def no_advice(monkeypatch):
    """What to set otherwise, which takes a second to predict, is no part of the message."""
    monkeypatch.setattr("train.stages.memory.advice", lambda *_: "")


@pytest.mark.parametrize("cause", [raise_for_gpu, pytest.param(raise_for_cpu, marks=pytest.mark.slow)])
def test_a_step_without_memory_saves_the_state_and_names_the_next_setting(
    run_command, small, at_step, tmp_path, reference, cause
):
    whole = reference("memory.checkpointing=none")
    at_step(3, cause)
    folder = tmp_path / "run"
    code, _, err = run_command(*small(f"output_dir={folder}", "memory.checkpointing=none"))
    message = one_message(err)
    assert code == 2
    assert holds(message, f"out of memory ... step 4 ... memory. ... {folder}/checkpoints/step_000003")
    assert message.endswith(f" resume={folder}")
    assert holds(message, "2.68 GB ... 1.61 GB") == (cause is raise_for_gpu)
    code, _, err = run_command(*small(f"resume={folder}", "memory.checkpointing=full"))
    assert code == 0
    assert same_tensors(adapter(folder), adapter(whole))


def test_the_first_step_has_nothing_to_save(no_advice, small, at_step, tmp_path):
    at_step(0, raise_for_gpu)
    message = refusal(*small(f"output_dir={tmp_path / 'run'}"), task=main)
    assert holds(message, "step 1 ... no checkpoint")
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("place", "doing", "saved"),
    [
        pytest.param("train.stages.model.load_transformer", "loading the transformer", False, marks=pytest.mark.slow),
        ("train.validation.loss.FixedNoiseLoss.__call__", "validation after step 2", True),
        pytest.param(
            "train.validation.samples.Sampler.write_grid", "sampling after step 2", True, marks=pytest.mark.slow
        ),
        pytest.param("torch.optim.AdamW.step", "update of step 1", False, marks=pytest.mark.slow),
        ("flux2.models.autoencoder.Autoencoder.encode", "encoding images", False),
        ("flux2.models.text_encoder.TextEncoder.encode", "encoding prompts", False),
    ],
)
def test_what_was_being_done_is_named(no_advice, small, monkeypatch, tmp_path, place, doing, saved):
    owner, _, name = place.rpartition(".")
    owner = resolve_name(owner)
    original, calls, at = getattr(owner, name), [], 2 if "after step 2" in doing else 1

    def once(*arguments, **options):
        calls.append(1)
        return raise_for_gpu() if len(calls) == at else original(*arguments, **options)

    monkeypatch.setattr(owner, name, once)
    monkeypatch.setattr("train.config.run_config.try_out", lambda *arguments: None)
    folder = tmp_path / "run"
    every = ["validate_every=2", "sample_every=2", "sample.prompts=[a cup]", "sample.steps=1"]
    message = refusal(*small(f"output_dir={folder}", f"cache_dir={tmp_path / 'cache'}", *every), task=main)
    assert holds(message, f"out of memory ... {doing} ... 2.68 GB ... 1.61 GB")
    assert ((folder / "checkpoints" / "step_000002").exists()) == saved
    assert ("step_000002" in message) == saved


def test_the_advice_is_a_setting_that_takes_less(small):
    run = load_config(compose(*small("memory.checkpointing=none")))
    said = advice(run, OutOfMemory("", "step", 0, 0))
    assert "memory.checkpointing=" in said
    said = advice(run, OutOfMemory("", "step", 10**15, 0))
    assert holds(said, "precision=int8 ... batch_size=1 ... gradient_accumulation ... buckets.resolution")
    for way in ("text_encoder.storage=nf4", "text_encoder=remote", "train/cache.py"):
        assert way in advice(run, OutOfMemory("", "prompts", 0, 0))
    assert "reference_resolution" in advice(run, OutOfMemory("", "images", 0, 0))
