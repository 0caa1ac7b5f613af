"""The benchmark that trains the demo in every precision: its conclusions from the runs."""

import json
import sys

import pytest
from train_helpers import ROOT

sys.path.insert(0, str(ROOT))

from benchmarks import demo_precisions as benchmark


def run(style, loss):
    return dict.fromkeys(benchmark.MEASURES, style) | {"validation_loss": [2.0, loss]}


def test_a_precision_passes_if_its_mean_lies_within_the_seeds_of_float32():
    summary = benchmark.summarize(
        {
            "fp32": [run(0.90, 1.0), run(0.95, 1.2)],
            "fp8": [run(0.80, 1.3), run(1.00, 0.9)],
            "nf4": [run(0.80, 1.3), run(0.90, 1.3)],
        }
    )
    assert summary["fp8"]["style_moved"] == {"mean": pytest.approx(0.9), "min": 0.8, "max": 1.0, "within_fp32": True}
    assert summary["fp8"]["final_validation_loss"] == {"mean": pytest.approx(1.1), "min": 0.9, "max": 1.3}
    assert not summary["nf4"]["style_moved"]["within_fp32"]  # by more than one image of 48
    assert all(summary["fp32"][key]["within_fp32"] for key in benchmark.MEASURES)
    nearly = benchmark.summarize({"fp32": [run(0.90, 1.0)], "nf4": [run(0.88, 1.0)]})
    assert nearly["nf4"]["subjects_right"]["within_fp32"]


def test_every_precision_is_trained_at_every_seed_and_written_with_hardware_and_versions(monkeypatch, tmp_path, capsys):
    trained = []

    def fake(overrides, folder, cache):
        trained.append((folder.name, list(overrides)))
        return run(0.9, 1.0)

    monkeypatch.setattr(benchmark, "train_demo", fake)
    out = tmp_path / "results" / "demo.json"
    result = benchmark.main(["--seeds", "2", "--out", str(out), "steps=4"])
    assert json.loads(out.read_text()) == result
    assert [name for name, _ in trained] == [f"{name}_{seed}" for seed in (0, 1) for name in benchmark.PRECISIONS]
    assert trained[6] == ("fp8_1", ["precision=fp8", "precision.matmul=fp8", "seed=1", "steps=4"])
    assert result["hardware"]
    assert set(result["versions"]) == {"torch", "bitsandbytes", "peft"}
    assert [len(runs) for runs in result["runs"].values()] == [2] * 5
    trained.clear()
    again = benchmark.main(["--seeds", "2", "--only", "int8", "--only", "nf4", "--out", str(out), "steps=4"])
    assert [name for name, _ in trained] == ["int8_0", "nf4_0", "int8_1", "nf4_1"]
    assert again == result
    with pytest.raises(SystemExit):
        benchmark.main(["--seeds", "2", "--only", "int8", "--out", str(out), "steps=5"])
    assert "steps=4' instead of 'conf/experiment/demo.yaml steps=5'" in capsys.readouterr().err
