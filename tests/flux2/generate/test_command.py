"""python -m flux2.generate: writes the pictures of the pipeline, and makes them again from what they say."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch
from adapter_helpers import write_adapter
from generate_helpers import repeat
from PIL import Image
from remote_helpers import SECRET, FakeServer
from safetensors.torch import load_file, save_file

from flux2 import adapters
from flux2.generate import metadata
from flux2.memory.block_offload import Offloader
from flux2.prompts import embeddings as prompts
from flux2.prompts.remote_client import TOKEN
from flux2.utils.cli import split_adapter
from flux2.weights.loading import load_text_encoder
from flux2.weights.sources import ModelSource

pytest_plugins = ("offload_helpers", "remote_helpers")


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
    assert TOKEN in capsys.readouterr().err
    monkeypatch.setenv(TOKEN, SECRET)
    assert command("--prompt", "a fox", "--text-encoder", f"{server.url}/", "--out", "far.png") == 0
    for number in ("000", "001"):
        assert (pixels(tmp_path / f"far_{number}.png") == pixels(tmp_path / f"near_{number}.png")).all()
        assert metadata.read(tmp_path / f"far_{number}.png", "far").text_encoder == f"{server.url}/"
    assert server.given == ["a cup", "a fox"]
    capsys.readouterr()
    headers = len(server.headers)
    again = ("--from-image", "far_000.png", "--out", "repeated.png")  # it may be someone else's image
    assert repeat(*again) == 2
    assert re.search(rf"--from-image far_000\.png .*{server.url}.*--text-encoder", capsys.readouterr().err)
    assert len(server.headers) == headers
    assert repeat(*again, "--text-encoder", server.url) == 0
    assert len(server.headers) > headers


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
    assert split_adapter("a/b:0.7") == ("a/b", 0.7, "")
    assert split_adapter("a/b:-1") == ("a/b", -1.0, "")
    assert split_adapter("run:2") == ("run:2", 1.0, "")
    assert split_adapter("run:2:0.5") == ("run:2", 0.5, "")
    assert split_adapter("C:/adapters") == ("C:/adapters", 1.0, "")
    assert split_adapter("C:/adapters=1") == ("C:/adapters=1", 1.0, "")
    assert split_adapter("run:2:0.5,single=0,time.0.5-1=2") == ("run:2", 0.5, "single=0,time.0.5-1=2")
    assert split_adapter("C:/a:double.0-3=0.5,single=0") == ("C:/a", 1.0, "double.0-3=0.5,single=0")
    assert split_adapter("a/b:-100") == ("a/b", -100.0, "")


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("a/b:nan", "--adapter a/b:nan: the scale nan must be a finite number"),
        ("a/b:,double=0.5", "there is no scale before the comma. Write a/b:double=0.5"),
    ],
)
def test_a_scale_that_is_not_finite_or_left_out_is_named(option: str, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        split_adapter(option)


def test_a_clear_reference_is_the_white_that_training_saw(
    command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGBA", (32, 32), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert command("--image", "clear.png") == 2
    assert re.search(r"error: --image clear\.png\b.*transparent everywhere", capsys.readouterr().err)
    for name, color in (("clear", (0, 0, 0, 0)), ("white", "white"), ("black", "black")):
        image = Image.new("RGBA", (32, 32), color)
        image.putpixel((0, 0), (0, 0, 0, 255) if name == "black" else (255, 255, 255, 255))
        image.save(tmp_path / f"{name}.png")
        assert command("--image", f"{name}.png", "--out", f"{name}_out.png") == 0
    made = {name: pixels(tmp_path / f"{name}_out.png") for name in ("clear", "white", "black")}
    assert (made["clear"] == made["white"]).all()
    assert np.abs(made["clear"] - made["black"]).max() > 3


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
    for given, said in (("6", r"offload_blocks=6\b.* 5 blocks"), ("1.5", r"offload_blocks=1\.5\b")):
        assert command("--stream-blocks", given) == 2
        assert re.search(rf"error: .*{said}", capsys.readouterr().err)


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
        assert repeat("--from-image", "one.png", "--out", "other.png", "--overwrite", *changed) == 0
        assert np.abs(pixels(tmp_path / "other.png") - pixels(tmp_path / "one.png")).max() > 3, changed


def test_strengths_by_block_and_time_are_used_and_recorded(
    command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_adapter(tmp_path / "lora")
    given = {
        "whole": "lora:0.5",
        "blocks": "lora:0.5,double=0,single.1-2=2",
        "late": "lora:0.5,time.0.9-1=0",
        "none": "lora:double=0,single=0",
    }
    for name, adapter in given.items():
        assert command("--adapter", adapter, "--out", f"{name}.png") == 0
    assert "adapter lora at scale 0.5, time.0.9-1=0: LoRA" in capsys.readouterr().err
    assert command("--out", "plain.png") == 0
    made = {name: pixels(tmp_path / f"{name}.png") for name in (*given, "plain")}
    assert (made["none"] == made["plain"]).all()
    names = ["whole", "blocks", "late", "plain"]
    for i, name in enumerate(names):
        for other in names[:i]:
            assert np.abs(made[name] - made[other]).max() > 3, (name, other)
    for name in ("blocks", "late"):
        assert repeat("--from-image", f"{name}.png", "--out", f"{name}_again.png") == 0
        assert (tmp_path / f"{name}_again.png").read_bytes() == (tmp_path / f"{name}.png").read_bytes()


def test_models_that_changed_since_are_named(
    command: Callable[..., int],
    model_folders: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(model_folders("dev"), tmp_path / "base")
    assert command("--path", "base", "--out", "one.png") == 0
    assert repeat("--from-image", "one.png", "--out", "two.png") == 0
    assert "changed since" not in capsys.readouterr().err
    for part in ("transformer", "vae"):
        file = sorted((tmp_path / "base" / part).glob("*.safetensors"))[0]
        save_file({name: 1.1 * tensor for name, tensor in load_file(file).items()}, file)
    assert repeat("--from-image", "one.png", "--out", "three.png") == 0
    assert "--from-image one.png: transformer and autoencoder changed since" in capsys.readouterr().err
    assert repeat("--from-image", "one.png", "--path", "base", "--out", "four.png") == 0
    assert "changed since" not in capsys.readouterr().err


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
    assert repeat("--from-image", "merged.png", "--no-merge", "--out", "plain.png") == 0
    assert len(merges) == 2
    capsys.readouterr()
    assert command("--merge") == 2
    assert re.search("error: .*--merge.*--adapter", capsys.readouterr().err)
    assert command("--merge", "--adapter", "lora", "--precision", "nf4") == 2
    assert re.search("error: .*precision=nf4.*merge", capsys.readouterr().err)


def test_one_line_says_what_an_adapter_is_and_its_layers_are_listed_if_asked_for(
    command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_adapter(tmp_path / "lora")
    assert command("--adapter", "lora:0.5") == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "lora" in line]
    assert len(said) == 1
    for words in (
        r"\blora\b",
        r"\b0\.5\b",
        r"\bLoRA\b",
        r"rank 2\b",
        r"\b22 layers",
        r"\b16\b.*double",
        r"\b6\b.*single",
    ):
        assert re.search(words, said[0]), words
    assert "img_attn" not in said[0]
    assert command("--adapter", "lora", "--verbose", "--overwrite") == 0
    assert "double_blocks.N.img_attn.qkv, " in capsys.readouterr().err


def test_without_metadata_the_file_says_nothing(
    command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("--no-metadata") == 0
    assert b"flux2-lora" not in (tmp_path / "out.png").read_bytes()
    assert repeat("--from-image", "out.png") == 2
    assert re.search(r"--from-image[= ]out\.png.*--no-metadata", capsys.readouterr().err)
    assert command("--out", "out.jpg") == 0
    assert b"a cup" not in (tmp_path / "out.jpg").read_bytes()


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
    assert re.search(r"width=49\b.*\b16\b.*\b48\b", printed.err)
    made = [metadata.read(tmp_path / file, file) for file in printed.out.split()]
    assert [(one.prompt, one.seed, one.width, one.steps) for one in made] == [
        ("a fox", 5, 32, 2),
        ("a fox", 9, 48, 2),
        ("at night", 7, 32, 3),
    ]
    assert (made[2].guidance, [image.path for image in made[2].images]) == (2, ["a.png"])
    assert repeat("--path", command.path, *sizes, "--prompt", "a fox", "--seed", "5", "--out", "alone.png") == 0
    assert (tmp_path / "alone.png").read_bytes() == (tmp_path / "x" / "y_000.png").read_bytes()


def test_a_model_for_which_int8_is_inexact_is_named(command, capsys, monkeypatch):
    assert command("--precision", "int8", "--out", "exact.png") == 0
    assert "inexact" not in capsys.readouterr().err
    monkeypatch.setattr("flux2.quantization.int8.COARSE", 60)
    assert command("--precision", "int8", "--out", "inexact.png") == 0
    assert re.search(r"warning: int8 is inexact for double_blocks.*--precision fp8 or bf16", capsys.readouterr().err)
