"""Random changes to training pictures, made on the device where they are.

Every draw is a function of (seed, optimizer step, sample index, camera): a sample is changed alike whatever its batch, rank or
device, all its frames of one camera in the same way. In this order, where the config asks for it:

    flip         left and right exchanged; one draw for all cameras of a sample
    crop, rotate one bilinear resampling: a crop at a uniform place, enlarged to the whole picture, turned about its centre by a
                 uniform angle; what lies outside of the picture has the background's colour
    brightness   x * b                                  b uniform in 1 ± brightness
    contrast     c * x + (1 - c) * mean of luma(x)      c uniform in 1 ± contrast
    saturation   s * x + (1 - s) * luma(x)              s uniform in 1 ± saturation
    hue          turned by h of the colour circle       h uniform in ± hue

Each colour step is cut off at 0 and 255; factors are never negative. luma = 0.299 R + 0.587 G + 0.114 B. The colour formulas are
those of torchvision's ColorJitter, which takes the four in random order. The result is rounded to uint8, which backbones read.

Shape letters as in `batch.py`; N = B * T pictures, C = 3 colours, H rows, W columns, K draws per sample.
"""

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from .batch import Observation

Flip = Literal["off", "pictures_only"]
WRIST_WORDS = ("hand", "wrist")
LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Random changes to training pictures. All are off unless asked for; `OPENPI` and `RDT` have what those train with."""

    crop: float = 1.0
    """Side of a random crop, as a share of the picture's; 1 is off."""
    rotate_deg: float = 0.0
    """Largest angle, in degrees, to either side."""
    moved_cameras: tuple[str, ...] | None = None
    """Cameras that are cropped and rotated; None: those without `hand` or `wrist` in their name, since for a camera on the hand that
    would be another pose of the robot."""
    brightness: float = 0.0
    """Largest change of the factor 1."""
    contrast: float = 0.0
    """Largest change of the factor 1."""
    saturation: float = 0.0
    """Largest change of the factor 1."""
    hue: float = 0.0
    """Largest turn, as a share of the colour circle; at most 0.5."""
    coloured_share: float = 1.0
    """Share of the pictures (all frames of a camera together) whose colours are changed."""
    horizontal_flip: Flip = "off"
    """`pictures_only` mirrors every second sample's pictures. Off, because a mirrored picture shows left as right while its
    actions, state and instruction stay as they are: right only where a task has no sides."""

    def __post_init__(self) -> None:
        if not 0 < self.crop <= 1:
            raise ValueError(f"crop is {self.crop}; it must be more than 0, and at most 1 (off)")
        for name, most in (
            ("rotate_deg", 180),
            ("brightness", math.inf),
            ("contrast", math.inf),
            ("saturation", math.inf),
        ):
            if not 0 <= getattr(self, name) <= most:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 0 (off) and at most {most}")
        if not 0 <= self.hue <= 0.5:
            raise ValueError(f"hue is {self.hue}; it must be at least 0 (off) and at most 0.5")
        if not 0 <= self.coloured_share <= 1:
            raise ValueError(f"coloured_share is {self.coloured_share}; it must be at least 0 and at most 1")
        if self.horizontal_flip not in get_args(Flip):
            raise ValueError(
                f"horizontal_flip is {self.horizontal_flip!r}; it can be off, or pictures_only, which leaves actions, state and "
                "instruction as they are, so that left in them is right in the picture: only for tasks without sides"
            )

    @property
    def moves(self) -> bool:
        return self.crop < 1 or self.rotate_deg > 0

    @property
    def colours(self) -> bool:
        return self.coloured_share > 0 and max(self.brightness, self.contrast, self.saturation, self.hue) > 0

    @property
    def is_off(self) -> bool:
        return not (self.moves or self.colours or self.horizontal_flip != "off")

    def moves_camera(self, camera: str) -> bool:
        if self.moved_cameras is not None:
            return camera in self.moved_cameras
        return not any(word in camera.lower() for word in WRIST_WORDS)


