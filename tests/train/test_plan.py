"""train/plan.py and what it stands on: the figures, the choices, and what is said where memory does not suffice."""

import json
import re
import socket
import weakref
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pkgutil import resolve_name

import bitsandbytes
import psutil
import pytest
import torch
from message_helpers import holds
from omegaconf import OmegaConf
from PIL import Image
from train_helpers import adapter, compose, one_message, refusal, same_tensors

from flux2.adapters import adapter_parameters
from flux2.adapters.tuners import attach
from flux2.models.variants import VARIANTS
from flux2.quantization.precision import Precision
from flux2.utils.cli import is_out_of_memory
from flux2.weights.loading import load_text_encoder
from train import plan
from train.config import settings as train_settings
from train.config.memory import Choice
from train.planner import from_config as choosing
from train.planner import gpus, search
from train.planner.from_config import advice, free_bytes, skeleton
from train.planner.gpus import GIB, SIZES, gpu, measured, usable
from train.planner.optimizer_memory import optimizer_bytes
from train.planner.predictor import Planner
from train.planner.search import choose, step_down
from train.planner.text_encoder_memory import text_encoder_bytes
from train.planner.workload import Workload
from train.run import main
from train.stages.memory import load_config
from train.utils.memory import OutOfMemory, explain_oom, parse_amounts

pytest_plugins = ("train_helpers",)

ADAMW = partial(torch.optim.AdamW, lr=1e-4)
H200 = gpu("NVIDIA H200", 141)


def job(name="dev", storage=None, side=1024, references=(), rank=16, dtype=torch.bfloat16, **more) -> Workload:
    """A job as PERFORMANCE.md counts them: one picture, rank 16 on all block linears, AdamW."""
    precision = Precision(dtype, storage, matmul="fp8" if storage == "fp8" else "auto")
    variant = VARIANTS[name]
    model = skeleton(variant, precision, lambda model: attach(model, rank=rank))
    return Workload(variant, model, dtype, ADAMW, (side, side), list(references), storage=storage, **more)


@pytest.fixture(scope="module")
def planner():
    """`planner("dev", storage="nf4")`: made once for the arguments."""
    made = {}

    def get(*arguments, **more) -> Planner:
        key = (arguments, tuple(sorted(more.items())))
        if key not in made:
            made[key] = Planner(job(*arguments, **more))
        return made[key]

    return get


# ------------------------------------------------------------------ figures


