"""Tests here run on the simulated device only: `make test-simulated-gpu`. Elsewhere they are not collected."""

import os

collect_ignore_glob = [] if "SIMULATED_GPU" in os.environ else ["test_*.py"]

if "SIMULATED_GPU" in os.environ:
    from simulated_gpu.simulated import device

    device().simulated_gpu_answer_ones(1)
