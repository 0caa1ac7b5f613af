"""Find a model's files, map their names onto ours, and fill a model with them.

A model is given as a Hugging Face repository id, as a folder in the published layout (transformer/ vae/
text_encoder/ tokenizer/), or as one safetensors file with the transformer. Two namings are read for the transformer
and the autoencoder: diffusers' and Black Forest Labs' own, which is also ours. The table from our names to diffusers'
is written once, here, and serves loading, exporting and adapters: a tensor of ours is one published tensor, three
stacked ones (q, k, v), or one with its halves swapped.

Models are built on the meta device and filled tensor by tensor, so host memory holds one tensor more than the model.
Loading is strict: missing, unexpected and misshaped tensors are one error that lists them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import huggingface_hub
import torch
from huggingface_hub import errors as hub_errors
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from flux2.autoencoder import Autoencoder
from flux2.model import Transformer
from flux2.text_encoder import TextEncoder, build, load_tokenizer
from flux2.variants import Variant, variant

TINY_FOLDER = Path(__file__).parent / "assets" / "tiny"
Part = Literal["transformer", "vae", "text_encoder", "tokenizer"]


class WeightsError(ValueError):
    """A model's files are absent, unreadable, or not those of the model asked for."""


# ------------------------------------------------------------------ names


@dataclass(frozen=True)
class Published:
    """How one tensor of ours is stored under diffusers' names."""

    names: tuple[str, ...]
    kind: Literal["same", "stacked", "swapped", "pointwise"] = "same"

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """Published tensors, in the order of `names` -> ours."""
        if self.kind == "stacked":
            return torch.cat(list(tensors))
        (tensor,) = tensors
        if self.kind == "swapped":
            return swap_halves(tensor)
        if self.kind == "pointwise" and tensor.ndim == 2:
            return tensor[:, :, None, None]
        return tensor

    def split(self, tensor: Tensor) -> dict[str, Tensor]:
        """Ours -> published tensors by name: the inverse of `join`."""
        if self.kind == "stacked":
            return dict(zip(self.names, tensor.chunk(len(self.names)), strict=True))
        if self.kind == "swapped":
            tensor = swap_halves(tensor)
        elif self.kind == "pointwise" and tensor.ndim == 4:
            tensor = tensor[:, :, 0, 0]
        return {self.names[0]: tensor}


def swap_halves(tensor: Tensor) -> Tensor:
    """(shift, scale) <-> (scale, shift) along the first dimension."""
    first, second = tensor.chunk(2)
    return torch.cat([second, first])


_SINGLE = {
    "linear1": "attn.to_qkv_mlp_proj",
    "linear2": "attn.to_out",
    "norm.query_norm": "attn.norm_q",
    "norm.key_norm": "attn.norm_k",
}
_DOUBLE = {
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
    "img_mlp.0": "ff.linear_in",
    "img_mlp.2": "ff.linear_out",
    "txt_mlp.0": "ff_context.linear_in",
    "txt_mlp.2": "ff_context.linear_out",
}
_QKV = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
_OUTER = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
    "guidance_in.in_layer": "time_guidance_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_guidance_embed.guidance_embedder.linear_2",
    "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
    "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
    "single_stream_modulation.lin": "single_stream_modulation.linear",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}


def transformer_module(name: str) -> Published:
    """diffusers' names of one of our transformer's modules. Raises KeyError for a name that is not ours."""
    if match := re.fullmatch(r"(double|single)_blocks\.(\d+)\.(.+)", name):
        kind, index, inner = match.groups()
        if kind == "single":
            return Published((f"single_transformer_blocks.{index}.{_SINGLE[inner]}",))
        prefix = f"transformer_blocks.{index}"
        if inner in _QKV:
            return Published(tuple(f"{prefix}.{part}" for part in _QKV[inner]), "stacked")
        return Published((f"{prefix}.{_DOUBLE[inner]}",))
    return Published((_OUTER[name],), "swapped" if name == "final_layer.adaLN_modulation.1" else "same")


def transformer_tensor(name: str) -> Published:
    """diffusers' names of one of our transformer's parameters."""
    module, _, leaf = name.rpartition(".")
    published = transformer_module(module)
    leaf = "weight" if leaf == "scale" else leaf
    return Published(tuple(f"{part}.{leaf}" for part in published.names), published.kind)