@pytest.mark.parametrize(
    ("name", "storage", "expected"),
    [
        ("dev", None, 64.4),
        ("dev", "fp8", 33.0),
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


def test_two_layouts_of_fp8_take_what_bfloat16_takes():
    precision = Precision(torch.bfloat16, "fp8", matmul="fp8", cache_transposed_weights=True)
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
        phases = Planner(replace(job("tiny"), variant=VARIANTS[name])).encoders({})
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
    phases = Planner(choosing.workload_of(run, on_gpu=False)).encoders({})
    assert phases["prompts"]["text encoder"] == sum(parameter.nbytes for parameter in model.parameters())


def test_a_text_encoder_elsewhere_takes_no_memory_here():
    run = load_config(compose("model=tiny", "device=cpu", "text_encoder=remote"))
    assert "prompts" not in Planner(choosing.workload_of(run, on_gpu=False)).encoders({})


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


# ------------------------------------------------------------------ choices


@pytest.mark.parametrize("storage", [None, "fp8", pytest.param("nf4", marks=pytest.mark.slow)])
def test_a_choice_fits_and_a_larger_card_never_gets_a_slower_one(planner, storage):
    found = planner("dev", storage=storage)
    times = []
    for card in SIZES:
        chosen = choose(found, {}, usable(card), H200)
        if chosen is None:
            assert not times, "a larger card must fit what a smaller one does"
            continue
        assert chosen.training <= usable(card)
        times.append(chosen.seconds(H200))
    assert len(times) >= 6
    assert times == sorted(times, reverse=True)


def test_the_same_question_gets_the_same_answer(planner):
    answers = {choose(planner("dev"), {}, usable(24), H200).choice for _ in range(3)}
    again = Planner(job("dev"))
    assert answers == {choose(again, {}, usable(24), H200).choice}


def test_weights_are_kept_transposed_where_there_is_room(planner):
    found = planner("dev", storage="fp8", side=512)
    assert choose(found, {}, usable(141), H200).choice.cache_transposed_weights
    assert not choose(found, {}, usable(48), H200).choice.cache_transposed_weights
    assert not choose(found, {"cache_transposed_weights": False}, usable(141), H200).choice.cache_transposed_weights
    assert not choose(planner("dev", side=512), {}, usable(141), H200).choice.cache_transposed_weights
    one, both = (found.predict(Choice("full", cache_transposed_weights=kept)) for kept in (False, True))
    assert both.seconds(H200) < one.seconds(H200)
    assert both.total("step") > one.total("step") + 30e9


def test_more_recompute_and_more_streaming_never_take_more(planner):
    found = planner("dev")
    for between in ([Choice("budget", 20.0), Choice("budget", 5.0)], [Choice("selective")]):
        choices = [Choice("none"), *between, Choice("full")]
        totals = [found.predict(choice).total("step") for choice in choices]
        assert totals == sorted(set(totals), reverse=True)
    streamed = [found.predict(Choice("full", offload_blocks=number)).total("step") for number in range(3, 57)]
    assert streamed == sorted(streamed, reverse=True)
    assert found.predict(Choice("full", offload_activations=True)).total("step") < totals[-1]


def test_what_is_given_is_not_chosen(planner):
    found = planner("dev", storage="nf4")
    assert choose(found, {"offload_blocks": 10}, usable(80), H200).choice.offload_blocks == 10
    assert choose(found, {"checkpointing": "full"}, usable(141), H200).choice == Choice("full")
    only = {"checkpointing": "none", "offload_blocks": 0}
    assert choose(found, only, usable(24), H200) is None


def test_a_budget_that_is_given_streams_where_it_must(planner):
    found = planner("klein_base_4b")
    assert choose(found, {"checkpointing": "budget"}, usable(8), H200).choice.offload_blocks > 0
    given = {"checkpointing": "budget", "budget_gb": 0.3}
    chosen = choose(found, given, usable(8), H200).choice
    assert (chosen.budget_gb, chosen.offload_blocks > 0) == (0.3, True)


def test_an_advice_saves_something(planner):
    found = planner("klein_base_4b")
    now = Choice("none")
    small = found.predict(now).training * 0.001
    said = choosing.LEAST_STEP * found.predict(now).training
    assert said > small
    lighter = step_down(found, now, H200, said)
    assert found.predict(lighter).training <= found.predict(now).training - said


def test_of_a_lighter_precision_it_is_said_how_much_it_takes_less(planner):
    said = search.lighter(planner("dev"))
    assert holds(said, "31.4 GB ... precision=fp8 ... 46.6 GB ... precision=nf4")
    assert search.lighter(planner("dev", storage="nf4")) == ""


def test_nothing_leaves_the_device_that_need_not(planner):
    assert choose(planner("klein_base_4b"), {}, usable(141), H200).choice == Choice("none")


def test_stepping_down_takes_less_each_time_and_comes_to_an_end(planner):
    found, now, sizes = planner("klein_base_4b"), Choice("none"), []
    while now is not None:
        sizes.append(found.predict(now).training)
        assert len(sizes) < 200
        now = step_down(found, now, H200, short=5e8)
    assert len(sizes) > 3
    assert all(after <= before - 5e8 for before, after in pairwise(sizes))


# ------------------------------------------------------------------ the command


@pytest.fixture
def offline(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("the planner needs no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["+experiment=tarot", "precision=nf4", "memory=24gb"],
            "dev in nf4 ... 2 ... 4096 tokens ... 512 ... 34.7 ... predicted ... 24 GB ... memory=auto",
        ),
        (["model=tiny", "device=cpu"], "tiny in fp32 ... 64 tokens ... host memory"),
        (["+experiment=demo", "memory=8gb"], "8 GB ... 10"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (
                    ["+experiment=tarot"],
                    "dev in bf16 ... 4096 tokens ... 512 ... 34.7 ... predicted",
                ),
                (["model=klein_base_4b"], "klein_base_4b in bf16 ... 4096 tokens"),
                (["model=tiny"], "tiny in bf16 ... 64 tokens"),
            )
        ),
    ],
)
def test_the_command_prints_the_plan_offline_and_without_weights(run_command, offline, arguments, said):
    before = psutil.Process().memory_info().rss
    code, out, err = run_command(*arguments, task=plan.main)
    assert (code, err) == (0, "")
    assert holds(out, said), out
    assert psutil.Process().memory_info().rss - before < 1e9


def test_what_does_not_fit_is_said_before_the_time_of_a_step(run_command, offline):
    code, out, err = run_command("+experiment=tarot", "+card=24", "batch_size=1", task=plan.main)
    assert code == 0, err
    assert holds(out, "dev in bf16 ... 4096 tokens ... 24 GB ... memory=auto")
    seconds = r"[\d.]+ s \("
    assert 0 < out.find("not fit") < re.search(seconds, out).start()
    code, out, err = run_command("model=tiny", "+card=24", task=plan.main)
    assert code == 0, err
    assert "not fit" not in out
    assert re.search(seconds, out)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["+card=big"], "card=big ... GB"),
        (["+card=0.5"], "card=0.5 ... GB"),
        (["device=foo"], "device=foo ... cuda ... cpu ... null"),
        (["dataset.reference_columns=before"], "dataset.reference_columns=before ... list"),
        (["batch_size=99999999999999999999"], "batch_size=99999999999999999999 ... 1048576"),
        (["buckets.resolution=65536"], "resolution=65536 ... 16 ... 8192"),
        (["memory=30gb"], "memory=30gb"),
        (["memory=auto", "memory.gpu_memory_gb=lots"], "memory.gpu_memory_gb=lots ... GB"),
        (["+memory.card=24"], "memory.card=24"),
        (["memory.checkpointing=some"], "memory.checkpointing=some"),
        (["model.resolution=big"], "model.resolution=big"),
    ],
)
def test_bad_input_is_one_message(arguments, said):
    message = refusal(*arguments, task=plan.main)
    assert holds(message, said), message


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


