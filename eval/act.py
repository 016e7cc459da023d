"""``vlatune act CHECKPOINT --demos DEMOS``: what a policy would have done where it was demonstrated what to do.

At every n-th frame the policy gets the recorded observation, as a robot would hand it over, and its chunk is compared with the actions
that followed. With two checkpoints both see the same frames and the same noise. Small errors do not make a policy succeed (it never
meets the states to which its own actions lead); large ones, or timid actions, tell early that something is wrong."""

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from ..data.episodes import EpisodeSource
from ..data.files import write_whole
from ..data.images import Orientation
from ..data.prepare import PrepareConfig, open_source
from ..data.sources.libero_hdf5 import ObservationTiming
from ..policy.execution import Compile, Precision
from .act_frames import ChosenEpisode, choose, noise_at
from .act_policies import check_fit, deviation_of, load_policies
from .act_rows import (
    ERRORS_NAME,
    PREDICTIONS_NAME,
    ErrorRow,
    csv_of,
    errors_of,
    errors_table,
    prediction_rows,
    predictions_of,
)
from .act_tables import table, times
from .run_folder import find_run

if TYPE_CHECKING:
    import pandas as pd

    from ..policy.acting import ActingPolicy

ERRORS_FIGURE = "errors.png"


@dataclass(frozen=True, kw_only=True)
class ActConfig:
    """Compare what a policy, or two, would do on recorded observations with what was demonstrated."""

    checkpoint: Annotated[Path, tyro.conf.Positional]
    """A run (its last checkpoint is taken), or a checkpoint's folder."""
    other: Annotated[Path | None, tyro.conf.Positional] = None
    """A second one, on the same frames with the same noise."""
    demos: Path
    """Demonstrations, as `vlatune prepare` takes them: an HDF5 file in LIBERO's format, a folder with some, a LeRobot dataset's folder or name."""
    episode: tuple[int, ...] = (0,)
    """Which demonstrations, counted from 0: of all, or of `--task`."""
    task: str = ""
    """Only demonstrations of this task: its name or its instruction."""
    every: int = 8
    """Frames from one decision to the next."""
    num_sampling_steps: int | None = None
    """Integration (or denoising) steps per chunk; as trained if not given."""
    num_candidates: int = 1
    """Chunks drawn at every frame from one encoded observation. The first is what is compared; with two or more, how far they lie apart
    is shown, too: how sure the policy is."""
    weights: Literal["raw", "ema"] = "raw"
    """The weights as trained, or their average over training."""
    seed: int = 0
    """Of the noise, which follows from it, the episode and the frame."""
    device: str = "auto"
    """Where the policy runs: `auto`, `cpu`, `cuda`, `cuda:1`, …"""
    compile: Compile = "off"
    """Act through compiled programs: `on`, or `auto`, which does so on a GPU and says why where it cannot."""
    precision: Precision = "float32"
    """Of backbone and expert."""
    camera: Mapping[str, str] = field(default_factory=dict)
    """LeRobot: the robot's cameras and their keys in the dataset, as for `vlatune prepare`."""
    stored_orientation: Orientation | Literal["auto"] = "auto"
    """LeRobot: how its pictures had been turned when they were stored, as for `vlatune prepare`."""
    observation_timing: ObservationTiming = "auto"
    """HDF5: whether observations were recorded before or after their actions, as for `vlatune prepare`."""
    out: Path | None = None
    """Folder for the CSVs and figures instead of RUN/act; what lies there is replaced."""

    def __post_init__(self) -> None:
        for name, lowest in {"every": 1, "num_sampling_steps": 1, "num_candidates": 1, "seed": 0}.items():
            number = getattr(self, name)
            if number is not None and number < lowest:
                raise ValueError(f"--{name.replace('_', '-')} is {number}; at least {lowest} is needed")
        if not self.episode or min(self.episode) < 0 or len(set(self.episode)) < len(self.episode):
            raise ValueError(f"--episode {' '.join(map(str, self.episode))}: give different numbers of 0 or more")
        if self.other is not None and self.other.resolve() == self.checkpoint.resolve():
            raise ValueError(f"{self.other} is given twice; give another checkpoint, or leave the second out")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What `act` found."""

    folder: Path
    predictions: "pd.DataFrame"
    errors: tuple[ErrorRow, ...]
    text: str
    """The table, for a terminal."""


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; raises what `act` raises."""
    found = act(tyro.cli(ActConfig, args=None if argv is None else list(argv), prog="vlatune act"))
    print(
        f"\n{found.text}\n\n{PREDICTIONS_NAME}, {ERRORS_NAME}, {ERRORS_FIGURE} and actions_….png lie in {found.folder}"
    )


