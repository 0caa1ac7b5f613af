"""What a run is predicted to write to disk, against what it writes."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf
from safetensors import safe_open
from train_helpers import CAPTIONS, compose, run_training

from train.plan import disk_lines, open_samples
from train.planner import disk
from train.planner.disk import Written, too_full
from train.planner.plans import make_plan

pytest_plugins = ("train_helpers",)
RUN = (
    "model=tiny",
    "device=cpu",
    "sample_every=0",
    "validate_every=0",
    "batch_size=2",
    "steps=3",
    "checkpoint_every=2",
)


def bytes_in(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def found_on_disk(run: Path, cache: Path) -> dict[str, tuple[int, int]]:
    """Count and bytes of what a run wrote, by kind."""
    entries = {"prompt": [], "image": []}
    for file in cache.glob("??/*.safetensors"):
        with safe_open(file, "pt") as opened:
            entries["prompt" if "embeddings" in opened.keys() else "image"].append(file.stat().st_size)  # noqa: SIM118
    checkpoints = [bytes_in(folder) for folder in (run / "checkpoints").iterdir()]
    found = {kind: (len(sizes), sum(sizes)) for kind, sizes in entries.items()}
    found |= {"checkpoint": (len(checkpoints), sum(checkpoints)), "adapter": (1, bytes_in(run / "adapter"))}
    copies = [file.stat().st_size for file in (cache / "weights").rglob("*.safetensors")]
    return found | ({"quantized copy": (len(copies), sum(copies))} if copies else {})


@pytest.mark.parametrize(
    "given",
    [
        (),
        ("precision=nf4", "embedding_storage=projected_fp8", "ema_decay=0.9", "adapter.rank=32"),
        (
            "buckets.random_crops=3",
            "buckets.flip=true",
            "buckets.resolution=[64,128]",
            "adapter=lokr",
            "optimizer.lr=1e-3",
        ),
        ("buckets.resolution=[64,128]", "buckets.each_resolution=true", "keep_last=1", "optimizer=adafactor"),
    ],
)
def test_what_a_run_writes_is_predicted_within_a_few_percent(tmp_path, given, monkeypatch):
    places = f"output_dir={tmp_path / 'run'}", f"cache_dir={tmp_path / 'cache'}"
    plan = make_plan(compose(*RUN, *given, *places))
    parts = []
    monkeypatch.setattr("train.plan.too_full", lambda found: parts.extend(found) or "")
    disk_lines(plan, open_samples(plan.run))
    run = run_training(compose(*RUN, *given, *places)).parent
    found = found_on_disk(run, tmp_path / "cache")
    assert {part.kind for part in parts} == found.keys()
    for part in parts:
        count, size = found[part.kind]
        if part.kind == "checkpoint":  # one more while it is written
            assert part.count == count + ("keep_last=1" in given)
            size *= part.count / count
        else:
            assert part.count == count, part.kind
        assert 0.99 < part.size / size < 1.06, (part.kind, part.size, size)


def test_a_disk_that_is_too_small_is_named_with_what_is_missing(monkeypatch):
    free = {"/a": (1, 5_000_000_000), "/b": (2, 10**12)}
    monkeypatch.setattr(disk, "free_space", lambda folder: free[str(folder)])
    fitting = [Written("prompt", 2, 2e9, Path("/a")), Written("image", 2, 2.9e9, Path("/a"))]
    assert too_full(fitting) == ""
    said = too_full([*fitting, Written("adapter", 1, 2e8, Path("/a")), Written("checkpoint", 9, 9e9, Path("/b"))])
    assert "/a has 5.00 GB free for 5.10 GB" in said
    assert "/b" not in said


def test_of_many_samples_a_part_is_asked_and_stands_for_the_rest(small, monkeypatch):
    plan = make_plan(compose(*small()))
    samples = open_samples(plan.run)
    whole = disk.latent_bytes(samples, plan.run.buckets, 48**2)
    assert whole[0] == len(samples) == len(CAPTIONS)
    part = disk.latent_bytes(samples, plan.run.buckets, 48**2, most=len(samples) // 2)
    assert part[0] == whole[0]
    assert part[1] == pytest.approx(whole[1], rel=0.5)


def test_the_checkpoints_of_a_rotation_are_counted_with_the_one_that_is_written():
    def most(**settings):
        run = OmegaConf.to_container(compose("model=tiny")) | settings
        kept = SimpleNamespace(last=run["keep_last"], best=run["keep_best"], every=run["keep_every"])
        given = SimpleNamespace(steps=run["steps"], checkpoint_every=run["checkpoint_every"], rotation=kept)
        return disk.checkpoints_at_once(SimpleNamespace(settings=given))

    assert most(steps=1000, checkpoint_every=250) == 4
    assert most(steps=1001, checkpoint_every=250) == 5
    assert most(steps=1000, checkpoint_every=0) == 0
    assert most(steps=1000, checkpoint_every=100, keep_last=2) == 3
    assert most(steps=1000, checkpoint_every=100, keep_last=2, keep_best=1, keep_every=500) == 6
