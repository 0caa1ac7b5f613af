"""Jobs and planners of published models, without weights: what the tests of the planner share.

A test module says `pytest_plugins = ("planner_helpers",)` to get the fixture, and may import the rest before that:
PYTEST_DONT_REWRITE.
"""

from functools import partial

import pytest
import torch

from flux2.adapters.tuners import attach
from flux2.models.variants import VARIANTS
from flux2.quantization.precision import Precision
from train.planner.from_config import skeleton
from train.planner.gpus import gpu
from train.planner.predictor import Planner
from train.planner.workload import Workload

ADAMW = partial(torch.optim.AdamW, lr=1e-4)
H200 = gpu("NVIDIA H200", 141)


def job(name="dev", storage=None, side=1024, references=(), rank=16, dtype=torch.bfloat16, **more) -> Workload:
    """A job as PERFORMANCE.md counts them: one picture, rank 16 on all block linears, AdamW."""
    precision = Precision(dtype, storage, matmul="fp8" if storage == "fp8" else "auto")
    variant = VARIANTS[name]
    model = skeleton(variant, precision, lambda model: attach(model, rank=rank))
    return Workload(variant, model, dtype, ADAMW, (side, side), list(references), storage=storage, **more)


@pytest.fixture(scope="session")
def planner():
    """`planner("dev", storage="nf4")`: made once for the arguments."""
    made = {}

    def get(*arguments, **more) -> Planner:
        key = (arguments, tuple(sorted(more.items())))
        if key not in made:
            made[key] = Planner(job(*arguments, **more))
        return made[key]

    return get
