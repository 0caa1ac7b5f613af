"""docs/SECURITY.md: nothing that a foreign file holds is called, interpolated or started as a program.

Every call in the code by which text becomes a callable, an interpolation, an object or a program is listed here, with
what keeps foreign files away from it; another one fails until somebody has thought of it. That the listed ones are kept
away is tested where they stand (tests/train/stages/test_saved_run.py and the tests that docs/SECURITY.md names).
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DANGEROUS = re.compile(
    r"eval|exec|compile|__import__|execfile"
    r"|(.*\.)?(import_module|run_module|run_path|get_object|get_class|get_method|hydra_instantiate|from_string)"
    r"|hydra\.utils\.\w+|OmegaConf\.(load|create|resolve|structured)|os\.(system|popen|exec\w+|spawn\w+|startfile)"
    r"|subprocess\.\w+|pty\.spawn|(pickle|cPickle|dill|marshal|shelve|joblib|cloudpickle)\.\w+"
    r"|torch\.(load|jit\.load|package\.\w+|hub\.\w+|ops\.load_library)|(np|numpy)\.load|yaml\.(\w*load\w*)"
    r"|(.*\.)?(from_pretrained|load_dataset|load_from_disk|instantiate_from_config)|ctypes\.\w+"
)
# (file, call): what keeps foreign files away
KNOWN = {
    ("train/config/instantiate.py", "get_object"): "check_own_targets, for the configuration of a run folder",
    ("train/utils/files.py", "yaml.load"): "a SafeLoader, after a check of aliases, depth and size",
    ("train/checkpoints/checkpoint.py", "torch.load"): "weights_only",
    ("flux2/prompts/remote_protocol.py", "torch.load"): "weights_only",
    ("train/tiny_model/training.py", "torch.load"): "weights_only",
    ("train/tiny_model/world.py", "np.load"): "a file that it has just written, without pickles",
    ("train/planner/plans.py", "OmegaConf.create"): "the command line",
    ("train/pages/queue.py", "subprocess.Popen"): "is_known: this project's commands, in a folder of this user",
    ("train/pages/runner.py", "subprocess.Popen"): "the same, started by the queue alone",
    ("train/pages/settings.py", "yaml.safe_load"): "conf/train.yaml",
    ("train/cli/commands.py", "yaml.safe_load"): "the same",
    ("train/cli/commands.py", "runpy.run_path"): "constant names",
    ("train/cli/commands.py", "runpy.run_module"): "constant names",
    ("train/cache.py", "OmegaConf.create"): "the command line",
    ("train/stages/run_folder.py", "OmegaConf.create"): "writes the composed configuration, without resolving",
    ("train/sweeps/callback.py", "OmegaConf.load"): "multirun.yaml, which Hydra has just written; nothing is resolved",
    ("train/sweeps/callback.py", "OmegaConf.create"): "the same",
    ("train/cli/start.py", "OmegaConf.load"): "the files of conf/optimizer",
    ("flux2/__init__.py", "ctypes.CDLL"): "the C library that runs already",
    ("train/cli/light_imports.py", "importlib.import_module"): "constant names",
    ("flux2/doctor/selftest.py", "importlib.import_module"): "constant names",
    ("flux2/doctor/selftest.py", "diffusers.AutoencoderKLFlux2.from_pretrained"): "the embedded model",
    ("flux2/doctor/selftest.py", "diffusers.Flux2Transformer2DModel.from_pretrained"): "the embedded model",
    ("train/evaluation/features.py", "AutoModel.from_pretrained"): "no trust_remote_code: the library's classes",
    ("train/evaluation/features.py", "AutoTokenizer.from_pretrained"): "likewise",
    ("flux2/prompts/captioning.py", "AutoProcessor.from_pretrained"): "refused with `auto_map`: the library's classes",
    ("flux2/prompts/captioning.py", "AutoModelForImageTextToText.from_pretrained"): "the same, without directives",
    ("flux2/models/text_encoder.py", "PreTrainedTokenizerFast.from_pretrained"): "a class of ours to choose",
    ("data/sources/open_table.py", "datasets.load_dataset"): "no trust_remote_code: the library runs no scripts",
    ("data/sources/open_table.py", "datasets.load_from_disk"): "Arrow files and JSON",
}
FILES = [file for top in ("flux2", "data", "train") for file in sorted((ROOT / top).rglob("*.py"))]


def calls(source: str) -> Iterator[ast.Call]:
    return (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))


def dangerous(source: str) -> set[str]:
    """The dangerous functions that a file calls, or imports by their own name."""
    tree = ast.parse(source)
    found = {ast.unparse(node.func) for node in calls(source)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names = {alias.name for alias in node.names}
            found |= {f"{node.module}.{name}" for name in names} - {"re.compile"}
    return {name for name in found if DANGEROUS.fullmatch(name)}


def test_every_call_that_makes_text_a_callable_or_a_program_is_known():
    found = {(str(file.relative_to(ROOT)), name) for file in FILES for name in dangerous(file.read_text())}
    assert found - {("train/config/instantiate.py", "hydra.utils.get_object")} == set(KNOWN)


@pytest.mark.parametrize(
    "source",
    [
        "import subprocess\nsubprocess.run(x)",
        "from subprocess import run",
        "from os import system",
        "exec(x)",
        "importlib.import_module(x)",
        "from hydra.utils import instantiate",
        "import torch\ntorch.load(x)",
        "np.load(x)",
        "pickle.loads(x)",
        "OmegaConf.load(x)",
        "AutoModel.from_pretrained(x)",
        "environment().from_string(x)",
    ],
)
def test_such_a_call_is_seen(source):
    assert dangerous(source)


def test_pickles_are_read_as_tensors_and_no_code_of_repositories_is_run():
    loads = [node for file in FILES for node in calls(file.read_text()) if ast.unparse(node.func) == "torch.load"]
    assert len(loads) == 3
    for node in loads:
        assert {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}["weights_only"] == "True"
    assert not [file for file in FILES if "trust_remote_code" in file.read_text() or "allow_pickle" in file.read_text()]


def test_constant_names_alone_are_imported():
    for file in FILES:
        for node in calls(file.read_text()):
            if ast.unparse(node.func).endswith("import_module"):
                parts = [part for part in ast.walk(node.args[0]) if isinstance(part, ast.Name | ast.Call)]
                assert {ast.unparse(part) for part in parts} <= {"module(diffusers)", "module", "diffusers"}, file


def test_the_files_that_the_document_names_exist():
    text = (ROOT / "docs" / "SECURITY.md").read_text()
    named = re.findall(r"`(tests/[\w/.]+\.py)`", text)
    assert len(named) >= 10
    for name in named:
        assert (ROOT / name).is_file(), name
