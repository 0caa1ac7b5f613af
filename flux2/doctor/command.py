"""Report versions, devices and caches, and test the numbers: the command `python -m flux2.doctor`."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import huggingface_hub
import psutil
import torch
from huggingface_hub import constants as hub

from flux2.doctor.arguments import check_arguments
from flux2.doctor.selftest import Finding, selftest
from flux2.models.variants import VARIANTS
from flux2.quantization.precision import FP8_CAPABILITY
from flux2.utils.text import gigabytes
from flux2.weights.sources import Part, is_available, model_source

PACKAGES = (
    *("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "safetensors", "huggingface-hub"),
    *("hydra-core", "wandb", "diffusers"),
)
PARTS: tuple[Part, ...] = ("transformer", "vae", "text_encoder", "tokenizer")
LATENTS = "outputs/cache"  # train/run.py's default, relative to the current folder
SYSTEMS = {
    "Linux": "supported",
    "Windows": "not supported: the tests run on Linux only; use WSL 2, which is Linux",
    "Darwin": "for the embedded model on the CPU; Apple's GPU (mps) is refused because it was never tested",
}


def version(package: str) -> str:
    """Return the version of a package, or that it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed" + (" (only the self-test uses it)" if package == "diffusers" else "")


def devices() -> Iterator[tuple[str, str]]:
    """Yield names and descriptions of GPUs and the CPU."""
    if torch.version.hip:
        yield "GPU", f"ROCm {torch.version.hip}: refused, only CUDA is supported; device=cpu works"
        return
    if not torch.cuda.is_available():
        built = f"PyTorch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "PyTorch is a CPU build"
        yield "GPU", f"none that PyTorch sees ({built}): practical for model=tiny only"
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        capability = torch.cuda.get_device_capability(index)
        free, total = torch.cuda.mem_get_info(index)
        fp8 = "FP8 products" if capability >= FP8_CAPABILITY else "no FP8 products (8.9 and above)"
        yield (
            f"GPU {index}",
            f"{torch.cuda.get_device_name(index)}, compute capability {capability[0]}.{capability[1]}, {fp8}, "
            f"{gigabytes(free)} of {gigabytes(total)} free, CUDA {torch.version.cuda}",
        )
    memory = psutil.virtual_memory()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield "CPU", f"{cores} cores, {gigabytes(memory.available)} of {gigabytes(memory.total)} free"


def nearest_folder(path: Path) -> Path:
    """Return `path`, or the nearest folder above it that exists."""
    return next(place for place in (path, *path.parents) if place.is_dir())


def size(folder: Path) -> str:
    """Return the number of files in a folder and their size."""
    if not folder.is_dir():
        return "does not exist yet"
    sizes = []
    for file in folder.rglob("*"):
        try:
            if file.is_file():
                sizes.append(file.stat().st_size)
        except OSError:  # deleted in the meantime, or not readable
            continue
    return f"{len(sizes)} files, {gigabytes(sum(sizes))}"


def folders() -> Iterator[tuple[str, str]]:
    """Yield the folders that grow, and the free space on their disks."""
    folders = {"latents and prompts": Path(LATENTS), "downloads": Path(hub.HF_HUB_CACHE)}
    cache = os.environ.get("FLUX2_CACHE")
    folders["quantized copies"] = Path(cache).expanduser() if cache else Path(LATENTS) / "weights"
    for what, folder in folders.items():
        free = shutil.disk_usage(nearest_folder(folder.absolute())).free
        yield what, f"{shorten_home(folder)}: {size(folder)}; {gigabytes(free)} free"


def shorten_home(folder: Path) -> str:
    """Return `folder` without the user's name, which a bug report need not have."""
    return f"~/{folder.relative_to(Path.home())}" if folder.is_relative_to(Path.home()) else str(folder)


def hub_state() -> str:
    """Return whether there is a login; the token itself is never shown."""
    login = "a token is set (it is not used now)" if huggingface_hub.get_token() else "no: `hf auth login`"
    return login + ("; offline mode" if hub.is_offline_mode() else "")


def models() -> Iterator[tuple[str, str]]:
    """Yield which parts of the published models are downloaded."""
    for name, variant in VARIANTS.items():
        if not variant.repo:
            yield name, "embedded"
            continue
        present = [part for part in PARTS if is_available(model_source(name), part)]
        missing = [part for part in PARTS if part not in present]
        if not present:
            yield name, f"not downloaded ({variant.repo})"
        else:
            yield name, "complete" if not missing else f"present: {', '.join(present)}; missing: {', '.join(missing)}"


def line(name: str, text: str) -> str:
    return f"  {name:<30} {text}"


def result_line(finding: Finding) -> str:
    word = {True: "ok", False: "WRONG", None: "--"}[finding.passed]
    return line(finding.what, f"{word:<5} {finding.detail}")


def report() -> Iterator[str]:
    """Yield everything except the self-test, line by line."""
    system = platform.system()
    yield "Versions"
    yield line("Python", f"{platform.python_version()} on {platform.platform()}")
    yield line(system, SYSTEMS.get(system, "not tested"))
    for package in PACKAGES:
        yield line(package, version(package))
    for title, lines in (("Devices", devices()), ("Folders", folders()), ("Models", models())):
        yield title
        for name, text in lines:
            yield line(name, text)
    yield line("Hub login", hub_state())


def main(argv: list[str] | None = None) -> int:
    check_arguments(argv)
    for text in report():
        print(text, flush=True)
    print("Self-test, compared with diffusers", flush=True)
    wrong = 0
    for finding in selftest():
        print(result_line(finding), flush=True)
        wrong += finding.passed is False
    print("What fits on a GPU: python train/plan.py +experiment=tarot")
    if wrong:
        print(f"{wrong} comparisons failed: images and adapters will differ from those of the published models.")
    return int(wrong > 0)
