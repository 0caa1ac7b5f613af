"""memory.kernels: what a run is told, keeps in its config.yaml, and repeats on resume."""

import pytest
import torch
from train_helpers import compose, lines

from train.planner.from_config import workload_of
from train.stages.memory import load_config
from train.utils.files import read_yaml

pytest_plugins = ("train_helpers",)


def test_auto_is_decided_said_and_kept(train, capfd, monkeypatch):
    run = train("run", "memory.kernels=auto", "steps=2", "checkpoint_every=2")
    assert "memory.kernels=torch" in capfd.readouterr().out
    assert read_yaml(run / "config.yaml")["memory"]["kernels"] == "torch"
    # what was torch stays torch without a trial, because kernels round differently
    monkeypatch.setattr("train.stages.memory.choose_kernels", lambda kernels, device: 1 / 0)
    train("run", "memory.kernels=auto", "steps=3", "resume=auto")
    assert "memory.kernels=torch: as in the resumed run" in capfd.readouterr().out
    assert [line["step"] for line in lines(run)] == [1, 2, 3]


def test_what_was_triton_is_tried_again_and_what_is_given_counts(train, capfd, monkeypatch):
    asked = []

    def choose(kernels, device):
        asked.append(kernels)
        return "triton" if kernels == "auto" else kernels

    monkeypatch.setattr("train.stages.memory.choose_kernels", choose)
    run = train("run", "memory.kernels=auto", "steps=2", "checkpoint_every=2")
    assert read_yaml(run / "config.yaml")["memory"]["kernels"] == "triton"
    train("run", "memory.kernels=auto", "steps=3", "checkpoint_every=3", "resume=auto")
    assert read_yaml(run / "config.yaml")["memory"]["kernels"] == "triton"
    train("run", "memory.kernels=torch", "steps=4", "resume=auto")
    assert read_yaml(run / "config.yaml")["memory"]["kernels"] == "torch"
    assert asked == ["auto", "auto", "torch"]


def test_triton_without_a_gpu_is_an_error_before_anything_is_encoded(train, tmp_path):
    with pytest.raises(ValueError, match=r"memory\.kernels=triton.*device=cpu is no GPU.*Set torch or auto"):
        train("run", "memory.kernels=triton", "steps=2")


def test_the_planner_counts_what_kernels_keep_and_move():
    given = "device=cpu", "model=klein_base_4b", "precision=fp8", "memory.checkpointing=none"

    def planned(*overrides):
        from train.planner.from_config import choice_of
        from train.planner.predictor import Planner

        config = load_config(compose(*given, *overrides))
        return Planner(workload_of(config, on_gpu=True)).predict(choice_of(config.composed["memory"]))

    plain, fused = planned(), planned("memory.kernels=triton")
    assert fused.work.flops == plain.work.flops
    assert fused.work.bytes < 0.5 * plain.work.bytes
    kept = [one.phases["step"]["kept for backward"] for one in (fused, plain)]
    assert kept[0] < 0.8 * kept[1]
    compiled = planned("memory.kernels=triton", "memory.compile=true")
    assert compiled.work.bytes == plain.work.bytes, "compiled blocks use no kernels"
    assert not torch.cuda.is_available()
