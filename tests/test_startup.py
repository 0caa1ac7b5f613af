"""How commands start: `--help` without the libraries that take seconds, and OpenMP threads that spin briefly."""

import json
import mmap
import os
import platform
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import flux2

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted(
    ".".join(path.relative_to(ROOT).parent.parts)
    for top in ("flux2", "train")
    for path in (ROOT / top).glob("*/__main__.py")
)
SCRIPTS = sorted(
    f"train/{path.name}" for path in (ROOT / "train").glob("*.py") if path.name not in ("__init__.py", "loop.py")
)
COMMANDS = [*(["-m", name] for name in MODULES), *([name] for name in SCRIPTS)]


def python(*arguments, **variables):
    """Exit code, stdout and stderr; a variable that is None is not set."""
    environment = {name: value for name, value in (os.environ | variables).items() if value is not None}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_imports_no_torch(command):
    code, out, err = python("-X", "importtime", *command, "--help")
    imported = {line.rpartition("|")[2].strip() for line in err.splitlines() if line.startswith("import time:")}
    assert code == 0
    assert "usage" in out or "powered by Hydra" in out
    assert "argparse" in imported
    assert "torch" not in imported


X86 = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="elsewhere nothing is set")
# a module that is called torch and is none: the first import of torch ends the program
SEEN = """
import json, os
print(json.dumps(dict(os.environ)), flush=True)
os._exit(0)
"""
COMPUTING = {
    "-m flux2.generate": "--prompt cup",
    "-m flux2.export": "x --format kohya --out x.safetensors",
    "-m flux2.doctor": "",
    "-m flux2.serve": "",
    "-m train.tiny_model": "--until text",
    "train/caption.py": "dataset.path=x",
    "train/evaluate.py": "run=x",
    "train/demo.py": "",
    "train/demo_edit.py": "",
    "benchmarks/step.py": "",
}


@pytest.fixture
def seen(tmp_path):
    """`seen(command, **variables)`: which variables of SPIN_VARIABLES are set when a command first imports torch."""
    (tmp_path / "torch.py").write_text(SEEN)
    unset = dict.fromkeys(flux2.SPIN_VARIABLES)

    def find(command, **variables):
        code, out, err = python(*command.split(), **unset | {"PYTHONPATH": str(tmp_path)} | variables)
        assert code == 0, err
        return {name: value for name, value in json.loads(out).items() if name in flux2.SPIN_VARIABLES}

    return find


@X86
@pytest.mark.parametrize("command", COMPUTING)
def test_threads_spin_briefly_from_the_first_import_of_torch(seen, command):
    assert seen(f"{command} {COMPUTING[command]}") == {"GOMP_SPINCOUNT": "10000"}


@pytest.mark.parametrize("given", [{"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "7"}])
def test_a_users_own_setting_of_how_threads_wait_stays(seen, given):
    assert seen("-m flux2.doctor", **given) == given


@X86
def test_the_openmp_of_torch_reads_what_flux2_sets():
    libraries = list((Path(find_spec("torch").origin).parent / "lib").glob("libgomp*"))
    if not libraries:
        pytest.skip("this PyTorch does not bring libgomp")
    load = f"import flux2, ctypes; ctypes.CDLL({str(libraries[0])!r})"
    unset = dict.fromkeys(flux2.SPIN_VARIABLES)
    _, _, default = python("-c", load.replace("flux2, ", ""), **unset | {"OMP_DISPLAY_ENV": "VERBOSE"})
    _, _, ours = python("-c", load, **unset | {"OMP_DISPLAY_ENV": "VERBOSE"})
    assert "GOMP_SPINCOUNT = '300000'" in default
    assert "GOMP_SPINCOUNT = '10000'" in ours


def test_the_allocator_is_told_how_to_grow_unless_the_user_tells_it() -> None:
    show = "import flux2, os; print([os.environ.get(name) for name in flux2.ALLOCATOR_VARIABLES])"
    given = {name: value for name, value in os.environ.items() if name not in flux2.ALLOCATOR_VARIABLES}
    for own, expected in (
        ({}, ["expandable_segments:True", None]),
        ({"PYTORCH_ALLOC_CONF": "garbage_collection_threshold:0.8"}, ["garbage_collection_threshold:0.8", None]),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, [None, "backend:native"]),
    ):
        done = subprocess.run(
            [sys.executable, "-c", show], env=given | own, cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == str(expected)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_memory_of_a_step_is_kept_for_the_next_unless_the_user_decides_it():
    steps = """
import flux2, resource, torch
def step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.zeros(4 << 20) for _ in range(8)]  # 16 MB each
    del tensors
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(min(step() for _ in range(12)))  # the system may take pages in between, where memory is short
"""
    pages = 8 * (16 << 20) // mmap.PAGESIZE
    unset = dict.fromkeys(flux2.HEAP_VARIABLES)
    for own, faults in (({}, 0), ({"MALLOC_TRIM_THRESHOLD_": "131072"}, pages)):
        code, out, err = python("-c", steps, **unset | own)
        assert code == 0, err
        assert int(out) == pytest.approx(faults, abs=0.1 * pages)


@pytest.mark.parametrize(
    "system",
    [
        "ctypes.CDLL = lambda name: object()",  # musl, whatever the interpreter was built for
        "sys.platform = 'win32'; ctypes.CDLL = None",
        "sys.platform = 'darwin'; sys.executable = '/not/readable'; os.confstr = None; ctypes.CDLL = None",
    ],
)
def test_flux2_is_imported_where_there_is_no_glibc(system):
    code, _, err = python(
        "-c", f"import ctypes, os, sys; {system}; import flux2", **dict.fromkeys(flux2.HEAP_VARIABLES)
    )
    assert code == 0, err
