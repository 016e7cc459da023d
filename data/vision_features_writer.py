"""Writing a store of vision features, block of frames by block, so that a kill at any moment costs at most the block at hand.

Work goes on in `<store>.unfinished/`: `plan.json` says what it is made from, `progress.json` how many frames are in all files of
`store/`, which is renamed to its place when the manifest is written. Only then is there a store.

Shape letters: K frames of a block, N image tokens of a picture, D width.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import torch
from torch import Tensor

from .cache import unfinished_path
from .episodes import DataError
from .files import json_bytes, write_whole
from .vision_features import DTYPES, FORMAT, FORMAT_VERSION, FeaturesPlan, file_name


class FeatureWriter:
    """One writer of one store; a context manager that holds its lock."""

    def __init__(self, path: Path, plan: FeaturesPlan) -> None:
        """Begin, or continue what a killed writer left. Raises `DataError` when another process is at it, or when what was left
        was made from something else."""
        self._path, self._plan = path, plan
        self._work = unfinished_path(path)
        self._store = self._work / "store"
        self._store.mkdir(parents=True, exist_ok=True)
        self._lock = (self._work / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise DataError(
                f"another process is making the features {path}; wait for it, or give another --out"
            ) from None
        self._check_plan()
        (self._store / "manifest.json").unlink(missing_ok=True)  # of a writer killed between it and the renaming
        self.num_done = self._continue()
        """Frames."""
        self._files: dict[str, IO[bytes]] = {
            camera: (self._store / file_name(camera)).open("ab") for camera in plan.cameras
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.close()
        self._lock.close()

    def append(self, features: Mapping[str, Tensor]) -> None:
        """The next K frames: camera -> (K, N, D)."""
        num_frames = len(features[self._plan.cameras[0]])
        for camera, file in self._files.items():
            rows_KND = features[camera].detach().cpu().contiguous()
            if rows_KND.shape != (num_frames, *self._plan.shape) or rows_KND.dtype != DTYPES[self._plan.dtype]:
                raise ValueError(
                    f"features of {camera} are {tuple(rows_KND.shape)} {rows_KND.dtype}; they must be {num_frames} x {self._plan.shape} "
                    f"{self._plan.dtype}"
                )
            file.write(rows_KND.view(torch.uint8).numpy().data)
            file.flush()
            os.fsync(file.fileno())
        self.num_done += num_frames
        write_whole(self._work / "progress.json", json_bytes({"num_frames": self.num_done}))

    def finish(self) -> None:
        """Write the manifest and rename the folder. Safe to repeat after a kill."""
        if self.num_done != self._plan.num_frames:
            raise ValueError(f"{self.num_done} of {self._plan.num_frames} frames are written; append the others first")
        files = {file_name(camera): self._plan.num_frames * self._plan.row_bytes for camera in self._plan.cameras}
        manifest = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "plan": self._plan.to_json(),
            "files": files,
        }
        write_whole(self._store / "manifest.json", json_bytes(manifest))
        self._store.rename(self._path)
        shutil.rmtree(self._work)

    def _check_plan(self) -> None:
        """Write the plan, or compare it with the one that a killed writer left."""
        file = self._work / "plan.json"
        if not file.exists():
            write_whole(file, json_bytes(self._plan.to_json()))
        changes = FeaturesPlan.from_json(json.loads(file.read_bytes())).differences(self._plan)
        if changes:
            self._lock.close()
            raise DataError(
                f"{self._work} was begun from something else ({changes}); delete it (rm -r {self._work}) or give another --out"
            )

    def _continue(self) -> int:
        """How many frames are whole on disk; what stands behind them is cut off."""
        file = self._work / "progress.json"
        num_done: int = json.loads(file.read_bytes())["num_frames"] if file.exists() else 0
        files = [self._store / file_name(camera) for camera in self._plan.cameras]
        on_disk = [file.stat().st_size // self._plan.row_bytes if file.exists() else 0 for file in files]
        num_done = min(num_done, *on_disk)
        for file in files:
            with file.open("ab") as data:
                data.truncate(num_done * self._plan.row_bytes)
        return num_done
