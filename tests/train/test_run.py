"""A whole run: its folder, its configuration, its samples, and what is refused before anything is loaded."""

import json
import time
from dataclasses import replace

import helpers
import pytest
from message_helpers import holds
from omegaconf import OmegaConf
from safetensors import safe_open
from train_helpers import compose, draw_picture, lines, pixels, refusal, refuse_encoders, run_training

import flux2
import train.stages.run_folder
from flux2.models.variants import VARIANTS
from train.checkpoints.checkpoint import checkpoints
from train.run import main as training_command
from train.stages.memory import load_config
from train.stages.run_folder import claim_run_folder
from train.validation.samples import Sampler

pytest_plugins = ("train_helpers",)


# ------------------------------------------------------------------ the run folder


def test_a_run_folder_holds_all_that_was_made(train):
    run = train(
        "run",
        "checkpoint_every=2",
        "validate_every=2",
        "sample_every=2",
        "sample.prompts=[a red cup]",
        "sample.steps=1",
    )
    assert sorted(path.name for path in run.iterdir()) == [
        "adapter",
        "checkpoints",
        "config.yaml",
        "data.json",
        "first_batch.png",
        "metrics.jsonl",
        "report.html",
        "samples",
        "validation.jsonl",
    ]
    assert {path.name for path in (run / "adapter").iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "diffusers.safetensors",
        "samples.png",
        "samples_base.png",
    }
    assert all(key.startswith("transformer.") for key in keys(run / "adapter" / "diffusers.safetensors"))
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[1])
    assert first.keys() == {"step", "loss", "lr", "grad_norm", "images_per_second", "peak_memory_gb"}
    assert first["images_per_second"] > 0
    assert first["peak_memory_gb"] > 0.05


def keys(file):
    with safe_open(file, "pt") as tensors:
        return list(tensors.keys())


def test_the_configuration_is_kept_resolved_and_makes_the_same_run_again(reference, tmp_path):
    run = reference()
    text = (run / "config.yaml").read_text()
    assert "${" not in text
    assert "???" not in text
    kept = OmegaConf.load(run / "config.yaml")
    assert (kept.adapter.rank, kept.buckets.resolution, kept.optimizer._target_) == (4, 48, "torch.optim.AdamW")
    kept.output_dir = str(tmp_path / "again")
    assert lines(run_training(kept).parent) == lines(run)


@pytest.mark.parametrize("license", ["", "FLUX Non-Commercial License"])
def test_a_restricting_license_is_named_in_every_adapter_that_is_saved(train, monkeypatch, small, license):
    variant = replace(helpers.VARIANTS["klein"], repo="owner/gated", license=license)
    monkeypatch.setitem(VARIANTS, "small_klein", variant)
    run = train("run", "steps=1", "checkpoint_every=1", kind="klein")
    for folder in (run / "adapter", checkpoints(run)[0] / "adapter"):
        readme = (folder / "README.md").read_text()
        assert "base_model: owner/gated" in readme
        with safe_open(folder / "diffusers.safetensors", "pt") as tensors:
            metadata = tensors.metadata()
        assert metadata["base_model"] == "owner/gated"
        assert metadata.get("base_model_license", "") == license
        assert ("Non-Commercial" in readme) == bool(license)


