"""Compare the planner's memory with what PyTorch's allocator holds on a simulated GPU, for every GPU size.

    .venv-cuda/bin/python benchmarks/planner_simulated.py                       all cases, about 40 minutes
    .venv-cuda/bin/python benchmarks/planner_simulated.py --only "dev nf4"      some of them; the others keep
                                                                        their results

Needs an environment with a CUDA build of PyTorch (`make .venv-cuda/installed`), and no GPU: see
tests/simulated_gpu/README.md. For each model, precision and GPU size the planner chooses the group `memory`, and steps
of the true size run in the memory of such a GPU, at the compute capability of a common one of that size, and for some
cases of two such GPUs that the model is divided over. Allocations
and frees are the real ones; kernels compute nothing, so there are no times, and the workspaces inside cuBLAS and cuDNN
do not show. The workspace that PyTorch allocates for cuBLAS is taken off: the planner counts it with the libraries.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)
sys.path.insert(1, str(ROOT / "tests"))

import flux2  # noqa: F401, I001  before torch: it sets how long threads spin

import argparse
import json
import subprocess
from dataclasses import asdict
from functools import cache
from typing import Any

import torch

from benchmarks.common import free_memory, limit_memory, write_result
from benchmarks.fits import Case, make_planner, train
from flux2.quantization.precision import Precision, Storage
from simulated_gpu.build import environment
from simulated_gpu.simulated import RepeatedCopier, device, empty_transformer
from train.config.memory import settings_of
from train.planner.gpus import CONTEXT_GB, GIB, SIZES, Gpu, gpu, usable
from train.planner.predictor import LIBRARIES, Planner
from train.planner.search import choose

RESULT = ROOT / "benchmarks" / "results" / "planner_simulated.json"
# of the GPUs that stand for a size (train/planner/gpus.py)
CAPABILITIES = {"RTX 3070": 86, "RTX 3060": 86, "RTX 4080": 89, "RTX 4090": 89, "RTX 5090": 120, "L40S": 89}
CASES = [
    Case(model, storage, 1024, size)
    for size in (*(size for size in SIZES if size != 96),)
    for model in ("dev", "klein_base_9b", "klein_base_4b")
    for storage in (None, "fp8", "int8", "nf4")
] + [
    Case(model, storage, 1024, size, num_gpus=2)
    for size in (16, 24, 32)
    for model in ("dev", "klein_base_9b")
    for storage in (None, "fp8", "int8", "nf4")
]


def card_of(case: Case) -> Gpu:
    return gpu(None, case.gpu_memory_gb)


def capability(case: Case) -> int:
    return CAPABILITIES.get(card_of(case).name, 90)


@cache
def planner_of(model: str, storage: Storage | None, pixels: int, num_gpus: int, in_fp8: bool) -> Planner:
    return make_planner(Case(model, storage, pixels, 0).variant, storage, pixels, in_fp8, num_gpus=num_gpus)


def simulate(case: Case) -> dict[str, Any]:
    """Return predicted and simulated memory of a case, in GB."""
    place, card = torch.device("cuda", 0), card_of(case)
    places = [torch.device("cuda", index) for index in range(case.num_gpus)]
    in_fp8 = Precision(torch.bfloat16, case.storage).multiplies_in_8_bits(place)
    planner = planner_of(case.model, case.storage, case.pixels, case.num_gpus, in_fp8)
    prediction = choose(planner, {}, usable(case.gpu_memory_gb), card)
    if prediction is None:
        return {"skipped": "predicted not to fit"}
    for each in places:
        limit_memory(each, case.gpu_memory_gb)
        torch.cuda.reset_accumulated_memory_stats(each)
    try:
        train(case, prediction, place, 1, in_fp8, empty_transformer, RepeatedCopier)
    except torch.OutOfMemoryError as error:
        return {"memory": settings_of(prediction.choice), "out of memory": str(error).splitlines()[0]}
    peaks = [(torch.cuda.max_memory_allocated(each), torch.cuda.max_memory_reserved(each)) for each in places]
    free_memory(place)
    before = [torch.cuda.memory_allocated(each) for each in places]
    torch._C._cuda_clearCublasWorkspaces()
    found = []
    for each, (peak, reserved), bytes_before, predicted in zip(places, peaks, before, prediction.peaks, strict=True):
        workspace = bytes_before - torch.cuda.memory_allocated(each)
        gigabytes = {
            "predicted": (predicted - LIBRARIES) / 1e9,
            "simulated": (peak - workspace) / 1e9,
            "cuBLAS": workspace / 1e9,
            "reserved": reserved / 1e9,
            "limit": (case.gpu_memory_gb - CONTEXT_GB) * GIB / 1e9,
        }
        found.append(
            {
                "GB": gigabytes,
                "predicted / simulated": (predicted - LIBRARIES) / (peak - workspace),
                "retries": torch.cuda.memory_stats(each)["num_alloc_retries"],
            }
        )
    memory = settings_of(prediction.choice)
    return (
        {"memory": memory, "split": prediction.split, "GPUs": found}
        if prediction.split
        else {"memory": memory, **found[0]}
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="run only cases whose name contains this, e.g. 'dev nf4 1024 24'")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--capability", type=int, help=argparse.SUPPRESS)  # of the process that runs these cases
    options = parser.parse_args()
    cases = [case for case in CASES if options.only in case.name]
    if options.capability is None:
        result: dict[str, Any] = {
            "what": "training steps with memory as chosen by the planner: one image, rank 16, AdamW; simulated",
            "hardware": "simulated GPU (tests/simulated_gpu)",
            "versions": {"torch": torch.__version__},
            "runs": json.loads(options.out.read_text())["runs"] if options.only and options.out.exists() else {},
        }
        for number in sorted({capability(case) for case in cases}):
            command = [sys.executable, __file__, "--only", options.only, "--capability", str(number)]
            given = environment(capability=number, gb=150, context_mb=0, count=2)
            done = subprocess.run(command, env=given, stdout=subprocess.PIPE, text=True, check=True)
            result["runs"] |= json.loads(done.stdout.splitlines()[-1])
            write_result(options.out, result)
        print(f"written to {options.out}")
        return
    device().simulated_gpu_answer_ones(1)
    found: dict[str, Any] = {}
    for case in cases:
        if capability(case) == options.capability:
            found[case.name] = {"case": asdict(case), "capability": options.capability} | simulate(case)
            print(case.name, json.dumps(found[case.name]), file=sys.stderr, flush=True)
            free_memory(torch.device("cuda"))
    print(json.dumps(found))
    sys.stdout.flush()
    os._exit(0)  # the memory that stands for the host's is not worth unmapping


if __name__ == "__main__":
    main()
