"""One of two processes that train the embedded model whole and sharded; what it finds goes to FOLDER/<rank>.pt.

`findings(folder, device)` starts both: python tests/sharding_worker.py FOLDER DEVICE, as a launcher would.
"""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import peft
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import flux2.weights.loading
from flux2 import adapters
from flux2.layers.selection import BLOCK_LINEARS
from flux2.memory.activation_checkpointing import set_policy
from flux2.models.positions import image_positions, text_positions
from flux2.models.transformer import DoubleBlock, SingleBlock, Transformer
from flux2.quantization.precision import Precision
from flux2.weights.sources import model_source
from train.distributed.processes import Processes, make_accelerator
from train.distributed.sharding import attach_sharded, local_bytes, sharder

SOURCE = model_source("tiny", None, None, None)
PRECISIONS = {
    "fp32": Precision(torch.float32),
    "bf16": Precision(torch.bfloat16),
    "fp8": Precision(torch.float32, "fp8"),
    "int8": Precision(torch.float32, "int8", rotate=True),
    "nf4": Precision(torch.float32, "nf4"),
}
CASES = [("fp32", "full"), ("fp32", "none"), ("bf16", "selective"), ("fp8", "full"), ("int8", "none"), ("nf4", "none")]
SIZES = {0: [(2, 2), (3, 5)], 1: [(4, 4), (1, 2)]}  # tokens of a process's micro-batches
# every kind of place: in blocks, in layers that are modules of their own, and where only the weight is read
TARGETS = [*BLOCK_LINEARS, "img_in", "txt_in", "time_in.in_layer", "final_layer.linear"]


