"""Several GPUs: DDP and a sharded base over NCCL. Skips, saying so, where there are fewer than two."""

import json
from pathlib import Path

import pytest
import torch
from sharding_worker import CASES, findings
from train_helpers import CONF, execute, free_port, launch

GPUS = torch.cuda.device_count()

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(GPUS < 2, reason=f"needs two CUDA GPUs, and PyTorch sees {GPUS}"),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return findings(tmp_path_factory.mktemp("sharding"), "cuda")


@pytest.mark.parametrize("case", CASES, ids=["-".join(case) for case in CASES])
def test_a_sharded_base_trains_as_a_whole_one_and_each_gpu_holds_half(found, case):
    for one in found:
        whole, sharded = one[case]["whole"], one[case]["sharded"]
        assert one["processes"] == 2
        assert all(sharded["sharded"].values())
        assert sharded["adapter is plain"]
        assert sharded["held"] == pytest.approx(one[case]["held by one"] / 2, rel=0.01)
        assert sharded["losses"] == pytest.approx(whole["losses"], rel=1e-5)
        for gradient, expected in zip(sharded["gradients"], whole["gradients"], strict=True):
            torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-3)


def losses(name: str, folder: Path) -> list[float]:
    """Of a few steps of the demo in two processes, started by one of conf/accelerate."""
    script = launch("--config_file", str(CONF / "accelerate" / f"{name}.yaml"), "--num_processes", "2")
    script += ["--main_process_port", str(free_port()), "train/run.py", "+experiment=demo", "steps=4", "log_every=1"]
    settings = ["precision=bf16", "batch_size=4", "sample.steps=2", "validate_every=2", "checkpoint_every=4"]
    done = execute([*script, *settings, f"cache_dir={folder / 'cache'}", f"output_dir={folder / name}"])
    assert done.returncode == 0, done.stderr[-3000:]
    assert "processes: 2" in done.stdout
    assert ("the base is sharded" in done.stdout) == (name == "fsdp2")
    found = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in found if "loss" in line]


def test_accelerates_ddp_and_fsdp2_configurations_train_alike(tmp_path):
    assert losses("fsdp2", tmp_path) == pytest.approx(losses("ddp", tmp_path), rel=1e-3)
