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

    def __post_init__(self) -> None:
        if self.orientation not in get_args(Orientation):
            raise ValueError(f"orientation is {self.orientation!r}; it can be {', '.join(get_args(Orientation))}")
        if self.size_px < 1:
            raise ValueError(f"size_px is {self.size_px}; it must be at least 1")
        if len(self.background) != 3 or any(not 0 <= value <= 255 for value in self.background):
            raise ValueError(f"background is {self.background}; it must be three numbers from 0 to 255")

    def prepare(self, images_NHWC: np.ndarray) -> np.ndarray:
        """(N, H, W, 3) uint8, as the camera gave them -> (N, size_px, size_px, 3) uint8, contiguous.

        Odd padding puts the extra row or column at the end. Pictures that have the size already are only turned. The
        resize is PIL's bilinear one (with its antialiasing when shrinking), as in openpi. Raises `ValueError` for another
        dtype or shape."""
        if images_NHWC.dtype != np.uint8 or images_NHWC.ndim != 4 or images_NHWC.shape[-1] != 3:
            raise ValueError(
                f"images are {images_NHWC.dtype} of shape {images_NHWC.shape}; they must be uint8 of shape (N, rows, columns, 3)"
            )
        squares_NHWC = self._padded(self._turned(images_NHWC))
        if squares_NHWC.shape[1] == self.size_px:
            return np.ascontiguousarray(squares_NHWC)
        resized_NHWC = np.empty((len(squares_NHWC), self.size_px, self.size_px, 3), np.uint8)
        for n, image_HWC in enumerate(squares_NHWC):
            picture = Image.fromarray(np.ascontiguousarray(image_HWC))
            resized_NHWC[n] = np.asarray(picture.resize((self.size_px, self.size_px), Image.Resampling.BILINEAR))
        return resized_NHWC

    def _turned(self, images_NHWC: np.ndarray) -> np.ndarray:
        match self.orientation:
            case "rot180":
                return images_NHWC[:, ::-1, ::-1]
            case "flipud":
                return images_NHWC[:, ::-1]
            case "raw":
                return images_NHWC

    def _padded(self, images_NHWC: np.ndarray) -> np.ndarray:
        num_images, rows, columns, _ = images_NHWC.shape
        if rows == columns:
            return images_NHWC
        side = max(rows, columns)
        top, left = (side - rows) // 2, (side - columns) // 2
        squares_NHWC = np.empty((num_images, side, side, 3), np.uint8)
        squares_NHWC[:] = np.array(self.background, np.uint8)
        squares_NHWC[:, top : top + rows, left : left + columns] = images_NHWC
        return squares_NHWC

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "background": list(self.background)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        return cls(**{**value, "background": tuple(value["background"])})
