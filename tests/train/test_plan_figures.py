"""Figures of the planner: bytes, multiplications and seconds of what a run computes and keeps."""

import json
from dataclasses import replace
from functools import partial

import bitsandbytes
import pytest
import torch
from PIL import Image
from planner_helpers import ADAMW, H200, job
from train_helpers import compose

from flux2.adapters import adapter_parameters
from flux2.adapters.tuners import attach
from flux2.models.variants import VARIANTS
from flux2.quantization.precision import Precision
from flux2.weights.loading import load_text_encoder
from flux2.weights.sources import model_source
from train.config.memory import Choice
from train.planner import from_config as choosing
from train.planner import gpus
from train.planner.from_config import skeleton
from train.planner.gpus import GIB, SIZES, gpu, measured, usable
from train.planner.optimizer_memory import optimizer_bytes
from train.planner.predictor import Planner
from train.planner.text_encoder_memory import text_encoder_bytes
from train.planner.workload import Workload
from train.stages.memory import load_config

pytest_plugins = ("train_helpers", "planner_helpers")


@pytest.mark.parametrize(
    ("name", "storage", "expected"),
    [
        ("dev", None, 64.4),
        ("dev", "fp8", 33.0),
        ("dev", "int8", 33.0),
        ("dev", "nf4", 17.8),
        ("klein_base_9b", None, 18.2),
        ("klein_base_9b", "fp8", 9.4),
        ("klein_base_9b", "nf4", 5.2),
        ("klein_base_4b", None, 7.8),
        ("klein_base_4b", "fp8", 4.1),
        ("klein_base_4b", "nf4", 2.3),
    ],
)
def test_weights_take_what_their_shapes_say(planner, name, storage, expected):
    found = planner(name, storage=storage)
    assert (sum(found.weights) + found.other_weights) / 1e9 == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("storage", ["fp8", "int8"])
def test_two_layouts_in_8_bits_take_what_bfloat16_takes(storage):
    precision = Precision(torch.bfloat16, storage, matmul=storage, cache_transposed_weights=True)
    model = skeleton(VARIANTS["dev"], precision, lambda model: attach(model, rank=1))
    found = Planner(Workload(VARIANTS["dev"], model, torch.bfloat16, ADAMW, (16, 16)))
    assert found.has_layouts
    both, one = (sum(found.block_weights(both)) + found.other_weights for both in (True, False))
    assert (both / 1e9, one / 1e9) == (pytest.approx(64.4, rel=0.01), pytest.approx(33.0, rel=0.02))


def test_the_adapter_of_rank_16_takes_1_6_gb_with_its_optimizer(planner):
    parts = planner("dev").adapter
    assert sum(parts.values()) / 1e9 == pytest.approx(1.56, rel=0.01)
    assert parts["adapter"] == parts["its gradients"] == parts["optimizer"] / 2


def test_what_full_and_selective_recompute_keep_of_dev_at_1024(planner):
    found = planner("dev")
    kept, working, _ = found.blocks("full")
    blocks = 56 * 4608 * 6144 * 2 / 1e9
    assert blocks == pytest.approx(3.2, rel=0.02)
    assert kept / 1e9 == pytest.approx(blocks * (1 + 8 / 56), rel=0.01)  # inputs; in double blocks a projection too
    assert 1.0 < working / 1e9 < 2.4
    assert (found.blocks("selective")[0] - kept) / 1e9 == pytest.approx(blocks, rel=0.05)  # the attention


@pytest.mark.parametrize(
    ("name", "side", "references", "teraflops"),
    [
        ("dev", 512, 0, 268),
        ("dev", 1024, 0, 891),
        ("dev", 1024, 1, 1905),
        ("klein_base_9b", 1024, 0, 243),
        ("klein_base_4b", 512, 0, 32),
        ("klein_base_4b", 1024, 0, 114),
    ],
)
def test_the_work_of_a_forward_a_recompute_and_a_backward(planner, name, side, references, teraflops):
    """The table counts the recompute as a whole forward; the adapter's products are about 1 % more."""
    found = planner(name, side=side, references=((1024, 1024),) * references)
    once = found.blocks("none")[2] + found.inference(found.job.shape, True)[1]
    assert sum(once.flops.values()) / 1e12 == pytest.approx(teraflops, rel=0.025)


def test_the_time_of_the_products_is_that_of_the_table(planner):
    found = planner("dev")
    work = found.blocks("none")[2] + found.inference(found.job.shape, True)[1]
    assert H200.seconds(replace(work, bytes=0)) == pytest.approx(1.205, rel=0.02)
    quick = planner("dev", storage="fp8")
    work = quick.blocks("none")[2] + quick.inference(quick.job.shape, True)[1]
    assert H200.seconds(replace(work, bytes=0)) == pytest.approx(0.750, rel=0.03)


def test_streaming_a_whole_model_is_bound_by_the_bus(planner):
    found = planner("dev", side=256)
    slow = found.predict(Choice("full", offload_blocks=56))
    still = found.predict(Choice("full")).seconds(H200)
    assert slow.seconds(H200) == pytest.approx(2 * 62.8 / 50 + 0.1 * still, rel=0.01)
    assert still < 0.5 * slow.seconds(H200)


