"""train.validation.twin: sample grids by another model of the same sizes, with the adapter as it is then."""

import shutil
from dataclasses import replace

import helpers
import pytest
import torch
from message_helpers import holds
from omegaconf import OmegaConf
from PIL import Image
from planner_helpers import job
from safetensors.torch import load_file, save_file
from train_helpers import compose, lines, pixels

import flux2
from flux2.adapters.formats import AdapterError
from flux2.adapters.loading import scaled
from flux2.models.variants import VARIANTS
from train.config.memory import Choice
from train.config.run_config import RunConfig
from train.optim.stochastic_rounding import to_bfloat16
from train.planner.from_config import workload_of
from train.planner.predictor import Planner
from train.validation.sample_grid import split_grid
from train.validation.twin import Twin, twins

pytest_plugins = ("train_helpers",)

SAMPLES = ["sample_every=4", "sample.prompts=[a fox, a cup]"]


@pytest.fixture
def fast(monkeypatch, model_folders, tmp_path):
    """A model `small_klein_fast` in a folder: the sizes of `small_klein`, other weights, one step without guidance."""
    folder = tmp_path / "fast"
    shutil.copytree(model_folders("klein"), folder)
    generator = torch.Generator().manual_seed(1)
    for file in sorted((folder / "transformer").glob("*.safetensors")):
        state = load_file(file)
        save_file({key: one + 0.1 * torch.randn(one.shape, generator=generator) for key, one in state.items()}, file)
    variant = replace(helpers.VARIANTS["klein"], name="small_klein_fast", steps=1, guidance=1.0, resolution=48)
    monkeypatch.setitem(VARIANTS, variant.name, variant)
    return [f"sample.model={variant.name}", f"sample.path={folder}"]


@pytest.mark.parametrize("adapter", ["lora", pytest.param("pissa", marks=pytest.mark.slow), "dora", "tlora"])
def test_a_grid_is_what_inference_draws_with_the_other_model_and_this_adapter(train, fast, adapter, monkeypatch):
    models = []
    loaded = Twin.loaded
    monkeypatch.setattr(Twin, "loaded", lambda self: models.append(self.source.variant.name) or loaded(self))
    settings = [*SAMPLES, f"adapter={adapter}", "adapter.rank=4", "ema_decay=0.5"]
    run = train("run", *settings, *fast, kind="klein")
    assert models == ["small_klein_fast"] * 2
    pipe = flux2.load("small_klein_fast", path=fast[1].partition("=")[2], device="cpu")
    for step in (0, 4):
        if step:
            pipe.load_adapter(run)
        elif adapter == "dora":
            continue  # its rows have the lengths of the trained model's, so it changes this one from the start
        grid = split_grid(Image.open(run / "samples" / f"step_00000{step}.png"))
        for i, (prompt, shown) in enumerate(grid):
            (drawn,) = pipe.generate(prompt, seed=i, width=48, height=48)
            factor = shown.width // 48
            assert abs(pixels(shown)[::factor, ::factor] - pixels(drawn)).max() <= 1
    assert lines(run) == lines(train("plain", *settings, kind="klein"))  # the losses are those of the trained model


def test_the_grid_shows_which_model_drew_it(train, fast):
    other, own = train("other", *SAMPLES, *fast, kind="klein"), train("own", *SAMPLES, kind="klein")
    first, second = (Image.open(run / "samples" / "step_000000.png") for run in (other, own))
    assert first.width > second.width  # a name is left of the row
    assert len(split_grid(first)) == len(split_grid(second)) == 2


@pytest.mark.parametrize("adapter", ["lora", "pissa", "dora", "lokr", "loha", "tlora"])
def test_the_rows_of_a_grid_are_images_at_the_scales_of_the_adapter_in_inference(train, adapter):
    settings = [*SAMPLES, f"adapter={adapter}", "adapter.rank=4", "sample.scales=[0,0.5,1]", "sample.steps=2"]
    run = train("run", *settings, kind="klein")
    grid = split_grid(Image.open(run / "samples" / "step_000004.png"))
    assert [prompt for prompt, _ in grid] == [
        f"{prompt}{scale}" for scale in (" (scale 0)", " (scale 0.5)", "") for prompt in ("a fox", "a cup")
    ]
    pipe = flux2.load("small_klein", path=str(OmegaConf.load(run / "config.yaml").model.path), device="cpu")
    pipe.load_adapter(run)
    for row, scale in enumerate((0, 0.5, 1)):
        with scaled(pipe.transformer, scale):
            for i, (prompt, shown) in enumerate(grid[2 * row : 2 * row + 2]):
                (drawn,) = pipe.generate(prompt.partition(" (")[0], seed=i, width=48, height=48, steps=2)
                factor = shown.width // 48
                assert abs(pixels(shown)[::factor, ::factor] - pixels(drawn)).max() <= 1
    assert len({shown.tobytes() for _, shown in grid}) == 6
    plain = train("plain", *settings[:-2], "sample.steps=2", kind="klein")
    assert lines(run) == lines(plain)
    last = split_grid(Image.open(plain / "samples" / "step_000004.png"))
    assert [shown.tobytes() for _, shown in last] == [shown.tobytes() for _, shown in grid[4:]]


