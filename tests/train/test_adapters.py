"""Runs with every type of adapter: they learn, are saved and loaded, and go on bit for bit where they stopped."""

import pytest
from message_helpers import holds
from train_helpers import adapter, compose, refusal, run_training, same_tensors, slow_but, values

from flux2 import adapters
from flux2.models.transformer import Transformer
from flux2.weights.loading import load_transformer
from train.planner.from_config import skeleton, workload_of
from train.planner.predictor import Planner
from train.run import main
from train.stages.memory import load_config

pytest_plugins = ("train_helpers",)

TYPES = ("lora", "rslora", "dora", "pissa", "loha", "lokr", "oft", "tlora")
NAMES = {
    "lora": "LoRA",
    "rslora": "rsLoRA",
    "dora": "DoRA",
    "pissa": "LoRA",
    "loha": "LoHa",
    "lokr": "LoKr",
    "oft": "OFT",
    "tlora": "T-LoRA",
}


@pytest.fixture
def typed(small, tmp_path):
    """`typed(kind, name, *overrides)`: a run with an adapter of this type."""

    def settings(kind, *overrides):
        size = {"oft": "adapter.block_size=16"}.get(kind, "adapter.rank=4")
        usual = [override for override in small() if not override.startswith("adapter.")]
        return [*usual, f"adapter={kind}", size, *overrides]

    def run(kind, name, *overrides):
        return load_config(compose(*settings(kind, f"output_dir={tmp_path / name}", *overrides)))

    return run


@pytest.mark.parametrize("kind", slow_but(TYPES, fast=("dora", "lokr", "tlora")))
def test_every_type_lowers_the_validation_loss_is_used_and_goes_on_bit_for_bit(kind, typed, tmp_path, capsys):
    every = ["validate_every=8", "checkpoint_every=4", "batch_size=4", "steps=8", "optimizer.lr=2e-2"]
    run = typed(kind, "whole", *every)
    whole = run_training(run).parent
    before, after = values(whole, "validation_loss")
    assert after < 0.97 * before
    said = capsys.readouterr().out
    parts = said[said.index(" samples, ") + 10 :].split(" ")
    model = skeleton(run.variant, run.precision, lambda model: run.make_adapter(model, seed=0))
    counted = sum(one.numel() for one in adapters.adapter_parameters(model))
    assert int(parts[0].replace(",", "")) == counted, "as the planner counts them"

    loaded = load_transformer(run.source)
    report = adapters.load(loaded, whole)
    assert (report.kind, len(report.layers)) == (NAMES[kind], 22)

    again = run_training(typed(kind, "again", *every, f"resume={whole / 'checkpoints' / 'step_000004'}")).parent
    assert values(again) == values(whole)[4:]
    assert values(again, "validation_loss")[-1] == after
    assert same_tensors(adapter(again), adapter(whole))


@pytest.mark.parametrize(("kind", "said"), [("loha", True), ("lora", False)])
def test_what_cannot_read_an_adapter_is_said_at_the_end(kind, said, small, run_command, tmp_path):
    code, out, _ = run_command(*small(f"output_dir={tmp_path / 'run'}", f"adapter={kind}", "steps=1"))
    assert code == 0
    command = f"python -m flux2.export {tmp_path / 'run' / 'adapter'} --format"
    assert (
        holds(out, f"PEFT ... flux2.generate ... LoHa ... {command} comfyui ... ComfyUI ... diffusers ... kohya")
        == said
    )
    assert (f"{command} comfyui --out FILE`" in out) == said


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["adapter=oft", "adapter.block_size=20"], "adapter.block_size=20 ... 48"),
        (["adapter=loha", "adapter.rank_pattern={mlp: 0}"], "adapter.rank_pattern ... mlp=0"),
        (
            ["adapter.targets=attentoin"],
            "adapter.targets ... attentoin",
        ),
        (["adapter.rank_pattern={attention: 2, mlp: 4}"], "attention ... mlp ... single_blocks.0.linear1"),
        (["adapter.rank_pattern={modulation: 2}"], "adapter.rank_pattern ... modulation ... 22"),
        (["adapter=dora", "+adapter.block_size=3"], "adapter.block_size=3"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_loaded(overrides, message, small, monkeypatch, tmp_path):
    def refuse(*_, **__):
        raise AssertionError("something large was loaded")

    monkeypatch.setattr("train.stages.model.load_transformer", refuse)
    settings = [one for one in small() if not one.startswith("adapter.")]
    assert holds(refusal(*settings, f"output_dir={tmp_path / 'run'}", *overrides, task=main), message)


def test_patterns_and_presets_are_given_on_the_command_line(small, tmp_path):
    overrides = [
        "adapter.targets=[double_attention,'single_blocks\\.0\\..*']",
        "adapter.rank_pattern={double_attention: 2}",
        "adapter.alpha_pattern={single_blocks: 3.0}",
    ]
    run = load_config(compose(*small(*overrides)))
    wrapped = run.make_adapter(load_transformer(run.source), seed=0)
    found = {
        name: (module.r["default"], module.scaling["default"])
        for name, module in wrapped.get_base_model().named_modules()
        if hasattr(module, "lora_A")
    }
    assert len(found) == 8 + 2
    assert set(found.values()) == {(2, 1.0), (4, 0.75)}
    assert found["single_blocks.0.linear2"] == (4, 0.75)


@pytest.mark.parametrize("kind", ["lora", "pissa", "oft"])
def test_what_is_frozen_of_an_adapter_does_not_stream_in_the_plan(kind, typed):
    """A PiSSA's beginning and an OFT's indices are no weights of the base: they are planned to stay on the device."""
    planner = Planner(workload_of(typed(kind, "run"), on_gpu=True))
    base = Transformer(planner.job.variant.transformer).to(planner.job.dtype)
    blocks = [*base.double_blocks, *base.single_blocks]
    assert planner.weights == [sum(one.nbytes for one in block.parameters()) for block in blocks]
    rest = sum(one.nbytes for one in base.parameters()) - sum(planner.weights)
    frozen_of_adapters = {"lora": 0, "pissa": planner.adapter["adapter"]}
    if kind in frozen_of_adapters:
        assert planner.other_weights == rest + frozen_of_adapters[kind]
    else:
        assert planner.other_weights > rest


def test_an_adapter_that_would_not_be_compiled_is_refused_before_anything_is_loaded(small):
    load_config(compose(*small("memory.compile=true")))
    with pytest.raises(ValueError, match=r"memory\.compile=true.*adapter=dora.*memory\.compile=false"):
        load_config(compose(*small("adapter=dora", "memory.compile=true")))
