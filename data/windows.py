"""The samples of one cache: a frame's observation and the chunk of actions that begins there.

Shape letters as in `batch.py`; E episodes of the split, M samples (its frames), R distinct instructions.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .batch import Batch, Observation, Prompts, Repeats
from .cache import Cache
from .normalise import Normaliser, Statistics
from .prompt import prompt_text
from .row_file import RowFile
from .vision_features import FeatureStore

if TYPE_CHECKING:
    from .loader import LoaderConfig

STATELESS_STYLES = ("instruction", "newline")
"""Prompt styles whose text is the instruction's alone."""


class CacheWindows:
    """Reads samples by their place in the split, 0 to M - 1, in the order of the cache's frames.

    Offsets before an episode's start read its first frame, and their pictures are masked; actions beyond its end repeat the last one and are not valid."""

    def __init__(
        self,
        cache: Cache,
        config: "LoaderConfig",
        statistics: Statistics | None,
        features: FeatureStore | None = None,
        *,
        first_index: int = 0,
    ) -> None:
        """Frames count from `first_index` in `sample_index_B`; `statistics` normalise the state that prompts spell out (None: the
        cache's); `features` are read in place of pictures. Raises `ValueError` for what the cache cannot give, and `DataError` for
        features of another cache."""
        self.cache, self.config, self._first_index = cache, config, first_index
        missing = [camera for camera in config.cameras if camera not in cache.images]
        if missing:
            raise ValueError(f"the cache {cache.path} has no camera {missing[0]!r}; it has {', '.join(cache.images)}")
        if config.embeddings and cache.language.embedding_width is None:
            raise ValueError(
                f"the cache {cache.path} has no text embeddings; prepare it again with --encoder seeded-t5 or a T5"
            )
        of_split = cache.episodes[cache.episodes["split"] == config.split]
        if of_split.empty:
            there = ", ".join(sorted(cache.episodes["split"].unique()))
            raise ValueError(f"the cache {cache.path} has no {config.split!r} episodes; it has {there}")
        length_E = of_split["length"].to_numpy()
        self._start_E = of_split["start"].to_numpy()
        self._last_E = self._start_E + length_E - 1
        self._first_sample_E = np.cumsum(length_E) - length_E
        self.num_samples = int(length_E.sum())
        self._instructions: list[str] = of_split["instruction"].tolist()
        self._offsets_T = np.array(config.observation_offsets)
        self._steps_H = np.arange(config.horizon)
        if features is not None:
            features.check_cache(cache)
        self._is_of_features = features is not None
        self._pictures = {
            camera: RowFile(cache.path / f"images_{camera}.u8", cache.images[camera])
            if features is None
            else RowFile(features.file(camera), features.rows[camera])
            for camera in config.cameras
        }
        state = (statistics or cache.statistics).state
        self._state_normaliser = Normaliser(state, config.state_normalisation, config.near_constant)
        is_known_ahead = config.prompt in STATELESS_STYLES and not config.embeddings
        self._table = _PromptTable(cache, config, self._instructions) if is_known_ahead else None

    def announce(self, sample_B: np.ndarray) -> None:
        """Have the disk fetch what `read` will want next. Free once everything is in the system's memory."""
        cold = [file for file in self._pictures.values() if file.is_cold]
        if cold:
            _, start_B1, _, frame_B1 = self._places(sample_B)
            seen_BT = np.maximum(frame_B1 + self._offsets_T, start_B1)
            for file in cold:
                file.announce(seen_BT.reshape(-1))

    def read(self, sample_B: np.ndarray, pictures: Mapping[str, Tensor]) -> Batch:
        """The samples' batch. `pictures`, a camera's being (B, T, px, px, 3) uint8, or (B, T, N, D) where features stand in for them, is
        filled and handed on in it."""
        episode_B, start_B1, last_B1, frame_B1 = self._places(sample_B)
        seen_BT, acted_BH = frame_B1 + self._offsets_T, frame_B1 + self._steps_H
        there_BT, valid_BH = seen_BT >= start_B1, acted_BH <= last_B1
        seen_BT, acted_BH = np.maximum(seen_BT, start_B1), np.minimum(acted_BH, last_B1)
        for camera, file in self._pictures.items():
            file.take(seen_BT.reshape(-1), out=pictures[camera].view(torch.uint8).numpy())
        state_BTS = torch.from_numpy(self.cache.state_NS[seen_BT])
        return Batch(
            observation=Observation(
                images={} if self._is_of_features else pictures,
                features=pictures if self._is_of_features else None,
                image_mask=dict.fromkeys(self.config.cameras, torch.from_numpy(there_BT)),
                state_BTS=state_BTS,
                prompts=self._prompts(episode_B, state_BTS[:, -1]),
            ),
            actions_BHA=torch.from_numpy(self.cache.actions_NA[acted_BH]),
            valid_BH=torch.from_numpy(valid_BH),
            sample_index_B=torch.from_numpy(frame_B1[:, 0] + self._first_index),
        )

    def _places(self, sample_B: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Each sample's episode (B,), and its episode's first frame, its last one and its own, (B, 1) in the cache."""
        episode_B = np.searchsorted(self._first_sample_E, sample_B, side="right") - 1
        start_B = self._start_E[episode_B]
        frame_B = start_B + sample_B - self._first_sample_E[episode_B]
        return episode_B, start_B[:, None], self._last_E[episode_B, None], frame_B[:, None]

    def _prompts(self, episode_B: np.ndarray, state_BS: Tensor) -> Prompts:
        if self._table is not None:
            return self._table.prompts(episode_B)
        config = self.config
        texts = [
            prompt_text(config.prompt, self._instructions[episode], state_S)
            for episode, state_S in zip(episode_B, self._state_normaliser(state_BS).numpy(), strict=True)
        ]
        return self.cache.language.prompts(texts, embeddings=config.embeddings)


class _PromptTable:
    """The tokens of every instruction, for prompts that hold nothing else."""

    def __init__(self, cache: Cache, config: "LoaderConfig", instructions: list[str]) -> None:
        rows = {instruction: row for row, instruction in enumerate(dict.fromkeys(instructions))}
        self._row_E = np.array([rows[instruction] for instruction in instructions])
        no_state = np.empty(0, np.float32)
        each = [cache.language.prompts([prompt_text(config.prompt, text, no_state)]) for text in rows]
        self._width_R = np.array([prompts.ids_BL.shape[1] for prompts in each])  # padded as it would be alone
        all_rows = concatenate_prompts(each)
        self._ids_RL, self._mask_RL = all_rows.ids_BL, all_rows.mask_BL

    def prompts(self, episode_B: np.ndarray) -> Prompts:
        row_B = self._row_E[episode_B]
        width = int(self._width_R[row_B].max())
        index_B = torch.from_numpy(row_B)
        _, first_R, which_B = np.unique(row_B, return_index=True, return_inverse=True)
        return Prompts(
            ids_BL=self._ids_RL[:, :width][index_B],
            mask_BL=self._mask_RL[:, :width][index_B],
            repeats=Repeats(row_R=torch.from_numpy(first_R), which_B=torch.from_numpy(which_B)),
        )


def concatenate_prompts(parts: list[Prompts]) -> Prompts:
    """One batch of all `parts`, padded on the right to the longest. Either all or none have embeddings; repeats are kept if all know theirs."""
    width = max(part.ids_BL.shape[1] for part in parts)

    def padded(tensors: list[Tensor]) -> Tensor:
        """Along axis 1."""
        joined = tensors[0].new_zeros(sum(len(t) for t in tensors), width, *tensors[0].shape[2:])
        first = 0
        for tensor in tensors:
            joined[first : first + len(tensor), : tensor.shape[1]] = tensor
            first += len(tensor)
        return joined

    embeddings = [part.embedding_BLE for part in parts if part.embedding_BLE is not None]
    return Prompts(
        ids_BL=padded([part.ids_BL for part in parts]),
        mask_BL=padded([part.mask_BL for part in parts]),
        embedding_BLE=padded(embeddings) if embeddings else None,
        repeats=_joined_repeats(parts),
    )


def _joined_repeats(parts: list[Prompts]) -> Repeats | None:
    """A prompt of two parts stands there twice, which costs time and nothing else."""
    row, which, rows, prompts = [], [], 0, 0
    for part in parts:
        if part.repeats is None:
            return None
        row.append(part.repeats.row_R + rows)
        which.append(part.repeats.which_B + prompts)
        rows, prompts = rows + len(part.ids_BL), prompts + len(part.repeats.row_R)
    return Repeats(row_R=torch.cat(row), which_B=torch.cat(which))
