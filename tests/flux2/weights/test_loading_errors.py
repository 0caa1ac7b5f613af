"""flux2.weights.loading: what is wrong with a file, a folder or a repository is one error that names it."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import helpers
import huggingface_hub
import pytest
import torch
from huggingface_hub import errors as hub_errors
from safetensors.torch import load_file, save_file

from flux2.weights import loading as weights
from flux2.weights.loading import load_autoencoder, load_transformer
from flux2.weights.sources import ModelSource, WeightsError, looks_local, model_source

DEV = helpers.VARIANTS["dev"]


# ------------------------------------------------------------------ wrong files


def test_missing_unexpected_and_misshaped_tensors_are_one_error_that_lists_them(tmp_path: Path) -> None:
    state = helpers.transformer("dev").state_dict()
    state["img_in.weight"] = torch.zeros(3, 5)
    state["extra.weight"] = torch.zeros(1)
    del state["single_blocks.1.linear2.weight"]
    save_file(state, tmp_path / "flux.safetensors")
    with pytest.raises(WeightsError) as error:
        load_transformer(ModelSource(DEV, str(tmp_path / "flux.safetensors")))
    message = str(error.value)
    assert re.search(r"/flux\.safetensors\b.*small_dev\b", message)
    assert re.search(r"\b1 missing: single_blocks\.1\.linear2\.weight\b", message)
    assert re.search(r"\b1 unexpected: extra\.weight\b", message)
    assert re.search(r"\b1 misshaped: img_in\.weight \(3, 5\).*\(48, 128\)", message)


def test_the_file_of_another_model_is_an_error_that_is_not_endless(model_folders: Callable[[str], Path]) -> None:
    with pytest.raises(WeightsError, match=r"missing: .*\b\d+ more") as error:
        load_transformer(ModelSource(DEV, str(model_folders("klein"))))
    assert len(str(error.value)) < 2500


def test_a_truncated_file_is_named(copied: Path) -> None:
    shard = sorted((copied / "transformer").glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(WeightsError, match=rf"{shard.name}\b.*incomplete"):
        load_transformer(ModelSource(DEV, str(copied)))


def test_a_file_that_changes_while_the_model_is_filled_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "flux.safetensors"
    save_file(helpers.transformer("klein").state_dict(), file)
    read = weights.run_tasks

    def write_meanwhile(*arguments: Any) -> None:
        read(*arguments)
        file.write_bytes(file.read_bytes() + b"more")

    monkeypatch.setattr(weights, "run_tasks", write_meanwhile)
    with pytest.raises(WeightsError, match=r"/flux\.safetensors\b.*change"):
        load_transformer(ModelSource(helpers.VARIANTS["klein"], str(file)))


def test_a_file_that_is_no_safetensors_is_named(tmp_path: Path) -> None:
    (tmp_path / "flux.safetensors").write_text("<html>404</html>")
    with pytest.raises(WeightsError, match=r"/flux\.safetensors\b"):
        load_transformer(ModelSource(DEV, str(tmp_path / "flux.safetensors")))


def test_a_shard_that_the_index_names_and_that_is_absent_is_named(copied: Path) -> None:
    shard = sorted((copied / "transformer").glob("*.safetensors"))[2]
    shard.unlink()
    with pytest.raises(WeightsError, match=rf"index.*{shard.name}"):
        load_transformer(ModelSource(DEV, str(copied)))


def test_a_damaged_index_is_named(copied: Path) -> None:
    (index,) = (copied / "transformer").glob("*.index.json")
    index.write_text("{")
    with pytest.raises(WeightsError, match=rf"{index.name}\b"):
        load_transformer(ModelSource(DEV, str(copied)))


def test_shards_that_the_index_does_not_name_are_not_read(copied: Path) -> None:
    """A leftover of an earlier download must not shadow the tensors of the index."""
    state = load_file(next((copied / "transformer").glob("*00001*")))
    stale = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    save_file(stale, copied / "transformer" / "zz.safetensors")
    loaded = load_transformer(ModelSource(DEV, str(copied)))
    assert helpers.same_tensors(loaded.state_dict(), helpers.transformer("dev").state_dict())


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (ModelSource(DEV, "/nowhere/at/all"), r"model\.path='/nowhere/at/all'"),
        (ModelSource(DEV, "FLUX.2-dev"), r"model\.path='FLUX\.2-dev'.*repository"),
        (ModelSource(DEV, "gone/flux.safetensors"), r"model\.path='gone/flux\.safetensors'"),
    ],
)
def test_a_missing_place_is_named(source: ModelSource, message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        load_transformer(source)


def test_a_missing_place_of_another_part_is_named_by_its_own_setting(model_folders: Callable[[str], Path]) -> None:
    folder = str(model_folders("dev"))
    with pytest.raises(WeightsError, match=r"model\.autoencoder='gone\.safetensors'"):
        load_autoencoder(ModelSource(DEV, folder, autoencoder="gone.safetensors"))
    with pytest.raises(WeightsError, match=r"model\.text_encoder='\./gone'"):
        weights.load_text_encoder(ModelSource(DEV, folder, text_encoder="./gone"))
    with pytest.raises(WeightsError, match=r"model\.text_encoder='a\.safetensors'.*folder"):
        weights.load_text_encoder(ModelSource(DEV, folder, text_encoder="a.safetensors"))


def test_gguf_is_refused_by_name_whatever_it_is_called(copied: Path) -> None:
    (copied / "a.gguf").write_bytes(b"GGUF" + bytes(64))
    (copied / "b.safetensors").write_bytes(b"GGUF\3\0\0\0" + bytes(64))
    for name in ("a.gguf", "b.safetensors"):
        with pytest.raises(WeightsError, match=rf"{re.escape(name)}\b.*GGUF, which is not read"):
            load_transformer(ModelSource(DEV, str(copied / name)))
    for file in (copied / "transformer").glob("*.safetensors"):
        file.rename(file.with_suffix(".gguf"))
    next((copied / "transformer").glob("*.index.json")).unlink()
    with pytest.raises(WeightsError, match=r"/transformer\b.*\.gguf\b.*which is not read.*bfloat16"):
        load_transformer(ModelSource(DEV, str(copied)))


def test_a_folder_in_another_layout_is_an_error_that_names_the_right_one(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=rf"{tmp_path}\b.*transformer/, vae/, text_encoder/, tokenizer/"):
        load_transformer(ModelSource(DEV, str(tmp_path)))
    (tmp_path / "transformer").mkdir()
    with pytest.raises(WeightsError, match=r"/transformer\b.*\.safetensors"):
        load_transformer(ModelSource(DEV, str(tmp_path)))


# ------------------------------------------------------------------ repositories


def test_places_on_disk_are_told_from_repositories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "dev").mkdir(parents=True)
    assert looks_local("models/dev")
    assert looks_local("../dev")
    assert looks_local("~/models")
    assert looks_local("/models/dev")
    assert not looks_local("black-forest-labs/FLUX.2-dev")


def test_a_repository_downloads_only_the_part_that_is_needed(
    model_folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def snapshot(repo: str, allow_patterns: list[str]) -> str:
        asked.append((repo, allow_patterns))
        return str(model_folders("dev"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    model = load_transformer(ModelSource(DEV, "someone/model"))
    assert asked == [("someone/model", ["transformer/*"])]
    assert helpers.same_tensors(model.state_dict(), helpers.transformer("dev").state_dict())


def test_a_repository_that_cannot_be_reached_is_an_error_that_says_how_to_give_a_local_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(WeightsError, match=r"someone/absent\b.*model\.path="):
        load_transformer(ModelSource(DEV, "someone/absent"))


def test_an_incomplete_cache_is_an_error_and_not_a_missing_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(WeightsError, match=r"someone/half\b.*transformer/.*model\.path="):
        load_transformer(ModelSource(DEV, "someone/half"))


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (hub_errors.GatedRepoError, ["gated", "https://huggingface.co/black-forest-labs/FLUX.2-dev", "hf auth login"]),
        (hub_errors.RepositoryNotFoundError, ["hf auth login"]),
        (hub_errors.HfHubHTTPError, ["model.path="]),
    ],
)
def test_the_hubs_refusals_say_what_to_do(kind: type, told: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import httpx

    response = httpx.Response(403, request=httpx.Request("GET", "https://huggingface.co"))

    def refuse(*_: Any, **__: Any) -> str:
        raise kind("403 Client Error", response=response)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(WeightsError) as error:
        load_transformer(model_source("dev"))
    message = str(error.value)
    assert "\n" not in message
    assert all(words in message for words in ["black-forest-labs/FLUX.2-dev", *told])
