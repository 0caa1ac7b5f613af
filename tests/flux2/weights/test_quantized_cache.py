"""flux2.weights.quantized_cache: a copy is what was quantized, is used next time, and is never trusted nor in the
way.
"""

import errno
import os
import re
import shutil
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import filelock
import helpers
import pytest
import torch
from safetensors.torch import load_file, save_file

from flux2.models.transformer import Transformer
from flux2.models.variants import VARIANTS
from flux2.quantization.precision import Precision
from flux2.weights import loading as weights
from flux2.weights import quantized_cache
from flux2.weights.loading import load_transformer
from flux2.weights.quantized_cache import QuantizedCache
from flux2.weights.sources import ModelSource

CONFIG = replace(helpers.TRANSFORMERS["dev"], heads=4, double_blocks=1, single_blocks=1, guidance=False)
SMALL = replace(VARIANTS["dev"], name="small", repo="", transformer=CONFIG)
NF4, FP8, INT8 = Precision(storage="nf4"), Precision(storage="fp8"), Precision(storage="int8")
ROTATED = Precision(storage="int8", rotate=True)
# what is reported of a copy
READ, WRITTEN = r"\bread\b.*\bcop(y|ies)\b", r"\bwrit\w+\b.*\bcop(y|ies)\b"


class RunLocation:
    """A model's file and a folder for copies of it."""

    def __init__(self, folder: Path) -> None:
        with torch.device("meta"):
            names = Transformer(CONFIG).state_dict()
        generator = torch.Generator().manual_seed(1)
        self.state = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in names.items()}
        self.file = folder / "flux.safetensors"
        self.cache = folder / "cache" / "weights"
        self.said: list[str] = []
        save_file(self.state, self.file)

    def load(self, precision: Precision = NF4, **options: Any) -> Transformer:
        self.said.clear()
        source = ModelSource(SMALL, str(self.file))
        return load_transformer(source, "cpu", precision, **{"cache": self.cache, "say": self.said.append} | options)

    def fresh(self, precision: Precision = NF4) -> Transformer:
        """Without copies."""
        return self.load(precision, cache=None)

    @property
    def copies(self) -> list[Path]:
        return sorted(self.cache.glob("*.safetensors"))

    @property
    def left_over(self) -> list[Path]:
        return [file for file in self.cache.rglob("*") if file.is_file() and file.suffix not in KEPT]


KEPT = {".safetensors", ".json", ".lock"}


@pytest.fixture
def place(tmp_path: Path) -> RunLocation:
    return RunLocation(tmp_path)


@pytest.fixture
def no_source(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From its call on, reading a model's own files is an error."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the model's files were read")

    return lambda: monkeypatch.setattr(weights, "fill", refuse)


def equal(model: Transformer, other: Transformer) -> bool:
    ours, theirs = dict(model.named_parameters()), dict(other.named_parameters())
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]) for name in ours
    )


@pytest.mark.parametrize(
    "precision",
    [NF4, FP8, Precision(storage="fp8", rowwise=True), INT8, ROTATED, Precision(storage="nf4", dtype=torch.bfloat16)],
    ids=["nf4", "fp8", "fp8 rows", "int8", "int8 rotated", "nf4 beside bf16"],
)
def test_the_second_load_reads_the_copy_and_is_the_same_bit_for_bit(
    precision: Precision, place: RunLocation, no_source: Callable[[], None]
) -> None:
    first = place.load(precision)
    size = place.copies[0].stat().st_size / 1e9
    (line,) = place.said
    assert re.search(WRITTEN, line)
    assert float(re.search(r"([\d.]+) MB", line)[1]) == pytest.approx(size * 1e3, abs=0.1)  # without the header
    assert str(place.copies[0]) in line
    no_source()
    second = place.load(precision)
    (line,) = place.said
    assert re.search(READ, line)
    assert str(place.copies[0]) in line
    assert equal(first, second)
    place.said.clear()
    assert not second.training
    assert not any(parameter.requires_grad for parameter in second.parameters())
    assert place.left_over == []


def test_a_copy_is_a_safetensors_file_with_bitsandbytes_keys(place: RunLocation) -> None:
    model = place.load()
    stored = load_file(place.copies[0])
    layer = model.get_submodule("single_blocks.0.linear1")
    assert torch.equal(stored["single_blocks.0.linear1.weight"], layer.qweight)
    assert "single_blocks.0.linear1.weight.quant_state.bitsandbytes__nf4" in stored
    assert torch.equal(stored["img_in.weight"], place.state["img_in.weight"])


