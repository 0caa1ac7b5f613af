"""Report versions, devices and caches, and test the numbers: the command `python -m flux2.doctor`."""

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import huggingface_hub
import psutil
import torch
from huggingface_hub import constants as hub

from flux2.doctor.arguments import arguments
from flux2.doctor.selftest import selftest
from flux2.doctor.verify import compare_files
from flux2.models.variants import VARIANTS
from flux2.quantization.precision import CAPABILITY, dotted
from flux2.utils.files import user_path
from flux2.utils.terminal import show
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
        products = ", ".join(
            f"{kind.upper()} products"
            if capability >= needed
            else f"no {kind.upper()} products ({dotted(needed)} and up)"
            for kind, needed in CAPABILITY.items()
        )
        name = f"{torch.cuda.get_device_name(index)}, compute capability {dotted(capability)}"
        free_memory = f"{gigabytes(free)} of {gigabytes(total)} free"
        yield f"GPU {index}", f"{name}, {products}, {free_memory}, CUDA {torch.version.cuda}"
    memory = psutil.virtual_memory()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield "CPU", f"{cores} cores, {gigabytes(memory.available)} of {gigabytes(memory.total)} free"


def size(folder: Path) -> str:
    """Return the number of files in a folder and their size."""
    if not folder.is_dir():
        return "does not exist yet"
    sizes = []
    for file in folder.rglob("*"):
        with suppress(OSError):  # deleted in the meantime, or not readable
            if file.is_file():
                sizes.append(file.stat().st_size)
    return f"{len(sizes)} files, {gigabytes(sum(sizes))}"


def folders() -> Iterator[tuple[str, str]]:
    """Yield the folders that grow, and the free space on their disks."""
    folders = {"latents and prompts": Path(LATENTS), "downloads": Path(hub.HF_HUB_CACHE)}
    cache = os.environ.get("FLUX2_CACHE")
    folders["quantized copies"] = user_path(cache) if cache else Path(LATENTS) / "weights"
    for what, folder in folders.items():
        existing = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.is_dir())
        free = shutil.disk_usage(existing).free
        home = Path.home()  # contains the user's name, which a bug report need not have
        name = f"~/{folder.relative_to(home)}" if folder.is_relative_to(home) else str(folder)
        yield what, f"{name}: {size(folder)}; {gigabytes(free)} free"


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
        missing = ", ".join(part for part in PARTS if part not in present)
        some = f"present: {', '.join(present)}; missing: {missing}" if missing else "complete"
        yield name, some if present else f"not downloaded ({variant.repo})"


def line(name: str, text: str) -> str:
    return f"  {name:<30} {text}"


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


def verify(model: str) -> int:
    """Print the result for each file of a model; return 0 if one was compared and none is damaged, 2 for an error."""
    counts = {True: 0, False: 0, None: 0}
    try:
        for found in compare_files(model):
            word = {True: "ok", False: "DAMAGED", None: "--"}[found.passed]
            show(line(found.file, f"{word:<8} {found.detail}"))
            counts[found.passed] += 1
    except ValueError as error:
        show(f"error: {error}", sys.stderr)
        return 2
    print(f"{counts[True]} files are as published, {counts[False]} are damaged, of {counts[None]} no hash is known")
    return int(counts[False] > 0 or not counts[True])


def main(argv: list[str] | None = None) -> int:
    if model := arguments(argv).verify:
        return verify(model)
    for text in report():
        show(text, style="" if text.startswith(" ") else "bold")
    show("Self-test, compared with diffusers", style="bold")
    wrong = 0
    for finding in selftest():
        word = {True: "ok", False: "WRONG", None: "--"}[finding.passed]
        show(line(finding.what, f"{word:<5} {finding.detail}"))
        wrong += finding.passed is False
    print("What fits on a GPU: python train/plan.py +experiment=tarot")
    if wrong:
        print(f"{wrong} comparisons failed: images and adapters will differ from those of the published models.")
    return int(wrong > 0)
