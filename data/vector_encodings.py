"""What a robot's numbers become before they take their places in a pretrained policy's vector, where a place means something that
the robot does not say in so many words: a rotation's two columns, metres, a gripper from 0 to 1.

An encoding reads raw units and writes what the policy was pretrained on, so nothing is normalised beside it. Everything is
float32, on the tensors' own device. Shape letters: D the robot's numbers, C encoded numbers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from .robots.libero_panda import FINGER_TRAVEL_M

EncodingName = Literal[
    "as_is", "libero_osc_state", "libero_osc_action", "libero_physical_state", "libero_physical_action"
]

OSC_METRES, OSC_RADIANS = 0.05, 0.5
"""What an action of 1 asks for in one control step: the output limits of robosuite's OSC_POSE."""
FINGER_LOW_M, FINGER_HIGH_M = -0.04245, 0.05185
"""The least and the greatest position of either finger, as reported with Libero_RDT (github.com/tj-chen-1209/Libero_RDT)."""


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """A pair of functions over the last axis, in float32."""

    encode: Callable[[Tensor], Tensor]
    """(…, D) -> (…, C)."""
    decode: Callable[[Tensor], Tensor]
    """(…, C) -> (…, D), also of numbers that a policy made up."""
    columns: tuple[tuple[int, ...], ...]
    """For each of the D numbers, which of the C it goes into."""

    @property
    def num_dims(self) -> int:
        return len(self.columns)

    @property
    def num_encoded(self) -> int:
        return 1 + max(max(columns) for columns in self.columns)


def encode_osc_state(state: Tensor) -> Tensor:
    """Seven joints (rad) as they are, two fingers (m) from their least to their greatest position onto 0 to 1."""
    fingers = (state[..., 7:] - FINGER_LOW_M) / (FINGER_HIGH_M - FINGER_LOW_M)
    return torch.cat([state[..., :7], fingers], dim=-1)


def decode_osc_state(encoded: Tensor) -> Tensor:
    fingers = encoded[..., 7:] * (FINGER_HIGH_M - FINGER_LOW_M) + FINGER_LOW_M
    return torch.cat([encoded[..., :7], fingers], dim=-1)


def encode_osc_action(action: Tensor) -> Tensor:
    """OSC deltas and the gripper as they are, -1 to 1."""
    return action


def decode_osc_action(encoded: Tensor) -> Tensor:
    """The gripper only opens (-1) or closes (1): its sign is read, and 0 opens it."""
    gripper = torch.where(encoded[..., 6:] > 0, 1.0, -1.0)
    return torch.cat([encoded[..., :6], gripper], dim=-1)


def encode_physical_state(state: Tensor) -> Tensor:
    """Position (m), rotation in 6D, and how far the gripper is open, of the state of card `libero_panda`."""
    opening = ((state[..., 6:7] - state[..., 7:8]) / (2 * FINGER_TRAVEL_M)).clamp(0, 1)
    return torch.cat([state[..., :3], axis_angle_to_6d(state[..., 3:6]), opening], dim=-1)


def decode_physical_state(encoded: Tensor) -> Tensor:
    """With the rotation's vector of at most pi, and both fingers equally far from the middle."""
    left = encoded[..., 9:] * FINGER_TRAVEL_M
    return torch.cat([encoded[..., :3], axis_angle_from_6d(encoded[..., 3:9]), left, -left], dim=-1)


def encode_physical_action(action: Tensor) -> Tensor:
    """Metres, a rotation in 6D, and the gripper from 0 (close) to 1 (open): what the controller is asked to do in one step."""
    opening = (1 - action[..., 6:]) / 2
    return torch.cat([OSC_METRES * action[..., :3], axis_angle_to_6d(OSC_RADIANS * action[..., 3:6]), opening], dim=-1)


