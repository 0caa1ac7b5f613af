"""A whole run through the command line and in processes of its own."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from accelerate import DistributedType
from accelerate.utils import DynamoBackend
from message_helpers import holds
from omegaconf import OmegaConf
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
    random_tiny,
    refusal,
    values,
)

import train.distributed.processes
from train.checkpoints.checkpoint import checkpoints
from train.distributed.processes import cores, make_accelerator
from train.encoding import text_encoders
from train.run import main as training_command

pytest_plugins = ("train_helpers", "train_processes")


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


@pytest.mark.parametrize("library", ["DEEPSPEED", "MEGATRON_LM"])
def test_a_library_that_is_not_used_is_refused_before_it_is_imported(monkeypatch, library):
    monkeypatch.setenv(f"ACCELERATE_USE_{library}", "true")
    with pytest.raises(ValueError, match=rf"{library}.*--multi_gpu.*shard=true"):
        make_accelerator("cpu")


def test_settings_of_the_launcher_that_have_no_effect_are_named(monkeypatch, capfd):
    for name, off, value, said in (
        ("MIXED_PRECISION", "no", "bf16", "precision"),
        ("GRADIENT_ACCUMULATION_STEPS", "1", "4", "gradient_accumulation"),
        ("DYNAMO_BACKEND", "NO", "INDUCTOR", "memory.compile"),
    ):
        monkeypatch.setenv(f"ACCELERATE_{name}", off)
        make_accelerator("cpu")
        assert capfd.readouterr().err == ""
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
        accelerator = make_accelerator("cpu")
        said = f"warning: {name.lower()}={value} of accelerate has no effect: {said} decides"
        assert said in capfd.readouterr().err
        assert accelerator.state.dynamo_plugin.backend == DynamoBackend.NO
        monkeypatch.delenv(f"ACCELERATE_{name}")


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
    assert out.splitlines()[-7:] == [
        f"adapter   {run}/adapter",
        f"numbers   {run}/metrics.jsonl",
        f"samples   {run}/samples",
        f"report    {run}/report.html",
        "best checkpoint: none (nothing was validated)",
        f"export    python -m flux2.export {run}/adapter --format comfyui --out {run}/comfyui.safetensors",
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
    assert holds(err, f"error: ... 1 of 1 samples ... {folder / 'broken.png'} ... Fix them: there is no other")
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


@pytest.mark.slow
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
def test_the_launcher_adds_nothing_to_an_error_with_the_configuration_that_the_documentation_names():
    table = (ROOT / "docs" / "scaling.md").read_text()
    words = re.search(r"`accelerate launch (--quiet [^`]*) train/run.py ...`", table)[1].split()
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", *words]
    done = execute([*accelerate, "train/run.py", "adapter.rnk=4"])
    assert (done.returncode, done.stdout) == (1, "")
    assert holds(one_message(done.stderr), "adapter.rnk=4 ... adapter.rank?")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_two_processes_draw_a_grid_when_asked_and_a_stop_request_to_their_launcher_saves_once(
    pictures, tmp_path, number
):
    """A Ctrl-C reaches launcher and processes alike, and the launcher then signals them again."""
    model = random_tiny(tmp_path / "model")
    cut = tmp_path / "cut"
    arguments = [
        *("model=tiny", f"model.path={model}", "model.resolution=48", "batch_size=1", "log_every=1"),
        *("dataset=folder", f"dataset.path={pictures}", f"cache_dir={tmp_path / 'cache'}", "steps=100000"),
        *("sample_every=100000", "sample.prompts=[a fox, a cup]", "sample.steps=1"),
        *("validate_every=0", "checkpoint_every=0", f"output_dir={cut}"),
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

    def wait(condition):
        while not condition():
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.05)

    wait(lambda: metrics.exists() and metrics.read_text().count("\n") >= 2)
    (cut / "sample").touch()
    wait(lambda: not (cut / "sample").exists() and len(list((cut / "samples").glob("step_*.png"))) == 2)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    _, err = process.communicate(timeout=200)
    assert process.returncode != 0
    (place,) = checkpoints(cut)
    assert json.loads((place / "state.json").read_text())["step"] == len(values(cut))
    assert f"saved in {place}" in err
