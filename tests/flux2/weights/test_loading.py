"""flux2.weights.loading: every published form loads to the same model, and what is wrong with a file is said in one
error.
"""

import json
import re
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import helpers
import huggingface_hub
import pytest
import torch
from huggingface_hub import errors as hub_errors
from safetensors.torch import load_file, save_file
from torch import Tensor

from flux2.models.transformer import Transformer
from flux2.quantization.base import QuantizedLinear
from flux2.weights import loading as weights
from flux2.weights import parallel_reader
from flux2.weights.key_names import PublishedTensor, transformer_module, transformer_tensor
from flux2.weights.loading import load_autoencoder, load_transformer
from flux2.weights.safetensors_files import TensorFiles
from flux2.weights.sources import TINY_FOLDER, ModelSource, WeightsError, fingerprint, looks_local, model_source

DEV = helpers.VARIANTS["dev"]


@pytest.fixture
def copied(model_folders: Callable[[str], Path], tmp_path: Path) -> Path:
    """A dev model folder that a test may damage."""
    shutil.copytree(model_folders("dev"), tmp_path / "model")
    return tmp_path / "model"


def equal(state: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in state)


# ------------------------------------------------------------------ forms


def test_a_folder_with_a_sharded_index_loads(source: ModelSource) -> None:
    kind = source.variant.name.removeprefix("small_")
    assert len(list((Path(source.path) / "transformer").glob("*.safetensors"))) > 3, "the test needs shards"
    assert equal(load_transformer(source).state_dict(), helpers.transformer(kind).state_dict())


def test_a_folder_with_one_file_loads(copied: Path) -> None:
    whole: dict[str, Tensor] = {}
    for shard in (copied / "transformer").glob("*.safetensors*"):
        whole |= load_file(shard) if shard.suffix == ".safetensors" else {}
        shard.unlink()
    save_file(whole, copied / "transformer" / "diffusion_pytorch_model.safetensors")
    loaded = load_transformer(ModelSource(DEV, str(copied)))
    assert equal(loaded.state_dict(), helpers.transformer("dev").state_dict())


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
def test_a_single_file_with_black_forest_labs_names_loads(prefix: str, tmp_path: Path) -> None:
    state = helpers.transformer("dev").state_dict()
    others = {"vae.decoder.conv_in.weight": torch.zeros(2)} if prefix else {}  # ComfyUI's checkpoints hold all parts
    save_file({prefix + name: tensor for name, tensor in state.items()} | others, tmp_path / "flux.safetensors")
    assert equal(load_transformer(ModelSource(DEV, str(tmp_path / "flux.safetensors"))).state_dict(), state)


def test_a_single_file_with_diffusers_names_loads(tmp_path: Path) -> None:
    model, reference = helpers.transformers("dev")
    save_file(reference.state_dict(), tmp_path / "flux.safetensors")
    assert equal(
        load_transformer(ModelSource(DEV, str(tmp_path / "flux.safetensors"))).state_dict(), model.state_dict()
    )


def test_the_autoencoder_loads_from_a_folder_and_from_the_published_single_file(
    model_folders: Callable[[str], Path], tmp_path: Path
) -> None:
    wanted = helpers.autoencoders()[0].state_dict()
    save_file(wanted, tmp_path / "ae.safetensors")
    wanted.pop("bn.num_batches_tracked")
    folder = str(model_folders("dev"))
    for source in (ModelSource(DEV, folder), ModelSource(DEV, folder, autoencoder=str(tmp_path / "ae.safetensors"))):
        model = load_autoencoder(source)
        assert equal(model.state_dict(), wanted)
        assert not model.training
        assert model.decode(model.encode(torch.zeros(1, 3, 32, 32))).isfinite().all()


def test_a_loaded_model_is_frozen_in_evaluation_mode_and_in_the_dtype_asked_for(
    model_folders: Callable[[str], Path],
) -> None:
    model = load_transformer(ModelSource(DEV, str(model_folders("dev"))), precision=torch.bfloat16)
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not [parameter for parameter in model.parameters() if parameter.requires_grad]
    wanted = helpers.transformer("dev").state_dict()
    assert equal(model.state_dict(), {name: tensor.bfloat16() for name, tensor in wanted.items()})