def act(config: ActConfig, source: EpisodeSource | None = None) -> Comparison:
    """Predict, compare and write. Raises `DataError` where a checkpoint, demonstration or task is not there, and `ValueError` where
    checkpoints or demonstrations do not fit each other; all of it before the first decision. `source` stands in for what is at
    `config.demos`: demonstrations in a format of your own."""
    from tqdm import tqdm

    policies = load_policies(
        config.checkpoint,
        config.other,
        averaged=config.weights == "ema",
        device=config.device,
        num_sampling_steps=config.num_sampling_steps,
        compile=config.compile,
        precision=config.precision,
    )
    first = next(iter(policies.values()))
    folder = config.out or find_run(config.checkpoint).path / "act"
    if source is None:
        source = open_source(
            PrepareConfig(
                demos=config.demos,
                out=folder,  # where a cache would be made: opening demonstrations makes none
                robot=first.robot,
                camera=config.camera,
                stored_orientation=config.stored_orientation,
                observation_timing=config.observation_timing,
            )
        )
    for label, policy in policies.items():
        check_fit(label, policy, source.robot)
    chosen = choose(source, config.episode, task=config.task, every=config.every)
    total = len(policies) * sum(len(one.frames) for one in chosen)
    with tqdm(total=total, desc="act", unit="decision", dynamic_ncols=True, file=sys.stdout) as bar:
        predictions = predict(
            policies,
            chosen,
            source.robot.action_names,
            seed=config.seed,
            num_candidates=config.num_candidates,
            on_decision=bar.update,
        )
    deviation_A, origin = deviation_of(policies, chosen)
    of_policies = {
        label: {
            "weights_hash": policy.weights_hash,
            "objective": policy.policy.config.objective.type,
            "num_sampling_steps": policy.num_sampling_steps,
            "sampling": json.dumps(dict(policy.sampling), sort_keys=True),
            "num_candidates": config.num_candidates,
            "seed": config.seed,
        }
        for label, policy in policies.items()
    }
    errors = errors_of(predictions, source.robot.action_names, deviation_A, of_policies)
    _write(folder, predictions, errors, chosen, source.robot.action_names)
    text = f"{table(errors)}\n{origin}\n{times(predictions)}"
    return Comparison(folder=folder, predictions=predictions, errors=tuple(errors), text=text)


def predict(
    policies: "Mapping[str, ActingPolicy]",
    chosen: Sequence[ChosenEpisode],
    names: Sequence[str],
    *,
    seed: int,
    num_candidates: int = 1,
    on_decision: Callable[[], object] = lambda: None,
) -> "pd.DataFrame":
    """The rows of `predictions.csv`. Policies take turns on each frame, so that a machine that grows slower does so for both."""
    cameras = dict.fromkeys(camera for policy in policies.values() for camera in policy.cameras)
    offsets = {offset for policy in policies.values() for offset in policy.observation_offsets}
    chunks = []
    for one in chosen:
        pictures = one.pictures_of(cameras, offsets)
        for frame in one.frames:
            for label, policy in policies.items():
                raw = one.observed(frame, policy.observation_offsets, pictures, policy.cameras)
                noise = noise_at(seed, one.episode.key, frame, (num_candidates, *policy.noise_shape))
                begun = time.perf_counter()
                candidates_KHA = policy.candidates([raw], num_candidates, noise[None])[0]
                of_chunk = {
                    "policy": label,
                    "task": one.episode.task,
                    "episode": one.index,
                    "key": one.episode.key,
                    "frame": frame,
                    "decision_ms": round(1e3 * (time.perf_counter() - begun), 3),
                }
                chunks.append(prediction_rows(of_chunk, candidates_KHA, one.demonstrated(frame, policy.horizon)))
                on_decision()
    return predictions_of(chunks, names)


def _write(
    folder: Path,
    predictions: "pd.DataFrame",
    errors: Sequence[ErrorRow],
    chosen: Sequence[ChosenEpisode],
    names: Sequence[str],
) -> None:
    """CSVs and figures; figures of episodes that an earlier call compared in this folder go away."""
    from .act_figures import actions_figure, errors_figure

    policies = list(dict.fromkeys(row.policy for row in errors))
    files = {ERRORS_FIGURE: errors_figure(errors, names, policies)}
    for one in chosen:
        files[f"actions_{one.index:04d}.png"] = actions_figure(
            predictions[predictions["episode"] == one.index],
            one.episode.actions_NA,
            names,
            policies,
            title=f"episode {one.index}: {one.episode.instruction}",
        )
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("actions_[0-9][0-9][0-9][0-9].png"):
        old.unlink()
    write_whole(folder / PREDICTIONS_NAME, csv_of(predictions))
    write_whole(folder / ERRORS_NAME, csv_of(errors_table(errors)))
    for name, content in files.items():
        write_whole(folder / name, content)


if __name__ == "__main__":
    main()
