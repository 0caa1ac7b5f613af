"""What an evaluation compares images by: the group `features`. A model gives a vector for each image.

`Latents` needs nothing but the run's own autoencoder. Its distances depend on place and color, so they find copies and
say little about what an image shows. `Vision` uses a vision transformer, whose distances depend on content.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from flux2.models.autoencoder import Autoencoder
from flux2.models.pixels import to_pixels
from train.utils.checks import check_count, is_number

Describe = Callable[[Image.Image], Tensor]


class Features(Protocol):
    """A way to compare images."""

    name: str  # in a report

    def load(self, autoencoder: Callable[[], Autoencoder], device: torch.device) -> Describe:
        """Return a function from an image to its vector (D,), float32 on the CPU.

        The distance of two images is the Euclidean one of their vectors. Raises ValueError if it cannot be loaded.
        """


class Latents:
    """The autoencoder's latents of the image, resized to a square whose `side` is a multiple of 16 pixels.

    The distance is the root of the mean squared difference. A latent has about unit variance, so two images with
    nothing in common are about 1.4 apart.
    """

    def __init__(self, side: int = 256) -> None:
        check_count("features.side", side, 16)
        if side % 16:
            raise ValueError(f"features.side={side!r} must be a multiple of 16 pixels")
        self.side = side
        self.name = f"latents of the autoencoder at {side} x {side} px"

    def load(self, autoencoder: Callable[[], Autoencoder], device: torch.device) -> Describe:
        model = autoencoder()

        @torch.no_grad()
        def describe(image: Image.Image) -> Tensor:
            square = image.convert("RGB").resize((self.side, self.side), Image.Resampling.LANCZOS)
            latents = model.encode(to_pixels([square]).to(next(model.parameters())))
            return (latents.flatten() / latents.numel() ** 0.5).float().cpu()

        return describe


class Vision:
    """A vision transformer of the library transformers, such as DINOv2: the vector of its first token, of length 1.

    The distance of two images is from 0 to 2: the root of 2 - 2 times the cosine of their vectors.

    Args:
        path: Repository id or folder of a model that `transformers.AutoModel` opens and that takes `pixel_values`.
        side: Pixels of the square's side that images are resized to.
        mean: Mean of red, green and blue that the model was trained with; the default is that of ImageNet.
        std: Standard deviation of red, green and blue, likewise.
    """

    def __init__(
        self,
        path: str,
        side: int = 224,
        mean: tuple[float, ...] | list[float] = (0.485, 0.456, 0.406),
        std: tuple[float, ...] | list[float] = (0.229, 0.224, 0.225),
    ) -> None:
        if not isinstance(path, str) or not path:
            raise ValueError(f"features.path={path!r} must be a repository id or a folder")
        check_count("features.side", side, 16)
        for key, given in (("mean", mean), ("std", std)):
            if not isinstance(given, list | tuple) or len(given) != 3 or not all(is_number(one, 0) for one in given):
                raise ValueError(f"features.{key}={given!r} must be three numbers >= 0")
        if not all(std):
            raise ValueError(f"features.std={std!r} must be three numbers > 0")
        self.path, self.side, self.mean, self.std = path, side, tuple(mean), tuple(std)
        self.name = f"{path} at {side} x {side} px"

    def load(self, autoencoder: Callable[[], Autoencoder], device: torch.device) -> Describe:
        from transformers import AutoModel

        remedy = "give a vision transformer that transformers can open, or use features=latents"
        try:
            model: Any = AutoModel.from_pretrained(self.path, dtype=torch.float32)
            model = getattr(model, "vision_model", model).to(device).eval().requires_grad_(False)
        except Exception as error:  # transformers, the Hub and safetensors each have their own
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            raise ValueError(f"features.path={self.path!r} cannot be loaded ({reason}): {remedy}") from error
        mean, std = (torch.tensor(each).view(1, 3, 1, 1) for each in (self.mean, self.std))

        @torch.no_grad()
        def describe(image: Image.Image) -> Tensor:
            square = image.convert("RGB").resize((self.side, self.side), Image.Resampling.BICUBIC)
            pixels = ((to_pixels([square]) + 1) / 2 - mean) / std
            try:
                vector = model(pixel_values=pixels.to(device)).last_hidden_state[0].float().cpu()
                return F.normalize(vector[0], dim=0)
            except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
                reason = f"{type(error).__name__}: {error}"
                raise ValueError(f"features.path={self.path!r} gives no image vectors ({reason}): {remedy}") from error

        return describe
