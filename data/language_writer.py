"""Encoding the texts of a language, by one process or several, so that a kill at any moment costs at most what was at hand.

Work goes on in `<language>.unfinished/`: `plan.json` says what it is made from, `texts/` has one file of features for each text that
is done, whoever did it, and `rank_0.lock`, … are held by the processes at work. When all texts are there, rank 0 writes the language
into `language/` and renames that to its place. Only then is there a language.

Shape letters: L tokens, E encoder width.
"""

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import Tensor

from .cache import unfinished_path
from .cache_writer import differences
from .episodes import DataError
from .files import json_bytes, write_whole
from .language import EMPTY_TEXT, Language

POLL_S = 0.1
LOCK_TRIES = 20
"""Rank 0 holds a rank's lock for a moment when it looks whether that rank is alive."""


class LanguageWriter:
    """One rank's part of one language; a context manager that holds the rank's lock."""

    def __init__(self, path: Path, plan: Mapping[str, Any], *, rank: int = 0, world_size: int = 1) -> None:
        """Begin, or continue what killed processes left. `plan` is a language's identity and texts, as `language_plan` gives them.

        Raises `DataError` when another process has this rank, or when what was left was made from something else."""
        self.texts: Sequence[str] = plan["texts"]
        self.own_texts = self.texts[rank::world_size]
        self._path, self._rank, self._world_size = path, rank, world_size
        self._work = unfinished_path(path)
        (self._work / "texts").mkdir(parents=True, exist_ok=True)
        self._lock = self._lock_file(rank).open("a")
        if not _locked(self._lock, LOCK_TRIES):
            self._lock.close()
            raise DataError(f"another process is embedding into {path}; wait for it, or give another --out")
        os.utime(self._lock.fileno())  # only now, so that a new lock that nobody holds is one that was left
        file = self._work / "plan.json"
        if not file.exists():
            write_whole(file, json_bytes(plan))
        changes = plan_differences(json.loads(file.read_bytes()), plan)
        if changes:
            self._lock.close()
            raise DataError(
                f"{self._work} was begun from something else ({changes}); delete it (rm -r {self._work}) or give another --out"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.close()

    def is_done(self, text: str) -> bool:
        return self._file(text).is_file()

    @property
    def num_done(self) -> int:
        return sum(map(self.is_done, self.texts))

    def add(self, text: str, features_LE: Tensor) -> None:
        from safetensors.torch import save

        write_whole(self._file(text), save({"features": features_LE.contiguous()}))

    def wait_for_others(self, launched_at: float, patience_s: float, on_progress: Callable[[int], object]) -> None:
        """Until every text is done, telling `on_progress` how many are. Raises `DataError` when a rank that came after `launched_at`
        (seconds since 1970; older ranks were killed before) is no more, or when nothing was done for `patience_s`."""
        num_done, changed_at = self.num_done, time.monotonic()
        on_progress(num_done)
        while num_done < len(self.texts):
            for rank in range(1, self._world_size):
                if self._has_ended(rank, launched_at) and (undone := self._undone(rank)):
                    raise DataError(
                        f"rank {rank} of {self._world_size} ended and left {len(undone)} texts undone, the first is {undone[0]!r}; see its "
                        "message above, and start the same command again: it continues"
                    )
            if time.monotonic() - changed_at > patience_s:
                raise DataError(
                    f"{len(self.texts) - num_done} texts are undone and for {patience_s:.0f} s no rank has done any; start the same command "
                    "again (it continues), with as many processes as the launcher says or a longer --patience-s"
                )
            time.sleep(POLL_S)
            done_now = self.num_done
            if done_now != num_done:
                num_done, changed_at = done_now, time.monotonic()
                on_progress(num_done)

    def features(self) -> list[Tensor]:
        """(L, E) of every text, when all are done. Raises `DataError` naming a file that is damaged."""
        return [self._read(self._file(text)) for text in self.texts]

    def finish(self, language: Language) -> None:
        """Write the language and rename it. Safe to repeat after a kill."""
        folder = self._work / "language"
        shutil.rmtree(folder, ignore_errors=True)  # of one that was killed here
        language.save(folder)
        folder.rename(self._path)
        shutil.rmtree(self._work)

    def _read(self, file: Path) -> Tensor:
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            features_LE: Tensor = load(file.read_bytes())["features"]
            return features_LE
        except (SafetensorError, KeyError) as error:
            raise DataError(f"{file} is damaged ({error!r}); delete it and start the same command again") from error

    def _undone(self, rank: int) -> list[str]:
        return [text for text in self.texts[rank :: self._world_size] if not self.is_done(text)]

    def _has_ended(self, rank: int, launched_at: float) -> bool:
        file = self._lock_file(rank)
        if not file.exists() or file.stat().st_mtime < launched_at:
            return False
        with file.open() as lock:
            return _locked(lock, 1)

    def _lock_file(self, rank: int) -> Path:
        return self._work / f"rank_{rank}.lock"

    def _file(self, text: str) -> Path:
        return self._work / "texts" / f"{hashlib.sha256(text.encode()).hexdigest()}.safetensors"


def language_plan(language: Language, texts: Sequence[str]) -> dict[str, Any]:
    """What a language with these texts is made from, as JSON."""
    return {"identity": language.identity, "texts": list(texts)}


def plan_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """For a person; empty if there are none."""
    return differences(
        dict.fromkeys(map(_said, old["texts"]), ""),
        _flat(old["identity"]),
        dict.fromkeys(map(_said, new["texts"]), ""),
        _flat(new["identity"]),
    )


def _said(text: str) -> str:
    return "the empty text" if text == EMPTY_TEXT else text


def _flat(identity: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"encoder": {"dtype": …}} -> {"encoder.dtype": …}; a list of ids by its length and digest."""
    flat: dict[str, Any] = {}
    for name, value in identity.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        elif isinstance(value, list):
            flat[prefix + name] = (
                f"{len(value)} ids, sha256 {hashlib.sha256(json.dumps(value).encode()).hexdigest()[:8]}"
            )
        else:
            flat[prefix + name] = value
    return flat


def _locked(file: Any, num_tries: int) -> bool:
    for number in range(num_tries):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if number + 1 < num_tries:
                time.sleep(POLL_S)
    return False
