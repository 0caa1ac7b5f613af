"""flux2.utils.files: what is written is complete or absent, and nothing else is left."""

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import SafetensorError

from flux2.utils import files
from flux2.utils.files import NotWritten, atomic_write, host, remove_unfinished, temporary_path
from flux2.utils.text import gigabytes


def test_a_file_is_replaced_at_the_end_and_flushed_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda handle: flushed.append(file.read_text()))
    file = tmp_path / "a.json"
    file.write_text("old")
    with atomic_write(file) as unfinished:
        unfinished.write_text("new")
        assert unfinished.parent == tmp_path
        assert file.read_text() == "old"
    assert file.read_text() == "new"
    assert flushed == ["old"], "flushed once, before the file got its name"
    assert [*tmp_path.iterdir()] == [file]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_after_an_error_the_old_content_is_there_and_nothing_else(kind: str, tmp_path: Path) -> None:
    place = tmp_path / "place"
    inside = place if kind == "file" else place / "inside"
    inside.parent.mkdir(exist_ok=True)
    inside.write_text("old")

    def write() -> None:
        with atomic_write(place) as unfinished:
            file = unfinished if kind == "file" else unfinished / "inside"
            file.parent.mkdir(exist_ok=True)
            file.write_text("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert inside.read_text() == "old"
    assert [*tmp_path.iterdir()] == [place]


def test_a_folder_replaces_a_folder_with_all_that_was_in_it(tmp_path: Path) -> None:
    (tmp_path / "place").mkdir()
    (tmp_path / "place" / "old").touch()
    with atomic_write(tmp_path / "place") as unfinished:
        unfinished.mkdir()
        (unfinished / "new").write_text("1")
    assert [file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*") if file.is_file()] == ["place/new"]


def test_files_of_killed_processes_are_removed_and_others_stay(tmp_path: Path) -> None:
    (tmp_path / ".a.json.12345678.part").touch()
    (tmp_path / ".b.json.12345678.part").touch()
    remove_unfinished(tmp_path / "a.json")
    assert [file.name for file in tmp_path.iterdir()] == [".b.json.12345678.part"]


@pytest.mark.parametrize("name", ["merged", "model [1].safetensors"])
def test_writing_again_removes_what_a_killed_process_of_this_machine_left(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / name
    killed = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    running = temporary_path(target)  # of another thread of this process
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: killed.pid)
        left = temporary_path(target)
    left.mkdir()
    (left / "half").touch()
    elsewhere = tmp_path / f".{name}.{'0000' if host() != '0000' else '1111'}-1-abcd.part"
    older = tmp_path / f".{name}.12345678.part"  # without a process
    for file in (running, elsewhere, older):
        file.touch()
    with atomic_write(target) as unfinished:
        unfinished.write_text("new")
    assert set(tmp_path.iterdir()) == {target, running, elsewhere, older, left}
    killed.kill()
    killed.communicate()
    monkeypatch.setattr(files, "_CLEANED", set())  # as in another process
    with atomic_write(tmp_path / "of another name") as unfinished:
        unfinished.write_text("new")
    (tmp_path / "of another name").unlink()
    assert set(tmp_path.iterdir()) == {target, running, elsewhere, older}


def test_many_writes_into_a_folder_list_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed, listdir, glob = [], os.listdir, Path.glob
    monkeypatch.setattr(os, "listdir", lambda place: (listed.append(str(place)), listdir(place))[1])
    monkeypatch.setattr(Path, "glob", lambda self, pattern: (listed.append(str(self)), glob(self, pattern))[1])
    monkeypatch.chdir(tmp_path)
    for number in range(20):
        with atomic_write((tmp_path if number % 2 else Path()) / f"{number}.txt") as unfinished:
            unfinished.write_text("new")
    assert listed == [str(tmp_path)]
    assert len(list(tmp_path.iterdir())) == 20


def test_what_another_user_left_does_not_stop_a_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = tmp_path / f".a.{host()}-{2**22 + 7}-abcd.part"  # no process has such a number
    left.touch()

    def refuse(path: Path) -> None:
        if path == left:
            raise PermissionError(1, "Operation not permitted")
        delete(path)

    delete = files._delete
    monkeypatch.setattr(files, "_delete", refuse)
    with atomic_write(tmp_path / "b") as unfinished:
        unfinished.write_text("new")
    assert set(tmp_path.iterdir()) == {left, tmp_path / "b"}


@pytest.mark.parametrize(("size", "text"), [(0, "0.0 MB"), (99.9e6, "99.9 MB"), (1e8, "0.10 GB"), (1.5e9, "1.50 GB")])
def test_sizes_are_megabytes_or_gigabytes(size: float, text: str) -> None:
    assert gigabytes(size) == text


def full_disk(code: int) -> OSError:
    return OSError(code, os.strerror(code))


def save_of_torch(code: int) -> None:
    try:
        raise full_disk(code)
    except OSError:
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")  # noqa: B904


def save_of_safetensors(code: int) -> None:
    raise SafetensorError(f"Error while serializing: I/O error: {os.strerror(code)} (os error {code})")


def save_of_python(code: int) -> None:
    raise full_disk(code)


@pytest.mark.parametrize("save", [save_of_python, save_of_torch, save_of_safetensors])
@pytest.mark.parametrize(
    ("code", "remedy"), [(errno.ENOSPC, "Make room"), (errno.EDQUOT, "quota"), (errno.EFBIG, "ulimit -f")]
)
def test_an_error_of_writing_names_the_file_and_what_to_do(
    save: Callable[[int], None], code: int, remedy: str, tmp_path: Path
) -> None:
    expected = rf"^{tmp_path}/a cannot be written \({os.strerror(code)}\)\. .*{remedy}"
    with pytest.raises(NotWritten, match=expected) as caught, atomic_write(tmp_path / "a"):
        save(code)
    assert (caught.value.errno, caught.value.filename) == (code, f"{tmp_path}/a")


def save_elsewhere(place: Path) -> None:
    try:
        raise NotWritten(errno.EFBIG, "File too large", "/first")
    except OSError:
        with atomic_write(place):
            save_of_safetensors(errno.EFBIG)


def test_an_error_that_follows_another_names_its_own_file(tmp_path: Path) -> None:
    """As of the temporary copy of an adapter that could not be written to its own place."""
    with pytest.raises(NotWritten) as caught:
        save_elsewhere(tmp_path / "second")
    assert caught.value.filename == f"{tmp_path}/second"


def test_errors_that_name_a_file_or_are_others_stay(tmp_path: Path) -> None:
    other = PermissionError(13, "Permission denied", "/other")
    for error in (other, RuntimeError("CUDA error"), OSError("cannot write mode P as JPEG")):
        with pytest.raises(type(error)) as caught, atomic_write(tmp_path / "a"):
            raise error
        assert caught.value is error
        assert "/a" not in str(error)
    with pytest.raises(FileNotFoundError) as missing, atomic_write(tmp_path / "a") as unfinished:
        (unfinished / "b").write_text("x")
    assert missing.value.filename == f"{tmp_path}/a/b"
