"""The same prompt, seed, references and adapter give diffusers' picture, to 2/255: `flux2.load` beside its pipelines.

On the embedded model, and on a small random klein that diffusers itself wrote; both sides load the same folder. In
diffusers every picture of a batch has a generator of its own, as every picture here has a seed of its own.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import helpers
import numpy as np
import pytest
import torch
from diffusers import Flux2KleinPipeline, Flux2Pipeline
from foreign_adapters import WRITERS, write
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import flux2
from data.synthetic.drawings import Drawing, draw
from flux2 import adapters
from flux2.models.variants import VARIANTS, Variant
from flux2.weights.sources import TINY_FOLDER

PROMPTS = ["a small red cup on a blue background", "a large green fish on a yellow background"]
REFERENCES = [
    draw(Drawing("star", "red", "blue", "large")),
    draw(Drawing("cup", "green", "white", "small")).resize((96, 128)),
    draw(Drawing("fish", "yellow", "pink", "large")).resize((80, 64)),
]
SEEDS = [3, 11]


class Both:
    """A model here and in diffusers, from one folder, with one adapter at hand."""

    def __init__(self, model: Variant, folder: Path, theirs: Any, adapter: Path, **options: Any) -> None:
        self.model, self.folder, self.theirs, self.adapter, self.options = model, folder, theirs, adapter, options
        self.ours = flux2.load("tiny", folder, device="cpu", precision="fp32", keep_text_encoder=True)
        theirs.set_progress_bar_config(disable=True)

    def in_diffusers(self, prompts: list[str], seeds: list[int], **options: Any) -> np.ndarray:
        images = self.theirs(
            prompt=prompts,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            max_sequence_length=self.model.text.length,
            text_encoder_out_layers=self.model.text.layers,
            **self.options,
            **options,
        ).images
        return stacked(images)

    def here(self, prompts: list[str], seeds: list[int], pipe: Any = None, **options: Any) -> np.ndarray:
        given = {"steps": self.options["num_inference_steps"], "guidance": self.options["guidance_scale"]}
        given |= {"width": self.options["width"], "height": self.options["height"]}
        return stacked((pipe or self.ours).generate(prompts, seed=seeds, **given, **options))


def stacked(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image, dtype=np.int16) for image in images])


def write_adapter(transformer: Any, folder: Path, name: str) -> Path:
    """A LoRA of which neither factor is zero, as training saves it."""
    wrapped = adapters.attach(transformer, rank=4, alpha=8)
    for i, parameter in enumerate(adapters.adapter_parameters(transformer)):
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)) * 0.1
    adapters.save(wrapped, folder, base=name)
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Both:
    adapter = write_adapter(flux2.load("tiny", device="cpu").transformer, tmp_path_factory.mktemp("lora"), "tiny")
    theirs = Flux2Pipeline.from_pretrained(TINY_FOLDER, torch_dtype=torch.float32)
    sizes = {"width": 128, "height": 128, "num_inference_steps": 4, "guidance_scale": 2.0}
    return Both(VARIANTS["tiny"], TINY_FOLDER, theirs, adapter, **sizes)


@pytest.fixture(scope="module")
def klein(tmp_path_factory: pytest.TempPathFactory) -> Both:
    """With classifier-free guidance, a picture that is not square, and a Qwen3 of random weights."""
    folder = tmp_path_factory.mktemp("klein")
    Flux2KleinPipeline(**helpers.reference_parts("klein"), is_distilled=False).save_pretrained(folder)
    adapter = write_adapter(helpers.transformer("klein"), tmp_path_factory.mktemp("lora"), "klein")
    theirs = Flux2KleinPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    sizes = {"width": 48, "height": 32, "num_inference_steps": 4, "guidance_scale": 4.0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(VARIANTS, "tiny", helpers.VARIANTS["klein"])
        return Both(helpers.VARIANTS["klein"], folder, theirs, adapter, **sizes)


@pytest.fixture(params=["tiny", "klein"])
def both(request: pytest.FixtureRequest) -> Both:
    return request.getfixturevalue(request.param)


def distance(a: np.ndarray, b: np.ndarray) -> int:
    assert a.shape == b.shape
    return int(np.abs(a - b).max())


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_picture_is_diffusers_with_and_without_references(both: Both, count: int) -> None:
    references = REFERENCES[:count]
    theirs = both.in_diffusers(PROMPTS[:1], SEEDS[:1], image=references or None)
    assert distance(both.here(PROMPTS[:1], SEEDS[:1], references=references), theirs) <= 2
    assert ((theirs > 0) & (theirs < 255)).mean() > 0.3, "the comparison says nothing of clipped pictures"


def test_a_batch_is_diffusers_with_a_generator_a_picture(both: Both) -> None:
    theirs = both.in_diffusers(PROMPTS, SEEDS)
    ours = both.here(PROMPTS, SEEDS)
    assert distance(ours, theirs) <= 2
    assert distance(ours[:1], ours[1:]) > 50


@pytest.mark.parametrize(("model", "count"), [("tiny", 1), ("klein", 0)])
def test_with_the_exported_lora_the_picture_is_diffusers(
    model: str, count: int, request: pytest.FixtureRequest
) -> None:
    both: Both = request.getfixturevalue(model)
    plain = both.in_diffusers(PROMPTS[:1], SEEDS[:1], image=REFERENCES[:count] or None)
    both.theirs.load_lora_weights(both.adapter, weight_name="diffusers.safetensors")
    try:
        theirs = both.in_diffusers(PROMPTS[:1], SEEDS[:1], image=REFERENCES[:count] or None)
    finally:
        both.theirs.unload_lora_weights()
    assert distance(theirs, plain) > 20
    for file in (both.adapter, both.adapter / "diffusers.safetensors"):
        pipe = fresh(both)
        pipe.load_adapter(file)
        assert distance(both.here(PROMPTS[:1], SEEDS[:1], pipe, references=REFERENCES[:count]), theirs) <= 2


READ_BY_DIFFUSERS = [
    ("diffusers", "lora", "pattern"),
    ("diffusers", "lora", "rslora"),
    ("diffusers", "dora", "number"),
    ("diffusers folder", "lora", "number"),
    ("PEFT in a prefix", "lora", "none"),
    ("ai-toolkit", "lora", "none"),
    ("ai-toolkit", "lokr_whole", "number"),
    ("musubi", "lora", "number"),
    ("LyCORIS", "lokr", "number"),
    ("SimpleTuner", "lokr", "number"),
]
FAST = {READ_BY_DIFFUSERS[0], READ_BY_DIFFUSERS[6]}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case in FAST else pytest.mark.slow) for case in READ_BY_DIFFUSERS], ids=str
)
def test_a_file_of_another_program_makes_the_picture_that_diffusers_makes_of_it(
    case: tuple[str, str, str], tiny: Both, tmp_path: Path
) -> None:
    name, kind, strength = case
    writer = WRITERS[name]
    write(writer, kind, strength, torch.float32, tmp_path, tiny.ours.transformer)
    file = tmp_path / writer.file
    with safe_open(file, "pt") as opened:  # diffusers drops the modulation of some formats
        header = opened.metadata()
    state = {key: tensor for key, tensor in load_file(file).items() if "norm_out" not in key and "adaLN" not in key}
    if name == "PEFT in a prefix":
        state = {re.sub(r"^transformer\.|\.mystyle", "", key): tensor for key, tensor in state.items()}
    save_file(state, file, header)
    theirs = Both.__new__(Both)
    vars(theirs).update(vars(tiny))
    theirs.theirs = Flux2Pipeline.from_pretrained(TINY_FOLDER, torch_dtype=torch.float32)  # a LoKr fuses its layers
    theirs.theirs.set_progress_bar_config(disable=True)
    plain = theirs.in_diffusers(PROMPTS[:1], SEEDS[:1])
    theirs.theirs.load_lora_weights(tmp_path, weight_name=writer.file)
    wanted = theirs.in_diffusers(PROMPTS[:1], SEEDS[:1])
    assert distance(wanted, plain) > 20
    pipe = fresh(tiny)
    pipe.load_adapter(tmp_path if writer.file != "lora.safetensors" else file)
    assert distance(tiny.here(PROMPTS[:1], SEEDS[:1], pipe), wanted) <= 2


def fresh(both: Both) -> flux2.Pipeline:
    """A pipeline to load adapters into, that knows the prompts already."""
    pipe = flux2.Pipeline(both.ours.source, both.ours.device, both.ours.precision, keep_text_encoder=False)
    pipe.prompts.known = both.ours.prompts.known
    return pipe


def test_references_in_another_order_are_another_picture(tiny: Both) -> None:
    """A prompt may name them by their index, so their order is kept, here as in diffusers."""
    turned = REFERENCES[::-1]
    ours = tiny.here(PROMPTS[:1], SEEDS[:1], references=turned)
    assert distance(ours, tiny.in_diffusers(PROMPTS[:1], SEEDS[:1], image=turned)) <= 2
    assert distance(ours, tiny.here(PROMPTS[:1], SEEDS[:1], references=REFERENCES)) > 20


def test_ten_references_run_and_eleven_are_refused(both: Both, loads: list[str]) -> None:
    ten = (REFERENCES * 4)[:10]
    ours = both.here(PROMPTS[:1], SEEDS[:1], references=ten)
    assert distance(ours, both.in_diffusers(PROMPTS[:1], SEEDS[:1], image=ten)) <= 2
    pipe = flux2.load("tiny", device="cpu")
    with pytest.raises(ValueError, match=r"11 references\b.*\b10\b"):
        pipe.generate(PROMPTS[0], references=[*ten, REFERENCES[0]])
    assert loads == []


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Parts of a model that are loaded from here on."""
    from flux2 import pipeline

    seen: list[str] = []
    for part in ("autoencoder", "transformer"):
        load: Callable[..., Any] = getattr(pipeline, f"load_{part}")
        spy = lambda *given, part=part, load=load, **named: seen.append(part) or load(*given, **named)  # noqa: E731
        monkeypatch.setattr(pipeline, f"load_{part}", spy)
    return seen


@pytest.mark.parametrize(
    ("model", "references"), [("tiny", []), ("klein", REFERENCES[:1])], ids=["tiny text", "klein edit"]
)
def test_a_seed_gives_its_picture_whatever_is_made_beside_it(
    model: str, references: list[Image.Image], request: pytest.FixtureRequest
) -> None:
    both: Both = request.getfixturevalue(model)
    prompts, seeds = [*PROMPTS, PROMPTS[0]], [1, 2, 3]
    alone = np.concatenate(
        [both.here([prompt], [seed], references=references) for prompt, seed in zip(prompts, seeds, strict=True)]
    )
    assert distance(both.here(prompts, seeds, references=references, batch_size=2), alone) <= 1
    backwards = both.here(prompts[::-1], seeds[::-1], references=references)
    assert distance(backwards[::-1], alone) <= 1
