"""The command `flux2` of an installed package, and the wheel that installs it."""

import os
import shutil
import subprocess
import sys
import sysconfig
import time
import urllib.request
import venv
from pathlib import Path

import pytest

from train.cli import commands
from train.cli.commands import COMMANDS, completions
from train.config.paths import CONFIG

ROOT = CONFIG.parent


def flux2(monkeypatch, capsys, *words: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["flux2", *words])
    code = commands.main()
    return code, *capsys.readouterr()


def test_every_command_is_there_and_help_is_short_and_names_them_all(monkeypatch, capsys):
    code, out, err = flux2(monkeypatch, capsys, "--help")
    assert (code, err) == (0, "")
    assert len(out.split("\n")) < 45
    assert all(len(line) <= 120 for line in out.split("\n") if str(CONFIG) not in line)
    for name, command in COMMANDS.items():
        assert f"  {name} " in out
        target = command.script if "/" in command.target else ROOT / f"{command.target.replace('.', '/')}"
        assert target.is_file() or target.with_suffix(".py").is_file() or (target / "__main__.py").is_file()
    assert flux2(monkeypatch, capsys)[1] == out
    assert flux2(monkeypatch, capsys, "where", "train")[1].strip() == str(ROOT / "train" / "run.py")


def test_an_unknown_command_is_one_error(monkeypatch, capsys):
    code, out, err = flux2(monkeypatch, capsys, "trian", "steps=3")
    assert (code, out) == (2, "")
    assert err.startswith("error: 'trian' is not one of train, plan")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["where"], "write flux2 where and one of train, plan,"),
        (["where", "generate"], "flux2 where generate: write flux2 where and one of train,"),
        (["completion", "fish"], "flux2 completion fish: write flux2 completion and one of bash, zsh"),
    ],
)
def test_what_a_helping_command_takes_is_said(monkeypatch, capsys, words, said):
    monkeypatch.setattr(sys, "argv", ["flux2", *words])
    assert commands.main() == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["tr"], ["train"]),
        (["train", "+exp"], ["+experiment="]),
        (["train", "+experiment=st"], ["+experiment=style"]),
        (["plan", "model=klein_base"], ["model=klein_base_4b", "model=klein_base_9b"]),
        (["train", "batch_s"], ["batch_size="]),
        (["train", "optimizer"], ["optimizer="]),
        (["generate", "--mo"], []),
        (["nothing", "x"], []),
        (["train", "../="], []),
        (["train", "hydra="], []),
    ],
)
def test_a_shell_completes_commands_groups_choices_and_settings(words, found):
    assert completions(words) == found


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_the_completion_of_a_shell_is_one_that_it_reads(monkeypatch, capsys, shell, tmp_path):
    _, out, _ = flux2(monkeypatch, capsys, "completion", shell)
    assert "flux2 complete" in out
    if shell == "bash":
        (tmp_path / "x.sh").write_text(out)
        assert subprocess.run(["bash", "-n", str(tmp_path / "x.sh")], check=False).returncode == 0


# ------------------------------------------------------------------ the wheel


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The folder of the programs of an environment with the wheel alone, and the libraries of this one."""
    folder, source = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("source")
    for name in ("flux2", "data", "train", "conf"):  # a build leaves files where it is made
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", str(source)]
    subprocess.run([*build, "--wheel-dir", str(folder), "--disable-pip-version-check"], check=True)
    venv.create(folder / "env", symlinks=True)
    (site,) = (folder / "env" / "lib").glob("python*/site-packages")
    install = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--python"]
    (wheel,) = folder.glob("*.whl")
    without = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}  # which may have it already
    subprocess.run([*install, str(folder / "env"), "install", "--no-deps", str(wheel)], check=True, env=without)
    # a folder that a .pth file adds has no .pth files of its own: what is installed here for editing is not seen
    (site / "libraries.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return folder / "env" / "bin"


@pytest.fixture
def outside(tmp_path, monkeypatch) -> dict[str, str]:
    """An environment of variables for commands in an empty folder that is no checkout."""
    monkeypatch.chdir(tmp_path)
    return {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {
        "HF_HUB_OFFLINE": "1",
        "XDG_STATE_HOME": str(tmp_path / "state"),
    }


@pytest.mark.slow
def test_a_wheel_trains_the_demo_outside_of_the_repository(installed, outside, tmp_path):
    words = ["train", "+experiment=demo", "steps=20", "sample_every=0", "validate_every=0"]
    done = subprocess.run([installed / "flux2", *words], env=outside, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (adapter,) = (tmp_path / "outputs/demo").glob("*/adapter")
    words = ["generate", "--model", "tiny", "--adapter", str(adapter), "--prompt", "a red cup", "--steps", "2"]
    done = subprocess.run([installed / "flux2", *words], env=outside, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.png").is_file()
    where = [installed / "python", "-c", "import train, conf; print(train.__file__, list(conf.__path__))"]
    shown = subprocess.run(where, env=outside, capture_output=True, text=True, check=True).stdout
    assert shown.count(str(installed.parent)) == 2
    plan = subprocess.run(
        [installed / "flux2", "plan", "+experiment=demo_edit", "+card=8"], env=outside, capture_output=True, text=True
    )
    assert plan.returncode == 0, plan.stderr


@pytest.mark.slow
def test_a_wheel_serves_the_studio(installed, outside):
    process = subprocess.Popen(
        [installed / "flux2", "studio", "--port", "0"], env=outside, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("studio at http://127.0.0.1:")
        address = line.split()[-1]
        for _ in range(100):
            try:
                page = urllib.request.urlopen(f"{address}/start?experiment=style", timeout=30).read().decode()
                break
            except OSError:
                time.sleep(0.1)
        assert "A style: everything that a prompt" in page
        assert b"uPlot" in urllib.request.urlopen(f"{address}/static/uPlot.iife.min.js", timeout=30).read()
    finally:
        process.terminate()
        process.wait(30)