def test_parts_can_come_from_different_places(model_folders: Callable[[str], Path], tmp_path: Path) -> None:
    source = ModelSource(DEV, "a.safetensors", autoencoder="b", text_encoder="c")
    assert [source.where(part) for part in ("transformer", "vae", "text_encoder", "tokenizer")] == [
        *["a.safetensors", "b", "c", "c"]
    ]
    published = model_source("klein_4b", "a.safetensors")
    assert published.where("transformer") == "a.safetensors"
    assert published.where("vae") == published.where("tokenizer") == "black-forest-labs/FLUX.2-klein-4B"


def test_a_model_is_looked_for_in_its_repository_unless_a_path_is_given() -> None:
    assert model_source("dev").path == "black-forest-labs/FLUX.2-dev"
    assert model_source("dev", "/models/dev").path == "/models/dev"
    assert model_source("tiny").path == str(TINY_FOLDER)
    with pytest.raises(ValueError, match=r"model\.autoencoder=3\b"):
        model_source("dev", autoencoder=3)  # type: ignore[arg-type]


# ------------------------------------------------------------------ streaming


def test_loading_never_holds_a_second_copy(
    model_folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what was read and is of another dtype than the model, there is never more than the next tensor beside one."""
    alive: dict[int, int] = {}
    sizes: list[int] = []
    most = 0
    begin = parallel_reader.start_task

    def spy(*args: Any) -> Any:
        nonlocal most
        tensors, futures = begin(*args)
        for tensor in tensors.values():
            sizes.append(tensor.nbytes)
            alive[id(tensor)] = tensor.nbytes
            weakref.finalize(tensor, alive.pop, id(tensor), None)
        most = max(most, sum(alive.values()))
        return tensors, futures

    monkeypatch.setattr(parallel_reader, "start_task", spy)
    model = load_transformer(ModelSource(DEV, str(model_folders("dev"))), precision=torch.bfloat16)
    assert sum(sizes) == sum(4 * parameter.numel() for parameter in model.parameters())
    assert max(sizes) < most <= 1.5 * max(sizes) < sum(sizes) / 5


def test_models_are_built_without_memory(model_folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[Any] = []

    def spy(model: torch.nn.Module, *_: Any, **__: Any) -> None:
        built.append({tensor.device.type for tensor in model.state_dict().values()})
        raise InterruptedError

    monkeypatch.setattr(weights, "fill", spy)
    source = ModelSource(DEV, str(model_folders("dev")))
    for load in (load_transformer, load_autoencoder, weights.load_text_encoder):
        with pytest.raises(InterruptedError):
            load(source)
    assert built == [{"meta"}] * 3


class Halves(QuantizedLinear):
    """A layer that keeps its weight in a form of its own: in half precision, under another name."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, torch.float32)
        self.allocate("meta", qweight=(self.out_features, 2 * self.in_features))

    def store(self, weight: Tensor) -> None:
        assert weight.dtype == torch.float32, "the dtype of the file, not the model's"
        self.hold("qweight", weight.half())


@pytest.fixture
def halved() -> Transformer:
    """A transformer on the meta device whose block linears store their weight in a form of their own."""
    with torch.device("meta"):
        model = Transformer(DEV.transformer)
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and "blocks" in name:
            model.set_submodule(name, Halves(module))
    return model


def test_a_module_that_stores_its_weight_itself_is_given_it(halved: Transformer, tmp_path: Path) -> None:
    model, reference = helpers.transformers("dev")
    save_file(reference.state_dict(), tmp_path / "flux.safetensors")
    published = {name: transformer_tensor(name) for name in weights.expected_shapes(halved)}
    assert published.keys() == model.state_dict().keys()
    weights.fill(halved, TensorFiles([tmp_path / "flux.safetensors"]), published, "the model", dtype=torch.bfloat16)
    for name, tensor in model.state_dict().items():
        if isinstance(halved.get_submodule(name.rpartition(".")[0]), Halves):
            stored = halved.get_parameter(name.replace(".weight", ".qweight")).view(torch.half)
            assert torch.equal(stored, tensor.half())
        else:
            assert torch.equal(halved.get_parameter(name), tensor.bfloat16())


def test_a_module_that_stores_its_weight_itself_needs_it_in_its_shape(halved: Transformer, tmp_path: Path) -> None:
    state = helpers.transformer("dev").state_dict()
    state["single_blocks.0.linear2.weight"] = torch.zeros(2, 3)
    del state["single_blocks.1.linear2.weight"]
    save_file(state, tmp_path / "flux.safetensors")
    published = {name: PublishedTensor((name,)) for name in weights.expected_shapes(halved)}
    with pytest.raises(WeightsError, match=r"missing: single_blocks\.1\.linear2\.weight.*misshaped: single_blocks\.0"):
        weights.fill(halved, TensorFiles([tmp_path / "flux.safetensors"]), published, "the model")


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
    assert equal(loaded.state_dict(), helpers.transformer("dev").state_dict())


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
    assert equal(model.state_dict(), helpers.transformer("dev").state_dict())


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


# ------------------------------------------------------------------ fingerprints


def test_a_fingerprint_stays_when_the_folder_moves(copied: Path, model_folders: Callable[[str], Path]) -> None:
    for part in ("transformer", "vae", "text_encoder", "tokenizer"):
        here, there = ModelSource(DEV, str(copied)), ModelSource(DEV, str(model_folders("dev")))
        assert fingerprint(here, part) == fingerprint(there, part)


def test_fingerprints_of_parts_differ(model_folders: Callable[[str], Path]) -> None:
    source = ModelSource(DEV, str(model_folders("dev")))
    assert len({fingerprint(source, part) for part in ("transformer", "vae", "text_encoder", "tokenizer")}) == 4


def test_a_fingerprint_changes_with_a_weight(copied: Path) -> None:
    source = ModelSource(DEV, str(copied))
    file = copied / "vae" / "diffusion_pytorch_model.safetensors"
    before = fingerprint(source, "vae")
    tensors = load_file(file)
    tensors["decoder.conv_out.bias"][1] += 1e-3
    save_file(tensors, file, metadata={"format": "pt"})
    assert fingerprint(source, "vae") != before


def test_a_fingerprint_changes_with_the_configuration_beside_the_weights(copied: Path) -> None:
    source = ModelSource(DEV, str(copied))
    before = fingerprint(source, "text_encoder")
    file = copied / "text_encoder" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"dtype": "bfloat16"}))
    assert fingerprint(source, "text_encoder") != before


