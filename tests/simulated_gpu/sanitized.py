"""Trains a small model under PyTorch's CUDA sanitizer: `sanitized.py STORAGE POLICY... [FAULT]`, for test_streams.py.

Prints a line for each way to offload: "no race", or at the first race its kind. Memory that is freed while a copy runs
is no race to the sanitizer, which begins anew with each allocation.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.cuda._sanitizer as sanitizer
from simulated_gpu.simulated import device
from torch import Tensor

import flux2  # noqa: F401  before torch: it sets how long threads spin
from benchmarks.models import Inputs, make_precision
from flux2 import adapters
from flux2.memory.activation_checkpointing import set_policy
from flux2.memory.block_offload import offload
from flux2.memory.ring_buffer import CudaCopier
from flux2.models.transformer import Transformer
from flux2.models.variants import KLEIN_4B
from flux2.quantization.precision import convert

CUDA = torch.device("cuda")
CONFIG = replace(KLEIN_4B, heads=4, double_blocks=2, single_blocks=3, text_width=256)


class NoWait(CudaCopier):
    """Compute does not wait for copies."""

    def wait(self, ticket: Any) -> None:
        pass


class NoOrder(CudaCopier):
    """Copies do not wait for compute."""

    def start(self, source: Tensor, target: Tensor) -> torch.cuda.Event:
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)
        return self.stream.record_event()


def train(
    storage: str, policy: str, blocks: float, inputs: bool, copier: Callable[[torch.device], CudaCopier] | None
) -> None:
    torch.manual_seed(0)
    with CUDA:
        model = Transformer(CONFIG).to(torch.bfloat16)
    convert(model, make_precision(None if storage == "bf16" else storage, in_fp8=True), CUDA)
    adapters.attach(model, rank=8)
    set_policy(model, policy, budget_gb=0.001 if policy == "budget" else None)
    offload(model, blocks, activations=inputs, device=CUDA, copier=copier)
    given = Inputs(CONFIG, 16, 64, CUDA)
    optimizer = torch.optim.AdamW(adapters.adapter_parameters(model), fused=True)
    for _ in range(2):
        given.backward(model)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            given.predict(model, is_peer=False)


def main(storage: str, *words: str) -> None:
    device().simulated_gpu_answer_ones(1)
    sanitizer.enable_cuda_sanitizer()
    faults = {"no-wait": NoWait, "no-order": NoOrder}
    copier = next((faults[word] for word in words if word in faults), None)
    for policy in (word for word in words if word not in faults):
        for blocks, inputs in ((0.0, True), (0.5, True), (1.0, False)):
            try:
                train(storage, policy, blocks, inputs, copier)
                print(storage, policy, blocks, inputs, "no race", flush=True)
            except (sanitizer.CUDASanitizerErrors, SystemError) as error:  # SystemError: found during an allocation
                print(storage, policy, blocks, inputs, f"race ({type(error).__name__})", flush=True)
                return


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)  # threads that the error of the sanitizer left would abort the process