def test_what_is_not_quantized_gets_no_copy(place: RunLocation) -> None:
    for precision in (Precision(), Precision(torch.bfloat16)):
        place.load(precision)
    assert not place.cache.exists()


def test_every_recipe_has_a_copy_of_its_own(place: RunLocation, monkeypatch: pytest.MonkeyPatch) -> None:
    recipes = [
        NF4,
        FP8,
        INT8,
        ROTATED,
        Precision(storage="fp8", rowwise=True),
        Precision(storage="nf4", dtype=torch.bfloat16),
        Precision(storage="nf4", layers=(r"single_blocks\.\d+\.linear[12]",)),
    ]
    for recipe in recipes:
        place.load(recipe)
    assert len(place.copies) == len(recipes)
    place.load(Precision(storage="fp8", backward="bf16"))  # computes otherwise, and stores the same
    assert re.search(READ, place.said[0])
    monkeypatch.setattr(quantized_cache, "VERSION", quantized_cache.VERSION + 1)
    place.load()
    assert len(place.copies) == len(recipes) + 1


def test_changed_weights_get_another_copy(place: RunLocation) -> None:
    before = place.load()
    place.state["single_blocks.0.linear1.weight"][0, 0] += 10
    save_file(place.state, place.file)
    after = place.load()
    assert len(place.copies) == 2
    assert not equal(before, after)
    assert equal(after, place.fresh())


def test_a_file_that_was_touched_is_read_again_and_its_copy_is_still_good(place: RunLocation) -> None:
    place.load()
    written = place.copies[0].stat().st_mtime_ns
    os.utime(place.file, ns=(0, 0))
    place.load()
    assert place.said == []  # neither read nor written
    assert [copy.stat().st_mtime_ns for copy in place.copies] == [written]
    place.load()
    assert re.search(READ, place.said[0])


def test_the_same_weights_in_another_place_share_a_copy(place: RunLocation, tmp_path: Path) -> None:
    place.load()
    (tmp_path / "other").mkdir()
    place.file = Path(shutil.copy(place.file, tmp_path / "other" / "again.safetensors"))
    place.load()
    assert len(place.copies) == 1
    place.load()
    assert re.search(READ, place.said[0])


# ------------------------------------------------------------------ damage


def flip(at: Callable[[bytes], int]) -> Callable[[bytes], bytes]:
    def damage(raw: bytes) -> bytes:
        i = at(raw)
        return raw[:i] + bytes([raw[i] ^ 1]) + raw[i + 1 :]

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        flip(lambda raw: len(raw) - 1),
        flip(lambda raw: len(raw) // 2),
        flip(lambda raw: 8 + int.from_bytes(raw[:8], "little")),
        flip(lambda raw: raw.index(b"checksums") + 40),
        flip(lambda raw: raw.index(b"checksums")),
        lambda raw: raw[:-1],
        lambda raw: raw[:100],
        lambda raw: b"",
        lambda raw: bytes(len(raw)),
        lambda raw: raw.replace(b"img_in.weight", b"img_on.weight"),
        lambda raw: raw.replace(b'"F32"', b'"I32"'),
    ],
    ids=[
        *["last byte", "middle", "first", "a checksum", "no checksums", "cut", "cut early", "empty", "blank", "a name"],
        "a dtype",
    ],
)
def test_a_damaged_copy_is_said_not_used_and_made_anew(
    damage: Callable[[bytes], bytes], place: RunLocation, no_source: Callable[[], None]
) -> None:
    good = place.load()
    copy = place.copies[0]
    raw = copy.read_bytes()
    copy.write_bytes(damage(raw))
    again = place.load()
    assert str(copy) in place.said[0]
    assert re.search(WRITTEN, place.said[1])
    assert equal(good, again)
    assert copy.read_bytes() == raw
    no_source()
    assert equal(good, place.load())


def test_a_damaged_note_is_as_none(place: RunLocation) -> None:
    place.load()
    (note,) = (place.cache / "sources").glob("*.json")
    for content in ("", "{", "[]", "{}", '{"content": 3}'):
        note.write_text(content)
        place.load()
        assert place.said == []
        place.load()
        assert re.search(READ, place.said[0])


# ------------------------------------------------------------------ what hinders


