"""MkDocs hook that adds the reference pages to the site: they are read from the repository at each build.

Commands: the docstring of each Hydra command, and what `--help` prints for the others. Settings: the YAML files of
conf/ with their comments. Python API: one page per package, with a mkdocstrings directive for each of its modules.
README.md's list of packages decides which pages there are. The build fails if it names a package that does not exist,
or lacks one.
"""

from __future__ import annotations

import ast
import os
import posixpath
import re
import subprocess
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
TOP_FOLDERS = ("flux2", "data", "train")
PUBLIC_API = ("flux2.load", "flux2.Pipeline")  # the first page of the API; their modules are left out below
COPIED = {  # page of the site: the file of the repository that it shows
    "getting-started.md": "README.md",
    "embedded-model.md": "flux2/assets/tiny/README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
}
HYDRA_COMMANDS = ("run", "plan", "cache", "caption", "evaluate", "demo", "demo_edit")
OTHER_COMMANDS = (
    "-m flux2.generate",
    "-m flux2.export",
    "-m flux2.serve",
    "-m flux2.doctor",
    "train/sweep.py",
    "-m train.hub",
    "-m train.tiny_model",
)


def docstring(file: Path) -> str:
    """Return the module docstring of a Python file. Raises PluginError if there is none."""
    text = ast.get_docstring(ast.parse(file.read_text()))
    if not text:
        raise PluginError(f"{file.relative_to(ROOT)} has no docstring, and the site shows it.")
    return text


def help_text(command: str) -> str:
    """Return what `python COMMAND --help` prints. Raises PluginError if the command fails."""
    env = {**os.environ, "COLUMNS": "100", "PYTHONPATH": str(ROOT)}
    words = [sys.executable, *command.split(), "--help"]
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode != 0:
        raise PluginError(f"python {command} --help fails:\n{done.stderr}")
    return done.stdout.strip()


def commands_page() -> str:
    parts = [
        "# Commands",
        "Run every command from the root of the repository. The first seven take settings as `key=value` and choices "
        "as `group=choice`; [Settings](settings.md) lists all of them, and `--help` prints them.",
    ]
    for name in HYDRA_COMMANDS:
        parts += [f"## python train/{name}.py", docstring(ROOT / "train" / f"{name}.py")]
    for command in OTHER_COMMANDS:
        parts += [f"## python {command}", f"```text\n{help_text(command)}\n```"]
    return "\n\n".join(parts)


def settings_page() -> str:
    parts = [
        "# Settings",
        "The files of `conf/` as they are, with the default of each key. Append `key=value` to a command to set a key, "
        "`group.key=value` for a key of a group, and `group=choice` to choose another file of a group.",
    ]
    conf = ROOT / "conf"
    titles = {"train.yaml": "Training", "caption.yaml": "Captions", "evaluate.yaml": "Evaluation"}
    for name, title in titles.items():
        parts += [f"## {title}: {name}", f"```yaml\n{(conf / name).read_text()}```"]
    for folder in sorted({file.parent for file in conf.rglob("*.yaml")} - {conf}):
        group = folder.relative_to(conf).as_posix()
        parts.append(f"## {group}")
        for file in sorted(folder.glob("*.yaml")):
            parts += [f"### {group}={file.stem}", f"```yaml\n{file.read_text()}```"]
    return "\n\n".join(parts)


def listed_packages() -> list[str]:
    """Return the packages and modules of README's list, dotted and in its order: the first cells of its table rows."""
    cells = re.findall(r"^\| (`[^|]*`) \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    paths = re.findall(rf"`((?:{'|'.join(TOP_FOLDERS)})/[\w/.]+)`", " ".join(cells))
    return [path.removesuffix(".py").replace("/", ".") for path in paths]


def check_packages(listed: list[str]) -> None:
    """Raises PluginError unless README lists every package, and nothing that does not exist."""
    found = {file.parent.relative_to(ROOT) for top in TOP_FOLDERS for file in (ROOT / top).glob("*/__init__.py")}
    missing = sorted({".".join(path.parts) for path in found} - set(listed))
    gone = [name for name in listed if not modules(name)]
    if missing or gone:
        raise PluginError(
            f"README.md's list of packages: does not exist: {gone or 'none'}; not listed: {missing or 'none'}."
        )


def modules(name: str) -> list[str]:
    """Return the dotted names of a module, or of a package and all modules in it; empty if it does not exist."""
    path = ROOT / name.replace(".", "/")
    if path.with_suffix(".py").is_file():
        return [name]
    files = sorted(path.rglob("*.py"), key=lambda file: (file.name != "__init__.py", file))
    dotted = [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files if file.name != "__main__.py"]
    return [module.removesuffix(".__init__") for module in dotted]


def api_pages() -> dict[str, str]:
    """Return the API pages by path, the public API first."""
    public = ["# flux2: load and generate", *(f"::: {name}" for name in PUBLIC_API)]
    pages = {"api/flux2.md": "\n\n".join(public)}
    for name in listed_packages():
        first, *others = modules(name)
        options = "show_root_heading: false, show_root_toc_entry: false"  # the heading of the page says it
        if others:
            options += ", members: false"  # what a package re-exports is documented where it is defined
        parts = [f"# {name}", f"::: {first}\n    options: {{{options}}}", *(f"::: {module}" for module in others)]
        pages[f"api/{name}.md"] = "\n\n".join(parts)
    return pages


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Check the list of packages, and add the API pages to the navigation."""
    assert config.nav is not None
    listed = listed_packages()
    check_packages(listed)
    names = ["flux2", *listed]
    for top in TOP_FOLDERS:
        pages = [{name: f"api/{name}.md"} for name in names if name.partition(".")[0] == top]
        config.nav.insert(-1, {f"Python API: {top}": pages})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages to those of docs/."""
    pages = {"commands.md": commands_page(), "settings.md": settings_page(), **api_pages()}
    pages |= {page: (ROOT / source).read_text() for page, source in COPIED.items()}
    for path, content in pages.items():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links within the repository into links within the site, or into plain text if the site has no such page."""
    path = page.file.src_uri
    folder = posixpath.dirname(COPIED.get(path, f"docs/{path}"))
    pages = {source: name for name, source in COPIED.items()}

    def replace(match: re.Match[str]) -> str:
        image, text, link, anchor = match.groups()
        target = posixpath.normpath(posixpath.join(folder, link))
        if link.startswith(("http://", "https://")) or not (ROOT / target).exists():
            return match[0]  # what does not exist is MkDocs' warning
        if target.startswith("conf"):
            target, anchor = (
                "docs/settings.md",
                f"#{target.removeprefix('conf').strip('/').partition('/')[0]}".rstrip("#"),
            )
        elif target in pages:
            target = f"docs/{pages[target]}"
        elif not target.startswith("docs/"):
            return text
        return f"{image}[{text}]({posixpath.relpath(target, posixpath.dirname('docs/' + path))}{anchor or ''})"

    return re.sub(r"(!?)\[([^\]]*)\]\(([^)#\s]+)(#[\w-]+)?\)", replace, markdown)