def decode_physical_action(encoded: Tensor) -> Tensor:
    rotation = axis_angle_from_6d(encoded[..., 3:9]) / OSC_RADIANS
    return torch.cat([encoded[..., :3] / OSC_METRES, rotation, 1 - 2 * encoded[..., 9:]], dim=-1)


def axis_angle_to_6d(axis_angle: Tensor) -> Tensor:
    """(…, 3) -> (…, 6): the first two columns of Rodrigues' matrix, exact at 0 too."""
    x, y, z = axis_angle.unbind(-1)
    angle = axis_angle.norm(dim=-1)
    s = torch.sinc(angle / torch.pi)  # sin(angle) / angle
    c = 0.5 * torch.sinc(angle / (2 * torch.pi)).square()  # (1 - cos(angle)) / angle²
    first = (1 - c * (y * y + z * z), c * x * y + s * z, c * x * z - s * y)
    second = (c * x * y - s * z, 1 - c * (x * x + z * z), c * y * z + s * x)
    return torch.stack([*first, *second], dim=-1)


def axis_angle_from_6d(columns: Tensor) -> Tensor:
    """(…, 6) -> (…, 3), at most pi long; finite for any six numbers (no rotation for six zeros)."""
    first = functional.normalize(columns[..., :3], dim=-1)
    second = columns[..., 3:] - (first * columns[..., 3:]).sum(-1, keepdim=True) * first
    second = functional.normalize(second, dim=-1)
    third = torch.linalg.cross(first, second, dim=-1)
    (m00, m10, m20), (m01, m11, m21), (m02, m12, m22) = (c.unbind(-1) for c in (first, second, third))
    # 4 q qᵀ of the quaternion q = (w, x, y, z): each row is q, scaled by one of its entries. That of the largest entry loses
    # no digits, near pi either.
    rows = torch.stack(
        [
            torch.stack([1 + m00 + m11 + m22, m21 - m12, m02 - m20, m10 - m01], dim=-1),
            torch.stack([m21 - m12, 1 + m00 - m11 - m22, m10 + m01, m02 + m20], dim=-1),
            torch.stack([m02 - m20, m10 + m01, 1 - m00 + m11 - m22, m21 + m12], dim=-1),
            torch.stack([m10 - m01, m02 + m20, m21 + m12, 1 - m00 - m11 + m22], dim=-1),
        ],
        dim=-2,
    )
    largest = rows.diagonal(dim1=-2, dim2=-1).argmax(-1)[..., None, None].expand(*rows.shape[:-2], 1, 4)
    quaternion = functional.normalize(rows.gather(-2, largest)[..., 0, :], dim=-1)
    quaternion = torch.where(quaternion[..., :1] < 0, -quaternion, quaternion)
    w, vector = quaternion[..., :1], quaternion[..., 1:]
    sine = vector.norm(dim=-1, keepdim=True)
    # Where there is no rotation the vector is 0 already, and 2 is the limit of angle / sine.
    scale = torch.where(sine > 0, 2 * torch.atan2(sine, w) / sine.clamp(min=torch.finfo(sine.dtype).tiny), 2.0)
    return vector * scale


_ONE_EACH = tuple((k,) for k in range(9))
_ROTATION = ((3, 4, 5, 6, 7, 8),) * 3
_POSITION = ((0,), (1,), (2,))

ENCODINGS: dict[str, Encoding] = {
    "libero_osc_state": Encoding(encode=encode_osc_state, decode=decode_osc_state, columns=_ONE_EACH),
    "libero_osc_action": Encoding(encode=encode_osc_action, decode=decode_osc_action, columns=_ONE_EACH[:7]),
    "libero_physical_state": Encoding(
        encode=encode_physical_state, decode=decode_physical_state, columns=(*_POSITION, *_ROTATION, (9,), (9,))
    ),
    "libero_physical_action": Encoding(
        encode=encode_physical_action, decode=decode_physical_action, columns=(*_POSITION, *_ROTATION, (9,))
    ),
}
"""All but `as_is`, which is none."""
