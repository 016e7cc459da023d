"""``vlatune study steps``: how many sampling steps does an objective need, and what do they cost?

The experts are those that the bimodal study trained; only sampling changes. Nothing is trained here.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from ...data.episodes import DataError
from ...policy.experts.expert import BoundExpert
from ...policy.objectives import ObjectiveConfig
from ...policy.objectives.diffusion import Diffusion
from .bimodal import EvaluationSettings, load_expert, score_paths
from .path_scores import PathScores
from .steps_report import write_report
from .tables import ResultsTable, claim
from .toy_training import ToySettings, bind, evaluation_starts, milliseconds_per_path, sample_paths

TRAIN_LEVELS = Diffusion().num_train_steps


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """A trained objective, and how it is asked for paths."""

    method: str
    """Short name, as in methods.py."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """Of the objective, besides the number of steps."""
    takes: Callable[[int], bool] = lambda num_steps: True
    """Whether it can be sampled in n steps."""

    def in_steps(self, objective: ObjectiveConfig, num_steps: int) -> ObjectiveConfig:
        """The objective with n sampling steps; one that always makes a single call has no such setting."""
        changes: dict[str, Any] = dict(self.settings)
        if "num_sampling_steps" in {each.name for each in dataclasses.fields(objective)}:
            changes["num_sampling_steps"] = num_steps
        return replace(objective, **changes)


def _is_power_of_two(number: int) -> bool:
    return number & (number - 1) == 0


SAMPLERS: dict[str, Sampler] = {
    "flow_euler": Sampler(method="flow", settings={"solver": "euler"}),
    "flow_midpoint": Sampler(method="flow", settings={"solver": "midpoint"}),
    "flow_heun": Sampler(method="flow", settings={"solver": "heun"}),
    "diffusion_ddim": Sampler(
        method="diffusion", settings={"sampler": "ddim"}, takes=lambda num_steps: TRAIN_LEVELS % num_steps == 0
    ),
    "diffusion_dpm_solver": Sampler(method="diffusion", settings={"sampler": "dpm_solver"}),
    "high_noise_euler": Sampler(method="high_noise"),
    "shortcut": Sampler(method="shortcut", takes=_is_power_of_two),
    "rs_imle": Sampler(method="rs_imle", takes=lambda num_steps: num_steps == 1),
}
"""Name -> sampler, in the order of the figure. DDIM steps over equally many training levels, a shortcut halves its step, RS-IMLE
answers in one call."""


@dataclass(frozen=True, kw_only=True)
class StepsConfig:
    """Quality of sampled paths, and time, against the number of sampling steps; on the experts of `vlatune study bimodal`. Stopped
    at any moment, the same command continues."""

    out: Path = Path("studies/steps")
    """Folder for results.csv, summary.csv, figure.png and findings.md."""
    bimodal: Path = Path("studies/bimodal")
    """Folder of a bimodal study that has trained the objectives."""
    samplers: tuple[str, ...] = tuple(SAMPLERS)
    """Which samplers."""
    num_sampling_steps: tuple[int, ...] = (1, 2, 4, 5, 8, 10, 20, 32, 40)
    """Numbers of steps; a sampler leaves out those that it cannot be sampled in."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Training seeds of the bimodal study."""
    share_right: float = 0.5
    """Share of the demonstrations that go right, one of the bimodal study's."""

    def __post_init__(self) -> None:
        unknown = sorted(set(self.samplers) - set(SAMPLERS))
        if unknown or not self.samplers:
            raise ValueError(f"--samplers {' '.join(unknown)}: there are {', '.join(SAMPLERS)}")
        if not self.seeds or not self.num_sampling_steps or min(self.num_sampling_steps) < 1:
            raise ValueError("--seeds and --num-sampling-steps need at least one value each, steps of 1 or more")

    def planned(self) -> list[tuple[str, int, int]]:
        """(sampler, steps, seed) of every row."""
        return [
            (name, num_steps, seed)
            for seed in self.seeds
            for name in self.samplers
            for num_steps in self.num_sampling_steps
            if SAMPLERS[name].takes(num_steps)
        ]