def test_a_full_disk_is_said_before_anything_is_written(place: RunLocation, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type(shutil.disk_usage("."))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1 << 40, 1 << 40, (1 << 30) + 1000))
    assert equal(place.load(), place.fresh())
    place.load()
    (line,) = place.said
    assert re.search(r"cop(y|ies)\b.*\b1\.07 GB", line)
    assert place.copies == place.left_over == []


def test_what_an_ended_process_left_makes_room_for_the_copy(
    place: RunLocation, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.load()
    (copy,) = place.copies
    copy.unlink()
    left = copy.with_name(f".{copy.name}.123.part")
    left.write_bytes(b"half")
    usage = type(shutil.disk_usage("."))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1 << 40, 0, 0 if left.exists() else 1 << 39))
    place.load()
    assert place.copies == [copy]


def test_a_disk_that_fills_while_writing_is_said_and_nothing_is_left(
    place: RunLocation, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(data: memoryview) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    wanted = place.fresh()
    monkeypatch.setattr(quantized_cache, "checksum", full)  # after the first tensor
    assert equal(place.load(), wanted)
    assert len(place.said) == 2
    assert re.search(r"cop(y|ies)\b.*No space left on device", place.said[1])
    assert place.copies == place.left_over == []


def test_a_place_that_cannot_be_written_is_said_and_the_model_is_loaded(place: RunLocation, tmp_path: Path) -> None:
    (tmp_path / "a file").touch()
    place.cache = tmp_path / "a file" / "weights"
    assert equal(place.load(), place.fresh())
    place.load()
    (line,) = place.said
    assert re.search(rf"cop(y|ies)\b.*{place.cache}", line)


def test_a_read_only_copy_is_read(
    place: RunLocation, no_source: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    place.load()

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EROFS, os.strerror(errno.EROFS))

    no_source()
    for method in ("mkdir", "write_bytes", "replace", "unlink"):
        monkeypatch.setattr(Path, method, refuse)
    place.load()
    assert re.search(READ, place.said[0])


# ------------------------------------------------------------------ several processes


def test_while_another_process_writes_none_is_written(place: RunLocation) -> None:
    place.load()
    (copy,) = place.copies
    copy.unlink()
    with filelock.FileLock(copy.with_suffix(".lock")):
        assert equal(place.load(), place.fresh())
        place.load()
        assert place.said == place.copies == []
    place.load()
    assert place.copies == [copy]


def test_what_an_ended_process_left_is_swept(place: RunLocation) -> None:
    place.load()
    (copy,) = place.copies
    copy.unlink()
    copy.with_name(f".{copy.name}.123.part").write_bytes(b"half")
    place.load()
    assert place.copies == [copy]
    assert place.left_over == []


def test_loads_at_the_same_time_do_not_tread_on_each_other(place: RunLocation, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = place.fresh()
    together = threading.Barrier(3)
    write = QuantizedCache.write

    def at_once(self: QuantizedCache, *rest: Any) -> None:
        together.wait(timeout=60)
        write(self, *rest)

    monkeypatch.setattr(QuantizedCache, "write", at_once)
    models: list[Transformer] = []
    threads = [threading.Thread(target=lambda: models.append(place.load())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(models) == 3
    assert all(equal(model, wanted) for model in models)
    assert len(place.copies) == 1
    assert place.left_over == []
    assert equal(place.load(), wanted)
    assert re.search(READ, place.said[0])


# ------------------------------------------------------------------ blocks in host memory


def test_each_tensor_is_asked_for_its_home(place: RunLocation, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the model's files and from the copy; on a machine with one device alone the moves cannot be seen."""
    asked: dict[str, str] = {}
    original = weights.device_chooser

    def recorded(host: Sequence[str], device: torch.device, devices: object) -> Callable[[str], torch.device]:
        home = original(host, torch.device("meta"))

        def ask(name: str) -> torch.device:
            if host:  # and not where it is quantized
                asked[name.removesuffix(".weight")] = str(home(name))
            return torch.device("cpu")

        return ask

    monkeypatch.setattr(weights, "device_chooser", recorded)
    names = {name.removesuffix(".weight") for name in place.state}
    wanted = {name: "cpu" if name.startswith("single_blocks.0.") else "meta" for name in names}
    for said in (WRITTEN, READ):
        asked.clear()
        place.load(host=["single_blocks.0"])
        assert re.search(said, place.said[0])
        assert asked == wanted
