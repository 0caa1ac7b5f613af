"""The published FLUX.2 models, one frozen record each, with everything that their files do not contain.

A record holds the sizes of transformer and autoencoder, the text encoder and its layers, whether the model takes a
guidance value, and the sampling defaults of its authors. Loading checks a checkpoint against these sizes, so a wrong
file is an error that names the tensor instead of a bad image.

Sources: Black Forest Labs' reference code (github.com/black-forest-labs/flux2) and the configuration files of the
published repositories.
"""

from dataclasses import dataclass, field, replace
from typing import Literal

TOKEN_CHANNELS = 128  # patches of 2 x 2 of the autoencoder's 32 channels, folded into channels
PIXELS_PER_TOKEN = 16  # one token covers 16 x 16 pixels in every model


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of the transformer, and whether its references see themselves alone (layers/isolated_references.py)."""

    heads: int
    double_blocks: int
    single_blocks: int
    text_width: int
    guidance: bool
    head_dim: int = 128
    mlp_ratio: float = 3.0
    rope_axes: tuple[int, ...] = (32, 32, 32, 32)
    rope_theta: int = 2000
    channels: int = TOKEN_CHANNELS
    time_width: int = 256
    eps: float = 1e-6
    isolated_references: bool = False

    def __post_init__(self) -> None:
        if sum(self.rope_axes) != self.head_dim:
            raise ValueError(f"rope_axes={self.rope_axes} must add up to head_dim={self.head_dim}")

    @property
    def hidden(self) -> int:
        return self.heads * self.head_dim

    @property
    def mlp_width(self) -> int:
        return int(self.hidden * self.mlp_ratio)

    @property
    def block_names(self) -> list[str]:
        """Return the module names of the blocks, in the order of the forward."""
        double = [f"double_blocks.{i}" for i in range(self.double_blocks)]
        return double + [f"single_blocks.{i}" for i in range(self.single_blocks)]


@dataclass(frozen=True)
class AutoencoderConfig:
    """Sizes of the convolutional autoencoder; every entry of `widths` except the last halves the side."""

    widths: tuple[int, ...] = (128, 256, 512, 512)
    blocks: int = 2
    groups: int = 32
    latent_channels: int = 32
    bn_eps: float = 1e-4


@dataclass(frozen=True)
class TextConfig:
    """The text encoder, the layers whose hidden states are stacked, and the padded length of prompts in tokens."""

    kind: Literal["mistral", "qwen3"]
    layers: tuple[int, int, int]
    length: int = 512


@dataclass(frozen=True)
class Variant:
    """One published model.

    Attributes:
        steps, guidance: Sampling defaults of the authors. The guidance is an input of the model if
            `transformer.guidance` is set, otherwise the scale of classifier-free guidance (1 turns it off).
        training_guidance: The value with which LoRAs are usually trained.
        license: Name of a non-commercial license; empty if commercial use is allowed.
    """

    name: str
    repo: str
    transformer: TransformerConfig
    text: TextConfig
    steps: int
    guidance: float
    resolution: int = 1024
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    training_guidance: float = 1.0
    license: str = ""


DEV = TransformerConfig(heads=48, double_blocks=8, single_blocks=48, text_width=15360, guidance=True)
KLEIN_9B = TransformerConfig(heads=32, double_blocks=8, single_blocks=24, text_width=12288, guidance=False)
KLEIN_4B = TransformerConfig(heads=24, double_blocks=5, single_blocks=20, text_width=7680, guidance=False)
TINY = TransformerConfig(6, 2, 4, text_width=192, guidance=True, head_dim=32, mlp_ratio=2.0, rope_axes=(8, 8, 8, 8))
MISTRAL = TextConfig(kind="mistral", layers=(10, 20, 30))
QWEN3 = TextConfig(kind="qwen3", layers=(9, 18, 27))
NON_COMMERCIAL = "FLUX Non-Commercial License (black-forest-labs)"

# name, repository, sizes, text encoder, steps, guidance
_dev = Variant("dev", "black-forest-labs/FLUX.2-dev", DEV, MISTRAL, 28, 4.0, license=NON_COMMERCIAL)
_klein_base_9b = Variant(
    "klein_base_9b", "black-forest-labs/FLUX.2-klein-base-9B", KLEIN_9B, QWEN3, 50, 4.0, license=NON_COMMERCIAL
)
_klein_base_4b = Variant("klein_base_4b", "black-forest-labs/FLUX.2-klein-base-4B", KLEIN_4B, QWEN3, 50, 4.0)
_klein_9b = replace(_klein_base_9b, name="klein_9b", repo="black-forest-labs/FLUX.2-klein-9B", steps=4, guidance=1.0)
_klein_9b_kv = replace(
    _klein_9b,
    name="klein_9b_kv",
    repo="black-forest-labs/FLUX.2-klein-9b-kv",
    transformer=replace(KLEIN_9B, isolated_references=True),
)
_klein_4b = replace(_klein_base_4b, name="klein_4b", repo="black-forest-labs/FLUX.2-klein-4B", steps=4, guidance=1.0)
_tiny_text = TextConfig(kind="mistral", layers=(1, 2, 3), length=32)
_tiny_autoencoder = AutoencoderConfig(widths=(16, 32, 48, 64), blocks=1, groups=1)
_tiny = Variant("tiny", "", TINY, _tiny_text, 16, 2.0, resolution=128, autoencoder=_tiny_autoencoder)
VARIANTS = {
    record.name: record for record in (_tiny, _dev, _klein_base_9b, _klein_9b, _klein_9b_kv, _klein_base_4b, _klein_4b)
}


def get_variant(name: str) -> Variant:
    """Return the record called `name`. Raise ValueError with the known names if there is none."""
    if name not in VARIANTS:
        raise ValueError(f"model={name!r} is not a FLUX.2 model; choose one of {', '.join(VARIANTS)}")
    return VARIANTS[name]


def find_variant(name: str) -> Variant | None:
    """Return the record whose name or repository is `name`, if there is one."""
    return next((record for record in VARIANTS.values() if name and name in (record.name, record.repo)), None)


def undistilled(variant: Variant) -> Variant | None:
    """Return the model of the same sizes that is not distilled to few steps; None if `variant` is none of those."""
    sizes = replace(variant.transformer, isolated_references=False)
    alike = (other for other in VARIANTS.values() if (other.transformer, other.text) == (sizes, variant.text))
    return next((other for other in alike if other.steps > variant.steps), None)
