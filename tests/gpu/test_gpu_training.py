"""What only a GPU can show. Everything here skips, saying so, on a machine without one."""

from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

import flux2
from flux2 import adapters
from flux2.memory.activation_checkpointing import set_policy
from flux2.models.positions import image_positions, text_positions
from flux2.models.transformer import Transformer
from flux2.models.variants import VARIANTS
from train.run import train
from train.stages.memory import load_config
from train.stages.run_folder import claim_run_folder

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU, and PyTorch sees none"),
]


@pytest.mark.gpu_values
def test_pictures_of_the_gpu_are_those_of_the_cpu() -> None:
    prompt = "a small red cup on a blue background"
    on_cpu = flux2.load("tiny", device="cpu", precision="fp32").generate(prompt)[0]
    on_gpu = flux2.load("tiny", device="cuda", precision="fp32").generate(prompt)[0]
    difference = torch.tensor(list(on_cpu.tobytes())).float() - torch.tensor(list(on_gpu.tobytes())).float()
    assert difference.abs().mean() < 2


@pytest.mark.gpu_values
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_lowers_the_validation_loss(precision: str, tmp_path: Path) -> None:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose(
            "train",
            overrides=[
                "+experiment=demo",
                f"precision={precision}",
                "device=cuda",
                "steps=60",
                "sample.prompts=[]",
                f"output_dir={tmp_path}/run",
                f"cache_dir={tmp_path}/cache",
                f"dataset.path={ROOT}/data/demo",
            ],
        )
    run = load_config(config)
    with claim_run_folder(run) as location:
        train(run, location)
    values = [line["validation_loss"] for line in _metrics(tmp_path / "run") if "validation_loss" in line]
    assert values[-1] < 0.9 * values[0]


@pytest.mark.parametrize("policy", ["none", "full"])
def test_a_step_of_klein_4b_at_512_px_fits_and_full_recompute_needs_less(policy: str) -> None:
    config = VARIANTS["klein_base_4b"].transformer
    with torch.device("cuda"):
        model = Transformer(config).to(torch.bfloat16)
    adapters.attach(model, rank=16)
    set_policy(model, policy)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    tokens = torch.randn(1, 1024, config.channels, device="cuda")
    text = torch.randn(1, 512, config.text_width, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        positions, text_at = image_positions(32, 32, device=tokens.device), text_positions(512, tokens.device)
        model(tokens, positions, text, text_at, torch.rand(1, device="cuda")).square().mean().backward()
    extra = torch.cuda.max_memory_allocated() - before
    assert all(torch.isfinite(p.grad).all() for p in adapters.adapter_parameters(model) if p.grad is not None)
    if policy == "full":
        assert extra < 4e9
    else:
        assert extra > 4e9


def _metrics(folder: Path) -> list[dict[str, float]]:
    import json

    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
