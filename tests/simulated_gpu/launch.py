"""Runs a command of the project on the simulated device: `launch.py train/run.py ...` or `launch.py -m flux2.doctor`.

The device computes nothing, and a byte that it answers is 1 here: flags such as `isfinite().all()` hold. With GLOO=1
processes communicate over gloo, because the simulated NCCL moves nothing. With MOST=1 the most memory that was taken of
each device is printed at the end.
"""

import atexit
import ctypes
import os
import runpy
import sys

library = ctypes.CDLL(os.path.join(os.environ["SIMULATED_GPU"], "libsimulated_gpu.so"))
library.simulated_gpu_answer_ones(1)
if os.environ.get("MOST") and "accelerate.commands.launch" not in sys.argv:
    library.simulated_gpu_most.restype = ctypes.c_size_t

    def tell_most(rank: str = os.environ.get("RANK", "0")) -> None:
        count = int(os.environ.get("SIMULATED_GPU_COUNT", "1"))
        print(f"most of {rank}:", *(library.simulated_gpu_most(index) for index in range(count)), flush=True)

    atexit.register(tell_most)
if os.environ.get("GLOO"):
    import torch.distributed

    init_process_group = torch.distributed.init_process_group

    def over_gloo(backend: object = None, *args: object, **options: object) -> None:
        options.pop("device_id", None)
        init_process_group("gloo", *args, **{name: value for name, value in options.items() if name != "backend"})

    torch.distributed.init_process_group = over_gloo

    # what another process was asked for is read from the device, where numbers are noise
    sys.path.insert(0, os.getcwd())
    import flux2  # noqa: F401
    from train.optim import update_guard

    received = update_guard.Reading
    update_guard.Reading = lambda step, loss, norm, *asked: received(step, loss, norm)
sys.argv = sys.argv[1:]
if sys.argv[0] == "-m":
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
else:
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")
