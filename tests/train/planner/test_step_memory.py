"""train/planner/step_memory.py counts what really happens: compared with running models, and with PyTorch's own
profiler.
"""

import json
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import helpers
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from flux2.adapters.tuners import attach
from flux2.memory.activation_checkpointing import set_policy
from flux2.models.transformer import Transformer
from flux2.models.variants import DEV
from flux2.quantization.nf4 import Nf4Linear, quant_map
from train.config.memory import Choice
from train.planner import step_memory
from train.planner.step_memory import (
    AllocationCounter,
    Shape,
    autoencoder_peaks,
    compiled_copy,
    gpu_kernels,
    size,
    step,
    train_block,
    train_end,
)

pytest_plugins = ("planner_helpers",)

ROOT = Path(__file__).resolve().parents[3]
CONFIG = replace(helpers.TRANSFORMERS["dev"], double_blocks=2, single_blocks=3)
SHAPE = Shape(2, 96, 32, 96)


@contextmanager
def no_kernels(float32_attention=False):
    yield


@pytest.fixture
def as_on_a_cpu(monkeypatch):
    """Count a CPU's kernels, as a CPU is what there is to compare with."""
    monkeypatch.setattr(step_memory, "gpu_kernels", no_kernels)


def model(device="cpu", config=CONFIG) -> Transformer:
    with torch.device(device):
        made = Transformer(config)
        attach(made, rank=4)
    return made.train()


def runner(policy: str):
    """What runs a block under a policy."""
    network = Transformer.__new__(Transformer)
    torch.nn.Module.__init__(network)
    set_policy(network, policy)
    return network.run_block


