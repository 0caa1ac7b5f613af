"""flux2.prompts.embeddings and flux2.prompts.saved: embeddings from a file are the encoder's, and a quantized encoder
is one.
"""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import helpers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import flux2
from flux2.generate import command as generate
from flux2.generate import metadata
from flux2.models.variants import VARIANTS
from flux2.pipeline import Pipeline
from flux2.prompts import embeddings as prompts
from flux2.prompts import saved
from flux2.prompts.embeddings import TextSource
from flux2.prompts.saved import SavedPrompts
from flux2.quantization.nf4 import Nf4Linear
from flux2.quantization.precision import Precision
from flux2.weights.loading import load_text_encoder
from flux2.weights.sources import ModelSource

SMALL: dict[str, Any] = {"width": 32, "height": 32, "steps": 1}


@pytest.fixture
def small(
    source: ModelSource, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> tuple[ModelSource, Callable[..., Pipeline]]:
    """A small model in the place of `tiny`, an empty folder, and what loads the model."""
    monkeypatch.setitem(VARIANTS, "tiny", source.variant)
    monkeypatch.chdir(tmp_path)
    return source, lambda **given: flux2.load("tiny", source.path, device="cpu", **given)


def command(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    sizes = [word for key, value in SMALL.items() for word in (f"--{key}", str(value))]
    monkeypatch.setattr(sys, "argv", ["generate", "--device", "cpu", *sizes, *words])
    return generate.main()


def differ(a: Any, b: Any) -> bool:
    return bool(np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max() > 0)


# ------------------------------------------------------------------ a file


def test_pictures_from_saved_embeddings_are_the_encoders_own(small, monkeypatch) -> None:
    source, load = small
    whole = load()
    whole.save_embeddings("deep/two.safetensors", ["a fox", "a cup", "a fox"])
    wanted = whole.generate(["a cup", "a fox"], seed=3, **SMALL)
    monkeypatch.setattr(prompts, "load_text_encoder", lambda *_: pytest.fail("a text encoder was loaded"))
    made = load(embeddings="deep/two.safetensors").generate(["a cup", "a fox"], seed=3, **SMALL)
    assert not any(differ(a, b) for a, b in zip(made, wanted, strict=True))
    has_empty = "" in SavedPrompts(Path("deep/two.safetensors"), source.variant).prompts
    assert has_empty == (not source.variant.transformer.guidance), "of guidance by two predictions"
    assert not list(Path("deep").glob(".*.part"))


def test_what_a_file_does_not_hold_is_named(small) -> None:
    _, load = small
    load().save_embeddings("one.safetensors", ["a cup"])
    pipe = load(embeddings="one.safetensors")
    with pytest.raises(ValueError, match=r"'one\.safetensors'.*'a fox'.*'a cup'"):
        pipe.generate("a fox", **SMALL)
    with pytest.raises(ValueError, match=r"\b\d+ tokens\b.*\b10\b"):
        pipe.encode(["a cup"], length=10)
    assert pipe.encode(["a cup"], length=pipe.variant.text.length).shape[0] == 1


def test_files_that_cannot_be_used_are_refused_when_the_model_is_asked_for(small) -> None:
    source, load = small
    other = helpers.VARIANTS["klein" if source.variant is helpers.VARIANTS["dev"] else "dev"]
    saved.write(Path("other.safetensors"), other, {"a cup": torch.zeros(2, 8)}, 2)
    save_file({"x": torch.zeros(1)}, "plain.safetensors")
    Path("broken.safetensors").write_text("nothing")
    load().save_embeddings("good.safetensors", ["a cup"])
    content = load_file("good.safetensors")
    for name, said in (
        ("gone", "--save-embeddings"),
        ("broken", ""),
        ("plain", "--save-embeddings"),
        ("other", "model"),
    ):
        with pytest.raises(ValueError, match=rf"\b{name}\.safetensors\b.*{said}"):
            load(embeddings=f"{name}.safetensors")
    for name, tensors, said in (
        ("short.safetensors", {}, r"short\.safetensors\b.*\b0 tensors"),
        ("bad.safetensors", {key: value * float("nan") for key, value in content.items()}, "NaN"),
    ):
        with open_about("good.safetensors") as about:
            save_file(tensors, name, about)
        with pytest.raises(ValueError, match=said):
            load(embeddings=name).encode(["a cup"])
    with open_about("good.safetensors") as about:
        save_file({key: value[:, :5].contiguous() for key, value in content.items()}, "narrow.safetensors", about)
        save_file(content, "number.safetensors", {**about, "prompts": str([5] * len(content))})
    for name, said in (
        ("narrow.safetensors", r"\[\d+, 5\]"),
        ("number.safetensors", r"\b5\b"),
    ):
        with pytest.raises(ValueError, match=rf"\b{name}\b.*{said}"):
            load(embeddings=name)


def open_about(file: str) -> Any:
    """A context with the metadata of `file`."""
    from contextlib import contextmanager

    from safetensors import safe_open

    @contextmanager
    def opened() -> Any:
        with safe_open(file, "pt") as inside:
            yield inside.metadata()

    return opened()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"text_storage": "nf4", "text_encoder": "http://127.0.0.1:1"},
            r"text_storage='nf4'.*http://127\.0\.0\.1:1\b",
        ),
        (
            {"text_storage": "nf4", "embeddings": "good.safetensors"},
            r"text_storage='nf4'.*good\.safetensors",
        ),
        (
            {"embeddings": "good.safetensors", "text_encoder": "http://127.0.0.1:1"},
            "(?s)embeddings.*text_encoder|text_encoder.*embeddings",
        ),
        (
            {"embeddings": "good.safetensors", "text_encoder": "folder"},
            "embeddings.*text_encoder|text_encoder.*embeddings",
        ),
        ({"text_storage": "fp8"}, "text_storage='fp8'.*nf4, int8"),
    ],
)
def test_places_that_contradict_each_other_are_refused(given, said, small) -> None:
    _, load = small
    load().save_embeddings("good.safetensors", ["a cup"])
    with pytest.raises(ValueError, match=said):
        load(**given)


