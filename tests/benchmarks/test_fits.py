"""The benchmarks of memory and time run at small shapes on a CPU and write their results."""

import json
import sys

import pytest
import torch
from train_helpers import ROOT

sys.path.insert(0, str(ROOT))

from benchmarks import fits, matrix
from train.config.memory import Choice

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "storage", ["nf4", *(pytest.param(name, marks=pytest.mark.slow) for name in (None, "fp8", "int8"))]
)
def test_a_case_trains_with_the_chosen_memory_settings(storage):
    case = fits.Case("small", storage, 128, 8)
    planner = fits.make_planner(case.variant, storage, 128, in_fp8=False)
    resident = fits.train(case, planner.predict(Choice("full")), CPU, 1, in_fp8=False)
    streaming = Choice("selective", offload_blocks=2, offload_activations=True)
    offloaded = fits.train(case, planner.predict(streaming), CPU, 2, in_fp8=False)
    assert (len(resident), len(offloaded)) == (1, 2)


def test_the_result_has_predicted_and_measured_figures(monkeypatch, tmp_path, capsys):
    out = tmp_path / "fits.json"
    monkeypatch.setattr(
        sys, "argv", ["fits.py", "--on", "cpu", "--only", "small nf4", "--repeats", "1", "--out", str(out)]
    )
    fits.main()
    (run,) = json.loads(out.read_text())["runs"].values()
    assert run["memory"]["checkpointing"] == "none"
    assert run["seconds"]["median"] > 0 < run["predicted seconds"]
    monkeypatch.setattr(sys, "argv", ["fits.py", "--on", "cpu", "--only", "dev nf5"])
    with pytest.raises(SystemExit):
        fits.main()
    assert "dev nf4 512 16; " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("script", "given", "message"),
    [
        (fits, ["--on", "cpu", "--repeats", "0"], "'0'"),
        (matrix, ["--repeats", "none"], "'none'"),
        (matrix, ["--rank", "-1"], "'-1'"),
        (matrix, ["--only", "fp4"], "flux2-lora, bf16, full; "),
    ],
)
def test_bad_arguments_are_named_before_anything_is_measured(script, given, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmark", *given])
    with pytest.raises(SystemExit):
        script.main()
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_the_matrix_writes_the_settings_that_plan_looks_up(monkeypatch, tmp_path):
    out = tmp_path / "matrix.json"
    small = ["--model", "small", "--side", "4", "--text", "8", "--repeats", "1", "--warmup", "0"]
    monkeypatch.setattr(sys, "argv", ["matrix.py", *small, "--on", "cpu", "--compiler", "aot_eager", "--out", str(out)])
    matrix.main()
    cases = json.loads(out.read_text())["cases"]
    assert len(cases) == len(matrix.CASES) + 1
    planner = fits.make_planner(fits.Case("small", None, 64, 8).variant, None, 64, in_fp8=False)
    from train.plan import setting

    ours = cases["flux2-lora, bf16, full"]["setting"]
    assert ours == setting(planner, Choice("full")) | {"text_tokens": 8}
    assert cases["flux2-lora, fp8, full, both layouts"]["setting"]["cache_transposed_weights"]
    losses = [case["loss"] for case in cases.values() if "loss" in case]
    assert max(losses) - min(losses) < 0.02
