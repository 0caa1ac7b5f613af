"""Whole commands on the simulated device, with the embedded model. What they compute is noise; that they end is not."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from simulated_gpu.simulated import LAUNCHER, ROOT, attempt, run
from train_helpers import free_port

DEBUG = ("train/run.py", "+experiment=debug", "device=cuda")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def trained(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    said = run(*DEBUG, f"output_dir={folder}", f"cache_dir={cache}", "checkpoint_every=1")
    assert "(bf16) on cuda" in said
    return folder


def steps(folder: Path) -> list[int]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if "loss" in line]


def test_a_run_saves_all_that_it_promises(trained: Path) -> None:
    assert {path.name for path in trained.iterdir()} >= {"adapter", "checkpoints", "metrics.jsonl", "report.html"}
    assert list((trained / "samples").glob("*.png"))


def test_a_run_resumes(trained: Path, cache: Path) -> None:
    folder = trained.with_name("resumed")
    run(*DEBUG, "steps=4", f"resume={trained}", f"output_dir={folder}", f"cache_dir={cache}")
    assert steps(folder) == [3, 4]


@pytest.mark.parametrize("capability", [80, 90, 120])
def test_blocks_are_compiled_for_every_generation(capability: int, cache: Path, tmp_path: Path) -> None:
    """By Triton, whose compiler is the real one."""
    where = f"output_dir={tmp_path}/run", f"cache_dir={cache}"
    said = run(
        *DEBUG, "memory.compile=true", *where, capability=capability, TORCHINDUCTOR_CACHE_DIR=tmp_path / "compiled"
    )
    assert "uncompiled" not in said
    assert list((tmp_path / "compiled").rglob("*.cubin"))
    assert steps(tmp_path / "run") == [1, 2]


def test_a_short_run_is_not_worth_compiling(cache: Path, tmp_path: Path) -> None:
    said = run(*DEBUG, "memory.compile=auto", f"output_dir={tmp_path}/run", f"cache_dir={cache}")
    assert "memory.compile=false: 2 steps are predicted to be 0 s shorter" in said


@pytest.mark.parametrize(
    "options",
    [[], ["--stream-blocks", "1.0"], ["--precision", "fp8"], ["--precision", "int8"], ["--precision", "fp32"]],
)
def test_images_are_generated(trained: Path, tmp_path: Path, options: list[str]) -> None:
    out = tmp_path / "a.png"
    run("-m", "flux2.generate", "--model", "tiny", "--adapter", trained / "adapter", "--prompt", "a red cup",
        "--out", out, "--steps", "2", *options)  # fmt: skip
    assert out.stat().st_size > 100


def test_a_run_is_evaluated(trained: Path, tmp_path: Path) -> None:
    said = run("train/evaluate.py", f"run={trained}", "device=cuda")
    assert "validation loss" in said


def test_the_doctor_finds_the_device_healthy() -> None:
    said = run("-m", "flux2.doctor", name="GeForce RTX 4090", capability=89, gb=24)
    assert "GPU 0" in said
    assert "GeForce RTX 4090, compute capability 8.9" in said


def test_an_adapter_is_exported_on_the_device(trained: Path, tmp_path: Path) -> None:
    run("-m", "flux2.export", trained / "adapter", "--format", "comfyui", "--out", tmp_path / "out.safetensors")


@pytest.mark.parametrize(
    "settings",
    [
        ["precision=fp32"],
        ["precision=fp8", "quantized_cache_dir=null"],
        ["precision=int8", "precision.rotate=true", "quantized_cache_dir=null"],
        ["memory.offload_blocks=1.0", "memory.offload_activations=true"],
        ["memory.checkpointing=selective", "gradient_accumulation=2", "batch_size=2"],
        ["adapter=dora", "optimizer=adafactor"],
        ["optimizer=muon", "ema_decay=0.9"],
        ["adapter=lokr", "optimizer=adamw_8bit"],
        ["text_encoder.device=cpu", "cache_dir=null"],
        ["text_encoder.storage=nf4", "cache_dir=null"],
        ["memory=auto", "cache_dir=null"],
        ["preservation=prior", "preservation.prompts=[a card]", "preservation.count=2", "preservation.steps=2"],
    ],
    ids=lambda settings: settings[0],
)
def test_runs_of_every_kind_end(settings: list[str], cache: Path, tmp_path: Path) -> None:
    drawn = [f"preservation.folder={tmp_path}/class"] if "preservation=prior" in settings else []
    done = attempt(*DEBUG, f"output_dir={tmp_path}/run", f"cache_dir={cache}", *settings, *drawn, gb=8)
    assert done.returncode == 0, done.stderr[-3000:]
    assert steps(tmp_path / "run")[-1] == 2


def test_jobs_of_a_sweep_follow_each_other_on_the_device(cache: Path, tmp_path: Path) -> None:
    run(DEBUG[0], "-m", *DEBUG[1:], "seed=1,2", f"hydra.sweep.dir={tmp_path}/sweep", f"cache_dir={cache}")
    assert len(list((tmp_path / "sweep").rglob("metrics.jsonl"))) == 2


def test_host_memory_that_cannot_be_pinned_is_used_as_it_is(cache: Path, tmp_path: Path) -> None:
    said = run(*DEBUG, "memory.offload_blocks=1.0", f"output_dir={tmp_path}/run", f"cache_dir={cache}", pinned_gb=0.002)
    assert "could not be pinned" in said
    assert "out of memory" not in said


@pytest.mark.parametrize(("device", "other"), [("cuda:0", 1), ("cuda:1", 0)])
def test_a_run_is_on_the_device_that_is_named(device: str, other: int, cache: Path, tmp_path: Path) -> None:
    places = [f"device={device}", f"output_dir={tmp_path}/run", f"cache_dir={cache}"]
    said = run(*DEBUG[:-1], *places, count=2, MOST=1)
    assert f"on {device}" in said
    most = [int(number) for number in re.search(r"most of 0: (\d+) (\d+)", said).groups()]
    assert most[other] == 0
    assert most[1 - other] > 10e6


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_two_processes_train_on_two_devices(name: str, cache: Path, tmp_path: Path) -> None:
    places = [f"output_dir={tmp_path}/run", f"cache_dir={cache}"]
    accelerate = ["-m", "accelerate.commands.launch", "--config_file", ROOT / "conf" / "accelerate" / f"{name}.yaml",
                  "--num_processes", 2, "--main_process_port", free_port(), LAUNCHER]  # fmt: skip
    said = run(*accelerate, *DEBUG[:-1], *places, count=2, GLOO=1, MOST=1)
    assert "processes: 2" in said
    assert ("the base is sharded" in said) == (name == "fsdp2")
    most = {rank: (int(first), int(second)) for rank, first, second in re.findall(r"most of (\d): (\d+) (\d+)", said)}
    assert steps(tmp_path / "run")[-1] == 2
    assert most["0"][0] > 10e6
    assert most["1"][0] == 0
    assert most["1"][1] > 10e6