def test_a_frozen_adapter_keeps_its_scale_in_a_grid_and_is_part_of_what_the_other_model_draws(train, fast, tmp_path):
    first = train("first", *SAMPLES, kind="klein")
    settings = [*SAMPLES, f"adapter.init={first}", "adapter.init_mode=frozen", "sample.steps=2", "steps=1"]
    run = train("run", *settings, "sample_every=1", "sample.scales=[0,1]", kind="klein")
    pipe = flux2.load("small_klein", path=str(OmegaConf.load(run / "config.yaml").model.path), device="cpu")
    other = flux2.load("small_klein_fast", path=fast[1].partition("=")[2], device="cpu")
    twin = train("twin", *settings, *fast, "sample_every=1", kind="klein")
    for pipeline, folder, each in ((pipe, run, 2), (other, twin, 1)):
        pipeline.load_adapter(first)
        grid = split_grid(Image.open(folder / "samples" / "step_000000.png"))
        assert len(grid) == 2 * each
        for i, (prompt, shown) in enumerate(grid):  # the trained one begins at zero
            (drawn,) = pipeline.generate(prompt.partition(" (")[0], seed=i % 2, width=48, height=48, steps=2)
            factor = shown.width // 48
            assert abs(pixels(shown)[::factor, ::factor] - pixels(drawn)).max() <= 1
    grid = split_grid(Image.open(run / "samples" / "step_000001.png"))
    (drawn,) = pipe.generate("a fox", seed=0, width=48, height=48, steps=2)
    assert abs(pixels(grid[0][1])[::factor, ::factor] - pixels(drawn)).max() <= 1
    assert grid[0][1].tobytes() != grid[2][1].tobytes()


def test_scales_of_an_adapter_without_scale_are_refused(small):
    given = [
        one
        for one in small(*SAMPLES, "adapter=oft", "adapter.block_size=8", "sample.scales=[0.5]")
        if "adapter.rank" not in one
    ]
    with pytest.raises(AdapterError, match=r"scale=0\.5: an OFT"):
        RunConfig(compose(*given)).dry_run()


def test_published_models_draw_for_their_base():
    assert twins(VARIANTS["klein_base_4b"]) == ["klein_4b"]
    assert twins(VARIANTS["klein_base_9b"]) == ["klein_9b"]
    assert twins(VARIANTS["dev"]) == twins(VARIANTS["tiny"]) == []


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["sample.model=dev"], "sample.model='dev' ... small_klein ... small_klein_fast"),
        (["sample.model=small_klein"], "sample.model='small_klein' ... small_klein_fast"),
        (["sample.model=3"], "sample.model=3 must be a string"),
        (["sample.path=x"], "sample.path='x' has no effect without sample.model"),
        (["sample.model=small_klein_fast", "embedding_storage=projected"], "embedding_storage=projected"),
        (["sample.model=small_klein_fast", "memory.split=auto"], "memory.split=auto"),
    ],
)
def test_a_model_that_cannot_draw_is_refused(small, fast, settings, said):
    with pytest.raises(ValueError) as raised:  # noqa: PT011 - its text follows
        RunConfig(compose(*small(*SAMPLES, *settings, kind="klein")))
    assert holds(str(raised.value), said)


def test_files_of_the_other_model_that_are_missing_end_the_run_before_it_trains(train, fast, tmp_path):
    with pytest.raises(ValueError, match="nowhere"):
        train("run", *SAMPLES, fast[0], f"sample.path={tmp_path / 'nowhere'}", kind="klein")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_its_memory_is_planned_its_blocks_stream_to_a_gpu():
    peaks, hosts = {}, {}
    for twin in (False, True):
        for on_gpu in (True, False):
            sizes = {"storage": "fp8", "sample_pixels": (512, 512), "twin": twin, "on_gpu": on_gpu}
            prediction = Planner(job("klein_base_4b", **sizes)).predict(Choice("full"))
            peaks[twin, on_gpu] = sum(prediction.phases["samples"].values())
            hosts[twin, on_gpu] = sum(prediction.host.values())
            weights = prediction.phases["samples"]["weights of blocks"]
            adapter = prediction.phases["samples"]["adapter"]
    added = {on_gpu: peaks[True, on_gpu] - peaks[False, on_gpu] for on_gpu in (True, False)}
    assert added[False] > weights + adapter
    assert adapter < added[True] < 0.3 * weights
    assert hosts[True, True] == hosts[False, True] + weights
    assert hosts[True, False] == hosts[False, False]


def test_the_adapter_that_it_gets_is_planned_in_float32():
    planned = job("klein_base_4b", sample_pixels=(512, 512), twin=True)
    before = Planner(planned).predict(Choice("full")).phases["samples"]
    to_bfloat16(planned.model)
    after = Planner(planned).predict(Choice("full")).phases["samples"]
    assert after["adapter"] == before["adapter"] / 2
    assert after["sampling model"] == before["sampling model"]


def test_a_plan_counts_it_only_for_runs_with_grids(small, fast):
    without = [[*rest, "sample.captions=0"] for rest in (SAMPLES[:1], SAMPLES[1:])]
    for settings, counted in ((SAMPLES, True), *((rest, False) for rest in without)):
        run = RunConfig(compose(*small(*settings, *fast, kind="klein")))
        assert workload_of(run, on_gpu=True).twin == counted
