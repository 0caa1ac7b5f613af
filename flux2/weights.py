"""Fill a model with a published one's weights.

Two namings are read for the transformer and the autoencoder: diffusers' and Black Forest Labs' own, which is also ours
(flux2/names.py). Models are built on the meta device and filled tensor by tensor, so host memory holds one tensor more
than the model. Loading is strict: missing, unexpected and misshaped tensors are one error that lists them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from flux2.autoencoder import Autoencoder
from flux2.files import TensorFiles, tensor_files
from flux2.model import Transformer
from flux2.names import Published, autoencoder_tensor, listed, transformer_tensor
from flux2.precision import Precision, convert
from flux2.sources import ModelSource, WeightsError
from flux2.text_encoder import TextEncoder, build, load_tokenizer


def check(what: str, files: TensorFiles, missing: set[str], unexpected: set[str], misshaped: Sequence[str]) -> None:
    problems = [
        f"{len(names)} {kind}: {listed(names)}"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("misshaped", misshaped))
        if names
    ]
    if problems:
        where = files.files[0] if len(files.files) == 1 else files.files[0].parent
        raise WeightsError(f"{where} does not hold {what}: " + "; ".join(problems))


@runtime_checkable
class StoresWeight(Protocol):
    """A linear layer that takes a float weight (out_features, in_features) and keeps it in a form of its own."""

    in_features: int
    out_features: int

    def store(self, weight: Tensor) -> None: ...


def taken(model: nn.Module) -> dict[str, torch.Size]:
    """Names and shapes of the tensors that a model is filled with.

    They are its parameters and buffers; of a module with a method `store`, a `weight` in their place.
    """
    stores = {name: module for name, module in model.named_modules() if isinstance(module, StoresWeight)}
    own = tuple(f"{name}." for name in stores)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items() if not name.startswith(own)}
    return shapes | {
        f"{name}.weight": torch.Size((module.out_features, module.in_features)) for name, module in stores.items()
    }


def place(
    model: nn.Module,
    name: str,
    tensor: Tensor,
    device: torch.device | str,
    dtype: torch.dtype | None,
    home: torch.device | str,
) -> None:
    """Put `tensor` where the model keeps what is called `name`: quantised by the module itself, or as it is.

    Args:
        device: where it is quantised.
        home: where it stays.
    """
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    if isinstance(module, StoresWeight):
        module.store(tensor.to(device))
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.to(home)
        return
    tensor = tensor.to(home, dtype if tensor.is_floating_point() else None, copy=True).contiguous()
    if leaf in module._buffers:
        module.register_buffer(leaf, tensor)
    else:
        module.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))


def fill(
    model: nn.Module,
    files: TensorFiles,
    published: Mapping[str, Published],
    what: str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    ignored: Callable[[str], bool] = lambda name: False,
    host: Sequence[str] = (),
) -> None:
    """Fill a model built on the meta device.

    Args:
        model: every tensor of `taken(model)` is filled. A module with a method `store` is given its weight on
            `device` in the file's dtype.
        published: for each of these names, where it is in `files`.
        what: the model's name in errors.
        device, dtype: of the filled tensors; integers keep their dtype.
        ignored: names in `files` that may stay unread.
        host: modules whose tensors stay in host memory; they are quantised on `device` all the same.
    """
    shapes = taken(model)
    wanted = {name for entry in published.values() for name in entry.names}
    missing = wanted - files.names
    unexpected = {name for name in files.names - wanted if not ignored(name)}
    misshaped = []
    for name, entry in published.items():
        if missing.isdisjoint(entry.names):
            with torch.device("meta"):
                shape = entry.join([torch.empty(files.shape(part)) for part in entry.names]).shape
            if shape != shapes[name]:
                misshaped.append(f"{entry.names[0]} {tuple(shape)} instead of {tuple(shapes[name])}")
    check(what, files, missing, unexpected, misshaped)
    in_host = tuple(f"{module}." for module in host)
    for name, entry in published.items():
        tensor = entry.join([files[part] for part in entry.names])
        place(model, name, tensor, device, dtype, "cpu" if name.startswith(in_host) else device)
    left = {name for name, tensor in model.state_dict().items() if tensor.is_meta}
    left |= {name for name, parameter in model.named_parameters() if parameter.is_meta}
    assert not left, f"not filled: {listed(left)}"


def load_transformer(
    source: ModelSource,
    device: torch.device | str = "cpu",
    precision: Precision | torch.dtype = torch.float32,
    *,
    host: Sequence[str] = (),
) -> Transformer:
    """The transformer in `precision` (or all of it in one dtype) on `device`, frozen, in evaluation mode.

    Its modules `host` stay in host memory.
    """
    if isinstance(precision, torch.dtype):
        precision = Precision(precision)
    with torch.device("meta"):
        model = Transformer(source.variant.transformer)
        convert(model, precision, device)
    files = tensor_files(source, "transformer")
    prefix = next((p for p in ("model.diffusion_model.", "diffusion_model.") if f"{p}img_in.weight" in files.names), "")
    if f"{prefix}img_in.weight" in files.names:  # Black Forest Labs' names, perhaps with ComfyUI's prefix
        published = {name: Published((prefix + name,)) for name in taken(model)}
    else:
        published = {name: transformer_tensor(name) for name in taken(model)}
    fill(
        model,
        files,
        published,
        f"the transformer of {source.variant.name}",
        device,
        precision.dtype,
        ignored=lambda name: bool(prefix) and not name.startswith(prefix),
        host=host,
    )
    return model.eval()


def load_autoencoder(
    source: ModelSource, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Autoencoder:
    """The autoencoder on `device` in `dtype`, frozen, in evaluation mode."""
    config = source.variant.autoencoder
    with torch.device("meta"):
        model = Autoencoder(config)
    model.bn.num_batches_tracked = None  # only training it would need the count
    files = tensor_files(source, "vae")
    if "encoder.down.0.block.0.conv1.weight" in files.names:
        published = {name: Published((name,)) for name in taken(model)}
    else:
        published = {name: autoencoder_tensor(name, len(config.widths)) for name in taken(model)}
    fill(
        model,
        files,
        published,
        f"the autoencoder of {source.variant.name}",
        device,
        dtype,
        ignored=lambda name: name == "bn.num_batches_tracked",
    )
    return model.eval()


def load_text_encoder(
    source: ModelSource, device: torch.device | str = "cpu", dtype: torch.dtype = torch.bfloat16
) -> TextEncoder:
    """The text encoder's layers that are read, on `device` in `dtype`, with its tokenizer."""
    files = tensor_files(source, "text_encoder")
    folder = source.folder("text_encoder")
    text = source.variant.text
    config_file = folder / "config.json"
    if not config_file.exists():
        raise WeightsError(f"{folder} holds no config.json")
    try:
        with torch.device("meta"):
            model = build(json.loads(config_file.read_text()), text)
    except ValueError as error:
        raise WeightsError(f"{folder}: {error}") from error
    width = len(text.layers) * model.get_parameter("embed_tokens.weight").shape[1]
    takes = source.variant.transformer.text_width
    if width != takes:
        raise WeightsError(
            f"{folder} makes embeddings of width {width}, {source.variant.name} takes {takes}: it is another model's"
        )
    # saved as a language model, as part of a vision-language model, or as such by newer versions of transformers
    prefixes = ("model.language_model.", "language_model.model.", "model.", "")
    prefix = next((p for p in prefixes if f"{p}embed_tokens.weight" in files.names), None)
    if prefix is None:
        raise WeightsError(f"{folder} holds no language model: no tensor ends in embed_tokens.weight")
    read = {name: Published((prefix + name,)) for name in taken(model)}
    fill(model, files, read, f"the text encoder of {source.variant.name}", device, dtype, ignored=lambda name: True)
    rebuild_rotary(model, device)
    return TextEncoder(model, load_tokenizer(source.folder("tokenizer")), text)


def rebuild_rotary(model: nn.Module, device: torch.device | str) -> None:
    """Recompute the rotary tables, which no file stores and the meta device left empty."""
    rotary = model.get_submodule("rotary_emb")
    with torch.device(device):
        model.rotary_emb = type(rotary)(model.config)