def inputs(shape: Shape):
    made = helpers.transformer_inputs(CONFIG, batch=shape.rows, size=(8, shape.image // 8), text=shape.text)
    return made


def whole_step(network: Transformer, shape: Shape = SHAPE) -> tuple[int, int]:
    """(kept after the forward, peak), in bytes, of a forward and backward through a whole model, really run."""
    given = inputs(shape)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    grads = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    known = [*network.parameters(), *grads, *(value for value in given.values() if value is not None)]
    with AllocationCounter(known) as count:
        loss = network(**given, keep=shape.predicted).square().mean()
        kept = count.live
        loss.backward()
    return kept, count.peak


@pytest.mark.parametrize("isolated", [False, True], ids=["", "isolated references"])
@pytest.mark.parametrize("policy", ["none", "full", "selective"])
def test_a_model_takes_the_sum_of_its_blocks(policy, isolated, as_on_a_cpu):
    config, shape = replace(CONFIG, isolated_references=isolated), replace(SHAPE, predicted=64 if isolated else 96)
    network = model(config=config)
    set_policy(network, policy)
    kept, peak = whole_step(network, shape)
    shadow = model("meta", config)
    costs = [
        train_block(shadow, block, runner(policy), shape, torch.float32, False)
        for block in [*shadow.double_blocks, *shadow.single_blocks]
    ]
    stream = 4 * shape.rows * shape.tokens * CONFIG.hidden
    outside = outside_blocks(shape, isolated)
    prediction = 4 * shape.rows * shape.predicted * CONFIG.channels
    end = train_end(shadow, shape, torch.float32, False)
    assert sum(cost.kept for cost in costs) + stream + outside + prediction == pytest.approx(kept, rel=0.03)
    assert sum(step(costs, end)) + stream + outside == pytest.approx(peak, rel=0.02)


def test_keys_and_values_of_isolated_references_are_counted_where_samples_are_drawn(planner):
    """In bfloat16 for each of 32 blocks; the working set of klein 9B's samples has none."""
    pixels = (1024, 1024)
    samples = {"sample_pixels": pixels, "sample_references": (pixels, pixels)}
    found, other = (planner(name, **samples) for name in ("klein_9b_kv", "klein_9b"))
    assert found.cached(8192, found.whole) == 32 * 2 * 8192 * 4096 * 2
    assert other.cached(8192, other.whole) == 0
    needed = [one.phases(Choice("full"), one.whole)["samples"]["working set"] for one in (found, other)]
    assert needed[0] - needed[1] > 0.8 * found.cached(8192, found.whole)


def outside_blocks(shape: Shape, isolated: bool = False) -> int:
    """Bytes that stay while blocks run and belong to none: modulations and angles."""
    sets = 2 * 2 * 3 + 3 + isolated * 2 * (2 * 3 + 3)
    return 4 * (shape.rows * CONFIG.hidden * sets + shape.tokens * CONFIG.head_dim)


def profiled_peak(work) -> int:
    """The most bytes that PyTorch's allocator had handed out at once during `work`, above those before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize("kind", ["double_blocks", "single_blocks"])
def test_a_block_takes_what_pytorchs_profiler_sees(kind, as_on_a_cpu):
    network, policy = model(), runner("full")
    block = getattr(network, kind)[0]
    cost = train_block(model("meta"), getattr(model("meta"), kind)[0], policy, SHAPE, torch.float32, False)
    tokens, rest = step_memory.arguments(network, block, SHAPE, torch.float32)
    with torch.no_grad():
        for tensor in tokens:
            tensor.normal_()
    for parameter in block.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)

    def work():
        out = policy(block, *tokens, *rest)
        ends = out if isinstance(out, tuple) else (out,)
        torch.autograd.backward(ends, [torch.ones_like(end) for end in ends])

    output = 4 * SHAPE.rows * SHAPE.tokens * CONFIG.hidden  # which this test holds
    assert profiled_peak(work) == pytest.approx(cost.kept + cost.backward + output, rel=0.02)


def test_what_a_block_keeps_is_what_autograd_saves(as_on_a_cpu):
    network = model()
    block = network.single_blocks[0]
    cost = train_block(model("meta"), model("meta").single_blocks[0], runner("none"), SHAPE, torch.float32, False)
    (x,), rest = step_memory.arguments(network, block, SHAPE, torch.float32)
    known = {tensor.untyped_storage()._cdata for tensor in block.parameters()}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            saved[storage._cdata] = (storage.nbytes(), tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        for tensor in rest[0]:
            known.add(tensor.untyped_storage()._cdata)
        out = block(x, *rest)
    total = sum(nbytes for nbytes, _ in saved.values())
    assert total == pytest.approx(cost.kept, rel=0.1)
    assert out.shape == x.shape


def test_the_count_follows_tensors_to_their_end():
    with AllocationCounter() as count:
        one = torch.zeros(1000)
        view = one[10:]
        assert count.live == 4096
        two = one + 1
        assert (count.live, count.peak) == (8192, 8192)
        del one
        assert count.live == 8192  # the view holds it
        del view, two
        assert count.live == 0
        assert count.start() == 0
        torch.zeros(8, 16) @ torch.zeros(16, 4)
    assert count.work.flops == {"fp32": 2 * 8 * 16 * 4}


def test_the_gpus_kernels_stand_in_for_a_while_only():
    import torch.nn.functional as functional

    before = (functional.layer_norm, functional.rms_norm, functional.scaled_dot_product_attention)
    options = (Nf4Linear.out_devices, Nf4Linear.dequantize)
    with gpu_kernels():
        assert functional.layer_norm is not before[0]
    assert before == (functional.layer_norm, functional.rms_norm, functional.scaled_dot_product_attention)
    assert options == (Nf4Linear.out_devices, Nf4Linear.dequantize)
    assert not isinstance(quant_map(torch.device("cpu")), torch._subclasses.FakeTensor)


def test_under_autocast_a_layer_norm_gives_float32_and_attention_bfloat16():
    import torch.nn.functional as functional

    with gpu_kernels(), FakeTensorMode(), torch.autocast("cpu", torch.bfloat16):
        x = torch.empty(2, 3, 8, 16, dtype=torch.bfloat16)
        assert functional.layer_norm(x, (16,)).dtype == torch.float32
        assert functional.scaled_dot_product_attention(x.float(), x.float(), x.float()).dtype == torch.bfloat16


def test_a_picture_in_the_autoencoder_takes_more_the_larger_it_is():
    config = helpers.AUTOENCODER
    weights, encode, decode = autoencoder_peaks(config, 64, 64)
    larger = autoencoder_peaks(config, 128, 64)
    assert larger[0] == weights
    assert 1.7 < larger[1] / encode < 2.1
    assert 1.7 < larger[2] / decode < 2.1


def test_sizes_are_bytes():
    assert size([torch.zeros(3), torch.zeros(2, dtype=torch.bfloat16)]) == 16


def test_what_compiled_blocks_take_more_is_counted():
    found = json.loads((ROOT / "benchmarks/results/compilation_simulated.json").read_text())["runs"]
    shape = Shape(1, 4096, 512, 4096)
    with torch.device("meta"):
        copy = compiled_copy(Transformer(replace(DEV, double_blocks=1, single_blocks=1)), shape, torch.bfloat16)
    for name, policies in found.items():
        for policy, run in policies.items():
            more = (run["compiled GB"] - run["uncompiled GB"]) * 1e9
            assert more < (copy if name.startswith("int8") else 60e6), (name, policy)
            if name.startswith("int8") and policy == "full":
                assert more > 0.8 * copy  # it is needed


def test_a_plan_has_what_compiled_blocks_and_attention_in_float32_take_more(planner):
    plain, compiled = planner("dev", storage="int8"), planner("dev", storage="int8", compiled=True)
    shape = plain.job.shape

    def working_set(found):
        return found.predict(Choice("full")).phases["step"]["working set"]

    copy = compiled_copy(plain.job.model, shape, torch.bfloat16)
    assert copy == 4608 * 55296 * 2
    assert working_set(compiled) - working_set(plain) == copy
    token = shape.tokens * 6144 * 4  # bytes of the tokens in float32
    more = working_set(planner("dev", float32_attention=True)) - working_set(planner("dev"))
    assert token <= more < 8 * token
