"""One step of a shallow dev at its true width: `one_step.py STORAGE`. Prints as JSON which kernels it takes."""

from __future__ import annotations

import json
import sys
import warnings
from dataclasses import replace

import torch
from simulated_gpu.simulated import empty_transformer

import flux2  # noqa: F401  before torch: it sets how long threads spin
from benchmarks.models import Inputs, make_precision
from flux2 import adapters
from flux2.layers.attention import attend, chosen_backend, preferred_backends, use_backends
from flux2.memory.activation_checkpointing import set_policy
from flux2.models.variants import DEV
from flux2.quantization.precision import Precision

CUDA = torch.device("cuda")


def main(storage: str) -> None:
    warnings.simplefilter("ignore")
    config = replace(DEV, double_blocks=1, single_blocks=1)
    stored = None if storage == "bf16" else storage
    in_8_bits = Precision(torch.bfloat16, stored).multiplies_in_8_bits(CUDA)
    model = empty_transformer(config, make_precision(stored, in_8_bits), CUDA)
    backends = preferred_backends(None, CUDA)
    set_policy(model, "full", attention=backends)
    adapters.attach(model, rank=16)
    for parameter in adapters.adapter_parameters(model):
        parameter.data = parameter.data.to(CUDA)
    Inputs(config, 64, 512, CUDA).backward(model)

    q = torch.zeros(3, 1, config.heads, 4608, config.head_dim, device=CUDA, dtype=torch.bfloat16)
    leaves = [part.requires_grad_() for part in q.unbind()]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with use_backends(backends):
        attend(*leaves).backward(torch.ones_like(leaves[0]))
    found = {
        "backend": chosen_backend(backends, config.heads, config.head_dim, 4608, CUDA, torch.bfloat16),
        "in 8 bits": in_8_bits,
        "attention peak": torch.cuda.max_memory_allocated() - before,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
