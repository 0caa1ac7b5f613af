"""python -m flux2.generate: writes pictures; whatever is wrong is one line and exit code 2."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from remote_helpers import SECRET, FakeServer

from flux2 import adapters
from flux2.generate import command as generate
from flux2.generate import metadata
from flux2.memory.block_offload import Offloader
from flux2.models.variants import VARIANTS
from flux2.prompts import embeddings as prompts
from flux2.prompts.remote_client import TOKEN
from flux2.utils.cli import split_adapter
from flux2.weights.loading import load_text_encoder
from flux2.weights.sources import ModelSource

pytest_plugins = ("offload_helpers", "remote_helpers")

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def command(
    model_folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., int]:
    """Runs the command in an empty folder with a small model in the place of `tiny`."""
    monkeypatch.setitem(VARIANTS, "tiny", helpers.VARIANTS["dev"])
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> int:
        path = ["--path", str(model_folders("dev"))]
        sizes = ["--width", "32", "--height", "32", "--steps", "2"]
        monkeypatch.setattr(
            sys, "argv", ["generate", "--prompt", "a cup", "--device", "cpu", *path, *sizes, *arguments]
        )
        return generate.main()

    run.path = str(model_folders("dev"))  # type: ignore[attr-defined]
    return run


def write_adapter(folder: Path, seed: int = 0) -> None:
    model, _ = helpers.transformers("dev")
    wrapped = adapters.attach(model, rank=2, seed=seed)
    for parameter in adapters.adapter_parameters(model):
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)) * 0.3
    adapters.save(wrapped, folder, base="small")


def pixels(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image, dtype=int)


def test_the_picture_is_the_pipelines(
    command: Callable[..., int],
    model_folders: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import flux2

    assert command("--out", "new/cup.png", "--seed", "5") == 0
    assert capsys.readouterr().out.split() == ["new/cup.png"]
    pipeline = flux2.load("tiny", str(model_folders("dev")), device="cpu")
    (wanted,) = pipeline.generate("a cup", seed=5, width=32, height=32, steps=2)
    assert (pixels(tmp_path / "new" / "cup.png") == np.asarray(wanted)).all()


def test_with_the_address_of_a_server_the_picture_is_the_same_and_no_text_encoder_is_loaded(
    command: Callable[..., int],
    fake_server: Callable[..., FakeServer],
    model_folders: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert command("--prompt", "a fox", "--out", "near.png") == 0
    source = ModelSource(helpers.VARIANTS["dev"], str(model_folders("dev")))
    encoder = load_text_encoder(source, dtype=torch.float32)
    server = fake_server(source.variant, token=SECRET)
    server.embedding = lambda prompt: encoder.encode([prompt])[0]  # type: ignore[method-assign]
    monkeypatch.setattr(prompts, "load_text_encoder", lambda *_: pytest.fail("a text encoder was loaded"))
    monkeypatch.delenv(TOKEN, raising=False)
    assert command("--text-encoder", server.url) == 2
    assert f"set the environment variable {TOKEN}" in capsys.readouterr().err
    monkeypatch.setenv(TOKEN, SECRET)
    assert command("--prompt", "a fox", "--text-encoder", f"{server.url}/", "--out", "far.png") == 0
    for number in ("000", "001"):
        assert (pixels(tmp_path / f"far_{number}.png") == pixels(tmp_path / f"near_{number}.png")).all()
        assert metadata.read(tmp_path / f"far_{number}.png", "far").text_encoder == f"{server.url}/"
    assert server.given == ["a cup", "a fox"]


def test_several_pictures_are_numbered_and_their_seeds_count_up(
    command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("--prompt", "a fox", "--count", "2", "--seed", "3") == 0
    files = capsys.readouterr().out.split()
    assert files == ["out_000.png", "out_001.png", "out_002.png", "out_003.png"]
    assert command("--seed", "4", "--out", "alone.png") == 0
    assert np.abs(pixels(tmp_path / "out_001.png") - pixels(tmp_path / "alone.png")).max() <= 1
    assert np.abs(pixels(tmp_path / "out_001.png") - pixels(tmp_path / "out_000.png")).max() > 50


def test_references_and_adapters_with_scales_are_used(command: Callable[..., int], tmp_path: Path) -> None:
    for i in range(2):
        write_adapter(tmp_path / f"lora{i}", i)
    Image.new("RGB", (48, 32), "red").save(tmp_path / "a.png")
    Image.new("L", (32, 64), 90).save(tmp_path / "b.jpg")
    runs = {
        "plain": [],
        "off": ["--adapter", "lora0:0"],
        "one": ["--adapter", "lora0"],
        "half": ["--adapter", "lora0:0.5"],
        "both": ["--adapter", "lora0", "--adapter", "lora1/diffusers.safetensors"],
        "reference": ["--image", "a.png"],
        "references": ["--image", "a.png", "--image", "b.jpg"],
    }
    made = {}
    for name, arguments in runs.items():
        assert command("--out", f"{name}.png", *arguments) == 0
        made[name] = pixels(tmp_path / f"{name}.png")
    assert (made["plain"] == made["off"]).all()
    distinct = ["plain", "one", "half", "both", "reference", "references"]
    for i, name in enumerate(distinct):
        for other in distinct[:i]:
            assert np.abs(made[name] - made[other]).max() > 3, (name, other)


def test_a_scale_is_told_from_a_colon_in_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run:2").mkdir()
    assert split_adapter("a/b:0.7") == ("a/b", 0.7)
    assert split_adapter("a/b:-1") == ("a/b", -1.0)
    assert split_adapter("run:2") == ("run:2", 1.0)
    assert split_adapter("run:2:0.5") == ("run:2", 0.5)
    assert split_adapter("C:/adapters") == ("C:/adapters", 1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--adapter", "gone"], "adapter 'gone': does not exist. Give an adapter folder"),
        (["--adapter", "gone:0.5"], "adapter 'gone': does not exist"),
        (["--adapter", "broken.safetensors"], "adapter broken.safetensors cannot be read"),
        (["--image", "gone.png"], "--image gone.png does not exist"),
        (["--image", "broken.png"], "--image broken.png cannot be read as a picture"),
        (["--image", "cut.png"], "--image cut.png cannot be read as a picture"),
        (["--image", "thin.png"], "a reference of 8 x 64 pixels is too small"),
        (["--width", "15"], "width=15 must be at least 16"),
        (["--height", "0"], "height=0 must be at least 16"),
        (["--image", "small.png"] * 11, "11 references are given, and FLUX.2 takes at most 10: leave some out"),
        (["--steps", "0"], "steps=0 must be at least 1"),
        (["--count", "0"], "--count 0 must be an integer from 1"),
        (["--device", "cuda"], "sees no CUDA GPU here. Use device=cpu"),
        (["--device", "gpu"], "device='gpu' is not a device"),
        (["--out", "cup.txt"], "--out cup.txt must end in a picture's extension"),
        (["--out", "cup.psd"], "--out cup.psd: pictures cannot be saved as .psd"),
        (["--out", "x" * 5000 + ".png"], "File name too long"),
        (["--out", "."], "--out . must end in a picture's extension"),
        (["--adapter", "lora:nan"], "--adapter lora:nan: the scale nan must be a finite number"),
        (["--adapter", "lora:1e400"], "the scale 1e400 must be a finite number"),
        (["--guidance", "nan"], "guidance=nan must be a finite number"),
        (["--guidance", "inf"], "guidance=inf must be a finite number"),
        (["--guidance", "1e300"], "guidance=1e+300 must be from -1000 to 1000"),
        (["--steps", "1000000000000"], "steps=1000000000000 must be at most 10000"),
        (["--width", "1600000", "--height", "1024"], "width=1600000, height=1024 are more than"),
        (["--seed", "1" + "0" * 30], "must be at most 18446744073709551615"),
        (["--count", "1000000000000"], "--count 1000000000000 must be an integer from 1 to"),
        (["--prompt", "a\udcff"], "is not valid Unicode"),
        (["--device", "meta"], "device='meta' is not supported: give cuda, cuda:1 or cpu"),
        (["--device", "mps"], "device='mps' is not supported: give cuda, cuda:1 or cpu"),
        (["--out", "broken.png/cup.png"], "broken.png"),
        (["--path", "gone"], "--path 'gone' does not exist. Give a repository id"),
        (["--path", "."], "in the published layout"),
        (["--autoencoder", "gone.safetensors"], "--autoencoder 'gone.safetensors' does not exist"),
        (["--text-encoder", "broken.png"], "--text-encoder 'broken.png' is neither a folder nor"),
        (["--text-encoder", "http://me:hidden@host"], "--text-encoder url=http://host/... must have no user, password"),
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
    assert command(*arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = [
        line for line in printed.err.splitlines() if "step/s" not in line and "s/step" not in line and line.strip()
    ]
    assert line.startswith("error: ")
    assert message in line
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
    assert line.startswith("error: out of memory")
    assert "smaller --width" in line


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
    assert "error: the picture that was computed has NaN or infinite pixels" in capsys.readouterr().err
    assert not list(tmp_path.glob("out*.png"))


def test_a_clear_reference_is_the_white_that_training_saw(command: Callable[..., int], tmp_path: Path) -> None:
    for name, color in (("clear", (0, 0, 0, 0)), ("white", "white"), ("black", "black")):
        Image.new("RGBA", (32, 32), color).save(tmp_path / f"{name}.png")
        assert command("--image", f"{name}.png", "--out", f"{name}_out.png") == 0
    made = {name: pixels(tmp_path / f"{name}_out.png") for name in ("clear", "white", "black")}
    assert (made["clear"] == made["white"]).all()
    assert np.abs(made["clear"] - made["black"]).max() > 3


def test_the_real_command_ends_with_code_2_and_no_traceback(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "flux2.generate", "--prompt", "a cup", "--image", str(tmp_path / "gone.png")],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == [f"error: --image {tmp_path / 'gone.png'} does not exist"]


def test_an_unknown_model_is_refused_by_the_command(
    command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        command("--model", "flux1")
    assert end.value.code == 2
    assert "invalid choice: 'flux1'" in capsys.readouterr().err


def test_blocks_that_stream_make_the_same_picture(
    command: Callable[..., int], tmp_path: Path, scrambled: list[Offloader], capsys: pytest.CaptureFixture[str]
) -> None:
    write_adapter(tmp_path / "adapter")
    for name, arguments in {"plain": [], "half": ["--stream-blocks", "0.5"], "four": ["--stream-blocks", "4"]}.items():
        assert command("--adapter", str(tmp_path / "adapter"), "--out", f"{name}.png", *arguments) == 0
    assert [len(offloader.blocks) for offloader in scrambled] == [3, 4]
    assert (tmp_path / "half.png").read_bytes() == (tmp_path / "plain.png").read_bytes()
    assert (tmp_path / "four.png").read_bytes() == (tmp_path / "plain.png").read_bytes()
    capsys.readouterr()
    for given, said in (
        ("6", "offload_blocks=6 is more than the model's 5 blocks"),
        ("1.5", "offload_blocks=1.5 must be"),
    ):
        assert command("--stream-blocks", given) == 2
        assert capsys.readouterr().err.startswith(f"error: {said}")


# ------------------------------------------------------------------ how a picture was made


def test_a_picture_is_made_again_from_what_it_says(command: Callable[..., int], tmp_path: Path) -> None:
    write_adapter(tmp_path / "lora")
    Image.new("RGB", (48, 32), "red").save(tmp_path / "a.png")
    arguments = ("--adapter", "lora:0.5", "--image", "a.png", "--guidance", "3.5", "--seed", "7")
    assert command(*arguments, "--out", "one.png") == 0
    record = metadata.read(tmp_path / "one.png", "one.png")
    assert (record.prompt, record.seed, record.width, record.height) == ("a cup", 7, 32, 32)
    assert (record.steps, record.guidance, record.precision, record.model) == (2, 3.5, "fp32", "tiny")
    assert [(adapter.path, adapter.scale) for adapter in record.adapters] == [("lora", 0.5)]
    assert record.adapters[0].sha256 == metadata.sha256(tmp_path / "lora" / "adapter_model.safetensors")
    assert [image.path for image in record.images] == ["a.png"]
    assert repeat("--from-image", "one.png", "--out", "two.png") == 0
    assert (tmp_path / "two.png").read_bytes() == (tmp_path / "one.png").read_bytes()
    for changed in (["--seed", "8"], ["--adapter", "lora:1.0"], ["--prompt", "a fox"], ["--steps", "3"]):
        assert repeat("--from-image", "one.png", "--out", "other.png", *changed) == 0
        assert np.abs(pixels(tmp_path / "other.png") - pixels(tmp_path / "one.png")).max() > 3, changed


def test_merged_adapters_make_the_picture_and_it_is_made_again_merged(
    command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_adapter(tmp_path / "lora")
    merges: list[bool] = []
    merge = adapters.merge
    monkeypatch.setattr(adapters, "merge", lambda model: (merges.append(True), merge(model)))
    assert command("--adapter", "lora:0.5", "--out", "beside.png") == 0
    assert not merges
    assert command("--adapter", "lora:0.5", "--merge", "--out", "merged.png") == 0
    assert len(merges) == 1
    assert np.abs(pixels(tmp_path / "merged.png") - pixels(tmp_path / "beside.png")).max() <= 1
    assert repeat("--from-image", "merged.png", "--out", "again.png") == 0
    assert len(merges) == 2
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "merged.png").read_bytes()
    assert repeat("--from-image", "merged.png", "--no-merge", "--out", "again.png") == 0
    assert len(merges) == 2
    capsys.readouterr()
    assert command("--merge") == 2
    assert "error: --merge has no effect without --adapter" in capsys.readouterr().err
    assert command("--merge", "--adapter", "lora", "--precision", "nf4") == 2
    assert "error: precision=nf4: adapters cannot be merged" in capsys.readouterr().err


def test_one_line_says_what_an_adapter_is_and_its_layers_are_listed_if_asked_for(
    command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_adapter(tmp_path / "lora")
    assert command("--adapter", "lora:0.5") == 0
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("adapter")]
    line = "adapter lora at scale 0.5: LoRA of rank 2 on 22 layers (16 in double blocks, 6 in single blocks)"
    assert said == [line]
    assert command("--adapter", "lora", "--verbose") == 0
    assert "  layers: double_blocks.N.img_attn.qkv, " in capsys.readouterr().err


def repeat(*arguments: str) -> int:
    """The command without a prompt or sizes of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["generate", "--device", "cpu", *arguments])
        return generate.main()


