"""What an evaluation compares images by: the group `features`. A model gives a vector for each image.

`Latents` needs nothing but the run's own autoencoder. Its distances depend on place and color, so they find copies and
say little about what an image shows. `Vision` uses a vision transformer, whose distances depend on content. `Clip`
also compares an image with its prompt.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
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

    def check(self) -> None:
        """Raise ValueError, before anything is drawn, if it cannot be loaded or gives no vectors."""

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

    def check(self) -> None:
        """The run's own autoencoder draws the images, too."""

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

    remedy = "give a vision transformer that transformers can open, or use features=latents"

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

    def check(self) -> None:
        self._describe(torch.device("cpu"))(Image.new("RGB", (self.side, self.side)))

    def load(self, autoencoder: Callable[[], Autoencoder], device: torch.device) -> Describe:
        return self._describe(device)

    def _describe(self, device: torch.device) -> Describe:
        model = self.open_model(device)
        mean, std = (torch.tensor(each).view(1, 3, 1, 1) for each in (self.mean, self.std))

        @torch.no_grad()
        def describe(image: Image.Image) -> Tensor:
            square = image.convert("RGB").resize((self.side, self.side), Image.Resampling.BICUBIC)
            pixels = ((to_pixels([square]) + 1) / 2 - mean) / std
            with self.named_errors("gives no image vectors"):
                return F.normalize(self.image_vector(model, pixels.to(device)).float().cpu(), dim=0)

        return describe

    def image_vector(self, model: Any, pixels: Tensor) -> Tensor:
        """(1, 3, side, side) -> (D,), not yet of length 1."""
        return getattr(model, "vision_model", model)(pixel_values=pixels).last_hidden_state[0, 0]

    def open_model(self, device: torch.device) -> Any:
        from transformers import AutoModel

        with self.named_errors("cannot be loaded"):
            model: Any = AutoModel.from_pretrained(self.path, dtype=torch.float32)
        return model.to(device).eval().requires_grad_(False)

    @contextmanager
    def named_errors(self, what: str) -> Iterator[None]:
        """Context manager that raises ValueError with the setting and a remedy for any error."""
        try:
            yield
        except Exception as error:  # transformers, the Hub and safetensors each have their own
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            raise ValueError(f"features.path={self.path!r} {what} ({reason}): {self.remedy}") from error


class Clip(Vision):
    """CLIP, or a model of the same kind such as SigLIP: vectors of images and of prompts, of length 1.

    The cosine of an image's vector and its prompt's is what others call the CLIP score, there multiplied by 100
    (Hessel et al. 2021, which also cuts it off at 0).
    """

    remedy = "give a model with get_image_features and get_text_features, such as openai/clip-vit-base-patch32"

    def check(self) -> None:
        super().check()
        self.load_text(torch.device("cpu"))("a cup")

    def image_vector(self, model: Any, pixels: Tensor) -> Tensor:
        return pooled(model.get_image_features(pixel_values=pixels))

    def load_text(self, device: torch.device) -> Callable[[str], Tensor]:
        """Return a function from a prompt, cut at the model's number of tokens, to its vector (D,)."""
        from transformers import AutoTokenizer

        model = self.open_model(device)
        with self.named_errors("has no tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(self.path)
        longest = getattr(model.config, "text_config", model.config).max_position_embeddings

        @torch.no_grad()
        def describe(prompt: str) -> Tensor:
            with self.named_errors("gives no text vectors"):
                tokens = tokenizer(
                    [prompt], padding="max_length", truncation=True, max_length=longest, return_tensors="pt"
                )
                return F.normalize(pooled(model.get_text_features(**tokens.to(device))).float().cpu(), dim=0)

        return describe


def pooled(output: Any) -> Tensor:
    """Return the vector of one image or text, which newer versions of transformers wrap in an output."""
    return getattr(output, "pooler_output", output)[0]