def test_a_run_names_its_folder_after_itself_and_the_time(small, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    adapter_folder = run_training(compose(*small("name=cats", "steps=1")))
    assert adapter_folder.parts[:2] == ("outputs", "cats")
    assert time.strptime(adapter_folder.parts[2], "%Y-%m-%d_%H-%M-%S")


@pytest.fixture
def nothing_loads(monkeypatch):
    """From here on whatever loads a model fails."""
    refuse_encoders(monkeypatch)
    monkeypatch.setattr("train.stages.model.load_transformer", lambda *_, **__: pytest.fail("a model was loaded"))


def test_settings_are_checked_before_anything_is_loaded_or_written(small, nothing_loads, tmp_path):
    folder = tmp_path / "run"
    for mistake in ("adapter.rank=0", "adapter.targets=[foo]", "optimizer.lr=x", "dataset.path=/nowhere"):
        refusal(*small(f"output_dir={folder}", f"cache_dir={tmp_path / 'cache'}", mistake), task=training_command)
    assert list(tmp_path.iterdir()) == []


def test_two_runs_of_a_name_in_the_same_second_get_folders_of_their_own(small, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train.stages.run_folder.time, "strftime", lambda _: "noon")
    first, second = (load_config(compose(*small("name=cats"))) for _ in range(2))
    with claim_run_folder(first) as one, claim_run_folder(second) as other:
        assert [one.folder.name, other.folder.name] == ["noon", "noon_1"]


def test_a_folder_that_another_run_writes_is_refused_by_name(small, tmp_path):
    alive = load_config(compose(*small(f"output_dir={tmp_path / 'run'}")))
    with claim_run_folder(alive):
        for settings in ([], ["resume=auto"]):
            message = refusal(*small(f"output_dir={tmp_path / 'run'}", *settings), task=training_command)
            assert holds(message, f"{tmp_path / 'run'} ... in use")
    assert not (tmp_path / "run").exists()


def test_a_run_that_is_being_resumed_is_not_resumed_twice(train, small):
    run = train("run", "steps=1", "checkpoint_every=1")
    alive = load_config(compose(*small(f"resume={run}")))
    with claim_run_folder(alive):
        assert holds(refusal(*small(f"resume={run}"), task=training_command), f"{run} ... in use")


def test_places_that_cannot_be_written_are_named_before_anything_is_loaded(small, nothing_loads, tmp_path):
    file = tmp_path / "file"
    file.touch()
    for place, said in (
        (f"output_dir={file}", f"output_dir={file} ... File exists"),
        (f"cache_dir={file}", f"cache_dir={file} ... not a folder"),
        (f"cache_dir={file / 'cache'}", f"cache_dir={file / 'cache'} ... Not a directory"),
    ):
        message = refusal(*small(f"output_dir={tmp_path / 'run'}", place), task=training_command)
        assert holds(message, said), message
    assert list(tmp_path.iterdir()) == [file]


def test_a_checkpoint_that_cannot_be_read_leaves_the_run_as_it_was(run_command, train, small):
    run = train("run", "steps=1", "checkpoint_every=1")
    (run / "checkpoints" / "step_000001" / "optimizer.pt").write_text("garbage")
    before = {name: (run / name).read_text() for name in ("config.yaml", "data.json", "metrics.jsonl")}
    code, out, err = run_command(*small(f"resume={run}", "steps=2"))
    assert code == 2
    assert "step_000001/optimizer.pt" in out
    assert "no complete checkpoint" in err
    assert {name: (run / name).read_text() for name in before} == before


# ------------------------------------------------------------------ samples


@pytest.fixture
def grids(monkeypatch):
    """The pictures of every grid that is made."""
    made = []
    pictures = Sampler.pictures

    def keep(self, model):
        made.append(pictures(self, model))
        return made[-1]

    monkeypatch.setattr(Sampler, "pictures", keep)
    return made


@pytest.mark.parametrize(
    ("kind", "guidance"), [("dev", "null"), ("klein", "3.0"), pytest.param("klein", "1.0", marks=pytest.mark.slow)]
)
def test_the_grids_show_what_inference_makes_of_the_base_and_of_the_finished_adapter(
    train, grids, kind, guidance, model_folders
):
    run = train(
        "run", "sample_every=4", "sample.prompts=[a red cup, the fox]", "sample.seed=3", "sample.steps=2",
        f"sample.guidance={guidance}", "sample.width=64", "sample.height=48", kind=kind,
    )  # fmt: skip
    pipeline = flux2.load(f"small_{kind}", str(model_folders(kind)), device="cpu")
    scale = None if guidance == "null" else float(guidance)
    options = {"seed": 3, "steps": 2, "guidance": scale, "width": 64, "height": 48}
    base = pipeline.generate(["a red cup", "the fox"], **options)
    pipeline.load_adapter(run)
    final = pipeline.generate(["a red cup", "the fox"], **options)
    for grid, expected in zip(grids, (base, final), strict=True):
        for one, two in zip(grid, expected, strict=True):
            assert one.size == two.size == (64, 48)
            assert abs(pixels(one) - pixels(two)).max() <= 1
    assert abs(pixels(base[0]) - pixels(final[0])).max() > 8  # the adapter does something


@pytest.mark.parametrize("count", [1, 2])
def test_sheets_of_edits_show_what_inference_makes_of_the_same_references(train, grids, tmp_path, model_folders, count):
    room = [draw_picture(5 + i, (100, 70)) for i in range(count)]
    files = [tmp_path / f"room{i}.png" for i in range(count)]
    for picture, file in zip(room, files, strict=True):
        picture.save(file)
    train(
        "run", "steps=1", "sample_every=1", "sample.prompts=[the red room]", "sample.steps=2",
        f"sample.references=[{','.join(map(str, files))}]", "sample.width=48", "sample.height=48",
    )  # fmt: skip
    pipeline = flux2.load("small_dev", str(model_folders("dev")), device="cpu")
    options = {"seed": 0, "steps": 2, "width": 48, "height": 48}
    (expected,) = pipeline.generate("the red room", references=room, **options)
    assert abs(pixels(grids[0][0]) - pixels(expected)).max() <= 1
    (without,) = pipeline.generate("the red room", **options)
    assert abs(pixels(without) - pixels(expected)).max() > 8