_AUTOENCODER = (
    (r"^(en|de)coder\.(post_)?quant_conv", r"\2quant_conv"),
    (r"\.down\.(\d+)\.block\.", r".down_blocks.\1.resnets."),
    (r"\.down\.(\d+)\.downsample\.", r".down_blocks.\1.downsamplers.0."),
    (r"\.up\.(\d+)\.block\.", r".up_blocks.\1.resnets."),
    (r"\.up\.(\d+)\.upsample\.", r".up_blocks.\1.upsamplers.0."),
    (r"\.mid\.block_1\.", r".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", r".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.norm\.", r".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
    (r"\.mid\.attn_1\.proj_out\.", r".mid_block.attentions.0.to_out.0."),
    (r"\.nin_shortcut\.", r".conv_shortcut."),
    (r"coder\.norm_out\.", r"coder.conv_norm_out."),
)


def autoencoder_tensor(name: str, levels: int) -> Published:
    """diffusers' name of one of our autoencoder's tensors; `levels` is the number of resolutions."""
    pointwise = re.search(r"\.attn_1\.(q|k|v|proj_out)\.weight$", name)
    for pattern, replacement in _AUTOENCODER:
        name = re.sub(pattern, replacement, name)
    # our up.0 is the level of full resolution, as in the published file; diffusers counts from the smallest
    name = re.sub(r"\.up_blocks\.(\d+)\.", lambda match: f".up_blocks.{levels - 1 - int(match[1])}.", name)
    return Published((name,), "pointwise" if pointwise else "same")


# ------------------------------------------------------------------ files


@dataclass(frozen=True)
class ModelSource:
    """Where the parts of a model come from.

    `path` is a repository id, a folder in the published layout, or a safetensors file with the transformer. The
    autoencoder and the text encoder come from there too unless they are given, likewise as id, folder or (the
    autoencoder) file; beside a single transformer file they come from the variant's repository.
    """

    variant: Variant
    path: str
    autoencoder: str | None = None
    text_encoder: str | None = None

    def where(self, part: Part) -> str:
        given = {"vae": self.autoencoder, "transformer": None}.get(part, self.text_encoder)
        if given:
            return given
        if part != "transformer" and self.path.endswith(".safetensors"):
            return self.variant.repo or str(TINY_FOLDER)
        return self.path

    def key(self, part: Part) -> str:
        """The setting that says where a part comes from, for errors."""
        given = {"vae": "autoencoder", "transformer": "path"}.get(part, "text_encoder")
        return f"model.{given}" if getattr(self, given) else "model.path"

    def file(self, part: Part) -> Path | None:
        """The single file of a part, if that is what was given. Raises WeightsError if it is not there."""
        where = self.where(part)
        if not where.endswith(".safetensors"):
            return None
        if part not in ("transformer", "vae"):
            raise WeightsError(f"{self.key(part)}={where!r} must be a repository id or a folder with {part}/ in it")
        if not Path(where).expanduser().is_file():
            raise WeightsError(f"{self.key(part)}={where!r} does not exist")
        return Path(where).expanduser()

    def folder(self, part: Part) -> Path:
        """The local folder of a part, downloaded if `path` is a repository id."""
        where = self.where(part)
        if not looks_local(where):
            return Path(download(where, part)) / part
        whole = Path(where).expanduser()
        if (whole / part).is_dir():
            return whole / part
        if whole.is_dir():
            raise WeightsError(
                f"{self.key(part)}={where!r}: there is no folder {whole / part}. It exists but is not in the published "
                "layout (transformer/, vae/, text_encoder/, tokenizer/)"
            )
        what = "does not exist" if not whole.exists() else "is neither a folder nor a .safetensors file"
        raise WeightsError(f"{self.key(part)}={where!r} {what}: give a repository id, a folder or a .safetensors file")


def model_source(
    name: str, path: str | None = None, autoencoder: str | None = None, text_encoder: str | None = None
) -> ModelSource:
    """The source of the model called `name`: at `path`, else the embedded one or the published repository."""
    found = variant(name)
    for key, value in {"path": path, "autoencoder": autoencoder, "text_encoder": text_encoder}.items():
        if value is not None and not isinstance(value, str):
            raise ValueError(f"model.{key}={value!r} must be a repository id, a folder or a file")
    return ModelSource(found, path or found.repo or str(TINY_FOLDER), autoencoder, text_encoder)


def looks_local(where: str) -> bool:
    """Whether `where` names a place on disk and not a repository: it exists, or does not read as `owner/name`."""
    return Path(where).expanduser().exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", where) or where.startswith(".")


def download(repo: str, part: Part) -> str:
    """The snapshot folder of one part of a repository. Raises WeightsError with what to do."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise WeightsError(f"{repo!r} is neither a file, a folder nor a repository id (owner/name)")
    try:
        snapshot = huggingface_hub.snapshot_download(repo, allow_patterns=[f"{part}/*"])
    except hub_errors.GatedRepoError as error:
        raise WeightsError(
            f"{repo} is gated, and you are not logged in or have not accepted its licence. Open "
            f"https://huggingface.co/{repo}, accept the licence (non-commercial for FLUX.2-dev and the 9B models), "
            "then run `hf auth login` and start again."
        ) from error
    except hub_errors.RepositoryNotFoundError as error:
        raise WeightsError(
            f"{repo} was not found on the Hugging Face Hub, or you are not logged in and it is gated. Check the name; "
            f"then run `hf auth login` and accept the licence on https://huggingface.co/{repo}."
        ) from error
    except (hub_errors.HfHubHTTPError, OSError, ValueError) as error:
        raise WeightsError(
            f"{repo} could not be reached and its {part}/ is not in the local cache ({type(error).__name__}). Go "
            "online once to download it, or give a local folder or file: model.path=/path/to/FLUX.2."
        ) from error
    if not (Path(snapshot) / part).is_dir():  # the repository has none, or an incomplete cache was used offline
        raise WeightsError(
            f"{repo} has no {part}/, or it is not in the local cache and the network could not be reached. Give a "
            "repository in the published layout, or a local folder: model.path=/path/to/FLUX.2."
        )
    return snapshot


class TensorFiles:
    """The tensors of one or several safetensors files by name, read one at a time."""

    def __init__(self, files: Iterable[Path]) -> None:
        self.files = sorted(files)
        if not self.files:
            raise WeightsError("no .safetensors file was found")
        self._handles = [self._open(file) for file in self.files]
        self._where = {name: handle for handle in self._handles for name in handle.keys()}  # noqa: SIM118

    @staticmethod
    def _open(file: Path) -> safe_open:
        try:
            return safe_open(file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise WeightsError(
                f"{file} cannot be read as safetensors ({error}). It is damaged or its download is incomplete: "
                "delete it and fetch it again."
            ) from error

    @property
    def names(self) -> set[str]:
        return set(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._where[name].get_slice(name).get_shape())

    def __getitem__(self, name: str) -> Tensor:
        return self._where[name].get_tensor(name)


def part_files(folder: Path) -> TensorFiles:
    """The tensors of one published folder: the shards its index names, or every safetensors file in it."""
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if not indexes:
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise WeightsError(f"{folder} holds no .safetensors file")
        return TensorFiles(files)
    try:
        shards = {folder / shard for shard in json.loads(indexes[0].read_text())["weight_map"].values()}
    except (json.JSONDecodeError, KeyError) as error:
        raise WeightsError(f"{indexes[0]} is not an index of shards ({error!r}): fetch it again") from error
    if absent := sorted(shard.name for shard in shards if not shard.exists()):
        raise WeightsError(f"{folder}: its index names files that are not there: {', '.join(absent)}")
    return TensorFiles(shards)


# ------------------------------------------------------------------ filling a model


def listed(names: Iterable[str], most: int = 8) -> str:
    ordered = sorted(names)
    more = f" and {len(ordered) - most} more" if len(ordered) > most else ""
    return ", ".join(ordered[:most]) + more


def check(what: str, files: TensorFiles, missing: set[str], unexpected: set[str], misshaped: Sequence[str]) -> None:
    problems = [
        f"{len(names)} {kind}: {listed(names)}"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("misshaped", misshaped))
        if names
    ]
    if problems:
        where = files.files[0] if len(files.files) == 1 else files.files[0].parent
        raise WeightsError(f"{where} does not hold {what}: " + "; ".join(problems))


def fill(
    model: nn.Module,
    files: TensorFiles,
    published: Mapping[str, Published],
    what: str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    ignored: Callable[[str], bool] = lambda name: False,
) -> None:
    """Fill a model built on the meta device.

    Args:
        model: every parameter and buffer in `published` is replaced.
        published: for each of the model's names, where it is in `files`.
        what: the model's name in errors.
        device, dtype: of the filled tensors; integers keep their dtype.
        ignored: names in `files` that may stay unread.
    """
    state = model.state_dict()
    wanted = {name for entry in published.values() for name in entry.names}
    missing = wanted - files.names
    unexpected = {name for name in files.names - wanted if not ignored(name)}
    misshaped = []
    for name, entry in published.items():
        if missing.isdisjoint(entry.names):
            with torch.device("meta"):
                shape = entry.join([torch.empty(files.shape(part)) for part in entry.names]).shape
            if shape != state[name].shape:
                misshaped.append(f"{entry.names[0]} {tuple(shape)} instead of {tuple(state[name].shape)}")
    check(what, files, missing, unexpected, misshaped)
    for name, entry in published.items():
        tensor = entry.join([files[part] for part in entry.names])
        tensor = tensor.to(device, dtype if tensor.is_floating_point() else None, copy=True).contiguous()
        parent, _, leaf = name.rpartition(".")
        module = model.get_submodule(parent)
        if leaf in module._buffers:
            module.register_buffer(leaf, tensor)
        else:
            module.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
    left = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    assert not left, f"not filled: {listed(left)}"


def tensor_files(source: ModelSource, part: Part) -> TensorFiles:
    """The tensors of a part: of its single file, or of its folder."""
    file = source.file(part)
    return part_files(source.folder(part)) if file is None else TensorFiles([file])


def load_transformer(
    source: ModelSource, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Transformer:
    """The transformer on `device` in `dtype`, frozen, in evaluation mode."""
    with torch.device("meta"):
        model = Transformer(source.variant.transformer)
    files = tensor_files(source, "transformer")
    prefix = next((p for p in ("model.diffusion_model.", "diffusion_model.") if f"{p}img_in.weight" in files.names), "")
    if f"{prefix}img_in.weight" in files.names:  # Black Forest Labs' names, perhaps with ComfyUI's prefix
        published = {name: Published((prefix + name,)) for name in model.state_dict()}
    else:
        published = {name: transformer_tensor(name) for name in model.state_dict()}
    fill(
        model,
        files,
        published,
        f"the transformer of {source.variant.name}",
        device,
        dtype,
        ignored=lambda name: bool(prefix) and not name.startswith(prefix),
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
        published = {name: Published((name,)) for name in model.state_dict()}
    else:
        published = {name: autoencoder_tensor(name, len(config.widths)) for name in model.state_dict()}
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
    read = {name: Published((prefix + name,)) for name in model.state_dict()}
    fill(model, files, read, f"the text encoder of {source.variant.name}", device, dtype, ignored=lambda name: True)
    rebuild_rotary(model, device)
    return TextEncoder(model, load_tokenizer(source.folder("tokenizer")), text)


def rebuild_rotary(model: nn.Module, device: torch.device | str) -> None:
    """Recompute the rotary tables, which no file stores and the meta device left empty."""
    rotary = model.get_submodule("rotary_emb")
    with torch.device(device):
        model.rotary_emb = type(rotary)(model.config)


def fingerprint(source: ModelSource, part: Part) -> str:
    """What a cached result of this part depends on: a digest of its files.

    Of each file: name, size, the safetensors header (names, shapes, offsets) and three samples of the data. Hashing
    48 GB whole would take longer than reading a cache saves.
    """
    single = source.file(part)
    files = [single] if single else sorted(file for file in source.folder(part).glob("*.*") if file.is_file())
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as handle:
            if file.suffix != ".safetensors":
                digest.update(handle.read())
                continue
            digest.update(handle.read(8 + int.from_bytes(handle.read(8), "little")))
            for share in (0.0, 0.5, 1.0):
                handle.seek(int(share * max(size - (1 << 20), 0)))
                digest.update(handle.read(1 << 20))
    return digest.hexdigest()[:16]
