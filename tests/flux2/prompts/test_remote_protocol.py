"""flux2.prompts.remote_protocol: bytes from elsewhere become one finite tensor or an error."""

import io
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import safetensors.torch
import torch
from remote_helpers import Harmful, harmful_archive, saved

from flux2.prompts.remote_protocol import check_embeddings, error_text, read_safetensors, read_serialized

TENSOR = torch.arange(24.0).view(1, 4, 6)


@pytest.mark.parametrize("tensor", [TENSOR, TENSOR.bfloat16(), TENSOR.mT, torch.nn.Parameter(TENSOR).detach()])
def test_a_tensor_comes_back(tensor: torch.Tensor) -> None:
    assert torch.equal(check_embeddings(read_serialized(saved(tensor)), tuple(tensor.shape)), tensor)  # type: ignore[arg-type]
    stored = safetensors.torch.save({"embeddings": tensor.contiguous()})
    assert torch.equal(check_embeddings(read_safetensors(stored), tuple(tensor.shape)), tensor)  # type: ignore[arg-type]


def test_what_would_run_when_unpickled_is_refused_in_every_format(tmp_path: Path) -> None:
    harm = tmp_path / "harm"
    old = io.BytesIO()
    torch.save(Harmful(harm), old, _use_new_zipfile_serialization=False)
    for body in (harmful_archive(harm), saved(Harmful(harm)), saved({"x": Harmful(harm)}), old.getvalue()):
        with pytest.raises(ValueError, match="tensor"):
            read_serialized(body)
    assert not harm.exists()
    torch.load(io.BytesIO(saved(Harmful(harm))), weights_only=False)
    assert harm.exists(), "the test needs a pickle that does harm"


def test_a_small_archive_cannot_become_large() -> None:
    packed = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(saved(torch.zeros(1 << 20)))) as plain,
        zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for name in plain.namelist():
            bomb.writestr(name, plain.read(name))
    assert len(packed.getvalue()) < 20_000
    with pytest.raises(ValueError, match="unpack"):
        read_serialized(packed.getvalue())


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": TENSOR}, r"\bdict\b.*tensor"),
        ([TENSOR], r"\blist\b.*tensor"),
        (OrderedDict(a=1), r"\bOrderedDict\b.*tensor"),
        ("text", r"\bstr\b.*tensor"),
        (torch.nn.Parameter(TENSOR), r"\bParameter\b.*tensor"),
    ],
)
def test_what_is_no_tensor_is_named(value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_serialized(saved(value))


@pytest.mark.parametrize("cut", [0, 1, 30, 100, -1, -30])
def test_damaged_bytes_are_an_error(cut: int) -> None:
    for whole, read in (
        (saved(TENSOR), read_serialized),
        (safetensors.torch.save({"embeddings": TENSOR}), read_safetensors),
    ):
        with pytest.raises(ValueError):  # noqa: PT011, what is said depends on where it is cut
            read(whole[:cut])


@pytest.mark.parametrize("tensors", [{}, {"other": TENSOR}, {"embeddings": TENSOR, "more": TENSOR}])
def test_a_file_of_other_tensors_is_refused(tensors: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ValueError, match="embeddings"):
        read_safetensors(safetensors.torch.save({name: tensor.clone() for name, tensor in tensors.items()}))


@pytest.mark.parametrize("tensor", [TENSOR.to_sparse(), TENSOR.to("meta")], ids=["sparse", "meta"])
def test_numbers_that_are_not_there_are_refused(tensor: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"numbers|dense|tensor"):
        check_embeddings(read_serialized(saved(tensor)), (1, 4, 6))


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b'{"error": "no"}', "no"),
        (b'{"detail": [1]}', "[1]"),
        (b'{"x": 1}', '{"x": 1}'),
        (b"plain", "plain"),
        (b"[" * 100_000, "[" * 100_000),
        (b"\xff", "\N{REPLACEMENT CHARACTER}"),
    ],
)
def test_a_reason_is_found_in_whatever_form_it_has(body: bytes, text: str) -> None:
    assert error_text(body) == text
