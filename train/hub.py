"""Checkpoints pushed to the Hugging Face hub while the run goes on, so that a lost machine loses nothing.

The repository has the run's folder as it is: whoever fetches it with `hf download` can evaluate it, or go on training.
"""

import os
import re
import shutil
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from ..data.episodes import DataError
from ..policy.checkpoints.layout import COMPLETE, checkpoint_name, complete_checkpoints

OUTBOX = ".hub"
"""Folder of a run in which checkpoints wait: hard links, so that nothing is copied and pruning a checkpoint breaks no upload."""
ALONGSIDE = ("config.json", "metrics.csv", "wandb_run.json")
"""Files of a run that go with every checkpoint, where they exist."""


@dataclass(frozen=True, kw_only=True)
class HubConfig:
    """Where checkpoints are pushed to as they are saved."""

    repo_id: str | None = None
    """A model repository on the Hugging Face hub, such as you/my-policy, made if there is none; left out: nothing is pushed."""
    private: bool = True
    """Whether a repository that is made is for you alone."""
    trainer_state: bool = True
    """Push the newest checkpoint's optimizer state as well, several times as large as the weights, so that another machine can go on.
    Older ones are deleted there, though the repository's history keeps them (`HfApi.super_squash_history` ends that)."""


class HubApi(Protocol):
    """What is used of `huggingface_hub.HfApi`."""

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> Any: ...

    def list_repo_files(self, repo_id: str) -> list[str]: ...

    def upload_folder(
        self,
        *,
        repo_id: str,
        folder_path: Path,
        commit_message: str,
        allow_patterns: list[str] | None = None,
        ignore_patterns: list[str] | None = None,
        delete_patterns: list[str] | None = None,
    ) -> Any: ...


