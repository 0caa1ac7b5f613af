"""Tests here run on the simulated device only: `make test-simulated-gpu`. Elsewhere they are not collected."""

import os

collect_ignore_glob = [] if "SIMULATED_GPU" in os.environ else ["test_*.py"]

if "SIMULATED_GPU" in os.environ:
    import ctypes

    library = ctypes.CDLL(os.path.join(os.environ["SIMULATED_GPU"], "libsimulated_gpu.so"))
    library.simulated_gpu_answer_ones(1)
