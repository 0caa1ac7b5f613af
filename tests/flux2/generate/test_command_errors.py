"""python -m flux2.generate: whatever is wrong is one line and exit code 2."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from adapter_helpers import write_adapter
from generate_helpers import repeat
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from process_helpers import run_module

from flux2.generate import command as generate
from flux2.generate import metadata

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--adapter", "gone"], r"adapter 'gone'.*adapter_model\.safetensors"),
        (["--adapter", "gone:0.5"], r"adapter 'gone'"),
        (["--adapter", "broken.safetensors"], r"adapter broken\.safetensors"),
        (["--adapter", "lora:0.5,triple=1"], r"ranges=triple=1 is not a range"),
        (["--adapter", "lora:single.9=1"], r"ranges=single\.9=1: numbers of single blocks .* 0 to 2"),
        (
            ["--adapter", "lora:time.0-1=2", "--merge"],
            r"--adapter lora:1\.0,time\.0-1=2: a merged adapter has no times",
        ),
        (["--image", "gone.png"], r"--image[= ]gone\.png"),
        (["--image", "broken.png"], r"--image[= ]broken\.png"),
        (["--image", "cut.png"], r"--image[= ]cut\.png"),
        (["--image", "thin.png"], r"8 x 64 pixels"),
        (["--width", "15"], r"width=15\b.* 16\b"),
        (["--height", "0"], r"height=0\b.* 16\b"),
        (["--image", "small.png"] * 11, r"11 references.* 10\b"),
        (["--steps", "0"], r"steps=0\b"),
        (["--count", "0"], r"--count[= ]0\b"),
        (["--device", "cuda"], r"CUDA.*device=cpu"),
        (["--device", "gpu"], r"device='?gpu"),
        (["--out", "cup.txt"], r"--out[= ]cup\.txt"),
        (["--out", "cup.psd"], r"--out[= ]cup\.psd"),
        (["--out", "x" * 5000 + ".png"], r"File name too long"),
        (["--out", "."], r"--out[= ]\."),
        (["--adapter", "lora:nan"], r"--adapter[= ]lora:nan"),
        (["--adapter", "lora:1e400"], r"--adapter[= ]lora:1e400"),
        (["--guidance", "nan"], r"guidance=nan\b"),
        (["--guidance", "inf"], r"guidance=inf\b"),
        (["--guidance", "1e300"], r"guidance=1e\+300\b.*-1000 to 1000"),
        (["--steps", "1000000000000"], r"steps=1000000000000\b.* 10000\b"),
        (["--width", "1600000", "--height", "1024"], r"width=1600000.*height=1024\b"),
        (["--seed", "1" + "0" * 30], r"seed=10{30}\b.*18446744073709551615"),
        (["--count", "1000000000000"], r"--count[= ]1000000000000\b"),
        (["--prompt", "a\udcff"], r"--prompt.*Unicode"),
        (["--device", "meta"], r"device='?meta.*cuda, cuda:1 or cpu"),
        (["--device", "mps"], r"device='?mps.*cuda, cuda:1 or cpu"),
        (["--out", "broken.png/cup.png"], r"broken\.png"),
        (["--path", "gone"], r"--path[= ]'?gone"),
        (["--path", "."], r"transformer"),
        (["--autoencoder", "gone.safetensors"], r"--autoencoder[= ]'?gone\.safetensors"),
        (["--text-encoder", "broken.png"], r"--text-encoder[= ]'?broken\.png"),
        (["--text-encoder", "http://me:hidden@host"], r"--text-encoder.*http://host/\.\.\..*password"),
    ],
)
def test_whatever_is_wrong_is_one_line_and_exit_code_2(
    arguments: list[str],
    message: str,
    command: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "broken.png").write_text("no picture")
    (tmp_path / "broken.safetensors").write_text("no tensors")
    Image.new("RGB", (64, 64), "red").save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:-40])
    Image.new("RGB", (8, 64)).save(tmp_path / "thin.png")
    Image.new("RGB", (32, 32)).save(tmp_path / "small.png")
    write_adapter(tmp_path / "lora")
    assert command(*arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = [
        line for line in printed.err.splitlines() if "step/s" not in line and "s/step" not in line and line.strip()
    ]
    assert line.startswith("error: ")
    assert re.search(message, line), line
    assert "hidden" not in line
    assert len(line) < 700
    assert not list(tmp_path.glob("out*.png"))


def test_numbers_and_places_are_checked_before_anything_is_loaded(
    command: Callable[..., int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a model was asked for")

    monkeypatch.setattr(generate, "load", refuse)
    wrong = ("--steps", "0"), ("--width", "10"), ("--seed", "9" * 30), ("--guidance", "nan"), ("--out", "cup.psd")
    # 252 letters are a file name, but not with what goes before it until the file is whole
    long = ("--out", "x" * 248 + ".png"), ("--out", "new/" + "x" * 248 + ".png")
    for arguments in (*wrong, ("--device", "xla"), ("--out", "gone.txt"), *long):
        assert command(*arguments) == 2
    assert not list(tmp_path.iterdir())


def test_ctrl_c_is_one_line_and_exit_code_130(
    command: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "run", interrupt)
    assert command() == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_ctrl_c_while_libraries_load_ends_it_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    done = subprocess.run(
        [sys.executable, "-m", "flux2.generate", "--prompt", "a cup"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # what runs in the background ignores it
    )
    assert done.returncode == -signal.SIGINT
    assert done.stderr == ""


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        MemoryError(),
    ],
)
def test_want_of_memory_is_one_line_that_says_what_takes_less(
    error: Exception,
    command: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(generate, "load", fail)
    assert command() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(r"error: .*memory.*--width", line)


def test_an_error_that_is_not_foreseen_keeps_its_traceback(
    command: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr(generate, "load", fail)
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        command()


def test_an_adapter_whose_scale_makes_the_picture_overflow_is_an_error(
    command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_adapter(tmp_path / "lora")
    assert command("--adapter", "lora:1e38") == 2
    assert re.search("error: .*NaN", capsys.readouterr().err)
    assert not list(tmp_path.glob("out*.png"))


def test_the_real_command_ends_with_code_2_and_no_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gone = tmp_path / "gone.png"
    assert run_module("flux2.generate", "--prompt", "a cup", "--image", str(gone)) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.fullmatch(rf"error: .*--image[= ]{gone}\b.*\n", printed.err)


def test_an_unknown_model_is_refused_by_the_command(
    command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        command("--model", "flux1")
    assert end.value.code == 2
    assert "invalid choice: 'flux1'" in capsys.readouterr().err


def test_a_file_that_has_changed_since_is_named(
    command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_adapter(tmp_path / "lora")
    Image.new("RGB", (48, 32), "red").save(tmp_path / "a.png")
    assert command("--adapter", "lora", "--image", "a.png", "--out", "one.png") == 0
    write_adapter(tmp_path / "lora", seed=1)
    assert repeat("--from-image", "one.png", "--out", "two.png") == 2
    assert re.search(r"one\.png.*\blora\b.*--adapter", capsys.readouterr().err)
    assert repeat("--from-image", "one.png", "--out", "two.png", "--adapter", "lora") == 0
    Image.new("RGB", (48, 32), "blue").save(tmp_path / "a.png")
    assert repeat("--from-image", "one.png", "--out", "two.png", "--adapter", "lora") == 2
    assert re.search(r"one\.png.*\ba\.png\b.*--image", capsys.readouterr().err)
    (tmp_path / "a.png").unlink()
    assert repeat("--from-image", "one.png", "--out", "two.png", "--adapter", "lora") == 2
    assert re.search(r"one\.png.*\ba\.png\b.*--image", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no json", r"Expecting value"),
        ("[]", r"\[\]"),
        ('{"model": "flux1"}', r"model='flux1'"),
        ('{"model": "tiny", "other": 1}', r"\bother\b"),
        ('{"model": "tiny", "precision": "fp32"}', r"'prompt'"),
    ],
)
def test_a_text_that_cannot_be_used_is_an_error(
    text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    info = PngInfo()
    info.add_itxt(metadata.KEYWORD, text)
    Image.new("RGB", (16, 16)).save("bad.png", pnginfo=info)
    assert repeat("--from-image", "bad.png") == 2
    error = capsys.readouterr().err
    assert re.search(rf"error: --from-image[= ]bad\.png.*{message}", error)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"--prompts[= ]many\.jsonl"),
        ('{"prompt": "a"}\nnonsense', r"line 2\b"),
        ('["a"]', r"line 1\b.*\['a'\]"),
        ('{"seed": 1}', r"line 1\b.*prompt=None"),
        ("[" * 100_000, r"line 1\b.*nested too deeply"),
        ('{"prompt": "a", "color": "red"}', r"line 1\b.*'color'.*prompt, out, seed"),
        ('{"prompt": "a", "steps": 0}', r"line 1\b.*steps=0\b"),
        ('{"prompt": "a", "seed": "x"}', r"line 1\b.*seed='x'"),
        ('{"prompt": "a", "width": 8}', r"line 1\b.*width=8\b.*16"),
        ('{"prompt": "a", "images": "a.png"}', r"line 1\b.*images='a\.png'"),
        ('{"prompt": "a", "out": "b.png"}\n{"prompt": "b", "out": "b.png"}', r"line 2\b.*b\.png"),
        ('{"prompt": "a", "images": ["gone.png"]}', r"--image[= ]gone\.png"),
        ('{"prompt": "a", "out": "b.txt"}', r"--out[= ]b\.txt"),
    ],
)
def test_a_wrong_line_is_named_before_anything_is_loaded(
    text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(generate, "load", lambda *_, **__: pytest.fail("a model was asked for"))
    (tmp_path / "many.jsonl").write_text(text)
    assert repeat("--prompts", "many.jsonl") == 2
    assert re.search(message, capsys.readouterr().err)


def test_prompts_are_given_in_one_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        ([], r"--prompt\b.*--prompts\b.*--from-image"),
        (["--prompt", "a", "--prompts", "b"], r"--prompt\b.*--prompts\b"),
    ):
        with pytest.raises(SystemExit) as end:
            repeat(*arguments)
        assert end.value.code == 2
        assert re.search(message, capsys.readouterr().err.splitlines()[-1])
