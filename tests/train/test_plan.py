"""train/plan.py: what the command prints, and what a run applies and keeps of a plan."""

import json
import re
import shlex
import socket
from dataclasses import replace
from types import SimpleNamespace

import psutil
import pytest
import torch
from message_helpers import holds
from omegaconf import OmegaConf
from PIL import Image
from planner_helpers import H200
from train_helpers import compose, refusal

from train import plan
from train.config import settings as train_settings
from train.config.memory import Choice
from train.config.run_config import RunConfig
from train.planner import plan_tables
from train.planner.from_config import fastest_batch, free_bytes
from train.planner.gpus import GIB, measured
from train.planner.lighter_runs import lighter_runs
from train.planner.plans import make_plan
from train.planner.predictor import Planner
from train.stages.class_data import batch_of
from train.stages.memory import load_config

pytest_plugins = ("train_helpers", "planner_helpers")


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
            "dev in nf4 ... 2 ... 4096 tokens ... 512 ... text encoder 19.1 ... 1,000 steps are predicted "
            "to take ... hours, without encoding ... 24 GB ... memory=auto",
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


@pytest.mark.slow
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


def test_a_preview_is_a_new_picture_of_what_would_be_trained_without_a_model(run_command, offline, tmp_path):
    settings = ["model=klein_base_4b", "model.path=/no/such/model", "dataset=demo", "steps=1", "device=cpu"]
    preview, cache_dir = tmp_path / "new" / "batch.png", f"cache_dir={tmp_path / 'cache'}"
    settings += [cache_dir, f"+preview={preview}", "buckets.resolution=128"]
    code, out, err = run_command(*settings, task=plan.main)
    assert (code, err) == (0, "")
    assert f"as it would be trained: {preview}" in out
    with Image.open(preview) as image:
        assert image.size[0] == 1596  # four samples of one step
    before = preview.read_bytes()
    message = refusal(*settings, task=plan.main)
    assert holds(message, "preview= ... exists and is not overwritten. Give another name")
    assert preview.read_bytes() == before


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
        (["+preview=batch.jpg"], "preview='batch.jpg' ... PNG ... +preview=batch.png"),
        (["memory.checkpointing=some"], "memory.checkpointing=some"),
        (["model.resolution=big"], "model.resolution=big"),
    ],
)
def test_bad_input_is_one_message(arguments, said):
    message = refusal(*arguments, task=plan.main)
    assert holds(message, said), message


@pytest.mark.parametrize(
    ("arguments", "said", "unsaid"),
    [
        (
            ["steps=100"],
            "24 samples, 100 steps: each is trained 16.7 times on average. That is little: ... 30 ... 100",
            "",
        ),
        (["steps=300"], "24 samples, 300 steps: each is trained 50 times on average.", "That is"),
        (["steps=2000"], "each is trained 333 times on average. That is much", "little"),
        (["steps=300", "validation.held_out=4"], "20 samples, 300 steps: each is trained 60 times", "That is"),
        (["steps=100", "gradient_accumulation=3"], "each is trained 50 times", "That is"),
        (["dataset=huggingface", "dataset.path=someone/cards"], "24 GB", "is trained"),
        (["dataset=folder", "dataset.path=tests"], "The images cannot be counted: ... tests", "is trained"),
    ],
)
def test_a_plan_says_how_often_each_image_is_trained(run_command, arguments, said, unsaid):
    code, out, err = run_command("model=tiny", "batch_size=4", "+card=24", *arguments, task=plan.main)
    assert (code, err) == (0, "")
    assert holds(out, said), out
    assert not unsaid or unsaid not in out


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


# ------------------------------------------------------------------ runs


def test_a_batch_size_is_chosen_for_a_gpu_and_kept(small, run_command, monkeypatch):
    settings = "model=klein_base_4b", "memory=auto", "batch_size=auto", "+card=24"
    code, out, err = run_command(*settings, task=plan.main)
    assert (code, err) == (0, "")
    assert holds(out, "step of 1 image: ... batch_size=1: predicted for an image on RTX 4090: ... with 1, ... with 2")
    with pytest.raises(ValueError, match=r"batch_size=auto .* CPU\. Set a number"):
        load_config(compose(*small("batch_size=auto")))
    config = RunConfig(compose(*small("batch_size=auto", "preservation=none")))
    seconds = {1: 1.0, 2: 0.8, 4: 0.75, 8: 0.74}  # a time for each image

    class FakePlanner:
        def __init__(self, job):
            self.job = job

        def predict(self, choice):
            rows = self.job.rows
            fits = rows <= 8
            return SimpleNamespace(training=1 if fits else 1e15, seconds=lambda gpu: seconds[rows] * rows)

    monkeypatch.setattr("train.planner.from_config.Planner", FakePlanner)
    chosen, why = fastest_batch(config, config.given_memory, 24, None)
    assert (chosen, "0.75 s with 4, 0.74 s with 8" in why) == (4, True)  # 8 saves too little
    kept = config.with_batch_size(chosen)
    assert (kept.settings.batch_size, kept.composed["batch_size"], kept.images_per_step) == (4, 4, 4)