def test_an_optimizer_is_measured_by_a_step_of_it():
    parameters = [torch.nn.Parameter(torch.zeros(100, 50)), torch.nn.Parameter(torch.zeros(10))]
    assert optimizer_bytes(ADAMW, parameters) == 8 * 5010
    assert optimizer_bytes(partial(torch.optim.SGD, lr=1.0), parameters) == 0
    assert optimizer_bytes(partial(torch.optim.SGD, lr=1.0, momentum=0.9), parameters) == 4 * 5010
    assert optimizer_bytes(partial(bitsandbytes.optim.AdamW8bit, lr=1.0), parameters) == 2 * (5000 + 4 * 20) + 8 * 10


def test_the_text_encoders_are_as_large_as_published():
    found = {}
    for name in ("dev", "klein_base_9b", "klein_base_4b"):
        phases = Planner(replace(job("tiny"), variant=VARIANTS[name])).encoders()
        found[name] = phases["prompts"]["text encoder"] / 1e9
    # of 24, 8.2 and 4.0 billion parameters those of the layers that are read, in two bytes, without output heads
    assert found == pytest.approx({"dev": 34.7, "klein_base_9b": 11.7, "klein_base_4b": 6.2}, rel=0.02)


def test_a_text_encoder_on_this_disk_is_counted_by_its_own_sizes():
    run = load_config(compose("model=tiny", "device=cpu"))
    sizes = choosing.text_sizes(run.source)
    held, activations = text_encoder_bytes(run.variant.text, 64, 32, torch.float32, sizes)
    model = load_text_encoder(run.source, dtype=torch.float32).model
    assert held == sum(parameter.numel() * 4 for parameter in model.parameters())
    assert 0 < activations < held


@pytest.mark.parametrize("storage", ["nf4", "int8"])
def test_a_text_encoder_in_less_memory_is_counted_as_it_is_kept(storage):
    run = load_config(compose("model=tiny", "device=cpu", f"text_encoder.storage={storage}"))
    model = load_text_encoder(run.source, dtype=torch.float32, storage=storage).model
    phases = Planner(choosing.workload_of(run, on_gpu=False)).encoders()
    assert phases["prompts"]["text encoder"] == sum(parameter.nbytes for parameter in model.parameters())


def test_a_text_encoder_elsewhere_takes_no_memory_here():
    run = load_config(compose("model=tiny", "device=cpu", "text_encoder=remote", "text_encoder.url=http://127.0.0.1:1"))
    assert "prompts" not in Planner(choosing.workload_of(run, on_gpu=False)).encoders()


def test_the_references_that_a_dataset_names_are_counted():
    def counted(*given):
        run = load_config(compose(*given, "reference_resolution=64"))
        return len(choosing.workload_of(run, on_gpu=False).references)

    pairs = ["+dataset@dataset.sources.pairs=pairs", "dataset.sources.pairs.path=x"]
    cards = ["+dataset@dataset.sources.cards=folder", "dataset.sources.cards.path=x"]
    assert counted("dataset.reference_columns=[before,style]") == 2
    assert counted() == 0
    assert counted("dataset=pairs", "dataset.path=x", "dataset.reference_folders=[a,b,c]") == 3
    assert counted("dataset=mix", *pairs, *cards) == 1


def test_what_sample_grids_edit_is_counted_with_the_prompt_that_edits_most(small, tmp_path):
    files = []
    for size in ((96, 64), (48, 40)):
        files.append(str(tmp_path / f"{size[0]}.png"))
        Image.new("RGB", size).save(files[-1])
    wide, small_one = files
    given = [f"sample.references=[[{small_one}],[{wide},{small_one}],[]]", "sample.prompts=[a cup,a fox,a cup]"]
    edits = choosing.workload_of(load_config(compose(*small(*given, "sample_every=1"))), on_gpu=False)
    assert edits.sample_references == [(96, 64), (48, 32)]
    assert (
        choosing.workload_of(load_config(compose(*small(*given))), on_gpu=False).sample_references == []
    )  # no grids are made
    alone = replace(edits, sample_references=[])
    sizes = [Planner(each).predict(Choice("full")).phases["samples"]["working set"] for each in (edits, alone)]
    assert sizes[0] > sizes[1]
    # a reference that is far larger than what is trained: encoding it is what takes most
    large = Planner(replace(alone, sample_references=[(1024, 1024)]))
    assert large.predict(Choice("full")).phases["samples"]["working set"] == large.reference_encoder > sizes[0]