def test_a_measured_micro_batch_counts_as_often_as_it_is_computed(planner, tmp_path, monkeypatch):
    found = planner("klein_base_4b")
    case = {"setting": plan.setting(found, Choice("full")), "seconds": {"median": 0.25}}
    (tmp_path / "a.json").write_text(json.dumps({"hardware": "NVIDIA H200", "cases": {"ours": case}}))
    monkeypatch.setattr(measured, "__defaults__", (tmp_path,))

    def said(**changes):
        job = replace(found.job, **changes)
        return plan.describe(Planner(job), Planner(job).predict(Choice("full")), H200, "NVIDIA H200")

    assert holds(said(), "0.25 s ... measured on NVIDIA H200")
    assert holds(said(accumulation=8), "8 ... 2.00 s ... measured")
    assert "predicted" in said(usual=False)


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


def test_every_gpu_has_its_figures():
    for name, size in (("NVIDIA GeForce RTX 4090", 24), ("NVIDIA H100 80GB HBM3", 80), ("NVIDIA A100-SXM4-40GB", 40)):
        assert gpu(name, size).name in name
    assert {gpu(None, size).size for size in SIZES} == set(SIZES)
    assert all(known.bf16 < (known.fp8 or 1e9) for known in gpus.GPUS)
    assert usable(24) == int(23 * GIB * 0.97)


# ------------------------------------------------------------------ runs


def test_what_is_chosen_is_what_a_run_applies_and_keeps(train, small, monkeypatch):
    seen = []
    original = train_settings.set_policy

    def noted(model, policy, **options):
        seen.append((policy, next(model.parameters()).is_meta))
        original(model, policy, **options)

    monkeypatch.setattr(train_settings, "set_policy", noted)
    run = train("run", "memory=8gb", "steps=1")
    kept = OmegaConf.load(run / "config.yaml").memory
    assert (kept.gpu_memory_gb, kept.checkpointing, kept.budget_gb) == (8, "none", None)
    assert seen == [("none", True), ("none", False)]  # rehearsed, and then the model that trains


def test_the_free_memory_of_the_device_is_asked_for(small, monkeypatch, capsys):
    monkeypatch.setattr("train.planner.from_config.free_bytes", lambda device: 7 * GIB)
    run = load_config(compose(*small("memory=auto")))
    assert run.config["memory"]["gpu_memory_gb"] == 8
    assert run.memory.checkpointing == "none"
    assert holds(capsys.readouterr().out, "8 GB ... memory.checkpointing=none")
    assert free_bytes(torch.device("cpu")) == pytest.approx(psutil.virtual_memory().available, rel=0.2)


def test_a_run_that_cannot_fit_says_what_would(small):
    with pytest.raises(ValueError, match=r"memory\.gpu_memory_gb=1\b.* memory\.checkpointing=\w+"):
        load_config(compose(*small("memory=auto", "memory.gpu_memory_gb=1")))


def test_a_resumed_run_keeps_what_was_chosen_for_it(train, small, monkeypatch, tmp_path, capsys):
    run = train("run", "memory=auto", "memory.gpu_memory_gb=8", "steps=2", "checkpoint_every=2")
    file = run / "config.yaml"
    file.write_text(file.read_text().replace("checkpointing: none", "checkpointing: full"))  # as by another planner
    train("run", "memory=auto", "memory.gpu_memory_gb=9", "steps=3", f"resume={run}")
    assert "memory.checkpointing=full" in capsys.readouterr().out
    assert OmegaConf.load(file).memory.checkpointing == "full"


# ------------------------------------------------------------------ out of memory


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


@pytest.mark.parametrize("cause", [raise_for_gpu, raise_for_cpu])
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
        ("train.stages.model.load_transformer", "loading the transformer", False),
        ("train.validation.loss.FixedNoiseLoss.__call__", "validation after step 2", True),
        ("train.validation.samples.Sampler.write_grid", "sampling after step 2", True),
        ("torch.optim.AdamW.step", "update of step 1", False),
        ("flux2.models.autoencoder.Autoencoder.encode", "encoding pictures", False),
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
    assert holds(said, "precision=fp8 ... batch_size=1 ... gradient_accumulation ... buckets.resolution")
    for way in ("text_encoder.storage=nf4", "text_encoder=remote", "train/cache.py"):
        assert way in advice(run, OutOfMemory("", "prompts", 0, 0))
    assert "reference_resolution" in advice(run, OutOfMemory("", "pictures", 0, 0))


def test_trained_parameters_are_the_adapters():
    model = job("tiny", rank=2).model
    assert {name.split(".")[-3] for name, p in model.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    assert len(adapter_parameters(model)) == sum(".lora_" in name for name, _ in model.named_parameters())
