"""A whole run: through the command line, as its own process and as a library."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import helpers
import pytest
import torch
from accelerate import DistributedType
from message_helpers import holds
from omegaconf import OmegaConf
from safetensors import safe_open
from train_helpers import (
    ROOT,
    adapter,
    compose,
    draw_picture,
    environment,
    execute,
    launch,
    lines,
    one_message,
    pixels,
    random_tiny,
    refusal,
    run_training,
    same_tensors,
    values,
)

import flux2
import train.distributed.processes
import train.encoding.prepare
import train.run
import train.stages.model
import train.stages.run_folder
from flux2.models.variants import VARIANTS
from flux2.quantization.base import QuantizedLinear
from flux2.quantization.precision import precision_from_name
from flux2.weights.loading import load_transformer
from train.checkpoints.checkpoint import checkpoints
from train.distributed.processes import cores, make_accelerator
from train.encoding import text_encoders
from train.loop import Trainer
from train.run import main as training_command
from train.stages.memory import load_config
from train.stages.run_folder import claim_run_folder
from train.validation.samples import Sampler

pytest_plugins = ("train_helpers", "train_processes")


# ------------------------------------------------------------------ the run folder


def test_a_run_folder_holds_all_that_was_made(train):
    run = train(
        "run",
        "checkpoint_every=2",
        "validate_every=2",
        "sample_every=2",
        "sample.prompts=[a red cup]",
        "sample.steps=1",
    )
    assert sorted(path.name for path in run.iterdir()) == [
        "adapter",
        "checkpoints",
        "config.yaml",
        "data.json",
        "metrics.jsonl",
        "report.html",
        "samples",
        "validation.jsonl",
    ]
    assert {path.name for path in (run / "adapter").iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "diffusers.safetensors",
        "samples.png",
        "samples_base.png",
    }
    assert all(key.startswith("transformer.") for key in keys(run / "adapter" / "diffusers.safetensors"))
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[1])
    assert first.keys() == {"step", "loss", "lr", "grad_norm", "images_per_second", "peak_memory_gb"}
    assert first["images_per_second"] > 0
    assert first["peak_memory_gb"] > 0.05


def keys(file):
    with safe_open(file, "pt") as tensors:
        return list(tensors.keys())


def test_the_configuration_is_kept_resolved_and_makes_the_same_run_again(reference, tmp_path):
    run = reference()
    text = (run / "config.yaml").read_text()
    assert "${" not in text
    assert "???" not in text
    kept = OmegaConf.load(run / "config.yaml")
    assert (kept.adapter.rank, kept.buckets.resolution, kept.optimizer._target_) == (4, 48, "torch.optim.AdamW")
    kept.output_dir = str(tmp_path / "again")
    assert lines(run_training(kept).parent) == lines(run)


# ------------------------------------------------------------------ precision

PRECISIONS = {
    "fp8": ["precision=fp8"],
    "fp8_matmul": ["precision=fp8", "precision.matmul=fp8"],
    "nf4": ["precision=nf4"],
}


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("dev", "fp8"),
        ("klein", "fp8_matmul"),
        ("dev", "nf4"),
        pytest.param("klein", "fp8", marks=pytest.mark.slow),
        pytest.param("dev", "fp8_matmul", marks=pytest.mark.slow),
        pytest.param("klein", "nf4", marks=pytest.mark.slow),
    ],
)
def test_a_base_in_few_bits_trains_a_float32_adapter_and_stays_as_it_is(
    train, reference, monkeypatch, capsys, name, kind
):
    exact, trained = reference(kind=kind), []
    original = Trainer.run

    def keep(self, start):
        trained.append(self.peft_model)
        return original(self, start)

    monkeypatch.setattr(Trainer, "run", keep)
    run = train("run", *PRECISIONS[name], kind=kind)
    assert values(run)[0] == pytest.approx(values(exact)[0], rel=0.05)
    assert values(run) != values(exact)
    model = trained[0].get_base_model()
    storage = PRECISIONS[name][0].removeprefix("precision=")
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    assert {layer.kind for layer in layers} == {storage}
    assert f"{len(layers)} of " in capsys.readouterr().out
    kinds = {parameter.dtype for key, parameter in model.named_parameters() if "lora_" in key}
    assert kinds == {torch.float32}
    assert adapter(run).keys() == adapter(exact).keys()
    loaded = load_transformer(
        load_config(compose(*reread(run))).source, "cpu", precision_from_name(storage, torch.device("cpu"))
    )
    stored = {key: value for key, value in loaded.named_parameters() if "qweight" in key}
    now = {key.replace(".base_layer", ""): value for key, value in model.named_parameters() if "qweight" in key}
    assert len(stored) == len(layers)
    assert same_tensors(stored, now)


def reread(run):
    """The overrides of a run's model."""
    kept = OmegaConf.load(run / "config.yaml").model
    return [f"model.name={kept.name}", f"model.path={kept.path}"]


