"""flux2.pipeline: the pictures of Flux2Pipeline and Flux2KleinPipeline from the same noise, loaded part by part."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import helpers
import numpy as np
import pytest
import torch
from diffusers import Flux2KleinPipeline, Flux2Pipeline
from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
from PIL import Image
from pipeline_helpers import difference, picture, pipeline

import flux2
from flux2 import pipeline as pipeline_module
from flux2.models.pixels import reference_image, to_pixels
from flux2.models.variants import VARIANTS
from flux2.pipeline import Pipeline
from flux2.prompts import embeddings as prompts
from flux2.sampling import initial_noise
from flux2.utils.device import pick_device
from flux2.weights.sources import ModelSource

pytest_plugins = ("pipeline_helpers",)

PROMPTS = ["a small red fox", "the tarot card"]
REFERENCES = {0: [], 1: [picture(80, 64)], 2: [picture(64, 96, 1), picture(100, 70, 2)]}


def kind_of(source: ModelSource) -> str:
    return source.variant.name.removeprefix("small_")


def published_pictures(kind: str, prompts: list[str], noise: torch.Tensor, **options: Any) -> list[Image.Image]:
    parts, text = helpers.reference_parts(kind), helpers.TEXTS[kind]
    made = Flux2Pipeline(**parts) if kind == "dev" else Flux2KleinPipeline(**parts, is_distilled=False)
    made.set_progress_bar_config(disable=True)
    return made(
        prompt=prompts,
        latents=noise,
        max_sequence_length=text.length,
        text_encoder_out_layers=text.layers,
        **options,
    ).images


# ------------------------------------------------------------------ the same pictures


@pytest.mark.parametrize("references", [0, 1, 2])
def test_pictures_are_those_of_diffusers_from_the_same_noise(source: ModelSource, references: int) -> None:
    """Two prompts, a picture that is not square, references of different sizes, klein with guidance by two passes."""
    wanted = published_pictures(
        kind_of(source),
        PROMPTS,
        initial_noise([7, 8], 2, 3),
        image=REFERENCES[references] or None,
        width=48,
        height=32,
        num_inference_steps=3,
        guidance_scale=4.0,
    )
    ours = pipeline(source).generate(PROMPTS, references=REFERENCES[references], seed=7, width=48, height=32)
    assert [image.size for image in ours] == [(48, 32)] * 2
    assert difference(ours, wanted) <= 2
    inside = np.asarray(ours[0])
    assert ((inside > 0) & (inside < 255)).mean() > 0.5, "the comparison says nothing of clipped pictures"
    assert difference(ours[:1], ours[1:]) > 50


def test_a_distilled_model_is_sampled_without_classifier_free_guidance(model_folders: Callable[[str], Path]) -> None:
    source = ModelSource(helpers.VARIANTS["klein"], str(model_folders("klein")))
    wanted = published_pictures(
        "klein", PROMPTS[:1], initial_noise([0], 2, 2), width=32, height=32, num_inference_steps=4, guidance_scale=1.0
    )
    assert difference(pipeline(source).generate(PROMPTS[0], width=32, height=32, steps=4, guidance=1.0), wanted) <= 2


def test_references_guidance_steps_and_prompt_all_change_the_picture(model_folders: Callable[[str], Path]) -> None:
    pipe = pipeline(ModelSource(helpers.VARIANTS["dev"], str(model_folders("dev"))))
    options: dict[str, Any] = {"width": 32, "height": 32}
    base = pipe.generate(PROMPTS[0], **options)
    for change in ({"references": REFERENCES[1]}, {"guidance": 1.0}, {"steps": 2}, {"prompt": "a cup"}, {"seed": 1}):
        arguments: dict[str, Any] = {"prompt": PROMPTS[0], **options, **change}
        assert difference(base, pipe.generate(**arguments)) > 2, change


@pytest.mark.parametrize("size", [(64, 64), (100, 70), (95, 113), (1500, 900), (2048, 1024), (900, 2300)])
def test_references_are_shrunk_and_cut_as_in_diffusers(size: tuple[int, int]) -> None:
    processor = Flux2ImageProcessor()
    image = shrunk = picture(*size)
    if size[0] * size[1] > 1024 * 1024:
        shrunk = processor._resize_to_target_area(image, 1024 * 1024)
    width, height = (side // 16 * 16 for side in shrunk.size)
    wanted = processor.preprocess(shrunk, height=height, width=width, resize_mode="crop")
    ours = to_pixels([reference_image(image, 1024 * 1024)])
    assert ours.shape == wanted.shape
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-6)


def test_a_reference_of_exactly_the_limit_after_shrinking_loses_no_token() -> None:
    assert reference_image(Image.new("RGB", (3000, 3000)), 1024**2).size == (1024, 1024)


def test_a_reference_smaller_than_a_token_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"12 x 40 pixels"):
        reference_image(Image.new("RGB", (12, 40)), 1024**2)


def test_one_reference_may_have_more_pixels_than_one_of_several(
    model_folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[int] = []

    def spy(image: Image.Image, max_pixels: int) -> Image.Image:
        limits.append(max_pixels)
        return image

    monkeypatch.setattr(pipeline_module, "reference_image", spy)
    pipe = pipeline(ModelSource(helpers.VARIANTS["dev"], str(model_folders("dev"))))
    pipe.encode_references([picture(32, 32)])
    latents = pipe.encode_references([picture(32, 32), picture(48, 32)])
    assert limits == [2024**2, 1024**2, 1024**2]
    assert [latent.shape for latent in latents] == [(1, 128, 2, 2), (1, 128, 2, 3)]


# ------------------------------------------------------------------ what a picture depends on


def test_a_picture_depends_on_its_own_prompt_and_seed_alone(pipe: Pipeline) -> None:
    prompts = ["a cup", "a fox", "a cup"]
    options: dict[str, Any] = {"width": 32, "height": 32}
    together = pipe.generate(prompts, seed=4, **options)
    for i, prompt in enumerate(prompts):
        assert difference(pipe.generate(prompt, seed=4 + i, **options), together[i : i + 1]) <= 1
    assert difference(pipe.generate(prompts, seed=[4, 5, 6], batch_size=2, **options), together) <= 1
    same = pipe.generate(prompts, seed=[4, 5, 4], **options)
    assert difference(same[:1], same[2:]) <= 1
    assert difference(together[:1], together[2:]) > 50


def test_the_size_is_the_first_references_else_the_models(pipe: Pipeline) -> None:
    assert pipe.generate("a cup", steps=1)[0].size == (64, 64)
    assert pipe.generate("a cup", steps=1, references=[picture(85, 40), picture(32, 64)])[0].size == (80, 32)
    assert pipe.generate("a cup", steps=1, references=[picture(85, 40)], width=16)[0].size == (16, 32)


def test_progress_is_called_once_a_step(pipe: Pipeline) -> None:
    shapes: list[torch.Size] = []
    pipe.generate("a cup", steps=3, width=32, height=48, progress=lambda tokens: shapes.append(tokens.shape))
    assert shapes == [(1, 6, 128)] * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 100}, r"width=100\b.*\b16$"),
        ({"height": 0}, r"height=0\b.*\b16$"),
        ({"width": -32}, r"width=-32\b.*\b16$"),
        ({"seed": [1, 2]}, r"seed\b.*\b2\b.*\b1\b"),
        ({"seed": 1.5}, r"seed=1\.5\b"),
        ({"prompt": []}, r"prompt\b.*empty"),
        ({"prompt": None}, r"prompt=None\b"),
        ({"references": "a.png"}, r"references\b.*\bstr\b"),
        ({"references": Image.new("RGB", (32, 32))}, r"references\b.*\bImage\b"),
        ({"references": ["a.png"]}, r"references\b.*'a\.png'.*\bstr\b"),
        ({"width": 32.0}, r"width=32\.0\b"),
        ({"steps": 0}, r"steps=0\b"),
        ({"steps": "4"}, r"steps='4'"),
        ({"guidance": float("nan")}, r"guidance=nan\b"),
        ({"guidance": "4"}, r"guidance='4'"),
        ({"length": 0}, r"length=0\b"),
        ({"length": 2.5}, r"length=2\.5\b"),
        ({"batch_size": 0}, r"batch_size=0\b"),
    ],
)
def test_what_cannot_be_generated_is_refused_before_anything_is_loaded(
    options: dict[str, Any], message: str, pipe: Pipeline
) -> None:
    arguments: dict[str, Any] = {"prompt": "a cup", **options}
    with pytest.raises((ValueError, TypeError), match=message):
        pipe.generate(**arguments)
    assert pipe.prompts.encoder is None
    assert "transformer" not in vars(pipe)


def test_whole_numbers_of_numpy_are_taken(pipe: Pipeline) -> None:
    ours = pipe.generate("a cup", seed=np.int64(3), width=np.int32(16), height=16, steps=np.int64(1))
    assert difference(ours, pipe.generate("a cup", seed=3, width=16, height=16, steps=1)) == 0


def test_prompts_that_are_cut_are_told_once_with_their_number(pipe: Pipeline, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        pipe.encode(["a cup", "fox " * 100, "cup " * 100])
    (record,) = caplog.records
    assert re.search(r"\b24 tokens\b", record.getMessage())
    assert re.search(r"\b2 prompts\b.*'fox fox", record.getMessage())


def test_prompts_to_encode_are_checked(pipe: Pipeline) -> None:
    assert pipe.encode("a cup").shape[0] == 1
    with pytest.raises(ValueError, match=r"prompts\b.*empty"):
        pipe.encode([])
    with pytest.raises(ValueError, match=r"length=0\b"):
        pipe.encode(["a cup"], length=0)


# ------------------------------------------------------------------ loading


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Records which parts are loaded."""
    seen: list[str] = []
    for part, module in (("text_encoder", prompts), ("autoencoder", pipeline_module), ("transformer", pipeline_module)):
        function = getattr(module, f"load_{part}")

        def spy(*arguments: Any, part: str = part, function: Any = function, **options: Any) -> Any:
            seen.append(part)
            return function(*arguments, **options)

        monkeypatch.setattr(module, f"load_{part}", spy)
    return seen