OPENPI = AugmentConfig(crop=0.95, rotate_deg=5.0, brightness=0.3, contrast=0.4, saturation=0.5)
"""The magnitudes of π0 and π0.5."""
RDT = AugmentConfig(brightness=0.3, contrast=0.4, saturation=0.5, hue=0.03, coloured_share=0.5)
"""The colour part of RDT-1B's."""


def augment(
    observation: Observation,
    config: AugmentConfig,
    *,
    seed: int,
    step: int,
    sample_index_B: Tensor,
    background: Sequence[int] = (0, 0, 0),
) -> Observation:
    """The observation with other pictures, still uint8; masked ones stay as they are. Nothing waits for the device.

    `background` is the colour outside of a picture, as the cache's image rule has it. Raises `ValueError` where the config names
    a camera that the observation lacks."""
    unknown = [camera for camera in config.moved_cameras or () if camera not in observation.images]
    if unknown:
        raise ValueError(f"moved_cameras has {unknown[0]!r}; the pictures are of {', '.join(observation.images)}")
    if config.is_off:
        return observation
    index_B = sample_index_B.to(observation.state_BTS.device, non_blocking=True)
    changed = {}
    for camera, images_BTHWC in observation.images.items():
        new_BTHWC = images_BTHWC
        if config.horizontal_flip == "pictures_only":
            flip_B = uniform(index_B, 1, seed, step, "flip")[:, 0] < 0.5
            new_BTHWC = torch.where(flip_B[:, None, None, None, None], new_BTHWC.flip(3), new_BTHWC)
        moves = config.moves and config.moves_camera(camera)
        if moves or config.colours:
            u_BK = uniform(index_B, 8, seed, step, camera)
            pixels_NCHW = new_BTHWC.flatten(0, 1).permute(0, 3, 1, 2).float()
            u_NK = u_BK.repeat_interleave(images_BTHWC.shape[1], dim=0)
            if moves:
                pixels_NCHW = _moved(pixels_NCHW, config, u_NK[:, :3], background)
            if config.colours:
                pixels_NCHW = _coloured(pixels_NCHW, config, u_NK[:, 3:])
            rounded_NHWC = pixels_NCHW.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
            new_BTHWC = rounded_NHWC.reshape(images_BTHWC.shape)
        mask_BT111 = observation.image_mask[camera][..., None, None, None]
        changed[camera] = torch.where(mask_BT111, new_BTHWC, images_BTHWC)
    return replace(observation, images=changed)


def uniform(index_B: Tensor, num_draws: int, seed: int, step: int, name: str) -> Tensor:
    """(B, K) float32 in [0, 1): the draws of that `name` for each sample. The same bits on every device.

    SplitMix64's finaliser (Steele, Lea and Flood, 2014) over the words that name a draw."""
    key = _mixed_int(_mixed_int(_mixed_int(seed) ^ step) ^ zlib.crc32(name.encode()))
    state_B1 = _mixed(index_B[:, None] + _signed(key))
    counter_K = torch.arange(1, num_draws + 1, device=index_B.device)
    mixed_BK = _mixed(state_B1 + counter_K * _signed(GOLDEN))
    return _shifted(mixed_BK, 40).float() / 2**24


def _moved(pixels_NCHW: Tensor, config: AugmentConfig, u_N3: Tensor, background: Sequence[int]) -> Tensor:
    """`u_N3` names the crop's place (column, row) and the angle."""
    angle_N = (2 * u_N3[:, 2] - 1) * math.radians(config.rotate_deg)
    centre_N2 = (2 * u_N3[:, :2] - 1) * (1 - config.crop)  # the picture reaches from -1 to 1
    cos_N, sin_N = config.crop * angle_N.cos(), config.crop * angle_N.sin()
    rows = [torch.stack([cos_N, -sin_N, centre_N2[:, 0]], dim=1), torch.stack([sin_N, cos_N, centre_N2[:, 1]], dim=1)]
    grid_NHW2 = functional.affine_grid(torch.stack(rows, dim=1), list(pixels_NCHW.shape), align_corners=False)
    # Outside of the picture sampling gives zero; as a difference from the background that is the background.
    colour_C11 = torch.tensor(background, dtype=torch.float32).to(pixels_NCHW.device, non_blocking=True)[:, None, None]
    return functional.grid_sample(pixels_NCHW - colour_C11, grid_NHW2, align_corners=False) + colour_C11