def test_recomputing_activations_changes_no_loss_in_few_bits(train):
    for storage in ("fp8", "nf4"):
        runs = [
            train(f"{storage}_{policy}", f"precision={storage}", f"memory.checkpointing={policy}", "steps=2")
            for policy in ("none", "full")
        ]
        assert lines(runs[0]) == lines(runs[1])


def test_bfloat16_with_a_base_in_few_bits_autocasts_as_plain_bfloat16_does(train, reference):
    near, ours = reference("precision=bf16"), train("ours", "precision=nf4", "precision.dtype=bf16")
    assert values(ours)[0] == pytest.approx(values(near)[0], rel=0.05)
    assert all(tensor.dtype == torch.float32 for tensor in adapter(ours).values())


def test_a_run_keeps_a_quantized_copy_that_the_next_one_reads(train, tmp_path, monkeypatch, capsys):
    train("none", "precision=nf4", "quantized_cache_dir=null", "steps=1")
    assert "copy" not in capsys.readouterr().out
    monkeypatch.setenv("FLUX2_CACHE", str(tmp_path / "copies"))
    first = train("first", "precision=nf4", "steps=2")
    (copy,) = (tmp_path / "copies").glob("*.safetensors")
    assert re.search(r"writing .*copy", capsys.readouterr().out)
    second = train("second", "precision=nf4", "steps=2")
    assert re.search(rf"read .*copy {re.escape(str(copy))}", capsys.readouterr().out)
    assert lines(first) == lines(second)


def test_the_first_steps_of_the_demo_have_the_losses_of_float32(tmp_path):
    """To 1 % in FP8 (0.5 % was measured) and 3 % in NF4 (1.6 %)."""
    losses = {}
    for name, overrides in {"fp32": ["precision=fp32"], **PRECISIONS}.items():
        run = load_config(
            compose(
                "+experiment=demo",
                *overrides,
                "device=cpu",
                "steps=2",
                "log_every=1",
                "checkpoint_every=0",
                "sample_every=0",
                "validate_every=0",
                f"cache_dir={tmp_path / 'cache'}",
                f"output_dir={tmp_path / name}",
            )
        )
        losses[name] = values(run_training(run).parent)
    exact = losses.pop("fp32")
    for name, ours in losses.items():
        assert ours == pytest.approx(exact, rel=0.03 if name == "nf4" else 0.01)
        assert ours != exact
    assert losses["fp8"] != losses["fp8_matmul"]


@pytest.mark.parametrize("license", ["", "FLUX Non-Commercial License"])
def test_a_restricting_license_is_named_in_every_adapter_that_is_saved(train, monkeypatch, small, license):
    variant = replace(helpers.VARIANTS["klein"], repo="owner/gated", license=license)
    monkeypatch.setitem(VARIANTS, "small_klein", variant)
    run = train("run", "steps=1", "checkpoint_every=1", kind="klein")
    for folder in (run / "adapter", checkpoints(run)[0] / "adapter"):
        readme = (folder / "README.md").read_text()
        assert "base_model: owner/gated" in readme
        with safe_open(folder / "diffusers.safetensors", "pt") as tensors:
            metadata = tensors.metadata()
        assert metadata["base_model"] == "owner/gated"
        assert metadata.get("base_model_license", "") == license
        assert ("Non-Commercial" in readme) == bool(license)


