"""Who may write a run folder, and what is left when writing fails."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from train_helpers import ROOT

from train.utils import lock
from train.utils.files import MOST_YAML, make_new, make_writable, read_yaml, write_whole
from train.utils.lock import InUse, Lock, in_use


def test_a_folder_is_held_by_one_until_it_lets_go(tmp_path):
    (tmp_path / "config.yaml").touch()
    first = Lock(tmp_path)
    assert in_use(tmp_path)
    with pytest.raises(InUse, match=f"{tmp_path}.*in use"):
        Lock(tmp_path)
    first.release()
    first.release()
    assert not in_use(tmp_path)
    Lock(tmp_path).release()


def test_a_killed_process_holds_nothing(tmp_path):
    (tmp_path / "config.yaml").touch()
    code = f"import sys, time; from pathlib import Path; from train.utils.lock import Lock; lock = Lock(Path({str(tmp_path)!r})); print('held', flush=True); time.sleep(60)"  # noqa: E501
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        assert in_use(tmp_path)
        os.kill(other.pid, signal.SIGKILL)
        other.wait()
    Lock(tmp_path).release()


def test_the_folder_of_a_run_that_wrote_nothing_goes_with_it(tmp_path):
    (tmp_path / "run").mkdir()
    Lock(tmp_path / "run").release()
    assert not (tmp_path / "run").exists()


def test_without_locks_runs_go_on_as_they_are(tmp_path, monkeypatch):
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", no_locks)
    one, two = Lock(tmp_path), Lock(tmp_path)
    assert not in_use(tmp_path)
    one.release()
    two.release()


def test_a_folder_without_a_run_is_not_in_use_and_not_written(tmp_path):
    assert not in_use(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_taken_name_gets_a_number(tmp_path):
    made = [make_new(tmp_path / "12-00-00").name for _ in range(3)]
    assert made == ["12-00-00", "12-00-00_1", "12-00-00_2"]


def test_what_cannot_be_written_is_named_with_its_key(tmp_path):
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ValueError, match=r"^cache_dir=.*file.*(File exists|Not a directory)"):
            make_writable(place, "cache_dir")
    with pytest.raises(ValueError, match=r"Not a directory.*output_dir="):
        make_new(tmp_path / "file" / "run")
    make_writable(tmp_path / "new" / "folder", "cache_dir")
    assert list((tmp_path / "new" / "folder").iterdir()) == []


def test_a_file_is_as_it_was_where_it_cannot_be_written_whole(tmp_path):
    file = tmp_path / "config.yaml"
    write_whole(file, "before")

    def pieces():
        yield "af"
        raise OSError(28, "No space left on device")

    with pytest.raises(ValueError, match=r"config\.yaml.*No space left on device"):
        write_whole(file, pieces())
    assert file.read_text() == "before"
    assert list(tmp_path.iterdir()) == [file]


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{two}: &{two} [{','.join([f'*{one}'] * 9)}]\n" for one, two in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (BOMB, "alias"),
        ("a: &a\n  b: *a", "alias"),
        ("[" * 100_000, "nested"),
        ("a: " + "{b: " * 50, "nested"),
        ("- " * 50 + "a", "nested"),
        ("a: " + "1:" * 200_000 + "1", "digits"),
        ("a: " + "9" * 5000, "digits"),
        ("a: 0x" + "f" * 400, "type int"),
        ("a: !!python/object/apply:os.system [touch x]", "python/object"),
        ("a: !!timestamp 2024-01-01", "type date"),
        ("a: !!binary aGk=", "type bytes"),
        ("a: !!set {x, y}", "type set"),
        ("? [1, 2]\n: 3", "key"),
        ("a: 1\na: 2", "a"),
        ("a: [", "expected"),
        ("#" * MOST_YAML + "#", "bytes"),
    ],
)
def test_yaml_from_someone_else_is_bounded_and_has_plain_values(tmp_path, text, said):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=rf"config\.yaml .*{said}"):
        read_yaml(tmp_path / "config.yaml")
    assert not Path("x").exists()


def test_yaml_is_read_as_a_configuration_is_written(tmp_path):
    written = {"lr": 1e-05, "text": "${oc.env:HOME} ???", "no": None, "on": True, 3: ["1e-5", "2024-01-01", 2**63]}
    (tmp_path / "a.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(written)))
    assert read_yaml(tmp_path / "a.yaml") == written
