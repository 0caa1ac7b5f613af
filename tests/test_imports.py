"""Who may import whom: an order of packages in each top folder, no circle of files, and diffusers for tests alone.

Also how long files and functions may be, and that a top folder has one class of a name.

Every import counts, whether it is at the top of a file, in a function or under TYPE_CHECKING.
"""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOPS = {"flux2": {"flux2"}, "data": {"data"}, "train": {"train", "data", "flux2"}}  # what each imports of ours
OURS = {*TOPS, "tests", "benchmarks"}

# From the ground up: what is on a line imports of its top folder only what is on the lines above.
ORDER = {
    "flux2": """
        utils
        layers
        quantization
        models
        sampling
        weights
        adapters
        prompts
        memory
        pipeline
        export serve doctor generate
        __init__
    """,
    "data": """
        __init__
        checks files memory
        buckets sampler synthetic
        sources
        cache
        loader
        demo demo_edit
    """,
    "train": """
        __init__
        utils
        distributed
        optim
        objective
        tracking
        encoding
        checkpoints
        validation
        evaluation
        reports
        publishing
        config
        sweeps
        planner
        cli
        stages
        loop
        run
        cache plan caption evaluate sweep hub tiny_model
        pages
        studio
        demo
        demo_edit
    """,
}


def module(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = {module(file): file for top in TOPS for file in sorted((ROOT / top).rglob("*.py"))}


def imported(source: str) -> Iterator[tuple[str, str]]:
    """(module, name in it or "") of every import in a file: `import`, `from`, and `import_module` of a constant."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the package"
            yield from ((node.module or "", alias.name) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            constants = (part.value for part in node.args if isinstance(part, ast.Constant))
            yield from ((value, "") for value in constants if isinstance(value, str))


def packages(source: str) -> set[str]:
    return {name.partition(".")[0] for name, _ in imported(source)}


def graph(sources: dict[str, str]) -> dict[str, set[str]]:
    """Module -> the modules of `sources` that it imports; `from package import module` is an import of the module."""
    found: dict[str, set[str]] = {}
    for name, source in sources.items():
        each = [f"{where}.{what}" if f"{where}.{what}" in sources else where for where, what in imported(source)]
        found[name] = {other for other in each if other in sources}
    return found


def circle(edges: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle, from one back to itself; empty if there is none."""
    done: set[str] = set()

    def search(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for other in sorted(edges[name]):
            if found := search(other, [*path, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(edges) if (found := search(name, []))), [])


def place(name: str) -> tuple[str, str]:
    """(top folder, what of it stands in ORDER) of a module."""
    top, _, rest = name.partition(".")
    return top, rest.partition(".")[0] or "__init__"


def against_the_order(edges: dict[str, set[str]], order: dict[str, str]) -> list[str]:
    lines = {top: [line.split() for line in text.split("\n")] for top, text in order.items()}
    level = {(top, word): i for top in lines for i, words in enumerate(lines[top]) for word in words}
    wrong = []
    for name, others in edges.items():
        for other in sorted(others):
            here, there = place(name), place(other)
            known = here in level and there in level  # else another test says so
            if known and here[0] == there[0] and here != there and level[there] >= level[here]:
                wrong.append(f"{name} imports {other}")
    return sorted(wrong)


@pytest.fixture(scope="module")
def edges() -> dict[str, set[str]]:
    return graph({name: file.read_text() for name, file in FILES.items()})


@pytest.mark.parametrize("top", TOPS)
def test_a_top_folder_imports_of_ours_only_what_it_may(top):
    assert sum(name.startswith(f"{top}.") for name in FILES) >= 6
    sources = {name: file.read_text() for name, file in FILES.items() if name.partition(".")[0] == top}
    wrong = {name: sorted(packages(source) & OURS - TOPS[top]) for name, source in sources.items()}
    assert {name: found for name, found in wrong.items() if found} == {}


@pytest.mark.parametrize("top", TOPS)
def test_the_order_names_all_that_is_there(top):
    assert sorted(ORDER[top].split()) == sorted({place(name)[1] for name in FILES if name.partition(".")[0] == top})


def test_packages_import_what_stands_above_them(edges):
    assert against_the_order(edges, ORDER) == []


def test_no_files_import_each_other_in_a_circle(edges):
    assert circle(edges) == []


def test_only_tests_benchmarks_and_the_self_test_import_diffusers():
    """But for the self-test of `python -m flux2.doctor`, which goes without where it is not installed."""
    users = [name for name, file in FILES.items() if "diffusers" in packages(file.read_text())]
    assert users == ["flux2.doctor.selftest"]
    assert "diffusers" in packages((ROOT / "tests" / "helpers.py").read_text())


@pytest.mark.parametrize(
    "source",
    [
        "import train.b",
        "from train import b",
        "from train.b import x",
        "def f():\n    import train.b as u",
        "if TYPE_CHECKING:\n    from train.b import x",
        "if True:\n    from importlib import import_module\n    import_module('train.b')",
    ],
)
def test_an_import_is_seen_wherever_it_stands(source):
    sources = {"train": "", "train.a": source, "train.b": "from train.c import y", "train.c": "import train.a"}
    assert "train" in packages(source)
    assert "train.b" in graph(sources)["train.a"]
    assert circle(graph(sources)) == ["train.a", "train.b", "train.c", "train.a"]
    assert circle(graph(sources | {"train.c": ""})) == []
    wrong = ["train.a imports train.b", "train.b imports train.c"]
    assert against_the_order(graph(sources | {"train.c": ""}), {"train": "__init__\na\nb\nc"}) == wrong
    assert against_the_order(graph(sources | {"train.c": ""}), {"train": "__init__\nc\nb\na"}) == []
    assert against_the_order(graph(sources | {"train.c": ""}), {"train": "__init__\nc\na b"}) == wrong[:1]


LONGEST = {"train/run.py": 120, "train/loop.py": 250}  # lines; they read from top to bottom
FOLDERS = (*OURS, "docs")


@cache
def definitions(file: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    """The functions and classes of a file, parsed once for all tests."""
    found, waiting = [], [ast.parse(file.read_text())]
    while waiting:
        for node in ast.iter_child_nodes(waiting.pop()):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.append(node)
            if isinstance(node, ast.stmt | ast.excepthandler | ast.match_case):
                waiting.append(node)
    return found


@pytest.mark.parametrize("top", sorted(FOLDERS))
def test_files_and_functions_are_short(top):
    for file in (ROOT / top).rglob("*.py"):
        name = str(file.relative_to(ROOT))
        assert file.read_text().count("\n") <= LONGEST.get(name, 400), name
        for node in definitions(file):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert (node.end_lineno or 0) - node.lineno < 80, f"{name}: {node.name}"


@pytest.mark.parametrize("top", TOPS)
def test_no_two_classes_of_a_top_folder_share_a_name(top):
    found = [node for file in (ROOT / top).rglob("*.py") for node in definitions(file)]
    names = [node.name for node in found if isinstance(node, ast.ClassDef)]
    assert sorted(names) == sorted(set(names))
