"""Builds the simulated device, and runs a command with it: `PYTHON build.py COMMAND ...`, as README.md shows.

`PYTHON` is that of an environment with a CUDA build of PyTorch. The library is kept in build/simulated_gpu, and built
again when a source file or the PyTorch is another.
"""

import hashlib
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SITE = Path(sysconfig.get_path("purelib"))
# what PyTorch's libraries ask for, by the names of the libraries that have it
ASKED = re.compile(r"(cublas|nccl|cudnn|cuda)[A-Z]|cublasLt")
# what is asked for by name when it runs: by PyTorch of the driver, by Triton, by bitsandbytes of cuBLAS
ASKED_BY_NAME = """
cuInit cuCtxSetCurrent cuCtxPushCurrent_v2 cuDevicePrimaryCtxRelease_v2 cuCtxSetLimit cuMemSetAccess cuModuleUnload
cuFuncSetAttribute cuFuncSetCacheConfig cuTensorMapEncodeTiled cuStreamSynchronize cuMemcpyHtoDAsync_v2 cuMemsetD8_v2
cuMemsetD32Async cuStreamWriteValue32_v2 cublasDestroy_v2 cublasHgemm cublasLtDestroy cublasLtMatrixTransform
cublasLtMatrixTransformDescCreate cublasLtMatrixTransformDescDestroy cublasLtMatrixTransformDescSetAttribute
""".split()
LIBRARIES = ("torch/lib/*.so", "bitsandbytes/libbitsandbytes_cuda*.so")


def undefined_names() -> set[str]:
    """Return the names of CUDA's libraries that PyTorch's and bitsandbytes' libraries leave to others."""
    names = set(ASKED_BY_NAME)
    for pattern in LIBRARIES:
        for file in sorted(SITE.glob(pattern)):
            listed = subprocess.run(["nm", "-D", "--undefined-only", file], capture_output=True, text=True, check=True)
            for line in listed.stdout.splitlines():
                name = line.split()[-1].split("@")[0]
                if ASKED.match(name):
                    names.add(name)
    return names


def defaults(sources: list[Path]) -> str:
    """Return a source file, without CUDA's headers, that answers "done" for every name that no other file defines."""
    defined = set(re.findall(r"^API [^=;]*?\b(\w+)\(", "\n".join(file.read_text() for file in sources), re.MULTILINE))
    lines = ["namespace simulated { void* handle(); }"]
    for name in sorted(undefined_names() - defined):
        if re.match(r"cudnnCreate\w+", name):
            lines.append(f'extern "C" int {name}(void** out) {{ *out = simulated::handle(); return 0; }}')
        else:
            lines.append(f'extern "C" long {name}() {{ return 0; }}')
    return "\n".join(lines) + "\n"


def build() -> Path:
    """Build the library unless it is there; return its folder."""
    sources = sorted((HERE / "device").glob("*.cpp"))
    made_from = [Path(__file__), SITE / "torch" / "version.py", *sorted((HERE / "device").iterdir())]
    version = hashlib.sha256(b"".join(file.read_bytes() for file in made_from)).hexdigest()[:16]
    folder = ROOT / "build" / "simulated_gpu" / version
    library = folder / "libsimulated_gpu.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        done = folder / "defaults.cpp"
        done.write_text(defaults(sources))
        includes = [SITE / "nvidia" / "cu13" / "include", SITE / "triton" / "backends" / "nvidia" / "include"]
        made = folder / f"made-by-{os.getpid()}.so"
        command = ["g++", "-O1", "-g", "-fPIC", "-shared", "-std=c++17", "-Wall", "-Wno-builtin-declaration-mismatch"]
        command += [*map(str, [*sources, done]), *(f"-I{path}" for path in includes), "-o", str(made), "-ldl"]
        subprocess.run(command, check=True)
        made.rename(library)
    for name in ("libcuda.so.1", "libcuda.so"):  # what Triton opens
        if not (folder / name).exists():
            (folder / name).symlink_to(library.name)
    return folder


def environment(**settings: object) -> dict[str, str]:
    """Return the environment in which a process sees the simulated device.

    Args:
        settings: Of the device, as README.md lists them: `capability=89` is SIMULATED_GPU_CAPABILITY=89.
    """
    folder = build()
    paths = [str(folder), os.environ.get("LD_LIBRARY_PATH", "")]
    given = {f"SIMULATED_GPU_{name.upper()}": str(value) for name, value in settings.items()}
    preload = {"LD_PRELOAD": str(folder / "libsimulated_gpu.so"), "LD_LIBRARY_PATH": ":".join(filter(None, paths))}
    return {**os.environ, **preload, "SIMULATED_GPU": str(folder), **given}


if __name__ == "__main__":
    os.execvpe(sys.argv[1], sys.argv[1:], environment())