def test_the_fingerprint_of_a_single_file_changes_with_its_weights_and_not_with_its_folder(tmp_path: Path) -> None:
    state = helpers.transformer("klein").state_dict()
    prints = []
    for place, value in (("a", 0.0), ("b", 0.0), ("c", 1.0)):
        (tmp_path / place).mkdir()
        state["final_layer.linear.weight"][0, 0] = value
        save_file(state, tmp_path / place / "flux.safetensors")
        prints.append(fingerprint(ModelSource(DEV, str(tmp_path / place / "flux.safetensors")), "transformer"))
    assert prints[0] == prints[1] != prints[2]
    with pytest.raises(WeightsError, match=r"/gone\.safetensors\b"):
        fingerprint(ModelSource(DEV, str(tmp_path / "gone.safetensors")), "transformer")


# ------------------------------------------------------------------ names


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("double_blocks.7.img_attn.qkv", ("to_q", "to_k", "to_v")),
        ("double_blocks.7.txt_attn.qkv", ("add_q_proj", "add_k_proj", "add_v_proj")),
        ("double_blocks.7.img_attn.proj", ("to_out.0",)),
        ("double_blocks.7.txt_attn.proj", ("to_add_out",)),
    ],
)
def test_module_names_are_the_published_ones(ours: str, theirs: tuple[str, ...]) -> None:
    assert transformer_module(ours).names == tuple(f"transformer_blocks.7.attn.{name}" for name in theirs)


@pytest.mark.parametrize("name", ["double_blocks.0.nothing", "single_blocks.0.img_mlp.0", "elsewhere"])
def test_names_that_are_not_ours_are_refused(name: str) -> None:
    with pytest.raises(KeyError):
        transformer_module(name)
