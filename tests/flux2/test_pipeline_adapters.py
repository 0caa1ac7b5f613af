"""flux2.pipeline: adapters that add up, merge or are refused, and pixels that are pictures."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import helpers
import numpy as np
import pytest
import torch
from adapter_helpers import attached, base, stirred, write_adapter
from pipeline_helpers import difference, picture

from flux2 import adapters
from flux2.models.pixels import to_images, to_pixels
from flux2.pipeline import Pipeline
from flux2.quantization.precision import Precision
from flux2.weights.sources import ModelSource

pytest_plugins = ("pipeline_helpers",)


def test_adapters_change_the_picture_and_add_up(pipe: Pipeline, tmp_path: Path) -> None:
    for i in range(2):
        write_adapter(tmp_path / str(i), i, "klein")
    options: dict[str, Any] = {"prompt": "a cup", "width": 32, "height": 32}
    pictures = [pipe.generate(**options)]
    for i in range(2):
        pipe.load_adapter(tmp_path / str(i))
        pictures.append(pipe.generate(**options))
    assert min(difference(pictures[i], pictures[j]) for i, j in ((0, 1), (1, 2), (0, 2))) > 10
    with adapters.adapters_disabled(pipe.transformer):
        assert difference(pipe.generate(**options), pictures[0]) == 0
    pipe.load_adapter(tmp_path / "1", scale=-1.0)
    assert difference(pipe.generate(**options), pictures[1]) <= 1, "once and minus once is nothing"


def test_merged_adapters_make_the_same_picture_in_plain_layers(pipe: Pipeline, tmp_path: Path) -> None:
    options: dict[str, Any] = {"prompt": "a cup", "width": 32, "height": 32}
    with pytest.raises(ValueError, match="adapter"):
        pipe.merge_adapters()
    base = pipe.generate(**options)
    for i in range(2):
        write_adapter(tmp_path / str(i), i, "klein")
        pipe.load_adapter(tmp_path / str(i), 0.5)
    beside = pipe.generate(**options)
    pipe.merge_adapters()
    assert not any("lora_" in name for name, _ in pipe.transformer.named_parameters())
    assert difference(pipe.generate(**options), beside) <= 1
    assert difference(pipe.generate(**options), base) > 10
    pipe.load_adapter(tmp_path / "0", -0.5)
    pipe.load_adapter(tmp_path / "1", -0.5)
    assert difference(pipe.generate(**options), base) <= 1, "others can be loaded on top"


def test_what_is_loaded_is_listed_rescaled_and_unloaded(pipe: Pipeline, tmp_path: Path) -> None:
    options: dict[str, Any] = {"prompt": "a cup", "width": 32, "height": 32, "steps": 2}
    base = pipe.generate(**options)
    assert pipe.adapters == []
    for i in range(2):
        write_adapter(tmp_path / str(i), i, "klein")
    first = pipe.load_adapter(tmp_path / "0", 0.5)
    alone = pipe.generate(**options)
    second = pipe.load_adapter(tmp_path / "1", ranges="single=0.5,time.0-0.5=0")
    listed = [(one.name, one.path, one.scale, one.ranges, one.kind, one.ranks[0]) for one in pipe.adapters]
    assert listed == [
        (first.name, str(tmp_path / "0"), 0.5, "", "LoRA", 2),
        (second.name, str(tmp_path / "1"), 1.0, "single=0.5,time.0-0.5=0", "LoRA", 2),
    ]
    both = pipe.generate(**options)
    assert difference(both, alone) > 3
    pipe.set_adapter_scale(second.name, 0)
    assert pipe.adapters[1].scale == 0
    assert difference(pipe.generate(**options), alone) <= 1
    pipe.set_adapter_scale(second.name, 1)
    assert difference(pipe.generate(**options), both) == 0
    pipe.unload_adapter(second.name)
    assert difference(pipe.generate(**options), alone) == 0
    pipe.unload_adapter(first.name)
    assert difference(pipe.generate(**options), base) == 0
    for refused in (lambda: pipe.unload_adapter(first.name), lambda: pipe.set_adapter_scale("style", 1)):
        with pytest.raises(ValueError, match=r"is not loaded\. Loaded are: none"):
            refused()
    third = pipe.load_adapter(tmp_path / "0", 0.5)
    assert third.name not in (first.name, second.name)
    with pytest.raises(ValueError, match=r"scale=nan"):
        pipe.set_adapter_scale(third.name, float("nan"))
    assert difference(pipe.generate(**options), alone) == 0
    pipe.merge_adapters()
    assert pipe.adapters == []
    with pytest.raises(ValueError, match="there is no adapter to merge"):
        pipe.merge_adapters()


def test_an_oft_cannot_be_rescaled_and_a_time_cannot_be_merged(pipe: Pipeline, tmp_path: Path) -> None:
    adapters.save(stirred(attached("oft", base())), tmp_path / "oft", base="small")
    oft = pipe.load_adapter(tmp_path / "oft")
    with pytest.raises(ValueError, match=r"scale=0\.5: an OFT"):
        pipe.set_adapter_scale(oft.name, 0.5)
    pipe.unload_adapter(oft.name)
    write_adapter(tmp_path / "lora", 0, "klein")
    pipe.load_adapter(tmp_path / "lora", ranges="time.0-0.5=0")
    with pytest.raises(ValueError, match=r"cannot merge adapter_1: its strength depends on the time"):
        pipe.merge_adapters()
    assert len(pipe.adapters) == 1
    with pytest.raises(ValueError, match=r"ranges=double\.7=1"):
        pipe.load_adapter(tmp_path / "lora", ranges="double.7=1")


@pytest.mark.parametrize(
    ("storage", "streamed", "message"),
    [
        ("nf4", 0, "precision=nf4.*precision=bf16 or fp32"),
        ("fp8", 0, "precision=fp8.*precision=bf16 or fp32"),
        ("int8", 0, "precision=int8.*precision=bf16 or fp32"),
        (None, 1, r"merge.*offload_blocks=0\b"),
    ],
)
def test_what_cannot_be_merged_into_is_refused_before_anything_is_loaded(
    storage: Any, streamed: int, message: str, model_folders: Callable[[str], Path]
) -> None:
    source = ModelSource(helpers.VARIANTS["klein"], str(model_folders("klein")))
    precision = Precision(torch.bfloat16, storage) if storage else Precision()
    pipe = Pipeline(source, torch.device("cpu"), precision, False, streamed)
    with pytest.raises(ValueError, match=message):
        pipe.merge_adapters()
    assert "transformer" not in vars(pipe)


def test_an_adapter_that_cannot_be_used_leaves_the_pipeline_as_it_was(pipe: Pipeline, tmp_path: Path) -> None:
    model = helpers.transformer("klein")
    wrapped = adapters.attach(model, rank=2)
    adapters.save(wrapped, tmp_path / "good", base="small")
    next(iter(adapters.adapter_parameters(model))).data.fill_(float("nan"))
    adapters.save(wrapped, tmp_path / "bad", base="small")
    options: dict[str, Any] = {"prompt": "a cup", "width": 16, "height": 16, "steps": 1}
    before = pipe.generate(**options)
    wrong: tuple[tuple[str, Any, type[Exception], str], ...] = (
        ("good", "0.5", TypeError, r"scale='0\.5'"),
        ("good", None, TypeError, r"scale=None\b"),
        ("good", float("nan"), ValueError, r"scale=nan\b"),
        ("bad", 1.0, ValueError, r"/bad\b.*NaN"),
    )
    for name, scale, kind, message in wrong:
        with pytest.raises(kind, match=message):
            pipe.load_adapter(tmp_path / name, scale)
    assert difference(pipe.generate(**options), before) == 0
    pipe.load_adapter(tmp_path / "good", np.float32(0.5))
    assert difference(pipe.generate(**options), before) == 0, "a fresh adapter changes nothing"


def test_pixels_that_are_not_finite_are_no_picture() -> None:
    for value in (float("nan"), float("inf")):
        pixels = torch.zeros(1, 3, 16, 16)
        pixels[0, 1, 2, 3] = value
        with pytest.raises(ValueError, match="NaN"):
            to_images(pixels)


def test_pixels_and_pictures_are_inverse_and_clip() -> None:
    images = [picture(32, 16, seed) for seed in range(2)]
    pixels = to_pixels(images)
    assert pixels.shape == (2, 3, 16, 32)
    assert pixels.min() == -1
    assert pixels.max() == 1
    assert difference(to_images(pixels), images) == 0
    assert (
        difference(
            to_images(pixels * 3),
            [image.point(lambda v: min(max(round((v - 127.5) * 3 + 127.5), 0), 255)) for image in images],
        )
        <= 1
    )