@pytest.mark.parametrize("references", [0, 2])
@pytest.mark.parametrize("name", ["dev", "klein_base_4b"])
def test_batches_of_smaller_buckets_need_no_more_memory(planner, small, name, references):
    folders = f"dataset.reference_folders=[{','.join('ab'[:references])}]"
    given = ["batch_by=tokens", f"model={name}", "buckets.resolution=[256,512,1024]", "reference_resolution=512"]
    config = RunConfig(compose(*given, "dataset=pairs", "dataset.path=x", folders, "precision=nf4", "batch_size=2"))
    sizes, of = [(512, 512)] * references, batch_of(config, 2)
    rows = [of(((side, side), sizes)) for side in (1024, 512, 256)]
    assert rows == ([2, 5, 10] if references == 0 else [2, 3, 4])
    for policy in ("full", "selective", "none"):
        jobs = [(side, count) for side, count in zip((1024, 512, 256), rows, strict=True)]
        peaks = [
            planner(name, storage="nf4", side=side, references=tuple(sizes), rows=count)
            .predict(Choice(policy))
            .training
            for side, count in jobs
        ]
        assert max(peaks[1:]) <= peaks[0]


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
    assert run.composed["memory"]["gpu_memory_gb"] == 8
    assert run.memory.checkpointing == "none"
    said = "memory for 7.52 GB of free host memory: memory.checkpointing=none ... of 6.56 GB; memory.headroom_gb=0.7 is"
    assert holds(capsys.readouterr().out, said)
    load_config(compose(*small("memory=auto", "memory.headroom_gb=0")))
    assert capsys.readouterr().out.rstrip().endswith("of 7.29 GB)")
    assert free_bytes(torch.device("cpu")) == pytest.approx(psutil.virtual_memory().available, rel=0.2)


@pytest.mark.slow
def test_on_a_cpu_nothing_is_offloaded_because_it_would_stay_in_host_memory(small, monkeypatch):
    for free in (0, 0.85, 7):  # nothing fits, all but everything fits, everything fits
        monkeypatch.setattr("train.planner.from_config.free_bytes", lambda device, free=free: free * GIB)
        config = compose(*small("memory=auto"))
        if free == 0:
            with pytest.raises(
                ValueError, match=r"^memory=auto, 0\.0 MB of free host memory: .*not fit.* MB of 0\.0 MB"
            ) as caught:
                load_config(config)
            assert "offload" not in str(caught.value)
            continue
        memory = load_config(config).memory
        assert (memory.offload_blocks, memory.offload_activations) == (0, False)
    kept = load_config(compose(*small("memory=auto", "memory.offload_blocks=1"))).memory
    assert kept.offload_blocks == 1


def test_a_plan_for_a_cpu_speaks_of_host_memory_and_of_no_gpu(run_command, small, monkeypatch):
    monkeypatch.setattr("train.planner.plans.free_bytes", lambda device: 7 * GIB)
    code, out, err = run_command(*small("device=cpu", "memory=auto"), task=plan.main)
    assert code == 0, err
    assert "For 7.52 GB of free host memory memory=auto would choose memory.checkpointing=none" in out
    assert "on a CPU no time is predicted" in out
    assert "RTX" not in out
    assert "GPU" not in out


@pytest.mark.parametrize("given", [-1, "1e9", "much", "true"])
def test_a_headroom_is_a_number_of_gb(small, given):
    with pytest.raises(ValueError, match=r"headroom_gb=.* must be a number of GB from 0"):
        load_config(compose(*small("memory=auto", f"memory.headroom_gb={given}")))


def test_a_run_that_cannot_fit_says_what_would(small):
    with pytest.raises(ValueError, match=r"memory\.gpu_memory_gb=1\b.* memory\.checkpointing=\w+"):
        load_config(compose(*small("memory=auto", "memory.gpu_memory_gb=1")))


def test_a_headroom_that_is_in_the_way_is_named(small):
    with pytest.raises(ValueError, match="does not fit") as caught:
        load_config(compose(*small("memory=auto", "memory.headroom_gb=0", "memory.gpu_memory_gb=1")))
    assert "headroom" not in str(caught.value)
    with pytest.raises(ValueError, match=r"It would fit with memory\.headroom_gb=0"):
        load_config(compose(*small("memory=auto", "memory.headroom_gb=8", "memory.gpu_memory_gb=8")))


@pytest.mark.parametrize(("device", "known"), [("cuda:1", True), ("mps", False), ("cuda:x", False)])
def test_a_plan_is_made_for_every_device_that_a_run_takes(run_command, small, device, known):
    code, _, err = run_command(*small(f"device={device}"), task=plan.main)
    assert (code == 0) == known, err
    assert known or "must be cuda, cuda:1 or cpu" in err


def test_a_resumed_run_keeps_what_was_chosen_for_it(train, small, monkeypatch, tmp_path, capsys):
    run = train("run", "memory=auto", "memory.gpu_memory_gb=8", "steps=2", "checkpoint_every=2")
    file = run / "config.yaml"
    file.write_text(file.read_text().replace("checkpointing: none", "checkpointing: full"))  # as by another planner
    train("run", "memory=auto", "memory.gpu_memory_gb=9", "steps=3", f"resume={run}")
    assert "memory.checkpointing=full" in capsys.readouterr().out
    assert OmegaConf.load(file).memory.checkpointing == "full"