def test_the_text_encoder_is_loaded_once_before_the_rest_and_freed(source: ModelSource, loads: list[str]) -> None:
    pipe = pipeline(source, keep=False)
    pipe.generate(PROMPTS, steps=1, width=16, height=16)
    assert sorted(loads) == ["autoencoder", "text_encoder", "transformer"], "the empty prompt is encoded along"
    assert loads[0] == "text_encoder"
    assert pipe.prompts.encoder is None
    pipe.generate(PROMPTS[1], steps=1, width=16, height=16)
    assert len(loads) == 3, "a known prompt needs no text encoder"
    pipe.generate("a cup", steps=1, width=16, height=16)
    assert loads[3:] == ["text_encoder"]


def test_embeddings_are_equal_whether_known_or_not(pipe: Pipeline) -> None:
    first = pipe.encode(["a cup", "a fox"])
    assert torch.equal(pipe.encode(["a fox", "a cup", "a fox"]), first[[1, 0, 1]])
    assert pipe.encode(["a cup"], length=10).shape[1] == 10


def test_load_finds_a_model_by_name_and_path(
    model_folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(VARIANTS, "tiny", helpers.VARIANTS["dev"])
    loaded = flux2.load("tiny", model_folders("dev"))  # a Path, and below a text
    assert (loaded.device.type, loaded.precision.dtype) == (
        ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    )
    loaded = flux2.load("tiny", str(model_folders("dev")), device="cpu", precision="bf16")
    assert loaded.transformer.img_in.weight.dtype == torch.bfloat16
    assert loaded.autoencoder.bn.running_mean is not None
    assert loaded.autoencoder.bn.running_mean.dtype == torch.float32
    exact = flux2.load("tiny", str(model_folders("dev")), device="cpu", precision="fp32")
    options: dict[str, Any] = {"width": 32, "height": 32, "steps": 2}
    rounded = np.asarray(loaded.generate("a cup", **options)[0], dtype=float)
    assert np.abs(rounded - np.asarray(exact.generate("a cup", **options)[0], dtype=float)).mean() < 8


def test_a_gpu_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device(None).type == "cpu"
    with pytest.raises(ValueError, match=r"device='?cuda\b.*device=cpu"):
        pick_device("cuda")
    with pytest.raises(ValueError, match=r"device='?gpu\b.*cuda, cuda:1 or cpu"):
        pick_device("gpu")
    for name in ("meta", "mps", "xla"):
        with pytest.raises(ValueError, match=rf"device='?{name}\b.*cuda, cuda:1 or cpu"):
            pick_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device(None).type == "cuda"
    assert pick_device("cuda:1").index == 1
    with pytest.raises(ValueError, match=r"device='?cuda:2\b.*\b2 GPUs"):
        pick_device("cuda:2")