# ------------------------------------------------------------------ a quantized encoder


@pytest.mark.parametrize("storage", ["nf4", "int8"])
def test_a_quantized_encoder_makes_the_embeddings_that_training_gets_of_it(storage, small, monkeypatch) -> None:
    source, load = small
    made: list[Any] = []
    monkeypatch.setattr(prompts, "load_text_encoder", lambda *given: made.append(load_text_encoder(*given)) or made[-1])
    pipe = load(text_storage=storage)
    found = pipe.encode(["a cup"])
    wanted = load_text_encoder(source, "cpu", torch.float32, storage)
    assert torch.equal(found, wanted.encode(["a cup"]))
    assert not torch.equal(found, load().encode(["a cup"]))
    linears = [m for m in made[0].model.layers.modules() if isinstance(m, torch.nn.Linear)]
    assert len(linears) == 7 * max(source.variant.text.layers), "only the layers that are read"
    assert (storage == "nf4") == all(isinstance(m, Nf4Linear) for m in linears)


# ------------------------------------------------------------------ the command


def test_the_command_saves_embeddings_and_draws_from_them(small, monkeypatch, capsys) -> None:
    source, _ = small
    path = ("--path", source.path)
    assert command(monkeypatch, *path, "--prompt", "a cup", "--out", "near.png") == 0
    capsys.readouterr()
    assert command(monkeypatch, *path, "--prompt", "a cup", "--save-embeddings", "e.safetensors") == 0
    assert capsys.readouterr().out == "e.safetensors\n"
    assert not Path("out.png").exists()
    monkeypatch.setattr(prompts, "load_text_encoder", lambda *_: pytest.fail("a text encoder was loaded"))
    assert command(monkeypatch, *path, "--prompt", "a cup", "--embeddings", "e.safetensors", "--out", "far.png") == 0
    assert not differ(pixels("near.png"), pixels("far.png"))
    record = metadata.read(Path("far.png"), "far.png")
    assert record.embeddings == metadata.NamedFile("e.safetensors", metadata.sha256(Path("e.safetensors")))
    assert command(monkeypatch, "--from-image", "far.png", "--out", "again.png") == 0
    assert Path("again.png").read_bytes() == Path("far.png").read_bytes()
    Path("e.safetensors").rename("moved.safetensors")
    assert command(monkeypatch, "--from-image", "far.png", "--out", "again.png") == 2
    assert re.search(r"far\.png\b.*\be\.safetensors\b.*--embeddings", capsys.readouterr().err)
    again = ("--from-image", "far.png", "--out", "moved.png", "--overwrite")
    assert command(monkeypatch, *again, "--embeddings", "moved.safetensors") == 0
    assert not differ(pixels("moved.png"), pixels("far.png"))
    monkeypatch.setattr(prompts, "load_text_encoder", load_text_encoder)
    assert command(monkeypatch, *again, "--text-encoder", source.path) == 0
    assert not differ(pixels("moved.png"), pixels("far.png"))


def pixels(file: str) -> Any:
    from PIL import Image

    with Image.open(file) as image:
        return np.asarray(image)


def test_a_picture_says_how_its_text_encoder_was_kept(small, monkeypatch, tmp_path) -> None:
    source, _ = small
    assert command(monkeypatch, "--path", source.path, "--prompt", "a cup", "--text-storage", "nf4") == 0
    assert metadata.read(tmp_path / "out.png", "out.png").text_storage == "nf4"
    assert command(monkeypatch, "--from-image", "out.png", "--out", "again.png") == 0
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "out.png").read_bytes()
    assert command(monkeypatch, "--from-image", "out.png", "--out", "other.png", "--text-storage", "int8") == 0
    assert metadata.read(tmp_path / "other.png", "x").text_storage == "int8"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ("--save-embeddings", "e.safetensors", "--embeddings", "f.safetensors"),
            r"--save-embeddings\b.*--embeddings\b",
        ),
        (("--save-embeddings", "e.pt"), r"--save-embeddings[= ]e\.pt\b.*\.safetensors"),
        (("--save-embeddings", "e.pt/e.safetensors"), r"--save-embeddings[= ]e\.pt/e\.safetensors\b.*\be\.pt "),
        (("--save-embeddings", f"{'e' * 240}.safetensors"), r"--save-embeddings\b.*File name too long"),
        (("--save-embeddings", "e.safetensors", "--adapter", "a"), r"--adapter\b.*--save-embeddings\b"),
        (("--save-embeddings", "e.safetensors", "--merge"), r"--merge\b.*--save-embeddings\b"),
        (("--save-embeddings", "e.safetensors", "--image", "a.png"), r"--image\b.*--save-embeddings\b"),
        (("--embeddings", "gone.safetensors"), r"\bgone\.safetensors\b"),
    ],
)
def test_options_that_cannot_be_are_one_line(words, said, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "e.pt").write_text("a file, and no folder")
    assert command(monkeypatch, "--prompt", "a cup", *words) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert re.search(said, err)
    assert err.count("\n") == 1


def test_a_pipeline_keeps_its_encoder_only_if_it_is_told_to(source) -> None:
    for keep in (False, True):
        pipe = Pipeline(source, torch.device("cpu"), Precision(), keep, text=TextSource(storage="int8"))
        pipe.encode(["a cup"])
        assert (pipe.prompts.encoder is not None) == keep
        assert pipe.prompts.text.storage == "int8"
