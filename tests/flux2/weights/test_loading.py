"""flux2.weights.loading: every published form loads to the same model, part by part, without a second copy."""

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from flux2.models.transformer import Transformer
from flux2.quantization.base import QuantizedLinear
from flux2.weights import loading as weights
from flux2.weights import parallel_reader
from flux2.weights.key_names import PublishedTensor, transformer_module, transformer_tensor
from flux2.weights.loading import load_autoencoder, load_transformer
from flux2.weights.safetensors_files import TensorFiles
from flux2.weights.sources import TINY_FOLDER, ModelSource, WeightsError, model_source

DEV = helpers.VARIANTS["dev"]


# ------------------------------------------------------------------ forms


def test_a_folder_with_a_sharded_index_loads(source: ModelSource) -> None:
    kind = source.variant.name.removeprefix("small_")
    assert len(list((Path(source.path) / "transformer").glob("*.safetensors"))) > 3, "the test needs shards"
    assert helpers.same_tensors(load_transformer(source).state_dict(), helpers.transformer(kind).state_dict())


def test_a_folder_with_one_file_loads(copied: Path) -> None:
    whole: dict[str, Tensor] = {}
    for shard in (copied / "transformer").glob("*.safetensors*"):
        whole |= load_file(shard) if shard.suffix == ".safetensors" else {}
        shard.unlink()
    save_file(whole, copied / "transformer" / "diffusion_pytorch_model.safetensors")
    loaded = load_transformer(ModelSource(DEV, str(copied)))
    assert helpers.same_tensors(loaded.state_dict(), helpers.transformer("dev").state_dict())


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
def test_a_single_file_with_black_forest_labs_names_loads(prefix: str, tmp_path: Path) -> None:
    state = helpers.transformer("dev").state_dict()
    others = {"vae.decoder.conv_in.weight": torch.zeros(2)} if prefix else {}  # ComfyUI's checkpoints hold all parts
    save_file({prefix + name: tensor for name, tensor in state.items()} | others, tmp_path / "flux.safetensors")
    assert helpers.same_tensors(
        load_transformer(ModelSource(DEV, str(tmp_path / "flux.safetensors"))).state_dict(), state
    )


def test_a_single_file_with_diffusers_names_loads(tmp_path: Path) -> None:
    model, reference = helpers.transformers("dev")
    save_file(reference.state_dict(), tmp_path / "flux.safetensors")
    assert helpers.same_tensors(
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
        assert helpers.same_tensors(model.state_dict(), wanted)
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
    assert helpers.same_tensors(model.state_dict(), {name: tensor.bfloat16() for name, tensor in wanted.items()})


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
