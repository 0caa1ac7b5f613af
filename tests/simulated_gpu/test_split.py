"""One model on two simulated GPUs: every tensor in its place, and no more memory on either than planned."""

from __future__ import annotations

import gc
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from simulated_gpu.simulated import ATTACH, empty_transformer, run

from benchmarks.fits import Case
from benchmarks.models import Inputs, make_precision
from benchmarks.planner_simulated import simulate
from flux2 import adapters
from flux2.memory.activation_checkpointing import POLICIES, set_policy
from flux2.memory.model_split import module_devices, split_devices, split_model
from flux2.models.transformer import Transformer
from flux2.models.variants import VARIANTS, TransformerConfig
from flux2.quantization.precision import Storage
from flux2.utils.device import seed_devices
from flux2.weights.loading import load_transformer
from flux2.weights.parallel_reader import Reader
from flux2.weights.sources import model_source

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs SIMULATED_GPU_COUNT=2")

FIRST, SECOND = torch.device("cuda", 0), torch.device("cuda", 1)
SHALLOW = replace(VARIANTS["klein_base_4b"].transformer, double_blocks=2, single_blocks=3)
STORAGES: list[Storage | None] = [None, "fp8", "int8", "nf4"]
OPTIMIZERS = ["adamw_8bit", "adafactor", "lion", "muon"]
OPTIMIZERS += ["prodigy"] * bool(find_spec("prodigyopt")) + ["schedulefree"] * bool(find_spec("schedulefree"))


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    """Every test gives back what it took of both devices."""
    gc.collect()
    before = [torch.cuda.memory_allocated(place) for place in (FIRST, SECOND)]
    yield
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()
    for place, bytes_before in zip((FIRST, SECOND), before, strict=True):
        assert torch.cuda.memory_allocated(place) <= bytes_before + 10_000


def divided(
    config: TransformerConfig, storage: Storage | None, split: list[int], policy: str, attach: Callable[..., None]
) -> Transformer:
    model = empty_transformer(config, make_precision(storage, in_fp8=True), FIRST)
    set_policy(model, policy, budget_gb=0.5 if policy == "budget" else None)
    attach(model)
    split_model(model, module_devices(config, split, split_devices(FIRST, len(split))))
    return model


def check_places(model: Transformer, optimizer: torch.optim.Optimizer) -> None:
    """Every parameter, buffer, gradient and state of the optimizer is on the device of its module, and on both."""
    places = set()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        own = [tensor, *([] if tensor.grad is None else [tensor.grad])]
        state = optimizer.state.get(tensor, {}).values()
        own += [value for value in state if isinstance(value, torch.Tensor) and value.dim()]
        places |= {part.device for part in own}
        assert {part.device for part in own} == {model.device_of(name)}, name
        assert not tensor.requires_grad or tensor.grad is not None, name
    assert places == {FIRST, SECOND}


@pytest.mark.parametrize("split", [[1, 4], [3, 2]])
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("policy", POLICIES)
def test_a_step_has_each_tensor_on_its_device(policy: str, storage: Storage | None, split: list[int]) -> None:
    model = divided(SHALLOW, storage, split, policy, ATTACH["lora"])
    optimizer = torch.optim.AdamW(adapters.adapter_parameters(model), lr=1e-4, fused=True)
    given, after = Inputs(SHALLOW, 64, 512, FIRST), []
    for _ in range(2):
        given.backward(model)
        optimizer.step()
        check_places(model, optimizer)
        optimizer.zero_grad(set_to_none=True)
        after.append([torch.cuda.memory_allocated(place) for place in (FIRST, SECOND)])
    assert after[0] == after[1], "a step keeps nothing"
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        assert given.predict(model, is_peer=False).device == FIRST


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("kind", ["dora", "lokr", "loha", "oft"])
def test_adapters_of_every_type_train(kind: str, storage: Storage | None) -> None:
    model = divided(SHALLOW, storage, [2, 3], "full", ATTACH[kind])
    optimizer = torch.optim.AdamW(adapters.adapter_parameters(model), lr=1e-4, fused=True)
    Inputs(SHALLOW, 32, 512, FIRST).backward(model)
    optimizer.step()
    check_places(model, optimizer)