@dataclass(frozen=True, kw_only=True)
class StepsRow(PathScores):
    """Paths sampled from one trained expert in one way."""

    sampler: str
    """Short name, as in steps.py."""
    num_sampling_steps: int
    """Steps of the sampler."""
    seed: int
    """Training seed of the expert."""
    expert_calls: int
    """Calls of the expert for one batch of paths, counted."""
    ms_per_path: float
    """Milliseconds of wall time to sample one path, median of batches of one; the expert is small, so that what a sampler does
    around its calls weighs more than it would in a large policy."""


KEY = ("sampler", "num_sampling_steps", "seed")


def main(argv: Sequence[str] | None = None) -> None:
    config = tyro.cli(StepsConfig, args=argv, prog="vlatune study steps")
    print(f"figure and tables: {run(config)}")


def run(config: StepsConfig) -> Path:
    """Compute the rows that are missing, then write summary, figure and findings; returns `config.out`. Raises `DataError` if the
    bimodal study, or an expert in it, is not there."""
    training, evaluation, settings = bimodal_settings(config.bimodal)
    claim(config.out, {**settings, "share_right": config.share_right})
    table = ResultsTable(config.out, StepsRow, KEY)
    planned = config.planned()
    missing = [key for key in planned if key not in table]
    with tqdm(total=len(planned), initial=len(planned) - len(missing), unit="row", dynamic_ncols=True) as bar:
        for name, num_steps, seed in missing:
            bar.set_description(f"{name}, {num_steps} steps, seed {seed}")
            expert, objective = load_expert(config.bimodal, training, SAMPLERS[name].method, config.share_right, seed)
            objective = SAMPLERS[name].in_steps(objective, num_steps)
            starts_N2 = evaluation_starts(evaluation.num_starts, evaluation.paths_per_start)
            paths_NH2 = sample_paths(expert, objective, starts_N2, seed)
            counting = CountingExpert(bind(expert, starts_N2[:1]))
            with torch.no_grad():
                objective.sample(counting, torch.zeros(1, *paths_NH2.shape[1:]))
            scores = score_paths(starts_N2, paths_NH2, config.share_right, evaluation)
            row = StepsRow(
                sampler=name,
                num_sampling_steps=num_steps,
                seed=seed,
                expert_calls=counting.num_calls,
                ms_per_path=milliseconds_per_path(expert, objective),
                **asdict(scores),
            )
            table.add(row)
            bar.update()
    write_report(config.out, table.records())
    return config.out


def bimodal_settings(folder: Path) -> tuple[ToySettings, EvaluationSettings, dict[str, float]]:
    """What a bimodal study was run with. Raises `DataError` if there is none."""
    path = folder / "settings.json"
    if not path.exists():
        raise DataError(f"{folder} has no bimodal study; type: vlatune study bimodal --out {folder}")
    settings = json.loads(path.read_text())

    def of(kind: type) -> dict[str, float]:
        return {each.name: settings[each.name] for each in dataclasses.fields(kind)}

    return ToySettings(**of(ToySettings)), EvaluationSettings(**of(EvaluationSettings)), settings  # type: ignore[arg-type]


class CountingExpert:
    """Counts the calls of a bound expert."""

    def __init__(self, expert: BoundExpert) -> None:
        self.expert = expert
        self.num_calls = 0

    def __call__(self, x_BHA: Tensor, noise_level_B: Tensor, second_level_B: Tensor | None = None) -> Tensor:
        self.num_calls += 1
        return self.expert(x_BHA, noise_level_B, second_level_B)

    def fan_out(self, num_candidates: int) -> "CountingExpert":
        self.expert = self.expert.fan_out(num_candidates)
        return self
