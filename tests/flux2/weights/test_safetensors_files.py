"""flux2.weights.safetensors_files and flux2.weights.parallel_reader: whatever is wrong with a file is said with its
name and the tensor's, and reading ahead keeps to its memory."""

import ctypes
import json
import os
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from process_helpers import in_fork
from safetensors.torch import save_file
from torch import Tensor

from flux2.weights import parallel_reader
from flux2.weights.parallel_reader import Digests, Piece, ReadTask, TensorRead, checksum, read_of, run_tasks
from flux2.weights.safetensors_files import BLANK, TensorFiles, part_files, read_header
from flux2.weights.sources import WeightsError

CPU = torch.device("cpu")


def entry(dtype: str, shape: list[int], start: int, stop: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def raw(header: Any, data: bytes) -> bytes:
    """A file with this header, however wrong, and this data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


A = entry("F32", [2, 3], 0, 24)
B = entry("BF16", [4], 24, 32)
DATA = bytes(range(1, 33))
GOOD = raw({"__metadata__": {"format": "pt"}, "a": A, "b": B}, DATA)
LONG = entry("U8", [BLANK + 5], 0, BLANK + 5)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", r"\b0 bytes"),
        (GOOD[:5], r"\b5 bytes"),
        (bytes(4096), r"header.*\b0\b"),
        (b"<html>404 Not Found</html>", "web page.*Download"),
        (b"GGUF\3\0\0\0" + bytes(64), "GGUF.*bfloat16"),
        (b"PK\3\4\x14\0\0\0" + bytes(64), "PyTorch checkpoint.*safetensors"),
        (b"\x80\2\x8a\nl\xfc\x9cF" + bytes(64), "pickle.*safetensors"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS.*Download"),
        (GOOD[:40], r"header.*\b40 bytes\b.*\b\d+"),
        (GOOD[:-1], r"\bb\b.*\b\d+ bytes\b.*\b\d+"),
        (GOOD[:-9], r"\ba: \d+ bytes|\btensor a\b.*\b\d+ bytes"),
        (GOOD + b"more", r"\b4 bytes\b.*\bb\b"),
        (raw(b"{not json", DATA), "header.*JSON"),
        (raw(b"\xff\xfe", DATA), "header.*JSON"),
        (raw([1, 2], DATA), r"header.*\blist\b"),
        (raw({"__metadata__": 3, "a": A}, DATA[:24]), "metadata"),
        (raw(b'{"a": %s, "a": %s}' % (json.dumps(A).encode(), json.dumps(A).encode()), DATA[:24]), "'a' twice"),
        (raw({"a": {"dtype": "F32", "shape": [6]}}, DATA[:24]), r"\ba\b.*dtype, shape and data_offsets"),
        (raw({"a": 3}, DATA[:24]), r"\ba\b.*dtype, shape and data_offsets"),
        (raw({"a": entry("F32", [-2, -3], 0, 24)}, DATA[:24]), r"\ba\b.*dtype, shape and data_offsets"),
        (raw({"a": A, "b": entry("F4", [16], 24, 32)}, DATA), r"\bb\b.*\bF4\b"),
        (raw({"a": entry("F32", [2, 4], 0, 24)}, DATA[:24]), r"\ba\b.*F32.*\(2, 4\).*\b32 bytes.*\b24\b"),
        (raw({"a": A, "b": entry("BF16", [4], 20, 28)}, DATA[:28]), "a and b.*overlap"),
        (raw({"a": A, "b": entry("BF16", [4], 26, 34)}, DATA + b"xx"), r"\b2 bytes\b.*\bb\b"),
        (raw({"w": LONG}, b"12345" + bytes(BLANK)), r"\bw\b.*zero"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_with_its_name_and_the_tensors(
    content: bytes, told: str, tmp_path: Path
) -> None:
    file = tmp_path / "part.safetensors"
    file.write_bytes(content)
    with pytest.raises(WeightsError, match=told) as error:
        TensorFiles([file])
    assert str(file) in str(error.value)


def test_a_whole_file_is_read_as_the_safetensors_library_reads_it(tmp_path: Path) -> None:
    tensors = {
        "half": torch.randn(3, 5).half(),
        "brain": torch.randn(7).bfloat16(),
        "eight": torch.randn(4, 4).to(torch.float8_e4m3fn),
        "five": torch.randn(4, 4).to(torch.float8_e5m2),
        "bytes": torch.arange(9, dtype=torch.uint8),
        "whole": torch.tensor(3),
        "none": torch.empty(0, 4),
        "yes": torch.tensor([True, False]),
        "double": torch.randn(2, dtype=torch.float64),
    }
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt", "made": "here"})
    files = TensorFiles([tmp_path / "a.safetensors"])
    assert files.metadata == {"format": "pt", "made": "here"}
    got: dict[str, Tensor] = {}
    run_tasks([ReadTask({name: read_of(files[name], CPU)}, got.update) for name in files.names])
    assert got.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert got[name].dtype == tensor.dtype
        assert got[name].shape == tensor.shape
        assert torch.equal(got[name].view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8))


def test_zeros_at_the_end_are_no_damage_where_they_are_few(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(100, 100), "b": torch.ones(1 << 20)}, tmp_path / "a.safetensors")
    read_header(tmp_path / "a.safetensors")


def test_a_tensor_in_two_shards_is_an_error(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_file({"w": torch.ones(2)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(WeightsError, match=r"\bw\b.*a\.safetensors\b.*\bb\.safetensors"):
        part_files(tmp_path)


def test_a_file_that_is_written_to_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_file({"w": torch.ones(2)}, file)
    files = TensorFiles([file])
    files.check_unchanged()
    status = file.stat()
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    with pytest.raises(WeightsError, match=r"\ba\.safetensors\b.*change"):
        files.check_unchanged()


def test_a_file_that_is_cut_after_its_header_was_read_is_an_error_that_names_the_tensor(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_file({"w": torch.ones(100)}, file)
    files = TensorFiles([file])
    os.truncate(file, file.stat().st_size - 4)
    with pytest.raises(WeightsError, match=r"\ba\.safetensors\b.*\bw\b"):
        run_tasks([ReadTask({"it": read_of(files["w"], CPU)}, lambda tensors: None)])
    file.unlink()
    with pytest.raises(WeightsError, match=r"\ba\.safetensors: w\b.*No such file"):
        run_tasks([ReadTask({"it": read_of(files["w"], CPU)}, lambda tensors: None)])


# ------------------------------------------------------------------ reading


@pytest.fixture
def matrices(tmp_path: Path) -> tuple[TensorFiles, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    sizes = (40, 16, 40, 8, 24, 40, 16)
    state = {f"w{i}": torch.randn(size, 32, generator=generator) for i, size in enumerate(sizes)}
    save_file(state, tmp_path / "a.safetensors")
    return TensorFiles([tmp_path / "a.safetensors"]), state


@pytest.mark.parametrize("staged", [False, True], ids=["directly", "through a buffer"])
def test_pieces_in_any_order_become_one_tensor(
    matrices: tuple[TensorFiles, dict[str, Tensor]], staged: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, state = matrices
    monkeypatch.setattr(parallel_reader, "CHUNK", 1000)  # no multiple of a row, and less than a tensor
    monkeypatch.setattr(parallel_reader, "needs_staging", lambda memory: staged)
    half = files["w3"].size // 2
    pieces = (
        Piece(files["w1"], 0, files["w1"].size),
        Piece(files["w3"], half, half),
        Piece(files["w3"], 0, half),
    )
    got: dict[str, Tensor] = {}
    run_tasks([ReadTask({"it": TensorRead(torch.float32, (24, 32), pieces, CPU)}, got.update)])
    first, second = state["w3"].chunk(2)
    assert torch.equal(got["it"], torch.cat([state["w1"], second, first]))


def test_jobs_are_done_in_their_order_and_keep_their_tensors(matrices: tuple[TensorFiles, dict[str, Tensor]]) -> None:
    files, state = matrices
    done: list[str] = []
    got: dict[str, Tensor] = {}

    def use(tensors: dict[str, Tensor]) -> None:
        done.extend(tensors)
        got.update(tensors)

    run_tasks([ReadTask({name: read_of(files[name], CPU)}, use) for name in state])
    assert done == list(state)
    assert all(torch.equal(got[name], state[name]) for name in state)


def test_reading_ahead_holds_at_most_one_and_a_half_of_the_largest(
    matrices: tuple[TensorFiles, dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    files, state = matrices
    alive: dict[int, int] = {}
    most = 0
    begin = parallel_reader.start_task

    def spy(job: ReadTask, *rest: Any) -> Any:
        nonlocal most
        tensors, futures = begin(job, *rest)
        for tensor in tensors.values():
            alive[id(tensor)] = tensor.nbytes
            weakref.finalize(tensor, alive.pop, id(tensor), None)
        most = max(most, sum(alive.values()))
        return tensors, futures

    monkeypatch.setattr(parallel_reader, "start_task", spy)
    run_tasks([ReadTask({name: read_of(files[name], CPU)}, lambda tensors: None) for name in state])
    largest = max(tensor.nbytes for tensor in state.values())
    assert largest < most <= 1.5 * largest


def test_an_error_in_use_ends_reading(matrices: tuple[TensorFiles, dict[str, Tensor]]) -> None:
    files, state = matrices
    used: list[str] = []

    def use(tensors: dict[str, Tensor]) -> None:
        used.extend(tensors)
        if len(used) == 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        run_tasks([ReadTask({name: read_of(files[name], CPU)}, use) for name in state])
    assert used == ["w0", "w1", "w2"]


def test_checksums_are_of_the_bytes(
    matrices: tuple[TensorFiles, dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    files, state = matrices
    monkeypatch.setattr(parallel_reader, "CHUNK", 1000)
    digests = Digests()
    run_tasks([ReadTask({name: read_of(files[name], CPU)}, lambda tensors: None) for name in state], digests)
    sums = {name: digests.checksum(files[name]) for name in state}
    assert len(set(sums.values())) == len(state)
    for name, tensor in state.items():
        assert sums[name] == checksum(tensor.view(-1).view(torch.uint8).numpy().data)
    state["w5"][39, 31] += 1
    assert sums["w5"] != checksum(state["w5"].view(-1).view(torch.uint8).numpy().data)


def test_contents_are_the_same_however_they_are_spread_over_files(
    matrices: tuple[TensorFiles, dict[str, Tensor]], tmp_path: Path
) -> None:
    _, state = matrices

    def content(*shards: dict[str, Tensor]) -> str:
        for i, shard in enumerate(shards):
            save_file(shard, tmp_path / f"shard{i}.safetensors")
        files = TensorFiles(tmp_path / f"shard{i}.safetensors" for i in range(len(shards)))
        digests = Digests()
        run_tasks(
            [ReadTask({name: read_of(files[name], CPU)}, lambda tensors: None) for name in sorted(files.names)], digests
        )
        return digests.content()

    first = {name: state[name] for name in ("w5", "w1")}
    rest = {name: state[name] for name in state if name not in first}
    assert content(state) == content(first, rest)
    assert content(state) != content(rest)
    assert content(state) != content(state | {"w1": state["w1"].reshape(32, 16)})
    assert content(state) != content(state | {"w1": state["w3"], "w3": state["w1"]})


def memory(key: str) -> int:
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) * 1024


def measured(file: Path) -> tuple[int, int, int]:
    """Bytes of the peak while a quarter of each tensor is kept, of what is kept, and of the largest tensor."""
    kept: list[Tensor] = []
    files = TensorFiles([file])
    run_tasks([ReadTask({"it": read_of(files["warm"], CPU)}, lambda tensors: None)], Digests())  # threads, libraries
    jobs = [
        ReadTask({"it": read_of(files[f"w{i}"], CPU)}, lambda tensors: kept.append(tensors["it"][::4].clone()))
        for i in range(6)
    ]
    ctypes.CDLL(None).malloc_trim(0)  # what the tests before have freed is not taken again
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins here
    before = memory("VmRSS")
    run_tasks(jobs, Digests())
    return memory("VmHWM") - before, sum(part.nbytes for part in kept), max(job.nbytes for job in jobs)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measured through Linux's /proc")
def test_host_memory_never_holds_two_tensors_above_the_result(tmp_path: Path) -> None:
    state = {f"w{i}": torch.full(((48 if i % 2 == 0 else 20) << 20,), i + 1, dtype=torch.uint8) for i in range(6)}
    save_file(state | {"warm": torch.ones(1 << 20, dtype=torch.uint8)}, tmp_path / "a.safetensors")
    peak, result_bytes, largest = in_fork(lambda: measured(tmp_path / "a.safetensors"))
    assert result_bytes < peak  # the measure sees something
    assert peak - result_bytes <= 2 * largest