def test_trained_modulation_has_its_gradient_from_both_devices() -> None:
    """Its gradient comes from the blocks of both, through the copies."""
    targets = [
        r"single_stream_modulation\.lin",
        r"double_stream_modulation_\w+\.lin",
        r"img_in",
        r"final_layer\.linear",
    ]
    model = divided(SHALLOW, None, [1, 4], "full", partial(adapters.attach, rank=4, targets=targets))
    Inputs(SHALLOW, 32, 512, FIRST).backward(model)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(gradients) == 2 * 5
    assert all(grad is not None and grad.device == model.device_of(name) for name, grad in gradients.items())


@pytest.mark.parametrize("wrong", ["single_blocks.2.linear1", "double_blocks.0.img_mlp.0", "final_layer", "time_in"])
def test_a_module_on_the_wrong_device_is_seen(wrong: str) -> None:
    model = divided(SHALLOW, None, [2, 3], "full", ATTACH["lora"])
    model.get_submodule(wrong).to(FIRST if model.device_of(wrong) == SECOND else SECOND)
    with pytest.raises(RuntimeError, match="same device"):
        Inputs(SHALLOW, 32, 512, FIRST).backward(model)


@pytest.mark.parametrize("storage", [None, "nf4"])
def test_compiled_blocks_run_on_their_devices(storage: Storage | None) -> None:
    torch._dynamo.reset()
    model = empty_transformer(SHALLOW, make_precision(storage, in_fp8=True), FIRST)
    set_policy(model, "full", compile=True)
    ATTACH["lora"](model)
    split_model(model, module_devices(SHALLOW, [2, 3], [FIRST, SECOND]))
    optimizer = torch.optim.AdamW(adapters.adapter_parameters(model), lr=1e-4, fused=True)
    Inputs(SHALLOW, 32, 512, FIRST).backward(model)
    optimizer.step()
    check_places(model, optimizer)
    torch._dynamo.reset()


def test_each_device_draws_other_dropout() -> None:
    seed_devices(5, [FIRST, SECOND])
    assert [torch.cuda.default_generators[index].initial_seed() for index in range(2)] == [5, 6]
    assert torch.initial_seed() == 5


def test_weights_are_read_to_both_devices_on_a_stream_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy on another device's stream would not be waited for, and its buffer is reused at once."""
    devices = module_devices(VARIANTS["tiny"].transformer, [2, 4], [FIRST, SECOND])
    places, copy = set(), Reader.copy_to_device

    def note(self: Reader, source: torch.Tensor, memory: torch.Tensor, ready: torch.cuda.Event) -> None:
        copy(self, source, memory, ready)
        places.add((memory.device, self.streams[memory.device].device))

    monkeypatch.setattr(Reader, "copy_to_device", note)
    model = load_transformer(model_source("tiny"), FIRST, devices=devices)
    assert places == {(FIRST, FIRST), (SECOND, SECOND)}
    model.devices = devices
    for name, tensor in model.named_parameters():
        assert tensor.device == model.device_of(name), name


# ------------------------------------------------------------------ memory


@pytest.mark.parametrize(
    "case",
    [
        Case("dev", "fp8", 1024, 24, num_gpus=2),
        Case("dev", "nf4", 1024, 24, num_gpus=2),
        Case("klein_base_9b", None, 1024, 24, num_gpus=2),
    ],
    ids=lambda case: case.name,
)
def test_the_peak_of_each_gpu_is_as_planned(case: Case) -> None:
    found = simulate(case)
    assert sum(found["split"]) == len(case.variant.transformer.block_names)
    for gpu in found["GPUs"]:
        assert 1 <= gpu["predicted / simulated"] < 1.03
        assert gpu["GB"]["reserved"] < gpu["GB"]["limit"]
        assert gpu["retries"] == 0


# ------------------------------------------------------------------ commands

