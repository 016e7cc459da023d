"""From what a client sends to what a policy reads: names, shapes and dtypes checked, each refusal one sentence.

Shape letters as in `batch.py`: T observation offsets, S state dims, H horizon, A action dims."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...data.images import Orientation
from ...data.raw_observation import RawObservation
from .limits import Limits
from .messages import Refused, short

OPENPI_LIBERO = {"agentview": "observation/image", "eye_in_hand": "observation/wrist_image"}
"""Camera -> the key of its picture in openpi's LIBERO example."""
STATE_KEYS = ("observation/state", "state")
PROMPT = "prompt"
IMAGES = "images"
"""A map of cameras and pictures, as openpi's ALOHA example sends them."""
PREVIOUS, EXECUTED, DELAY, THERE = "previous_actions", "num_executed_steps", "inference_delay", "there"


@dataclass(frozen=True, kw_only=True)
class Request:
    """One decision that a client waits for."""

    raw: RawObservation
    previous_HA: np.ndarray | None = None
    """The chunk that it was sent at its decision before."""
    num_executed_steps: int | None = None
    """How many of that chunk's steps have been carried out since."""
    inference_delay: int = 0
    """How many more will have been when this decision is there."""


@dataclass(frozen=True, kw_only=True)
class ObservationReader:
    """What a policy reads, and under which keys it may come."""

    cameras: tuple[str, ...]
    num_offsets: int
    """T."""
    state_dim: int
    action_shape: tuple[int, int]
    """(H, A)."""
    reads_previous: bool = False
    """Whether decisions depend on the one before: with several candidates, or real-time chunking."""
    orientation: Orientation = "raw"
    """How pictures that come have been turned against what the camera gives; it is undone."""
    camera_keys: Mapping[str, str]
    """Camera -> another key of its picture."""
    default_prompt: str = ""
    """For observations without one; empty: they are refused."""
    limits: Limits

    def __post_init__(self) -> None:
        unknown = sorted(set(self.camera_keys) - set(self.cameras))
        if unknown:
            raise ValueError(
                f"--camera {unknown[0]} {self.camera_keys[unknown[0]]}: the policy has no camera {unknown[0]!r}; it has "
                f"{', '.join(self.cameras)}"
            )

    @property
    def keys(self) -> dict[str, tuple[str, ...]]:
        """Each camera, and the state -> the keys under which it is looked for."""
        aliases = {**OPENPI_LIBERO, **self.camera_keys}
        return {
            **{
                camera: tuple(filter(None, (f"observation/{camera}", camera, aliases.get(camera))))
                for camera in self.cameras
            },
            "state": STATE_KEYS,
        }

    def read(self, message: Any) -> Request:
        """Raises `Refused`."""
        if not isinstance(message, dict) or not all(isinstance(key, str) for key in message):
            raise Refused(f"the message is {_kind(message)}; send a map with text keys: {self._wanted()}")
        sent = self._flat(message)
        raw = RawObservation(
            images={camera: self._picture(camera, sent) for camera in self.cameras},
            state_TS=self._state(sent),
            instruction=self._prompt(sent),
            there_T=self._there(sent),
        )
        horizon = self.action_shape[0]
        executed = _whole(sent, EXECUTED, 1, horizon)
        if self.reads_previous and executed is None:
            raise Refused(
                f"decisions of this policy depend on the one before, and {EXECUTED} is missing; send how many steps of a chunk are carried "
                f"out from one observation to the next, and {PREVIOUS}, the chunk sent last, from the second decision on"
            )
        return Request(
            raw=raw,
            previous_HA=self._previous(sent),
            num_executed_steps=executed,
            inference_delay=_whole(sent, DELAY, 0, horizon) or 0,
        )

    def _flat(self, message: dict[str, Any]) -> dict[str, Any]:
        """Pictures of a map `images` beside the rest. What else a robot observes may come below `observation/` and is not read; any
        other key would be a misspelt one."""
        sent = dict(message)
        images = sent.pop(IMAGES, {})
        if not isinstance(images, dict) or not all(isinstance(key, str) for key in images):
            raise Refused(f"{IMAGES} is {_kind(images)}; send a map of cameras and pictures")
        allowed = {key for keys in self.keys.values() for key in keys} | {PROMPT, PREVIOUS, EXECUTED, DELAY, THERE}
        unknown = [key for key in sent if key not in allowed and not key.startswith("observation/")]
        if unknown:
            raise Refused(f"the observation has an unknown key {short(unknown[0])}; it may have {self._wanted()}")
        return {**sent, **{f"{IMAGES}/{camera}": picture for camera, picture in images.items()}}

    def _wanted(self) -> str:
        names = [" or ".join(keys) for keys in self.keys.values()]
        optional = [PREVIOUS, EXECUTED, DELAY] + ([THERE] if self.num_offsets > 1 else [])
        return f"{', '.join(names)}, {PROMPT}; and, if wanted, {', '.join(optional)}"

    def _only(self, name: str, keys: tuple[str, ...], sent: Mapping[str, Any]) -> tuple[str, Any]:
        """The key under which it came, and what did."""
        found = [key for key in keys if key in sent]
        if len(found) != 1:
            came = f"came {len(found)} times, as {' and '.join(found)}" if found else "is missing"
            raise Refused(f"the observation's {name} {came}; send it once, as {' or '.join(keys)}")
        return found[0], sent[found[0]]

    def _picture(self, camera: str, sent: Mapping[str, Any]) -> np.ndarray:
        """(T, rows, columns, 3) uint8, as the camera gave it."""
        key, picture = self._only(camera, (*self.keys[camera], f"{IMAGES}/{camera}"), sent)
        form = "(rows, columns, 3)" if self.num_offsets == 1 else f"({self.num_offsets}, rows, columns, 3)"
        if not isinstance(picture, np.ndarray) or picture.dtype != np.uint8:
            raise Refused(
                f"{key} is {_kind(picture)}; send pictures of numbers from 0 to 255 as uint8, {form} (openpi_client.image_tools."
                "convert_to_uint8 makes them of floats from 0 to 1)"
            )
        stacked = picture[None] if picture.ndim == 3 and self.num_offsets == 1 else picture
        if stacked.ndim == 4 and stacked.shape[1] == 3 and stacked.shape[3] != 3:  # colours first
            stacked = np.moveaxis(stacked, 1, 3)
        if stacked.ndim != 4 or stacked.shape[0] != self.num_offsets or stacked.shape[3] != 3:
            raise Refused(f"{key} is {_kind(picture)}; send {form}")
        rows, columns = stacked.shape[1:3]
        if min(rows, columns) < 1 or max(rows, columns) > self.limits.picture_px:
            raise Refused(
                f"{key} is {rows} x {columns} pixels; send 1 to {self.limits.picture_px} a side (openpi_client.image_tools."
                "resize_with_pad makes them smaller)"
            )
        match self.orientation:
            case "raw":
                return stacked
            case "rot180":
                return stacked[:, ::-1, ::-1]
            case "flipud":
                return stacked[:, ::-1]

    def _state(self, sent: Mapping[str, Any]) -> np.ndarray:
        key, state = self._only("state", STATE_KEYS, sent)
        shape = (self.num_offsets, self.state_dim)
        numbers = _numbers(key, state, shape, without_first=self.num_offsets == 1)
        return numbers.reshape(shape)

    def _prompt(self, sent: Mapping[str, Any]) -> str:
        prompt = sent.get(PROMPT, self.default_prompt)
        if not isinstance(prompt, str) or not prompt.strip():
            came = "is missing" if PROMPT not in sent else f"is {_kind(prompt)}"
            raise Refused(f"{PROMPT} {came}; send the instruction as a text")
        most = self.limits.prompt_characters
        if len(prompt) > most:
            raise Refused(f"{PROMPT} has {len(prompt)} characters; send at most {most}")
        return prompt

    def _there(self, sent: Mapping[str, Any]) -> np.ndarray | None:
        if THERE not in sent:
            return None
        there = sent[THERE]
        if not isinstance(there, np.ndarray) or there.dtype != np.bool_ or there.shape != (self.num_offsets,):
            raise Refused(
                f"{THERE} is {_kind(there)}; send ({self.num_offsets},) truth values, False where an observation lies before the "
                "episode's start"
            )
        return there

    def _previous(self, sent: Mapping[str, Any]) -> np.ndarray | None:
        if PREVIOUS not in sent:
            return None
        return _numbers(PREVIOUS, sent[PREVIOUS], self.action_shape)


def _numbers(key: str, value: Any, shape: tuple[int, ...], *, without_first: bool = False) -> np.ndarray:
    """float32 of this shape (or without its first axis), finite."""
    allowed = [shape, shape[1:]] if without_first else [shape]
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "iuf" or value.shape not in allowed:
        raise Refused(f"{key} is {_kind(value)}; send {' or '.join(map(str, reversed(allowed)))} numbers")
    with np.errstate(over="ignore"):
        numbers = value.astype(np.float32)
    if not np.isfinite(numbers).all():
        raise Refused(f"{key} has numbers that are not finite, or too large for float32; send none")
    return numbers


def _whole(sent: Mapping[str, Any], key: str, lowest: int, highest: int) -> int | None:
    if key not in sent:
        return None
    value = sent[key]
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not lowest <= value <= highest:
        raise Refused(f"{key} is {_kind(value)}; send a whole number from {lowest} to {highest}")
    return int(value)


def _kind(value: Any) -> str:
    """What came, for a sentence."""
    if isinstance(value, np.ndarray):
        return f"{value.dtype} of shape {value.shape}"
    return (
        f"{type(value).__name__} {short(value)}"
        if isinstance(value, str | int | float | np.generic)
        else f"a {type(value).__name__}"
    )
