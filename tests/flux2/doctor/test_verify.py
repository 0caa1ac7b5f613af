"""flux2.doctor --verify: each file of a model is compared with the hash that the Hub gave for it."""

import hashlib
import re
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from flux2.doctor import command as doctor
from flux2.doctor.verify import hash_like
from flux2.weights.streaming_writer import write_safetensors

LARGE, SMALL = b"weights" * 1000, b'{"a": 1}'


def sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository in the cache of huggingface_hub; returns the folder of its blobs."""
    repo = tmp_path / "models--black-forest-labs--FLUX.2-dev"
    snapshot, commit = repo / "snapshots" / ("c" * 40), "c" * 40
    (snapshot / "transformer").mkdir(parents=True)
    (repo / "blobs").mkdir()
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    blobs = {"transformer/x.safetensors": (hashlib.sha256(LARGE).hexdigest(), LARGE), "a.json": (sha1(SMALL), SMALL)}
    for name, (key, content) in blobs.items():
        (repo / "blobs" / key).write_bytes(content)
        depth = "../" * (2 + name.count("/"))
        (snapshot / name).symlink_to(f"{depth}blobs/{key}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    return repo / "blobs"


@pytest.mark.parametrize("model", ["dev", "black-forest-labs/FLUX.2-dev"])
def test_whole_files_of_the_cache_pass(model: str, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--verify", model]) == 0
    text = capsys.readouterr().out
    assert re.search(r"transformer/x\.safetensors +ok", text)
    assert "2 files are as published, 0 are damaged" in text
    assert "Versions" not in text


@pytest.mark.parametrize("content", [LARGE, SMALL], ids=["large", "small"])
def test_a_bit_that_flipped_is_named_with_what_to_do(
    content: bytes, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (blob,) = [file for file in cache.iterdir() if file.read_bytes() == content]
    blob.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    assert doctor.main(["--verify", "dev"]) == 1
    found = capsys.readouterr().out
    assert re.search(rf"DAMAGED.*delete {blob}.*hf download black-forest-labs/FLUX\.2-dev", found)
    assert "1 files are as published, 1 are damaged" in found


def test_a_file_that_is_gone_is_damaged(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    next(file for file in cache.iterdir() if file.read_bytes() == LARGE).unlink()
    assert doctor.main(["--verify", "dev"]) == 1
    assert re.search(r"x\.safetensors +DAMAGED +cannot be read", capsys.readouterr().out)


def test_a_download_to_another_folder_is_compared_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    about = tmp_path / ".cache" / "huggingface" / "download" / "vae"
    about.mkdir(parents=True)
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "x.safetensors").write_bytes(LARGE)
    (about / "x.safetensors.metadata").write_text(f"{'c' * 40}\n{hashlib.sha256(LARGE).hexdigest()}\n1700000000.0\n")
    (tmp_path / "own.txt").write_text("not from the Hub")
    for model in (tmp_path, tmp_path / "vae" / "x.safetensors"):
        assert doctor.main(["--verify", str(model)]) == 0
    assert re.search(r"own\.txt +-- +no hash is known", capsys.readouterr().out)
    (tmp_path / "vae" / "x.safetensors").write_bytes(LARGE + b" ")
    assert doctor.main(["--verify", str(tmp_path)]) == 1


def test_an_export_is_compared_with_the_hash_in_its_header(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "merged.safetensors"
    write_safetensors(file, {"a": torch.randn(9)}, {})
    assert doctor.main(["--verify", str(file)]) == 0
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    assert doctor.main(["--verify", str(tmp_path)]) == 1
    file.write_bytes(raw[:-1])
    assert doctor.main(["--verify", str(tmp_path)]) == 1
    assert re.search(r"DAMAGED +differs.*\n.*\n.*DAMAGED +cannot be read \(.*ends within a", capsys.readouterr().out)


def test_nothing_compared_is_no_success(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / "x.safetensors")
    assert doctor.main(["--verify", str(tmp_path)]) == 1
    assert "0 files are as published, 0 are damaged, of 1 no hash is known" in capsys.readouterr().out


@pytest.mark.parametrize(("model", "remedy"), [("tiny", "git"), ("./gone", "dev,.*path"), ("klein_4b", "hf download")])
def test_what_cannot_be_verified_is_an_error(
    model: str, remedy: str, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert doctor.main(["--verify", model]) == 2
    assert re.search(rf"error: --verify {re.escape(model)}: .*{remedy}", capsys.readouterr().err)


def test_the_hash_of_small_files_is_gits(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(SMALL)
    done = subprocess.run(["git", "hash-object", tmp_path / "a"], capture_output=True, text=True, check=True)
    assert hash_like(tmp_path / "a", "0" * 40) == done.stdout.strip()
