"""A disk without room, as a limit on the size of files makes one: what was saved before stays whole."""

import os
import resource
import signal
import tempfile
from contextlib import suppress

import pytest
from train_helpers import adapter, lines, same_tensors

from flux2 import adapters
from train.checkpoints.checkpoint import check, checkpoints

pytest_plugins = ("train_helpers",)


@pytest.fixture
def full():
    """`full(bytes)`: from now on no file of this process may be larger, as on a disk without room."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # or it kills; so it is an OSError

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_without_room_training_goes_on_and_earlier_checkpoints_stay(train, at_step, full, capfd):
    whole = train("whole", "steps=5", "checkpoint_every=2")
    at_step(2, lambda: full(5_000))  # a checkpoint's files are larger, a line of numbers is not
    with pytest.raises(ValueError, match=r"adapter.*step_000002"):
        train("cut", "steps=5", "checkpoint_every=2", "keep_last=1")
    assert "step_000004" in capfd.readouterr().err
    cut = whole.parent / "cut"
    assert [path.name for path in (cut / "checkpoints").iterdir()] == ["step_000002"]
    check(checkpoints(cut)[0])
    full(resource.RLIM_INFINITY)
    train("cut", "steps=5", "checkpoint_every=2", "keep_last=1", "resume=auto")
    assert lines(cut) == lines(whole)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes into read-only folders")
def test_a_folder_that_became_read_only_is_a_warning_and_the_checkpoint_before_stays(train, at_step, capfd, tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    at_step(2, lambda: folder.chmod(0o500))
    run = train("run", "steps=4", "checkpoint_every=2")
    folder.chmod(0o700)
    assert "step_000004" in capfd.readouterr().err
    assert [path.name for path in checkpoints(run)] == ["step_000002"]


def test_an_adapter_that_has_no_room_at_all_in_its_folder_is_kept_among_the_temporary_files(
    train, monkeypatch, tmp_path, capfd
):
    whole, cut = train("whole"), tmp_path / "cut"
    save, temporary = adapters.save, tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))

    def full_there(wrapped, folder, **about):
        if cut in folder.parents:
            raise OSError(28, "No space left on device")
        save(wrapped, folder, **about)

    monkeypatch.setattr(adapters, "save", full_there)
    with pytest.raises(ValueError, match=rf"{temporary}\b"):
        train("cut", "checkpoint_every=4")
    (kept,) = temporary.glob("flux2-lora-*")
    assert same_tensors(adapter(kept), adapter(whole))


def test_the_warning_names_the_file_that_had_no_room_and_what_to_do(train, at_step, full, capfd):
    whole = train("whole", "checkpoint_every=4") / "checkpoints" / "step_000004"
    sizes = {file: (whole / file).stat().st_size for file in ("adapter/adapter_model.safetensors", "optimizer.pt")}
    assert sizes["optimizer.pt"] > sizes["adapter/adapter_model.safetensors"] + 10_000
    capfd.readouterr()
    for number, (file, size) in enumerate(sizes.items()):
        at_step(2, lambda size=size: full(size - 2_000))
        with suppress(ValueError):  # the finished adapter has no room either
            train(f"cut{number}", "checkpoint_every=2", "steps=4")
        full(resource.RLIM_INFINITY)
        err = capfd.readouterr().err
        place = whole.parents[2] / f"cut{number}" / "checkpoints" / "step_000004"
        assert f"{place} could not be saved: {place / file} cannot be written (File too large). Raise the limit" in err
        assert ".part" not in err
