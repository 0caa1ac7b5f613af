"""Class pictures that several processes draw, in real ones; and what is left when one of them is killed."""

import re
import signal
from pathlib import Path

import pytest
from train_processes import Process

pytest_plugins = ("train_helpers", "train_processes")

COUNT = 10
PROMPTS = ["a red cup", "a blue fox", "the small card"]


@pytest.fixture(scope="module")
def drawing(tiny):
    """The settings of a run of one step beside class pictures, but for their folder."""
    return [
        *(*tiny, "steps=1", "preservation=prior", f"preservation.prompts=[{','.join(PROMPTS)}]"),
        *(f"preservation.count={COUNT}", "preservation.steps=2"),
    ]


@pytest.fixture(scope="module")
def by_one(server, drawing, tmp_path_factory):
    """The pictures that one process draws, by name."""
    folder = tmp_path_factory.mktemp("by_one")
    server.run(*drawing, *places(folder), WRITTEN=str(folder / "log"))
    drawn = pictures(folder)
    assert list(drawn) == [f"{i:05d}.png" for i in range(COUNT)]
    assert len(set(drawn.values())) == COUNT
    return drawn


def places(folder: Path) -> list[str]:
    return [f"preservation.folder={folder / 'classes'}", f"output_dir={folder / 'run'}"]


def pictures(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted((folder / "classes").glob("*/*.png"))}


def written(log: Path, suffix: str) -> list[tuple[int, str]]:
    """Of files that end so: which process wrote it, and its name, in this order."""
    lines = log.read_text().splitlines() if log.exists() else []
    return [(int(line.split()[0]), line.split()[1]) for line in lines if line.endswith(suffix)]


def times(folder: Path, suffix: str) -> dict[str, tuple[int, int]]:
    """When the files that end so were written, and what was: a file that is replaced is another."""
    files = (folder / "classes").glob(f"*/[0-9]*{suffix}")
    return {file.name: (file.stat().st_mtime_ns, file.stat().st_ino) for file in files}


def wait(processes: list[Process]) -> None:
    assert [process.wait() for process in processes] == [0, 0], processes[0].out.read_text()


@pytest.mark.slow
def test_two_processes_draw_the_pictures_of_one_each_its_share_and_none_twice(server, drawing, by_one, tmp_path):
    log = tmp_path / "log"
    two = server.start_two(*drawing, *places(tmp_path), WRITTEN=str(log))
    wait(two)
    assert f"drawing {COUNT} class" in two[0].out.read_text()
    assert pictures(tmp_path) == by_one
    for suffix in (".safetensors", ".png"):
        found = written(log, suffix)
        assert sorted(name for _, name in found) == [f"{i:05d}{suffix}" for i in range(COUNT)]
        assert [sum(rank == own for rank, _ in found) for own in (0, 1)] == [COUNT // 2, COUNT // 2]
    (folder,) = (tmp_path / "classes").iterdir()
    assert {file.name for file in folder.iterdir()} == {*by_one, "recipe.json"}


@pytest.mark.slow
@pytest.mark.parametrize(("suffix", "others"), [(".safetensors", 2), (".png", 1)])
def test_after_one_of_two_is_killed_the_next_start_keeps_what_was_drawn(
    server, drawing, by_one, tmp_path, suffix, others
):
    """While latents are drawn and while they are decoded; two processes go on, and one."""
    log, rest = tmp_path / "log", tmp_path / "rest"
    two = server.start_two(*drawing, *places(tmp_path), WRITTEN=str(log), KILLED_AFTER=f"1 {suffix} 3")
    assert two[1].wait() == -signal.SIGKILL
    assert two[0].wait() not in (0, -signal.SIGKILL)  # it does not wait for ever
    kept = {ending: times(tmp_path, ending) for ending in (".safetensors", ".png")}
    done = {name for _, name in written(log, suffix)}
    assert len(done) == COUNT // 2 + 3  # the other did its share
    assert all(by_one[name] == picture for name, picture in pictures(tmp_path).items())
    assert done >= set(kept[suffix])

    if others == 2:
        last = server.start_two(*drawing, *places(tmp_path), WRITTEN=str(rest))
        wait(last)
        said = last[0].out.read_text()
    else:
        said = server.run(*drawing, *places(tmp_path), WRITTEN=str(rest))
    assert pictures(tmp_path) == by_one
    assert {name: times(tmp_path, ".png")[name] for name in kept[".png"]} == kept[".png"]
    missing = set(by_one) - set(kept[".png"])
    assert sorted(name for _, name in written(rest, ".png")) == sorted(missing)
    undrawn = {Path(name).stem for name in missing} - {Path(name).stem for name in kept[".safetensors"]}
    assert sorted(name for _, name in written(rest, ".safetensors")) == sorted(
        f"{name}.safetensors" for name in undrawn
    )
    assert not times(tmp_path, ".safetensors")
    assert re.search(rf"drawing {len(missing)} class .*{'; 8 ' if suffix == '.png' else ''}", said)
