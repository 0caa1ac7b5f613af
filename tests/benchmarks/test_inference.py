"""The benchmarks of inference and of decoding run at small shapes on a CPU and write their results."""

import json
import re
import sys

import pytest
import torch
from train_helpers import ROOT

sys.path.insert(0, str(ROOT))

from benchmarks import decoding, inference

CPU = torch.device("cpu")


def test_every_case_makes_an_image(monkeypatch, tmp_path, capsys):
    out = tmp_path / "inference.json"
    words = ["inference.py", "--small", "--on", "cpu", "--steps", "2", "--pixels", "64", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", words)
    inference.main()
    result = json.loads(out.read_text())
    assert result["hardware"]
    assert len(result["runs"]) == 4
    assert all(run["seconds per image"] > 0 for run in result["runs"].values())
    assert [name for name in result["runs"] if "predicted GB" in result["runs"][name]] == [
        "8 GB: flux2-lora, 0 streamed, bf16",
        "8 GB: flux2-lora, 2 streamed, nf4",
    ]


def test_both_sides_have_the_same_weights():
    variant = inference.SMALL_DEV
    ours = inference.random_transformer(variant.transformer, inference.make_precision(None, in_fp8=False), CPU)
    weights = inference.HostWeights(variant.transformer, CPU)
    assert set(weights) == set(ours.state_dict())
    assert all(torch.equal(weights[name], tensor) for name, tensor in ours.state_dict().items())


def test_offloaded_blocks_are_not_counted_as_weights_on_the_gpu():
    whole = inference.predict_memory(inference.SMALL_DEV, inference.Case(8, None), 256)
    offloaded = inference.predict_memory(inference.SMALL_DEV, inference.Case(8, None, 1.0, tiled=True), 256)
    assert offloaded["weights of blocks"] == 0 < whole["weights of blocks"]
    assert offloaded["buffers of streamed blocks"] > 0 == whole["buffers of streamed blocks"]


@pytest.mark.parametrize("words", [["--on", "cpu"], ["--small", "--on", "cpu", "--only", "9 GB"]])
def test_options_that_cannot_be_measured_are_rejected(words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["inference.py", *words])
    with pytest.raises(SystemExit):
        inference.main()
    assert re.search(r"error: .*(--small|9 GB)", capsys.readouterr().err)


@pytest.mark.slow
def test_decoding_writes_time_memory_and_difference(monkeypatch, tmp_path):
    out = tmp_path / "decoding.json"
    words = ["decoding.py", "--sides", "128", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", words)
    decoding.main()
    result = json.loads(out.read_text())
    assert result["128"]["whole"]["seconds"] > 0 < result["128"]["stripes"]["seconds"]
    assert result["pixel_difference_of_the_embedded_model"]["mean"] < 1