def _coloured(pixels_NCHW: Tensor, config: AugmentConfig, u_N5: Tensor) -> Tensor:
    """`u_N5` names whether at all, then brightness, contrast, saturation and hue."""
    chosen_N = u_N5[:, 0] < config.coloured_share
    signed_N4 = torch.where(chosen_N[:, None], 2 * u_N5[:, 1:] - 1, 0.0)

    def factor(draw: int, most: float) -> Tensor:
        return (1 + signed_N4[:, draw] * most).clamp(min=0)[:, None, None, None]

    if config.brightness > 0:
        pixels_NCHW = (pixels_NCHW * factor(0, config.brightness)).clamp(0, 255)
    if config.contrast > 0:
        mean_N111 = _luma(pixels_NCHW).mean(dim=(1, 2, 3), keepdim=True)
        pixels_NCHW = torch.lerp(mean_N111, pixels_NCHW, factor(1, config.contrast)).clamp(0, 255)
    if config.saturation > 0:
        pixels_NCHW = torch.lerp(_luma(pixels_NCHW), pixels_NCHW, factor(2, config.saturation)).clamp(0, 255)
    if config.hue > 0:
        turned_NCHW = _turned(pixels_NCHW, signed_N4[:, 3] * config.hue)
        pixels_NCHW = torch.where(chosen_N[:, None, None, None], turned_NCHW, pixels_NCHW)
    return pixels_NCHW


def _luma(pixels_NCHW: Tensor) -> Tensor:
    """(N, 1, H, W)."""
    red, green, blue = LUMA
    return red * pixels_NCHW[:, :1] + green * pixels_NCHW[:, 1:2] + blue * pixels_NCHW[:, 2:]


def _turned(pixels_NCHW: Tensor, turn_N: Tensor) -> Tensor:
    """Colours with another hue and the same HSV saturation and value; `turn_N` is a share of the circle."""
    red, green, blue = pixels_NCHW.unbind(dim=1)
    value_NHW, chroma_NHW = pixels_NCHW.amax(dim=1), pixels_NCHW.amax(dim=1) - pixels_NCHW.amin(dim=1)
    divisor_NHW = chroma_NHW.clamp(min=1e-6)  # a grey has no hue, and any will do
    sector_NHW = torch.where(
        value_NHW == red,
        (green - blue) / divisor_NHW,
        torch.where(value_NHW == green, 2 + (blue - red) / divisor_NHW, 4 + (red - green) / divisor_NHW),
    )
    sector_NHW = sector_NHW + 6 * turn_N[:, None, None]
    # How far each colour lies below the value depends on the distance of its own sector (red 5, green 3, blue 1).
    below = [
        torch.minimum(place, 4 - place).clamp(0, 1)
        for place in ((sector_NHW + 5) % 6, (sector_NHW + 3) % 6, (sector_NHW + 1) % 6)
    ]
    return value_NHW[:, None] - chroma_NHW[:, None] * torch.stack(below, dim=1)


GOLDEN = 0x9E3779B97F4A7C15
FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
WORD = 2**64


def _signed(word: int) -> int:
    """The int64 with the bits of a 64-bit word."""
    return (word + WORD // 2) % WORD - WORD // 2


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Right, filling with zeros; torch's own shift copies the sign."""
    return (x >> bits) & (2 ** (64 - bits) - 1)


def _mixed(x: Tensor) -> Tensor:
    x = (x ^ _shifted(x, 30)) * _signed(FACTORS[0])
    x = (x ^ _shifted(x, 27)) * _signed(FACTORS[1])
    return x ^ _shifted(x, 31)


def _mixed_int(word: int) -> int:
    """The same for one 64-bit word, after a step of the counter: 0 would stay 0."""
    word = (word + GOLDEN) % WORD
    word = (word ^ word >> 30) * FACTORS[0] % WORD
    word = (word ^ word >> 27) * FACTORS[1] % WORD
    return word ^ word >> 31