# ------------------------------------------------------------------ host memory, disk, text encoder, lighter runs


def test_the_host_memory_is_that_of_the_choice_and_of_each_gpu(run_command):
    code, out, err = run_command("model=dev", "batch_size=1", "+card=24", task=plan.main)
    assert (code, err) == (0, "")
    as_set, chosen = (
        float(re.search(rf"{words} ([\d.]+) GB", out)[1]) for words in ("Host memory, predicted:", "host memory of")
    )
    assert as_set < 8
    assert chosen > 60
    rows = {row[0].split()[0]: row for row in plan_tables.gpu_rows(make_plan(compose("model=dev", "batch_size=1")))}
    best = make_plan(compose("model=dev", "batch_size=1", "+card=24")).best()
    assert float(rows["24"][5]) == round(chosen) == round(best.host_memory / 1e9)
    assert best.pinned == pytest.approx(chosen * 1e9 - 6.4e9, abs=1e8)
    assert float(rows["141"][5]) < 8
    assert [rows[size][1] for size in ("8", "16", "24", "48")] == ["cpu", "nf4", "int8", "yes"]
    assert max(map(len, out[out.index("Which GPU") : out.index("For a GPU")].splitlines())) <= 80


def test_what_encodes_prompts_is_what_a_user_set(run_command):
    def cells(*given):
        return [row[1] for row in plan_tables.gpu_rows(make_plan(compose("model=dev", *given)))]

    assert cells("text_encoder.storage=nf4")[2:] == ["yes"] * 7
    assert set(cells("text_encoder.storage=null", "text_encoder.device=null")[:5]) == {"remote"}
    assert set(cells("text_encoder=remote")) == {""}
    chosen = make_plan(compose("model=dev", "memory=24gb"))
    assert chosen.now.phases["prompts"]["text encoder"] == pytest.approx(19.1e9, rel=0.01)
    on_cpu = make_plan(compose("model=dev", "memory=8gb", "text_encoder.storage=null")).best()
    assert on_cpu is None  # nothing of the transformer fits
    small = make_plan(compose("model=klein_base_4b", "memory=8gb", "text_encoder.storage=null", "batch_size=1")).now
    assert "prompts" not in small.phases
    assert small.host_encoding["text encoder"] == pytest.approx(6.2e9, rel=0.02)
    assert small.host_memory == sum(small.host.values())  # which is more, and comes later


def test_where_a_run_fits_badly_lighter_ones_are_planned_and_can_be_copied(run_command):
    given = ["model=dev", "batch_size=1", "name=my run", "memory=default", "memory.checkpointing=full"]
    code, out, err = run_command(*given, "+card=12", task=plan.main)
    assert (code, err) == (0, "")
    lines = out[out.index("Lighter on the same GPU:") :].splitlines()[1:]
    assert lines[1].strip() == "python train/run.py batch_size=1 'name=my run' model=klein_base_4b memory=auto"
    assert lines[3].split()[-2:] == ["buckets.resolution=512", "memory=auto"]
    for words, said in ((lines[1], lines[0]), (lines[3], lines[2])):
        again = make_plan(compose(*shlex.split(words)[2:-1], "memory=12gb"))
        assert f"{again.now.training / 1e9:.1f} GB and {again.now.host_memory / 1e9:.1f} of" in said
        assert f"{again.now.seconds(again.on):.2f} s a step" in said
    fitting = compose("model=dev", "memory=80gb", "batch_size=1")
    assert not list(lighter_runs(fitting, make_plan(fitting)))


@pytest.mark.parametrize(
    ("model", "base"),
    [("klein_4b", "klein_base_4b"), ("klein_9b_kv", "klein_base_9b"), ("klein_base_4b", ""), ("dev", "")],
)
def test_a_model_that_is_distilled_to_few_steps_is_objected_to(run_command, model, base):
    code, out, _ = run_command(f"model={model}", "precision=nf4", "batch_size=1", "+card=80", task=plan.main)
    assert code == 0
    assert holds(out, f"model={model} is distilled to 4 steps ... model={base} instead") == bool(base)


def test_a_run_on_a_distilled_model_says_so_at_its_start_once(capsys):
    load_config(compose("model=klein_4b", "device=cpu"))
    assert capsys.readouterr().err.count("Train model=klein_base_4b instead") == 1
    load_config(OmegaConf.to_container(compose("model=klein_4b", "device=cpu"), resolve=True))  # to evaluate one
    assert "distilled" not in capsys.readouterr().err


def test_the_disk_is_of_one_image_where_the_images_are_elsewhere(run_command):
    given = "model=klein_base_4b", "dataset=huggingface", "dataset.path=someone/cards", "+card=80"
    code, out, _ = run_command(*given, task=plan.main)
    assert code == 0
    assert holds(out, "Disk, predicted: ... 7.9 MB ... 1 image of 2.1 MB ... of images, one is counted")