DEBUG = ("train/run.py", "+experiment=debug", "device=cuda")
PAIR = {"count": 2, "MOST": 1}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def trained(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a finished run on two devices, and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    said = run(*DEBUG, "memory.split=auto", f"output_dir={folder}", f"cache_dir={cache}", "checkpoint_every=1", **PAIR)
    return folder, said


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def most(said: str) -> list[int]:
    found = re.search(r"most of 0: (\d+) (\d+)", said)
    assert found, said
    return [int(number) for number in found.groups()]


def test_a_run_divides_the_model_over_both(trained: tuple[Path, str]) -> None:
    folder, said = trained
    assert re.search(r"memory\.split=\[\d+,\d+\]: predicted to need", said)
    assert re.search(r"the model is divided: \d+ blocks? on cuda:0, \d+ blocks? on cuda:1", said)
    assert min(most(said)) > 10e6
    steps = [line for line in metrics(folder) if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2]
    assert all(line["peak_memory_gb"] > 0 and line["peak_memory_gb/cuda:1"] > 0 for line in steps)
    assert list((folder / "samples").glob("*.png"))


@pytest.mark.parametrize(("split", "count"), [("null", 1), ("[3,3]", 2)])
def test_it_resumes_with_and_without_a_split(
    trained: tuple[Path, str], cache: Path, tmp_path: Path, split: str, count: int
) -> None:
    folder = tmp_path / "resumed"
    said = run(*DEBUG, "steps=4", f"memory.split={split}", f"resume={trained[0]}", f"output_dir={folder}",
               f"cache_dir={cache}", **PAIR)  # fmt: skip
    assert [line["step"] for line in metrics(folder) if "loss" in line] == [3, 4]
    assert sum(number > 10e6 for number in most(said)) == count


@pytest.mark.parametrize(
    "settings",
    [
        ["precision=nf4", "quantized_cache_dir=null"],
        ["precision=fp8"],
        ["adapter=lokr", "ema_decay=0.9"],
        ["adapter=dora", "adapter.dropout=0.2"],
        ["adapter.targets=['single_blocks.*linear1']", "ema_decay=0.9"],  # no gradient is on the first device
        ["memory.compile=true"],
        ["embedding_storage=projected", "preservation=base", "preservation.prompts=[a card]"],
        ["preservation=prior", "preservation.prompts=[a card]", "preservation.count=2", "preservation.steps=2"],
        ["device=cuda:1"],
        *(["optimizer=" + name] for name in OPTIMIZERS),
    ],
    ids=lambda settings: settings[0],
)
def test_runs_of_every_kind_end(settings: list[str], cache: Path, tmp_path: Path) -> None:
    drawn = [f"preservation.folder={tmp_path}/class"] if "preservation=prior" in settings else []
    said = run(
        *DEBUG, "memory.split=[2,4]", f"output_dir={tmp_path}/run", f"cache_dir={cache}", *settings, *drawn, **PAIR
    )
    assert metrics(tmp_path / "run")[-1]["step"] == 2
    assert "uncompiled" not in said
    assert min(most(said)) > 10e6


def test_jobs_of_a_sweep_follow_each_other_on_both(cache: Path, tmp_path: Path) -> None:
    said = run(DEBUG[0], "-m", *DEBUG[1:], "memory.split=[2,4]", "seed=1,2", f"hydra.sweep.dir={tmp_path}/sweep",
               f"cache_dir={cache}", **PAIR)  # fmt: skip
    assert said.count("the model is divided") == 2
    assert len(list((tmp_path / "sweep").rglob("metrics.jsonl"))) == 2


def test_a_run_on_two_devices_is_evaluated(trained: tuple[Path, str]) -> None:
    said = run("train/evaluate.py", f"run={trained[0]}", "device=cuda", **PAIR)
    assert "the model is divided" in said
    assert min(most(said)) > 10e6


def test_a_plan_says_when_both_together_are_faster() -> None:
    words = ["train/plan.py", "+experiment=tarot", "memory=auto", "precision=fp8", "batch_size=1", "sample.prompts=[]"]
    said = " ".join(run(*words, count=2, gb=24, capability=89).split())
    assert "memory.split=auto would divide the model over the 2 GPUs of this machine" in said
    assert "memory.split=auto would" not in " ".join(run(*words, count=1, gb=24, capability=89).split())