def test_a_file_that_has_changed_since_is_named(
    command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_adapter(tmp_path / "lora")
    Image.new("RGB", (48, 32), "red").save(tmp_path / "a.png")
    assert command("--adapter", "lora", "--image", "a.png", "--out", "one.png") == 0
    write_adapter(tmp_path / "lora", seed=1)
    assert repeat("--from-image", "one.png", "--out", "two.png") == 2
    assert "the adapter lora has changed. Give the original with --adapter" in capsys.readouterr().err
    assert repeat("--from-image", "one.png", "--out", "two.png", "--adapter", "lora") == 0
    Image.new("RGB", (48, 32), "blue").save(tmp_path / "a.png")
    assert repeat("--from-image", "one.png", "--out", "two.png", "--adapter", "lora") == 2
    assert "the reference a.png has changed" in capsys.readouterr().err
    (tmp_path / "a.png").unlink()
    assert repeat("--from-image", "one.png", "--out", "two.png", "--adapter", "lora") == 2
    assert "the reference a.png does not exist. Give it with --image" in capsys.readouterr().err


def test_without_metadata_the_file_says_nothing(
    command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("--no-metadata") == 0
    assert b"flux2-lora" not in (tmp_path / "out.png").read_bytes()
    assert repeat("--from-image", "out.png") == 2
    assert "--from-image out.png does not record how it was made" in capsys.readouterr().err
    assert command("--out", "out.jpg") == 0
    assert b"a cup" not in (tmp_path / "out.jpg").read_bytes()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no json", "is invalid"),
        ("[]", "is not an object"),
        ('{"model": "flux1"}', "model='flux1' must be one of"),
        ('{"model": "tiny", "other": 1}', "unknown: other"),
        ('{"model": "tiny", "precision": "fp32"}', "'prompt'"),
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
    assert error.startswith("error: --from-image bad.png: the record of how it was made is invalid")
    assert message in error


# ------------------------------------------------------------------ many pictures


def test_a_file_of_prompts_makes_what_its_lines_say(
    command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (48, 32), "red").save(tmp_path / "a.png")
    lines = [
        {"prompt": "a fox"},
        {"prompt": "a fox", "seed": 9, "width": 49, "out": "wide.png"},
        {"prompt": "at night", "images": ["a.png"], "steps": 3, "guidance": 2},
    ]
    text = "\n".join(json.dumps(line) for line in lines) + "\n\n"
    (tmp_path / "many.jsonl").write_text(text, "utf-8-sig")  # with the mark that Windows' editors put before it
    sizes = ("--width", "32", "--height", "32", "--steps", "2")
    assert repeat("--path", command.path, *sizes, "--prompts", "many.jsonl", "--seed", "5", "--out", "x/y.png") == 0
    printed = capsys.readouterr()
    assert printed.out.split() == ["x/y_000.png", "x/wide.png", "x/y_002.png"]
    assert "width=49 is not a multiple of 16: rounded to 48" in printed.err
    made = [metadata.read(tmp_path / file, file) for file in printed.out.split()]
    assert [(one.prompt, one.seed, one.width, one.steps) for one in made] == [
        ("a fox", 5, 32, 2),
        ("a fox", 9, 48, 2),
        ("at night", 7, 32, 3),
    ]
    assert (made[2].guidance, [image.path for image in made[2].images]) == (2, ["a.png"])
    assert repeat("--path", command.path, *sizes, "--prompt", "a fox", "--seed", "5", "--out", "alone.png") == 0
    assert (tmp_path / "alone.png").read_bytes() == (tmp_path / "x" / "y_000.png").read_bytes()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no lines"),
        ('{"prompt": "a"}\nnonsense', "line 2: "),
        ('["a"]', "line 1: ['a'] is not an object"),
        ('{"seed": 1}', "line 1: prompt=None must be a string"),
        ("[" * 100_000, "line 1: maximum recursion depth exceeded"),
        ('{"prompt": "a", "color": "red"}', "line 1: 'color' must be one of prompt, out, seed"),
        ('{"prompt": "a", "steps": 0}', "line 1: steps=0 must be at least 1"),
        ('{"prompt": "a", "seed": "x"}', "line 1: seed='x' must be a whole number"),
        ('{"prompt": "a", "width": 8}', "line 1: width=8 must be at least 16"),
        ('{"prompt": "a", "images": "a.png"}', "line 1: images='a.png' must be a list"),
        ('{"prompt": "a", "out": "b.png"}\n{"prompt": "b", "out": "b.png"}', "line 2: an earlier line writes b.png"),
        ('{"prompt": "a", "images": ["gone.png"]}', "--image gone.png does not exist"),
        ('{"prompt": "a", "out": "b.txt"}', "--out b.txt must end in a picture's extension"),
    ],
)
def test_a_wrong_line_is_named_before_anything_is_loaded(
    text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(generate, "load", lambda *_, **__: pytest.fail("a model was asked for"))
    (tmp_path / "many.jsonl").write_text(text)
    assert repeat("--prompts", "many.jsonl") == 2
    assert message in capsys.readouterr().err


def test_prompts_are_given_in_one_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        ([], "give --prompt, --prompts or --from-image"),
        (["--prompt", "a", "--prompts", "b"], "give --prompt or --prompts, not both"),
    ):
        with pytest.raises(SystemExit) as end:
            repeat(*arguments)
        assert end.value.code == 2
        assert message in capsys.readouterr().err
