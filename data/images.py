"""From a camera's picture to the square that a policy reads: turned upright, padded, resized.

One `ImageRule` is written into the cache and into every checkpoint; `prepare` applies it to demonstrations and acting applies the
same object to what the robot sees, so that the two cannot differ.

Shape letters: N images, H rows, W columns, C = 3 colours.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self, get_args

import numpy as np
from PIL import Image

Orientation = Literal["rot180", "flipud", "raw"]
Padding = Literal["centre", "left_top"]
Resize = Literal["pil_bilinear", "pil_bicubic", "torch_bilinear"]
PIL_FILTERS = {"pil_bilinear": Image.Resampling.BILINEAR, "pil_bicubic": Image.Resampling.BICUBIC}


@dataclass(frozen=True, kw_only=True)
class ImageRule:
    """How pictures are prepared: turned upright, padded to a square without distortion, resized."""

    orientation: Orientation = "rot180"
    """How stored pictures are turned: `rot180` (by 180 degrees, as openpi and OpenVLA train on LIBERO), `flipud` (rows
    reversed: what a person would see) or `raw` (left as they are)."""
    size_px: int = 64
    """Side of the square, in pixels."""
    background: tuple[int, int, int] = (0, 0, 0)
    """Colour (red, green, blue; 0 to 255) of the padding that makes a picture square."""
    padding: Padding = "centre"
    """Where the padding goes: around the middle (π0, π0.5, RDT), or all of it on the left and the top (SmolVLA)."""
    resize: Resize = "pil_bilinear"
    """How pictures change their size: PIL's bilinear (openpi) or bicubic (SigLIP's own, so RDT), both after padding and
    with antialiasing; or torch's bilinear without it, before padding (LeRobot)."""

    def __post_init__(self) -> None:
        for name, allowed in (("orientation", Orientation), ("padding", Padding), ("resize", Resize)):
            if getattr(self, name) not in get_args(allowed):
                raise ValueError(f"{name} is {getattr(self, name)!r}; it can be {', '.join(get_args(allowed))}")
        if self.size_px < 1:
            raise ValueError(f"size_px is {self.size_px}; it must be at least 1")
        if len(self.background) != 3 or any(not 0 <= value <= 255 for value in self.background):
            raise ValueError(f"background is {self.background}; it must be three numbers from 0 to 255")

    def prepare(self, images_NHWC: np.ndarray) -> np.ndarray:
        """(N, H, W, 3) uint8, as the camera gave them -> (N, size_px, size_px, 3) uint8, contiguous.

        Odd padding around the middle puts the extra row or column at the end. Pictures that have the size already are only
        turned. Raises `ValueError` for another dtype or shape."""
        if images_NHWC.dtype != np.uint8 or images_NHWC.ndim != 4 or images_NHWC.shape[-1] != 3:
            raise ValueError(
                f"images are {images_NHWC.dtype} of shape {images_NHWC.shape}; they must be uint8 of shape (N, rows, columns, 3)"
            )
        images_NHWC = self._turned(images_NHWC)
        if self.resize == "torch_bilinear":
            return np.ascontiguousarray(self._padded(self._fitted(images_NHWC), self.size_px))
        squares_NHWC = self._padded(images_NHWC, max(images_NHWC.shape[1:3]))
        if squares_NHWC.shape[1] == self.size_px:
            return np.ascontiguousarray(squares_NHWC)
        resized_NHWC = np.empty((len(squares_NHWC), self.size_px, self.size_px, 3), np.uint8)
        for n, image_HWC in enumerate(squares_NHWC):
            picture = Image.fromarray(np.ascontiguousarray(image_HWC))
            resized_NHWC[n] = np.asarray(picture.resize((self.size_px, self.size_px), PIL_FILTERS[self.resize]))
        return resized_NHWC

    def _fitted(self, images_NHWC: np.ndarray) -> np.ndarray:
        """The longer side is `size_px` after it, or one less where LeRobot's arithmetic rounds down; rounded to uint8, where LeRobot
        goes on in float."""
        import torch  # not for the simulators' processes

        rows, columns = images_NHWC.shape[1:3]
        ratio = max(rows, columns) / self.size_px
        if ratio == 1:
            return images_NHWC
        images = torch.from_numpy(np.ascontiguousarray(images_NHWC)).permute(0, 3, 1, 2).float()
        size = (int(rows / ratio), int(columns / ratio))
        fitted = torch.nn.functional.interpolate(images, size=size, mode="bilinear", align_corners=False)
        array: np.ndarray = fitted.round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
        return array

    def _turned(self, images_NHWC: np.ndarray) -> np.ndarray:
        match self.orientation:
            case "rot180":
                return images_NHWC[:, ::-1, ::-1]
            case "flipud":
                return images_NHWC[:, ::-1]
            case "raw":
                return images_NHWC

    def _padded(self, images_NHWC: np.ndarray, side: int) -> np.ndarray:
        num_images, rows, columns, _ = images_NHWC.shape
        if rows == columns == side:
            return images_NHWC
        top, left = side - rows, side - columns
        if self.padding == "centre":
            top, left = top // 2, left // 2
        squares_NHWC = np.empty((num_images, side, side, 3), np.uint8)
        squares_NHWC[:] = np.array(self.background, np.uint8)
        squares_NHWC[:, top : top + rows, left : left + columns] = images_NHWC
        return squares_NHWC

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "background": list(self.background)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        return cls(**{**value, "background": tuple(value["background"])})