def findings(folder: Path, device: str) -> list[dict[Any, Any]]:
    """What two processes find on `device`, cpu or cuda."""
    from train_helpers import ROOT, environment, free_port

    port = str(free_port())
    processes = [
        subprocess.Popen(
            [sys.executable, "tests/sharding_worker.py", str(folder), device],
            cwd=ROOT,
            env=environment(
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE="2",
                LOCAL_WORLD_SIZE="2",
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=port,
            ),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=400)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(text[-3000:] for text in said)
    return [torch.load(folder / f"{rank}.pt", map_location="cpu", weights_only=False) for rank in range(2)]


def inputs(rank: int, micro: int, device: torch.device | str = "cpu") -> dict[str, Any]:
    config = SOURCE.variant.transformer
    height, width = SIZES[rank][micro]
    generator = torch.Generator().manual_seed(10 * rank + micro)
    arguments = {
        "tokens": torch.randn(2, height * width, config.channels, generator=generator),
        "positions": image_positions(height, width),
        "text": torch.randn(2, 3, config.text_width, generator=generator),
        "text_positions": text_positions(3),
        "timestep": torch.rand(2, generator=generator),
        "guidance": torch.ones(2),
    }
    return {name: value.to(device) for name, value in arguments.items()}


def held(model: nn.Module) -> int:
    """Bytes of all parameters that this process holds."""
    local = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
    return sum(tensor.nbytes for tensor in local if not tensor.is_meta)


def is_whole(module: nn.Module) -> bool:
    """Whether a frozen parameter of `module` is gathered, or was never sharded."""
    return any(not isinstance(p, DTensor) for p in module.parameters() if not p.requires_grad)


def load(precision: str, policy: str, device: torch.device, ready: Any = None) -> peft.PeftModel:
    model = flux2.weights.loading.load_transformer(
        SOURCE, device, PRECISIONS[precision], say=lambda text: None, ready=ready
    )
    set_policy(model, policy)
    wrapped = attach_sharded(adapters.attach, model, rank=4, seed=0, targets=TARGETS)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():  # B too, which begins at zero
        for parameter in adapters.adapter_parameters(wrapped):
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return wrapped


def loss_of(model: nn.Module, precision: str, batch: dict[str, Any]) -> torch.Tensor:
    """As with preservation: a prediction of the base, and one of the base with its adapter that is held to it."""
    with torch.autocast(batch["tokens"].device.type, torch.bfloat16, enabled=precision == "bf16"):
        with torch.no_grad(), adapters.adapters_disabled(model):
            base = model(**batch)
        prediction = model(**batch)
    return prediction.float().square().mean() + (prediction.float() - base.float()).square().mean()


def step(processes: Processes, wrapped: peft.PeftModel, precision: str, rank: int) -> dict[str, Any]:
    """A step of two micro-batches: the losses of this process, and the gradients that all have."""
    model, device = processes.wrap(wrapped), processes.accelerator.device
    losses = []
    for micro in range(2):
        if micro == 0:
            with processes.accelerator.no_sync(model):
                loss = loss_of(model, precision, inputs(rank, micro, device))
                (loss / 2).backward()
        else:
            loss = loss_of(model, precision, inputs(rank, micro, device))
            (loss / 2).backward()
        losses.append(loss.item())
    processes.average_gradients(wrapped)
    gradients = [parameter.grad.clone() for parameter in adapters.adapter_parameters(wrapped)]
    return {"losses": losses, "gradients": gradients, "wrapped in": type(model).__name__}


def alone(precision: str, policy: str, device: torch.device) -> list[torch.Tensor]:
    """The gradients of the whole step in one process."""
    wrapped = load(precision, policy, device)
    for rank in SIZES:
        for micro in range(2):
            (loss_of(wrapped, precision, inputs(rank, micro, device)) / 4).backward()
    return [parameter.grad for parameter in adapters.adapter_parameters(wrapped)]


def sharded(processes: Processes, precision: str, policy: str, rank: int, folder: Path) -> dict[str, Any]:
    """The same step with a sharded base, and what is where meanwhile."""
    made: list[Transformer] = []
    device = processes.accelerator.device
    most_loading, shard = 0, sharder(device)

    class Seen(Transformer):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(self)

    def ready(module: nn.Module) -> None:
        nonlocal most_loading
        most_loading = max(most_loading, held(made[-1]))
        shard(module)

    flux2.weights.loading.Transformer = Seen
    try:
        wrapped = load(precision, policy, device, ready)
    finally:
        flux2.weights.loading.Transformer = Transformer
    base = wrapped.get_base_model()
    blocks = [module for module in base.modules() if isinstance(module, DoubleBlock | SingleBlock)]
    frozen = {name: p for name, p in base.named_parameters() if not p.requires_grad}
    whole: list[int] = []

    def count(*_: Any) -> None:  # an adapter's parameters are always whole
        whole.append(sum(is_whole(block) for block in blocks))

    for module in base.modules():
        if ".base_layer" not in type(module).__name__ and isinstance(module, nn.Linear):
            module.register_forward_hook(count)
    found = step(processes, wrapped, precision, rank)
    for parameter in adapters.adapter_parameters(wrapped):
        parameter.register_hook(count)
    loss_of(wrapped, precision, inputs(rank, 0, device)).backward()
    found |= {
        "sharded": {name: isinstance(p, DTensor) for name, p in frozen.items()},
        "adapter is plain": all(
            type(p) is nn.Parameter and type(p.grad) is torch.Tensor for p in adapters.adapter_parameters(wrapped)
        ),
        "local": {name: tuple(p.to_local().shape) for name, p in frozen.items()},
        "whole": {name: tuple(p.shape) for name, p in frozen.items()},
        "held": local_bytes(base),
        "most while loading": most_loading,
        "most blocks at once": max(whole),
        "blocks at the end": sum(is_whole(block) for block in blocks),
        "numel": {name: p.numel() * p.element_size() for name, p in frozen.items()},
    }
    if precision == "fp32" and policy == "full":
        if rank == 0:  # alone, as a checkpoint is written
            adapters.save(wrapped, folder / "adapter", base="tiny")
        with torch.no_grad():
            found["prediction"] = wrapped(**inputs(0, 1, device))
    return found


def refused(device: torch.device) -> str:
    """What is said of an adapter that reads the base's weights when it begins."""
    model = flux2.weights.loading.load_transformer(SOURCE, device, ready=sharder(device))
    config = peft.LoraConfig(r=2, use_dora=True, target_modules=["single_blocks.0.linear1"])
    try:
        attach_sharded(partial(peft.get_peft_model, model), config)
    except ValueError as error:
        return str(error)
    return "nothing"


def failures(processes: Processes, rank: int) -> dict[str, Any]:
    """What work shared by `Processes.map` gives, with an error in the second process."""

    def fails(i: int) -> int:
        if i == 1:
            raise KeyError("no such picture")
        return i

    found: dict[str, Any] = {"shared": processes.map(lambda i: (i * i, rank), range(5))}
    together = Processes(processes.accelerator, sharded=True)
    calls: list[int] = []
    found["in step"] = together.map(lambda i: calls.append(i) or i, range(3))
    found["calls"] = calls
    try:
        processes.map(fails, range(3))
    except Exception as error:
        found["failed"] = f"{type(error).__name__}: {error}"
    return found


def main(folder: Path, kind: str) -> None:
    accelerator = make_accelerator(kind)
    rank, device = accelerator.process_index, accelerator.device
    timeout = torch.distributed.group.WORLD._get_backend(torch.device(kind)).options._timeout
    found: dict[Any, Any] = {"processes": accelerator.num_processes, "timeout": timeout.total_seconds()}
    for precision, policy in CASES:
        whole = step(Processes(accelerator), load(precision, policy, device), precision, rank)
        assert whole["wrapped in"] == DistributedDataParallel.__name__
        found[precision, policy] = {
            "whole": whole,
            "sharded": sharded(Processes(accelerator, sharded=True), precision, policy, rank, folder),
            "held by one": local_bytes(load(precision, policy, device).get_base_model()),
            "alone": alone(precision, policy, device),
        }
    found |= {"map": failures(Processes(accelerator), rank), "refused": refused(device)}
    torch.save(found, folder / f"{rank}.pt")
    accelerator.end_training()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2])
