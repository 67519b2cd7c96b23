"""Images to the tensor a vision backbone was trained on: resize, crop, normalise, with PIL and numpy alone.

Reach for it through a model's ``collate``; it reads and writes the ``preprocessor_config.json`` of transformers.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from downriver.core.errors import InputError

CONFIG = "preprocessor_config.json"


@dataclass(frozen=True)
class ImageProcessor:
    """Turns images of any size into one float32 tensor (n, 3, height, width).

    Parameters
    ----------
    height, width
        The size that the backbone sees, in pixels.
    mean, std
        Of each colour channel, on the scale 0 to 1: ``(pixel / 255 - mean) / std``. Default 0.5, as for ViT.
    shortest
        Resize the shorter edge to so many pixels and cut out the middle; ``None`` resizes to height × width straight
        away.
    resample
        PIL's filter: 2 bilinear (default), 3 bicubic.
    name
        The class that transformers knows this pre-processing by.

    Example
    -------
    >>> pixels = ImageProcessor(height=8, width=8)([np.full((28, 28), 255, dtype=np.uint8)])
    >>> pixels.shape, pixels.max().item()
    (torch.Size([1, 3, 8, 8]), 1.0)
    """

    height: int = 224
    width: int = 224
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    shortest: int | None = None
    resample: int = 2
    name: str = "ViTImageProcessor"

    def __call__(self, images: Sequence[Any]) -> Tensor:
        """Images: PIL images, file paths, or uint8 arrays (h, w), (h, w, 1) or (h, w, 3)."""
        pixels = torch.from_numpy(np.stack([self._pixels(image) for image in images]))
        mean, std = (torch.tensor(v).reshape(1, -1, 1, 1) for v in (self.mean, self.std))
        return (pixels.permute(0, 3, 1, 2).float() / 255 - mean) / std

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``preprocessor_config.json`` as transformers writes it."""
        config: dict[str, Any] = {
            "image_processor_type": self.name,
            "do_resize": True,
            "size": {"shortest_edge": self.shortest} if self.shortest else {"height": self.height, "width": self.width},
            "resample": self.resample,
            "do_center_crop": self.shortest is not None,
            "crop_size": {"height": self.height, "width": self.width},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }
        (Path(folder) / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "ImageProcessor":
        """Read a folder's ``preprocessor_config.json`` (the forms of old and new transformers alike)."""
        file = Path(folder) / CONFIG
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
            crop = config.get("crop_size") if config.get("do_center_crop") else None
            size = _size(config.get("size", 224))
            height, width = _size(crop)[:2] if crop else size[:2]
            plain = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
            mean, std = (
                (tuple(config.get("image_mean", [0.5] * 3)), tuple(config.get("image_std", [0.5] * 3)))
                if config.get("do_normalize", True)
                else plain
            )
            shortest = size[2] or (size[0] if crop else None)
            name = config.get("image_processor_type", cls.name)
            return cls(height, width, mean, std, shortest, config.get("resample", 2), name)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{file} is no configuration of an image processor ({error})") from None

    def _pixels(self, image: Any) -> np.ndarray:
        picture = _picture(image)
        if self.shortest is not None:
            scale = self.shortest / min(picture.size)
            resized = [max(1, round(side * scale)) for side in picture.size]
            picture = picture.resize((resized[0], resized[1]), self.resample)
            left, top = (picture.width - self.width) // 2, (picture.height - self.height) // 2
            picture = picture.crop((left, top, left + self.width, top + self.height))
        elif picture.size != (self.width, self.height):
            picture = picture.resize((self.width, self.height), self.resample)
        return np.asarray(picture)


def _size(value: Any) -> tuple[int, int, int | None]:
    """Height, width and shortest edge of transformers' ways to say a size."""
    if isinstance(value, int):
        return value, value, None
    if "shortest_edge" in value:
        return value["shortest_edge"], value["shortest_edge"], value["shortest_edge"]
    return value["height"], value["width"], None


def _picture(image: Any) -> Image.Image:
    if isinstance(image, str | Path):
        try:
            image = Image.open(image)
        except OSError as error:
            raise InputError(f"image {image} cannot be read ({error})") from None
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    pixels = np.asarray(image)
    if pixels.dtype != np.uint8:
        if pixels.dtype.kind not in "iu" or pixels.size == 0 or pixels.min() < 0 or pixels.max() > 255:
            raise InputError(
                f"an image of {pixels.dtype} values: a picture, or whole numbers from 0 to 255, are expected"
            )
        pixels = pixels.astype(np.uint8)
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    if pixels.ndim != 2 and not (pixels.ndim == 3 and pixels.shape[2] == 3):
        raise InputError(f"an image of shape {pixels.shape}: (h, w), (h, w, 1) or (h, w, 3) is expected")
    return Image.fromarray(pixels).convert("RGB")
