"""``vlatune study bimodal``: demonstrations go left or right; which objectives learn both, and which average between them?

One small expert is trained with every objective on the same demonstrations (`two_ways.py`, `toy_training.py`), once where half
of them go right and once where more do. Paths sampled from each are scored (`path_scores.py`).
"""

import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from safetensors.torch import load_file, save
from tqdm import tqdm

from ...data.episodes import DataError
from ...data.files import write_whole
from ...policy.experts.mlp import MLPExpert
from ...policy.objectives import ObjectiveConfig
from .bimodal_report import write_report
from .methods import METHODS, check_methods
from .path_scores import PathScores, score
from .tables import ResultsTable, claim
from .toy_training import (
    ToySettings,
    evaluation_starts,
    fresh_demos,
    make_expert,
    milliseconds_per_path,
    sample_paths,
    train_expert,
    training_demos,
)

DEMONSTRATIONS = "demonstrations"
"""Stands among the objectives: fresh demonstrations, scored as if they were sampled. Nothing can do better."""
PATHS = "paths.npy"
"""(N, 1 + H, 2) float32: the paths sampled from a run, each behind its start."""
REFERENCE_SEED = 1_000_000
"""Of the demonstrations that all paths are compared with; not one that a run has."""


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """What is sampled from a trained expert."""

    num_starts: int = 50
    """Starts, the same for every objective."""
    paths_per_start: int = 20
    """Paths sampled from each."""

    def __post_init__(self) -> None:
        if self.num_starts < 1 or self.paths_per_start < 2:
            raise ValueError(
                f"num_starts is {self.num_starts} and paths_per_start {self.paths_per_start}; give at least 1 and 2"
            )


@dataclass(frozen=True, kw_only=True)
class BimodalConfig:
    """Every objective on demonstrations of two ways: which learn both? Stopped at any moment, the same command continues."""

    out: Path = Path("studies/bimodal")
    """Folder for results.csv, summary.csv, figure.png, findings.md, and the trained experts under runs/."""
    objectives: tuple[str, ...] = tuple(METHODS)
    """Which objectives; results of others that are in the folder stay."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Training seeds: first weights, order of the demonstrations, noise."""
    shares_right: tuple[float, ...] = (0.5, 0.7)
    """Shares of the demonstrations that go right; each is a data set of its own."""
    training: ToySettings = field(default_factory=ToySettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)

    def __post_init__(self) -> None:
        check_methods(self.objectives)
        if not self.seeds or not self.shares_right:
            raise ValueError("--seeds and --shares-right need at least one value each")
        if not all(0 <= share <= 1 for share in self.shares_right):
            raise ValueError(f"--shares-right is {self.shares_right}; shares lie between 0 and 1")

    @property
    def settings(self) -> dict[str, Any]:
        """What a row depends on besides its key."""
        return {**asdict(self.training), **asdict(self.evaluation)}


@dataclass(frozen=True, kw_only=True)
class BimodalRow(PathScores):
    """One trained expert (or fresh demonstrations), and the paths sampled from it."""

    objective: str
    """Short name, as in methods.py; or `demonstrations`."""
    share_right: float
    """Share of the training demonstrations that go right."""
    seed: int
    """Training seed."""
    num_sampling_steps: int | None
    """Steps of the objective's sampler."""
    num_parameters: int | None
    """Of the expert; more only for a second time input."""
    ms_per_train_step: float | None
    """Milliseconds of wall time of an optimizer step, median; read beside the others of the same machine only."""
    ms_per_path: float | None
    """Milliseconds of wall time to sample one path, median of batches of one."""


KEY = ("objective", "share_right", "seed")


def main(argv: Sequence[str] | None = None) -> None:
    config = tyro.cli(BimodalConfig, args=argv, prog="vlatune study bimodal", config=(tyro.conf.OmitArgPrefixes,))
    print(f"figure and tables: {run(config)}")


def run(config: BimodalConfig) -> Path:
    """Compute the rows that are missing, then write summary, figure and findings; returns `config.out`."""
    claim(config.out, config.settings)
    table = ResultsTable(config.out, BimodalRow, KEY)
    planned = [
        (name, share, seed)
        for share in config.shares_right
        for seed in config.seeds
        for name in (DEMONSTRATIONS, *config.objectives)
    ]
    missing = [key for key in planned if key not in table]
    with tqdm(total=len(planned), initial=len(planned) - len(missing), unit="run", dynamic_ncols=True) as bar:
        for name, share, seed in missing:
            bar.set_description(f"{name}, {share:.0%} right, seed {seed}")
            table.add(measure(config, name, share, seed))
            bar.update()
    write_report(config.out, table.records(), lambda *key: np.load(run_folder(config.out, *key) / PATHS))
    return config.out


def measure(config: BimodalConfig, name: str, share_right: float, seed: int) -> BimodalRow:
    """One row: train, keep the weights and the sampled paths, score them."""
    starts_N2 = evaluation_starts(config.evaluation.num_starts, config.evaluation.paths_per_start)
    folder = run_folder(config.out, name, share_right, seed)
    folder.mkdir(parents=True, exist_ok=True)
    about: dict[str, Any] = dict.fromkeys(("num_sampling_steps", "num_parameters", "ms_per_train_step", "ms_per_path"))
    if name == DEMONSTRATIONS:
        paths_NH2 = fresh_demos(starts_N2, share_right, seed).paths_NH2
    else:
        objective = METHODS[name].make(config.training.num_draws)
        demos = training_demos(config.training, share_right)
        expert, ms_per_train_step = train_expert(config.training, objective, demos, seed=seed)
        write_whole(folder / "expert.safetensors", save(expert.state_dict()))
        paths_NH2 = sample_paths(expert, objective, starts_N2, seed)
        about = {
            "num_sampling_steps": objective.num_sampling_steps,
            "num_parameters": sum(parameter.numel() for parameter in expert.parameters()),
            "ms_per_train_step": ms_per_train_step,
            "ms_per_path": milliseconds_per_path(expert, objective),
        }
    content = io.BytesIO()
    np.save(content, np.concatenate([starts_N2[:, None], paths_NH2], axis=1, dtype=np.float32))
    write_whole(folder / PATHS, content.getvalue())
    scores = score_paths(starts_N2, paths_NH2, share_right, config.evaluation)
    return BimodalRow(objective=name, share_right=share_right, seed=seed, **about, **asdict(scores))


def score_paths(
    starts_N2: np.ndarray, paths_NH2: np.ndarray, share_right: float, evaluation: EvaluationSettings
) -> PathScores:
    """Against the same fresh demonstrations for every objective and seed."""
    reference = fresh_demos(starts_N2, share_right, REFERENCE_SEED)
    return score(starts_N2, paths_NH2, reference.paths_NH2, evaluation.num_starts)


def run_folder(out: Path, name: str, share_right: float, seed: int) -> Path:
    """Where a run's weights and paths are."""
    return out / "runs" / f"{name}_right{100 * share_right:g}_seed{seed}"


def load_expert(
    out: Path, training: ToySettings, name: str, share_right: float, seed: int
) -> tuple[MLPExpert, ObjectiveConfig]:
    """A trained expert of this study and its objective; raises `DataError` if it is not there."""
    path = run_folder(out, name, share_right, seed) / "expert.safetensors"
    if not path.exists():
        raise DataError(
            f"there is no {path}; type: vlatune study bimodal --out {out} --seeds {seed} --shares-right {share_right:g} "
            f"--objectives {name}"
        )
    objective = METHODS[name].make(training.num_draws)
    expert = make_expert(training, objective, seed)
    expert.load_state_dict(load_file(path))
    return expert.eval(), objective
