"""Who may import whom: `train -> {data, flux2}`, and diffusers is for tests and benchmarks alone."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OURS = {"flux2", "data", "train", "tests", "benchmarks"}
MAY = {"flux2": {"flux2"}, "data": {"data"}, "train": {"train", "data", "flux2"}}


def imported(source: str) -> set[str]:
    """The packages that a file imports anywhere in it, by `import`, `from` or `import_module` of a constant."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the package"
            found.add(node.module or "")
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            found |= {
                part.value for part in node.args if isinstance(part, ast.Constant) and isinstance(part.value, str)
            }
    return {name.partition(".")[0] for name in found}


def files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("package", MAY)
def test_a_package_imports_of_ours_only_what_it_may(package):
    assert len(files(package)) >= 6
    wrong = {str(file): sorted(imported(file.read_text()) & OURS - MAY[package]) for file in files(package)}
    assert {file: names for file, names in wrong.items() if names} == {}


def test_only_tests_benchmarks_and_the_self_test_import_diffusers():
    """But for the self-test of `python -m flux2.doctor`, which goes without where it is not installed."""
    users = [str(file) for package in MAY for file in files(package) if "diffusers" in imported(file.read_text())]
    assert users == [str(ROOT / "flux2" / "doctor" / "selftest.py")]
    assert "diffusers" in imported((ROOT / "tests" / "helpers.py").read_text())


@pytest.mark.parametrize(
    "source",
    [
        "import diffusers",
        "from diffusers.models import x",
        "def f():\n    import diffusers.utils as u",
        "if True:\n    from importlib import import_module\n    import_module('diffusers')",
    ],
)
def test_an_import_is_seen_wherever_it_stands(source):
    assert "diffusers" in imported(source)
