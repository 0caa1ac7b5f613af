"""Values that no run can mean, or that train nothing, are refused with their key and what is accepted."""

import re

import pytest
import regex
from message_helpers import holds
from train_helpers import compose, refusal

from flux2.layers import selection
from train.cli.errors import no_choice
from train.planner.from_config import workload_of
from train.stages.memory import load_config

pytest_plugins = ("train_helpers",)

PRESERVE = "preservation.prompts=[a]"
HOSTILE = {
    "steps=1000000000000000000000000": "1 to 1000000000",
    "gradient_accumulation=1000000000": "1 to 1048576",
    "max_grad_norm=1e-320": ">= 1e-06, or 0",
    "guidance=1e308": "0 to 1000, or null",
    "reference_resolution=1000000000000": "16 to 8192",
    "precision=fp8 precision.layers=inf": "list of regular expressions",
    "precision=fp8 precision.layers=[[1]]": "list of regular expressions",
    "precision=nf4 precision.layers=5": "list of regular expressions",
    "memory.attention=[[1]]": "list of attention backends",
    "memory.checkpointing=budget memory.budget_gb=1e308": "0 to 1e+06",
    "memory=auto memory.gpu_memory_gb=1e308": "1 to 1e+06",
    "memory=24gb memory.gpu_memory_gb=1e308": "1 to 1e+06",
    "timesteps.mean=1e308": "-10 to 10",
    "timesteps.mean=-1e308": "-10 to 10",
    "timesteps.std=1e308": "positive number up to 10",
    "timesteps.shift=1e308": "1e-06 to 1e+06",
    "timesteps.shift=empirical timesteps.steps=1000000000000": "1 to 10000",
    "timesteps.min=1e308": "number from 0 to 1",
    "target=contrastive target.scale=1e308": "number above 1, up to 1000",
    "loss=huber loss.delta=1e308": "1e-06 to 1e+06",
    "loss=dpo loss.beta=1e308": "0.001 to 1e+09",
    "loss.unmasked_prior=1e308": "0 to 1e+06",
    "preservation=blank preservation.weight=1e308": "1e-06 to 1e+06",
    "weighting=sigma_sqrt weighting.most=1e308": "1 to 1e+09",
    "optimizer.lr=1e-320": ">= 1e-12",
    "+optimizer.eps=1e308": "1e-37 to 1",
    f"preservation=base {PRESERVE} preservation.weight=1e308": "1e-06 to 1e+06",
    f"preservation=base {PRESERVE} preservation.weight=1e-320": "1e-06 to 1e+06",
    f"preservation=base {PRESERVE} preservation.samples=1000000000": "0 to 1048576",
    f"preservation=prior {PRESERVE} preservation.weight=1e308": "1e-06 to 1e+06",
    "validation.samples=1000000000": "0 to 10000",
    "validation.held_out=1000000000": "0 to 10000",
    "text_encoder.length=1000000000000": "1 to 100000",
}


@pytest.mark.parametrize(("words", "said"), HOSTILE.items())
def test_a_value_that_trains_nothing_or_never_ends_is_refused_with_its_key(words, said):
    settings = re.split(r" (?=\S+=)", words)
    key = settings[-1].lstrip("+").partition("=")[0]
    message = refusal("device=cpu", *settings)
    assert holds(message, f"{key}= ... must be ... {said}"), message


@pytest.mark.parametrize(
    "words",
    [
        "max_grad_norm=0",
        "max_grad_norm=0.001",
        "guidance=0",
        "timesteps.mean=-2",
        "timesteps.std=0.1",
        "steps=100000000",
    ],
)
def test_unusual_values_are_accepted(words):
    load_config(compose("device=cpu", words))


def test_the_group_that_is_a_list_of_lists_is_named(run_command):
    for group in ("precision", "optimizer"):
        message = run_command.refused(f"{group}=[[1]]")
        assert holds(message, f"{group}=[[1]] ... name of a choice")
    assert no_choice(TypeError("ours"), ["steps=[[1]]", "optimizer=adamw"]) is None


def test_an_expression_that_takes_for_ever_is_refused(monkeypatch):
    monkeypatch.setattr(selection, "SECONDS", 0.05)
    slow = r"(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)\1(?<=x)"
    with pytest.raises(TimeoutError):
        regex.fullmatch(slow, "double_blocks.0.img_attn.qkv", timeout=0.05)
    for setting in ("adapter.targets", "precision.layers"):
        message = refusal("precision=nf4", f"{setting}=['{slow}']")
        assert holds(message, f"{setting}: ... takes more than 0.05 s"), message
    for simple in (r"(.*)*z", r"(([a-z_0-9.]+)+)+!"):  # without a limit they take longer than anyone waits
        assert holds(refusal(f"adapter.targets=['{simple}']"), "adapter.targets: ... matches no linear layer")
    assert holds(refusal("adapter.targets=['(']"), "adapter.targets: ... not a regular expression")


def test_references_that_are_no_list_of_names_are_refused():
    config = load_config(compose("device=cpu", "dataset.reference_columns={}"))
    with pytest.raises(ValueError, match=r"dataset\.reference_columns=\{\} .*list of names"):
        config.instantiate("dataset")
    with pytest.raises(ValueError, match=r"dataset\.reference_columns=\{\} .*list of names"):
        workload_of(config, on_gpu=False)