def test_a_measurement_counts_for_its_gpu_and_setting_alone(tmp_path):
    setting = {"model": "dev", "checkpointing": "full"}
    cases = {
        "diffusers": {"seconds": {"median": 1.9}},
        "out": {"out of memory": "...", "setting": {"model": "dev", "checkpointing": "none"}},
        "ours": {"setting": setting, "seconds": {"median": 0.9}},
    }
    (tmp_path / "a.json").write_text(json.dumps({"hardware": "NVIDIA H200", "cases": cases}))
    (tmp_path / "b.json").write_text(json.dumps([{"hardware": "NVIDIA H200"}]))
    assert measured("NVIDIA H200", setting, tmp_path) == 0.9
    assert measured("NVIDIA H100", setting, tmp_path) is None
    assert measured("NVIDIA H200", setting | {"checkpointing": "none"}, tmp_path) is None
    assert measured(None, setting, tmp_path) is None


def test_a_budget_is_named_with_no_more_digits_than_its_blocks_need(planner):
    for name in ("dev", "klein_base_4b", "tiny"):
        found = planner(name)
        blocks = len(found.weights)
        budgets = {count: found.budget_for(count) for count in range(1, blocks)}
        assert {count: found.kept_within(budget) for count, budget in budgets.items()} == {n: n for n in budgets}
        digits = {len(f"{budget:.10g}".partition(".")[2]) for budget in budgets.values()}
        assert max(digits) <= (1 if name == "dev" else 4), (name, budgets)


@pytest.mark.parametrize(
    "given", ["precision.rowwise=true", "precision.backward=bf16", "memory.attention=[math]", "preservation=base"]
)
def test_what_is_set_otherwise_than_measured_is_not_usual(given):
    arguments = ["model=tiny", "device=cpu", "precision=fp8", "precision.matmul=fp8"]
    assert choosing.workload_of(load_config(compose(*arguments)), on_gpu=False).usual
    more = ["preservation.prompts=[a]"] if given == "preservation=base" else []
    assert not choosing.workload_of(load_config(compose(*arguments, given, *more)), on_gpu=False).usual


def test_on_a_card_without_fp8_products_they_are_planned_in_bf16():
    run = load_config(compose("model=klein_base_4b", "device=cpu", "precision=fp8"))
    new, old = (Planner(choosing.workload_of(run, True, in_fp8)) for in_fp8 in (True, False))
    assert (new.has_layouts, old.has_layouts) == (True, False)
    assert "fp8" in new.blocks("full")[2].flops
    assert "fp8" not in old.blocks("full")[2].flops


def test_integer_products_are_counted_as_such_and_are_all_products_of_the_base():
    quick, exact = (Planner(job("klein_base_4b", storage=storage)) for storage in ("fp8", "int8"))
    eight_bits = [found.blocks("full")[2].flops for found in (quick, exact)]
    assert eight_bits[0]["fp8"] == eight_bits[1]["int8"] > 0
    assert eight_bits[0].keys() - {"fp8"} == eight_bits[1].keys() - {"int8"}


@pytest.mark.slow
def test_int8_is_proposed_where_it_is_predicted_to_be_faster_than_fp8():
    run = load_config(compose("model=klein_base_4b", "device=cpu", "precision=fp8"))
    now = Planner(choosing.workload_of(run, True)).predict(Choice("full"))
    assert choosing.faster(run, now, gpu("RTX 4090", 24)).startswith("With precision=int8 a step is predicted to take ")
    assert choosing.faster(run, now, H200) == ""
    for words in (("precision=fp8", "precision.matmul=dequantized"), ("precision=nf4",), ("precision=int8",)):
        other = load_config(compose("model=klein_base_4b", "device=cpu", *words))
        assert choosing.faster(other, now, gpu("RTX 4090", 24)) == ""


def test_every_gpu_has_its_figures():
    for name, size in (("NVIDIA GeForce RTX 4090", 24), ("NVIDIA H100 80GB HBM3", 80), ("NVIDIA A100-SXM4-40GB", 40)):
        assert gpu(name, size).name in name
    assert {gpu(None, size).size for size in SIZES} == set(SIZES)
    assert all(known.bf16 < (known.fp8 or 1e9) for known in gpus.GPUS)
    assert all(max(known.bf16, (known.fp8 or 0) * 0.99) < known.int8 for known in gpus.GPUS)
    assert usable(24) == int(22.3 * GIB * 0.97)
    assert usable(24, 0) == int(23 * GIB * 0.97)


def test_trained_parameters_are_the_adapters():
    model = job("tiny", rank=2).model
    assert {name.split(".")[-3] for name, p in model.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    assert len(adapter_parameters(model)) == sum(".lora_" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("content", ["[]", "3", "{}", '{"text_config": 3}', '{"text_config": {"head_dim": "x"}}'])
def test_the_sizes_of_a_text_encoder_that_says_none_are_not_known(content, tmp_path):
    (tmp_path / "text_encoder").mkdir()
    (tmp_path / "text_encoder" / "config.json").write_text(content)
    assert choosing.text_sizes(model_source("tiny", str(tmp_path))) == {}
    (tmp_path / "text_encoder" / "config.json").write_text("[" * 99_999)
    with pytest.raises(ValueError, match=r"config\.json cannot be read"):
        choosing.text_sizes(model_source("tiny", str(tmp_path)))