def test_a_run_names_its_folder_after_itself_and_the_time(small, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    adapter_folder = run_training(compose(*small("name=cats", "steps=1")))
    assert adapter_folder.parts[:2] == ("outputs", "cats")
    assert time.strptime(adapter_folder.parts[2], "%Y-%m-%d_%H-%M-%S")


def refuse_to_load(*args, **kwargs):
    raise AssertionError("something was loaded")


def test_settings_are_checked_before_anything_is_loaded_or_written(small, monkeypatch, tmp_path):
    encoders = (text_encoders, "load_text_encoder"), (train.encoding.prepare, "load_autoencoder")
    for module, name in (*encoders, (train.stages.model, "load_transformer")):
        monkeypatch.setattr(module, name, refuse_to_load)
    folder = tmp_path / "run"
    for mistake in ("adapter.rank=0", "adapter.targets=[foo]", "optimizer.lr=x", "dataset.path=/nowhere"):
        refusal(*small(f"output_dir={folder}", f"cache_dir={tmp_path / 'cache'}", mistake), task=training_command)
    assert list(tmp_path.iterdir()) == []


def test_two_runs_of_a_name_in_the_same_second_get_folders_of_their_own(small, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train.stages.run_folder.time, "strftime", lambda _: "noon")
    first, second = (load_config(compose(*small("name=cats"))) for _ in range(2))
    with claim_run_folder(first) as one, claim_run_folder(second) as other:
        assert [one.folder.name, other.folder.name] == ["noon", "noon_1"]


def test_a_folder_that_another_run_writes_is_refused_by_name(small, tmp_path):
    alive = load_config(compose(*small(f"output_dir={tmp_path / 'run'}")))
    with claim_run_folder(alive):
        for settings in ([], ["resume=auto"]):
            message = refusal(*small(f"output_dir={tmp_path / 'run'}", *settings), task=training_command)
            assert holds(message, f"{tmp_path / 'run'} ... in use")
    assert not (tmp_path / "run").exists()


def test_a_run_that_is_being_resumed_is_not_resumed_twice(train, small):
    run = train("run", "steps=1", "checkpoint_every=1")
    alive = load_config(compose(*small(f"resume={run}")))
    with claim_run_folder(alive):
        assert holds(refusal(*small(f"resume={run}"), task=training_command), f"{run} ... in use")


def test_places_that_cannot_be_written_are_named_before_anything_is_loaded(small, monkeypatch, tmp_path):
    encoders = (text_encoders, "load_text_encoder"), (train.encoding.prepare, "load_autoencoder")
    for module, name in (*encoders, (train.stages.model, "load_transformer")):
        monkeypatch.setattr(module, name, refuse_to_load)
    file = tmp_path / "file"
    file.touch()
    for place, said in (
        (f"output_dir={file}", f"output_dir={file} ... File exists"),
        (f"cache_dir={file}", f"cache_dir={file} ... not a folder"),
        (f"cache_dir={file / 'cache'}", f"cache_dir={file / 'cache'} ... Not a directory"),
    ):
        message = refusal(*small(f"output_dir={tmp_path / 'run'}", place), task=training_command)
        assert holds(message, said), message
    assert list(tmp_path.iterdir()) == [file]


def test_a_checkpoint_that_cannot_be_read_leaves_the_run_as_it_was(run_command, train, small):
    run = train("run", "steps=1", "checkpoint_every=1")
    (run / "checkpoints" / "step_000001" / "optimizer.pt").write_text("garbage")
    before = {name: (run / name).read_text() for name in ("config.yaml", "data.json", "metrics.jsonl")}
    code, out, err = run_command(*small(f"resume={run}", "steps=2"))
    assert code == 2
    assert "step_000001/optimizer.pt" in out
    assert "no complete checkpoint" in err
    assert {name: (run / name).read_text() for name in before} == before


# ------------------------------------------------------------------ samples


@pytest.fixture
def grids(monkeypatch):
    """The pictures of every grid that is made."""
    made = []
    pictures = Sampler.pictures

    def keep(self, model):
        made.append(pictures(self, model))
        return made[-1]

    monkeypatch.setattr(Sampler, "pictures", keep)
    return made


@pytest.mark.parametrize(
    ("kind", "guidance"), [("dev", "null"), ("klein", "3.0"), pytest.param("klein", "1.0", marks=pytest.mark.slow)]
)
def test_the_grids_show_what_inference_makes_of_the_base_and_of_the_finished_adapter(
    train, grids, kind, guidance, model_folders
):
    run = train(
        "run", "sample_every=4", "sample.prompts=[a red cup, the fox]", "sample.seed=3", "sample.steps=2",
        f"sample.guidance={guidance}", "sample.width=64", "sample.height=48", kind=kind,
    )  # fmt: skip
    pipeline = flux2.load(f"small_{kind}", str(model_folders(kind)), device="cpu")
    scale = None if guidance == "null" else float(guidance)
    options = {"seed": 3, "steps": 2, "guidance": scale, "width": 64, "height": 48}
    base = pipeline.generate(["a red cup", "the fox"], **options)
    pipeline.load_adapter(run)
    final = pipeline.generate(["a red cup", "the fox"], **options)
    for grid, expected in zip(grids, (base, final), strict=True):
        for one, two in zip(grid, expected, strict=True):
            assert one.size == two.size == (64, 48)
            assert abs(pixels(one) - pixels(two)).max() <= 1
    assert abs(pixels(base[0]) - pixels(final[0])).max() > 8  # the adapter does something


@pytest.mark.parametrize("count", [1, 2])
def test_sheets_of_edits_show_what_inference_makes_of_the_same_references(train, grids, tmp_path, model_folders, count):
    room = [draw_picture(5 + i, (100, 70)) for i in range(count)]
    files = [tmp_path / f"room{i}.png" for i in range(count)]
    for picture, file in zip(room, files, strict=True):
        picture.save(file)
    train(
        "run", "steps=1", "sample_every=1", "sample.prompts=[the red room]", "sample.steps=2",
        f"sample.references=[{','.join(map(str, files))}]", "sample.width=48", "sample.height=48",
    )  # fmt: skip
    pipeline = flux2.load("small_dev", str(model_folders("dev")), device="cpu")
    options = {"seed": 0, "steps": 2, "width": 48, "height": 48}
    (expected,) = pipeline.generate("the red room", references=room, **options)
    assert abs(pixels(grids[0][0]) - pixels(expected)).max() <= 1
    (without,) = pipeline.generate("the red room", **options)
    assert abs(pixels(without) - pixels(expected)).max() > 8


# ------------------------------------------------------------------ processes


def test_one_launched_process_uses_all_cores_and_one_of_several_its_share(monkeypatch):
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    for key in ("ACCELERATE_USE_CPU", "ACCELERATE_MIXED_PRECISION", "OMP_NUM_THREADS", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(key, raising=False)
    make_accelerator("cpu")
    assert threads == []  # plain python: PyTorch's own choice
    monkeypatch.setattr(train.distributed.processes, "cores", lambda: 12)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    make_accelerator("cpu")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    make_accelerator("cpu")
    assert threads == [12, 3]
    monkeypatch.setenv("OMP_NUM_THREADS", "5")  # somebody asked for it
    make_accelerator("cpu")
    assert threads == [12, 3]


def test_processes_that_do_not_know_each_other_are_an_error(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(AssertionError, match=r"1 process.*\b2\b"):
        make_accelerator("cpu")


def test_a_launcher_set_up_for_another_kind_of_parallelism_is_refused(monkeypatch):
    fake = SimpleNamespace(distributed_type=DistributedType.DEEPSPEED)
    monkeypatch.setattr(train.distributed.processes, "Accelerator", lambda **kwargs: fake)
    with pytest.raises(ValueError, match=r"DEEPSPEED.*--multi_gpu.*shard=true"):
        make_accelerator("cpu")


def test_the_launchers_mixed_precision_does_not_change_the_runs(train, reference, monkeypatch):
    plain = reference()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # or the run takes all cores
    assert lines(train("launched")) == lines(plain)


# ------------------------------------------------------------------ the command line


def test_a_sweep_trains_every_value_in_its_own_folder(run_command, small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = small("dataset.path=" + compose(*small()).dataset.path)
    code, out, err = run_command("-m", "+experiment=debug", *settings, "adapter.rank=2,8", "steps=2")
    assert code == 0, err
    (sweep,) = (tmp_path / "outputs" / "debug").iterdir()
    table = ["sweep.csv", "sweep.html", "sweep.json"]
    assert sorted(path.name for path in sweep.iterdir()) == ["0", "1", "multirun.yaml", *table]
    for job, rank in (("0", 2), ("1", 8)):
        assert OmegaConf.load(sweep / job / "config.yaml").adapter.rank == rank
        assert {min(tensor.shape) for tensor in adapter(sweep / job).values()} == {rank}
        assert len(values(sweep / job)) == 2
        assert f"adapter   {(sweep / job / 'adapter').relative_to(tmp_path)}" in out
    assert values(sweep / "0")[0] == pytest.approx(values(sweep / "1")[0])  # B is zero: the same base
    assert values(sweep / "0")[1] != values(sweep / "1")[1]


def test_a_job_of_a_sweep_that_fails_leaves_the_others_results(run_command, small, tmp_path):
    code, _, err = run_command("-m", *small(f"output_dir={tmp_path / 'sweep'}"), "adapter.rank=2,0,8", "steps=1")
    assert code == 2
    assert err.count("error: ") == 1
    assert holds(err, "adapter.rank=0 ... 1")
    assert [len(values(tmp_path / "sweep" / job)) for job in ("0", "2")] == [1, 1]


def test_the_command_that_uses_an_adapter_names_the_precision_it_was_trained_in(run_command, small, tmp_path):
    for precision, said in (("nf4", " --precision nf4 "), ("auto", "")):
        folder = f"output_dir={tmp_path / precision}"
        code, out, err = run_command(*small(folder, "steps=1", f"precision={precision}", "device=cpu"))
        assert code == 0, err
        assert out.splitlines()[-1].startswith("use it ")
        assert said in out.splitlines()[-1]
        assert said or "--precision" not in out.splitlines()[-1]


def test_the_last_lines_say_where_everything_is_and_how_it_is_used(run_command, small, tmp_path, model_folders):
    prompt, room = 'sample.prompts=["a cup\'s fox"]', tmp_path / "room.png"
    draw_picture(0, (48, 48)).save(room)
    code, out, err = run_command(
        *small(f"output_dir={tmp_path / 'run'}", prompt, f"sample.references=[[{room}]]", "sample_every=4"),
        *("sample.steps=1", "steps=1"),
    )
    assert code == 0, err
    run = tmp_path / "run"
    assert out.splitlines()[-5:] == [
        f"adapter   {run}/adapter",
        f"numbers   {run}/metrics.jsonl",
        f"pictures  {run}/samples",
        f"report    {run}/report.html",
        f"use it    python -m flux2.generate --model small_dev --path {model_folders('dev')} --adapter {run}/adapter "
        f"--prompt 'a cup'\"'\"'s fox' --image {room}",
    ]


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        ("model.path=/nowhere/model", "model.path=/nowhere/model ... does not exist ... repository ... folder"),
        ("dataset.path=/nowhere/pictures", "dataset.path=/nowhere/pictures ... does not exist ... folder"),
        ("dataset.caption_column=title", "caption_column=title"),
        ("resume=/nowhere", "resume=/nowhere ... folder ... auto"),
        ("validation.held_out=6", "validation.held_out=6 ... 6 samples"),
    ],
)
def test_a_place_that_is_not_there_is_named_with_its_key_and_a_remedy(small, mistake, said):
    message = refusal(*small(mistake), task=training_command)
    assert holds(message, said), message


def test_a_column_that_is_not_there_is_named_with_those_that_are(small, parquet):
    settings = ["dataset=huggingface", f"dataset.path={parquet}", "dataset.caption_column=text"]
    assert holds(refusal(*small(*settings), task=training_command), "dataset.caption_column=text ... image, caption")


def test_a_picture_that_cannot_be_read_is_named_before_any_encoder_is_loaded(run_command, small, tmp_path, monkeypatch):
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "broken.png").write_bytes(b"no picture")
    (folder / "broken.txt").write_text("a broken picture")
    monkeypatch.setattr(text_encoders, "load_text_encoder", lambda *args: pytest.fail("the text encoder was loaded"))
    code, _, err = run_command(*small(f"dataset.path={folder}", f"cache_dir={tmp_path / 'cache'}"))
    assert code == 2
    assert holds(err, f"error: ... 1 of 1 samples ... {folder / 'broken.png'} ... dataset.max_bad=1")
    assert "Traceback" not in err


def test_a_model_that_cannot_be_downloaded_is_named_with_the_way_to_give_a_local_one(parquet, tmp_path):
    message = refusal(
        "+experiment=tarot", f"dataset.path={parquet}", f"cache_dir={tmp_path}", f"output_dir={tmp_path / 'run'}",
        task=training_command,
    )  # fmt: skip
    assert holds(message, "black-forest-labs/FLUX.2-dev ... model.path=/path/to/FLUX.2")


def test_a_run_that_ends_in_a_loss_that_is_not_finite_is_one_message(run_command, small, tmp_path):
    code, _, err = run_command(*small("optimizer.lr=1e30", "max_nonfinite_steps=2", f"output_dir={tmp_path / 'run'}"))
    assert code == 2
    assert re.search(r"^warning: .*step 2\b", err, re.MULTILINE)
    assert re.search(r"^error: .*step 3\b.*no checkpoint.*optimizer\.lr", err, re.MULTILINE)
    assert "Traceback" not in err


# ------------------------------------------------------------------ other processes


@pytest.mark.parametrize("way", ["variables", pytest.param("launch", marks=pytest.mark.slow)])
def test_accelerate_launch_trains_the_tarot_experiment_on_local_parquet_with_all_cores(server, parquet, tmp_path, way):
    """By the command itself, and by the variables that it sets."""
    run = tmp_path / "run"
    arguments = [
        *("+experiment=tarot", "model=tiny", f"dataset.path={parquet}", "steps=2", f"output_dir={run}"),
        *("model.resolution=64", "sample.steps=1", "log_every=1", "checkpoint_every=2", "sample_every=2"),
        f"cache_dir={tmp_path / 'cache'}",
    ]
    if way == "launch":
        done = execute(launch("train/run.py", *arguments))
        assert done.returncode == 0, done.stderr[-3000:]
        said = done.stdout
    else:
        said = server.run(*arguments, ACCELERATE_MIXED_PRECISION="no", OMP_NUM_THREADS="1")
    assert f"processes: 1, CPU threads each: {cores()};" in said
    kept = OmegaConf.load(run / "config.yaml")
    assert (kept.name, kept.adapter.rank, kept.optimizer._target_) == ("tarot", 8, "bitsandbytes.optim.AdamW8bit")
    assert [line["step"] for line in lines(run)] == [0, 1, 2]
    assert values(run, "lr") == pytest.approx([1e-4 / 201, 2e-4 / 201])
    assert [path.name for path in sorted((run / "samples").iterdir())] == ["step_000000.png", "step_000002.png"]
    assert any(tensor.abs().max() > 0 for name, tensor in adapter(run).items() if "lora_B" in name)


@pytest.mark.slow
def test_without_network_the_tarot_experiment_says_which_repository_and_how_to_give_a_local_one(tmp_path):
    started = time.monotonic()
    done = execute(
        [sys.executable, "train/run.py", "+experiment=tarot"],
        HF_HUB_OFFLINE="0",
        HF_ENDPOINT="http://127.0.0.1:9",  # refuses connections, as a machine without network does
        HF_HOME=str(tmp_path),
    )
    assert done.returncode == 2
    message = one_message(done.stderr)
    assert holds(
        message,
        "multimodalart/1920-raider-waite-tarot-public-domain ... dataset.path=/path/to/file.parquet",
    )
    assert "http://127.0.0.1:9" in done.stdout
    assert time.monotonic() - started < 240  # ten seconds on a machine that does nothing else


def test_a_mistake_on_the_command_line_of_the_entry_file_is_one_line(tmp_path):
    done = execute([sys.executable, "train/run.py", "adapter.rnk=4", f"output_dir={tmp_path / 'run'}"])
    assert (done.returncode, done.stdout) == (2, "")
    assert holds(one_message(done.stderr), "adapter.rnk=4 ... adapter.rank?")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_request_to_the_launcher_of_two_processes_saves_once(pictures, tmp_path, number):
    """A Ctrl-C reaches launcher and processes alike, and the launcher then signals them again."""
    model = tmp_path / "model"
    model.mkdir()
    cut = tmp_path / "cut"
    arguments = [
        *("model=tiny", f"model.path={random_tiny(model)}", "model.resolution=48", "batch_size=1", "log_every=1"),
        *("dataset=folder", f"dataset.path={pictures}", f"cache_dir={tmp_path / 'cache'}", "steps=100000"),
        *("sample_every=0", "validate_every=0", "checkpoint_every=0", f"output_dir={cut}"),
    ]
    process = subprocess.Popen(
        [*launch("train/run.py", processes=2), *arguments],
        cwd=ROOT,
        env=environment(ACCELERATE_USE_CPU="true"),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    metrics = cut / "metrics.jsonl"
    deadline = time.monotonic() + 400
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    _, err = process.communicate(timeout=200)
    assert process.returncode != 0
    (place,) = checkpoints(cut)
    assert json.loads((place / "state.json").read_text())["step"] == len(values(cut))
    assert f"saved in {place}" in err