class HubPush:
    """The main rank's, alone. One thread uploads one checkpoint after another; training neither waits for it nor stops for it."""

    def __init__(self, config: HubConfig, run: Path, *, api: HubApi | None = None) -> None:
        """Makes the repository, and begins with what of the run's checkpoints it lacks. Raises DataError where nothing can be
        pushed there, or it holds a run that is further than this folder."""
        assert config.repo_id is not None
        self.config, self.repo_id, self.run = config, config.repo_id, run
        self._api = _real_api() if api is None else api
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="hub")
        self._lock = threading.Lock()
        self._waiting: list[int] = []
        self._uploading: int | None = None
        self._is_failing = False
        self._pushed = self._steps_on_the_hub()
        newest = max(complete_checkpoints(run), default=-1)
        if max(self._pushed, default=-1) > newest:
            raise DataError(
                f"{self.repo_id} on the hub has a checkpoint of step {max(self._pushed)}, which {run} has not: fetch it with "
                f"`hf download {self.repo_id} --local-dir {run}`, or choose another --hub.repo-id"
            )
        _refuse_without_hard_links(run)
        if newest >= 0:
            self._submit(self._stage_and_upload)

    def push(self, step: int) -> None:
        """Upload the checkpoint of `step` when its turn comes, after what an earlier failure left. Returns at once."""
        self._pushed.discard(step)  # there may be an older one of this name
        try:
            self._stage_lacking()
        except OSError as error:
            self._say_failure(error)
        else:
            self._submit(self._upload_waiting)

    def close(self) -> None:
        """At the end of the run: waits for the last upload, and says how to fetch what was pushed, or what was not."""
        last = self._worker.submit(self._stage_and_upload)
        if lacking := self._lacking():
            _say(f"waiting until step {lacking[-1]} has been pushed to {self.repo_id}")
        error = last.exception()
        self._worker.shutdown()
        shutil.rmtree(self.run / OUTBOX, ignore_errors=True)
        if error is None:
            _say(f"all is pushed to {self.repo_id}; to fetch it: hf download {self.repo_id} --local-dir {self.run}")
        else:
            steps = ", ".join(map(str, self._lacking()))
            _say(f"not pushed to {self.repo_id}: step {steps} ({_first_line(error)}); the same command does it again")

    def _steps_on_the_hub(self) -> set[int]:
        """Of the checkpoints that are whole there."""

        def ask() -> list[str]:
            self._api.create_repo(self.repo_id, private=self.config.private, exist_ok=True)
            return self._api.list_repo_files(self.repo_id)

        asked = self._worker.submit(ask)
        if (error := asked.exception()) is not None:
            self._worker.shutdown()
            raise DataError(
                f"nothing can be pushed to {self.repo_id!r} on the hub ({_first_line(error)}); give --hub.repo-id as you/name and log in "
                "with `hf auth login` (or set HF_TOKEN), or leave --hub.repo-id out"
            ) from error
        matches = (re.fullmatch(rf"checkpoints/step_(\d+)/{COMPLETE}", path) for path in asked.result())
        return {int(match[1]) for match in matches if match}

    def _lacking(self) -> list[int]:
        return [step for step in complete_checkpoints(self.run) if step not in self._pushed]

    def _staged(self, step: int) -> Path:
        """A folder as the repository will be, with one checkpoint."""
        return self.run / OUTBOX / checkpoint_name(step)

    def _stage_lacking(self) -> None:
        with self._lock:
            lacking = self._lacking()
            for step in set(lacking) - {self._uploading}:
                has_worthless_state = step != lacking[-1] or not self.config.trainer_state
                shutil.rmtree(self._staged(step), ignore_errors=True)
                shutil.copytree(
                    self.run / "checkpoints" / checkpoint_name(step),
                    self._staged(step) / "checkpoints" / checkpoint_name(step),
                    copy_function=os.link,
                    ignore=shutil.ignore_patterns("trainer*") if has_worthless_state else None,
                )
                for name in ALONGSIDE:
                    if (self.run / name).exists():
                        shutil.copy(self.run / name, self._staged(step))  # metrics.csv goes on growing
            self._waiting = lacking

    def _submit(self, job: Callable[[], None]) -> None:
        def hear(upload: Future[None]) -> None:
            if (error := upload.exception()) is None:
                self._is_failing = False
            else:
                self._say_failure(error)

        self._worker.submit(job).add_done_callback(hear)

    def _say_failure(self, error: BaseException) -> None:
        if not self._is_failing:
            _say(
                f"step {self._lacking()[0]} could not be pushed to {self.repo_id} ({_first_line(error)}); training goes on, and the next "
                "checkpoint tries again"
            )
        self._is_failing = True

    def _stage_and_upload(self) -> None:
        self._stage_lacking()
        self._upload_waiting()

    def _upload_waiting(self) -> None:
        while self._waiting:
            with self._lock:
                step = self._uploading = self._waiting[0]
            try:
                self._upload(step)
                with self._lock:
                    self._pushed.add(step)
                    self._waiting.remove(step)
                    shutil.rmtree(self._staged(step))
            finally:
                self._uploading = None

    def _upload(self, step: int) -> None:
        last = f"checkpoints/{checkpoint_name(step)}/{COMPLETE}"
        # Large uploads are committed in parts: what makes the checkpoint whole, and its forerunners' state worthless, comes last.
        self._api.upload_folder(
            repo_id=self.repo_id, folder_path=self._staged(step), commit_message=f"step {step}", ignore_patterns=[last]
        )
        has_state = any(self._staged(step).glob("checkpoints/*/trainer"))
        others = [checkpoint_name(other) for other in complete_checkpoints(self.run) if other != step]
        self._api.upload_folder(
            repo_id=self.repo_id,
            folder_path=self._staged(step),
            commit_message=f"step {step} is complete",
            allow_patterns=[last],
            delete_patterns=[f"checkpoints/{name}/trainer/*" for name in others] if has_state and others else None,
        )


def _refuse_without_hard_links(run: Path) -> None:
    """Also clears what a kill left in the outbox."""
    outbox = run / OUTBOX
    shutil.rmtree(outbox, ignore_errors=True)
    outbox.mkdir(parents=True)
    (outbox / "file").touch()
    try:
        (outbox / "link").hardlink_to(outbox / "file")
    except OSError as error:
        raise DataError(
            f"{run} lies on a file system without hard links, by which checkpoints wait for their upload; choose another --out, or leave "
            "--hub.repo-id out"
        ) from error
    finally:
        shutil.rmtree(outbox)


def _real_api() -> HubApi:
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()  # they would write over the run's own
    api: Any = HfApi()
    return api


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def _say(sentence: str) -> None:
    """A line of its own beside the progress bar."""
    tqdm.write(sentence, file=sys.stderr)
