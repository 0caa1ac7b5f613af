"""flux2.weights.sources: a part's fingerprint is that of its files, or what is remembered where they are gone."""

import re
import shutil
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from flux2.weights.sources import TINY_FOLDER, Fingerprints, ModelSource, WeightsError, fingerprint, model_source


def remembering(file: Path, path: str) -> ModelSource:
    source = model_source("tiny", path)
    return ModelSource(source.variant, source.path, fingerprints=Fingerprints(file))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TINY_FOLDER, tmp_path / "model"))


def test_a_fingerprint_is_remembered_for_when_the_files_are_gone(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = remembering(tmp_path / "known.json", str(folder))
    found = {part: fingerprint(source, part) for part in ("vae", "text_encoder", "tokenizer")}
    assert found == {part: fingerprint(model_source("tiny"), part) for part in found}
    source.fingerprints.save()
    shutil.rmtree(folder / "vae")
    shutil.rmtree(folder / "tokenizer")
    (folder / "text_encoder" / "model.safetensors").unlink()  # what is left is no encoder
    later = remembering(tmp_path / "known.json", str(folder))
    assert {part: fingerprint(later, part) for part in found} == found
    for record, part in zip(caplog.records, found, strict=True):
        assert re.search(rf"\b{part}\b.* {folder}\b", record.getMessage())
    with pytest.raises(WeightsError, match=rf"{folder}/vae\b"):
        fingerprint(model_source("tiny", str(folder)), "vae")
    with pytest.raises(WeightsError, match=rf"{folder}/text_encoder\b.*\.safetensors"):
        fingerprint(model_source("tiny", str(folder)), "text_encoder")


def test_other_files_at_the_place_are_seen_and_remembered_instead(folder: Path, tmp_path: Path) -> None:
    source = remembering(tmp_path / "known.json", str(folder))
    before = fingerprint(source, "vae")
    source.fingerprints.save()
    file = next((folder / "vae").glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    again = remembering(tmp_path / "known.json", str(folder))
    after = fingerprint(again, "vae")
    assert after != before
    again.fingerprints.save()
    assert Fingerprints(tmp_path / "known.json").get(f"vae of {folder}") == after


def test_what_is_known_of_a_repository_is_not_downloaded_for_it(tmp_path: Path, monkeypatch) -> None:
    def snapshot(repo: str, *, allow_patterns: list[str], local_files_only: bool = False) -> str:
        assert local_files_only, "a download was tried"
        raise LocalEntryNotFoundError("not there")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    source = remembering(tmp_path / "known.json", "owner/name")
    source.fingerprints.set("text_encoder of owner/name", "abc")
    assert fingerprint(source, "text_encoder") == "abc"
    with pytest.raises(AssertionError, match="a download was tried"):
        fingerprint(source, "vae")


@pytest.mark.parametrize("content", ["{", "[1]", ""])
def test_a_damaged_memory_is_told(tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "known.json").write_text(content)
    assert Fingerprints(tmp_path / "known.json").get("vae of x") is None
    assert str(tmp_path / "known.json") in caplog.text


def test_nothing_new_writes_nothing_and_without_a_file_nothing_is_known(tmp_path: Path) -> None:
    Fingerprints(tmp_path / "none" / "known.json").save()
    nowhere = Fingerprints(None)
    nowhere.set("a", "b")
    nowhere.save()
    assert list(tmp_path.iterdir()) == []


def test_hidden_files_are_no_part_of_a_model(tmp_path: Path) -> None:
    shutil.copytree(TINY_FOLDER, tmp_path / "model")
    source = model_source("tiny", str(tmp_path / "model"))
    before = fingerprint(source, "transformer")
    (tmp_path / "model/transformer/.DS_Store").write_bytes(b"x")
    assert fingerprint(source, "transformer") == before
    (tmp_path / "model/transformer/more.json").write_bytes(b"{}")
    assert fingerprint(source, "transformer") != before
