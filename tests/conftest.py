"""Set-up of every test process, and model folders in the published layout.

Small models and their counterparts in diffusers and transformers are made in `helpers`, which takes seconds to import:
the fixtures import it when a test needs it.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before huggingface_hub is imported: no test may reach the network
# before torch is imported: pytest-xdist starts a process per core, and with more threads they wait for each other
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.pop("FLUX2_CACHE", None)  # no test may write where the developer keeps copies of models

import pytest

import flux2  # noqa: F401  before torch: it sets how long threads spin

if TYPE_CHECKING:
    from flux2.weights.sources import ModelSource

os.fsync = lambda handle: None  # what tests write does not have to survive a power cut, and a disk takes its time


def pytest_collection_finish(session: pytest.Session) -> None:
    """What was imported stays: garbage is collected many times, and would walk through a million objects each time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)  # with the default, tests that import more spend a fifth of their time on it


@pytest.fixture(autouse=True, scope="module")
def what_a_file_leaves_stays() -> Iterator[None]:
    """Freeze what caches hold after a test file (the planner's models: 300,000 objects), for the same reason."""
    yield
    if len(gc.get_objects(generation=2)) > 20_000:
        gc.collect()
        gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def hangup_ends_a_process() -> None:
    """Restore the default action of SIGHUP, which `nohup make test` ignores: tests send it."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def no_configuration_of_another_command() -> Iterator[None]:
    """A command that ran in this process leaves Hydra's singleton, and a later run would take itself for that one."""
    yield
    if "hydra.core.hydra_config" in sys.modules:
        sys.modules["hydra.core.hydra_config"].HydraConfig.instance().cfg = None


@pytest.fixture(autouse=True)
def no_threads_of_another_run() -> Iterator[None]:
    """Restore PyTorch's number of threads: a run that was launched takes all cores, and later tests would keep them."""
    if "torch" not in sys.modules:
        yield
        return
    torch = sys.modules["torch"]
    before = torch.get_num_threads()
    yield
    if torch.get_num_threads() != before:
        torch.set_num_threads(before)


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`model_folders("dev")`: the folder of a small random model, written once; not to be changed."""
    import helpers

    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = helpers.write_model(kind, tmp_path_factory.mktemp(kind))
        return made[kind]

    return folder


@pytest.fixture(params=["dev", "klein"])
def source(request: pytest.FixtureRequest, model_folders: Callable[[str], Path]) -> ModelSource:
    """A small random model of every kind: dev with a guidance embedding, klein without."""
    import helpers

    from flux2.weights.sources import ModelSource

    return ModelSource(helpers.VARIANTS[request.param], str(model_folders(request.param)))
