"""What studies that begin with a pretrained policy share: that policy, the demonstrations of held-out tasks, their rows.

A flow policy is trained on the four tasks of the suite `pocket`; every run of a study goes on from it on the two tasks of
`pocket_holdout`: a cube of a colour that it has never seen, to the same two targets.

Statistics: `--pretrained` brings weights alone. States and actions are normalised with the statistics of the cache that is trained
on, here the held-out tasks', so the same normalised number means another motion than in pretraining (by how much, findings say).
What of a change is due to that, and not to training, shows in freeze's arm `statistics`. All other arms share it.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...data.cache import Cache
from ...data.episodes import DataError
from ...data.files import file_sha256
from ...data.normalise import FieldStatistics, Normaliser, NormaliserMode, Statistics
from ...eval.sweep import sweep
from ...policy.checkpoints.layout import complete_checkpoints
from ...train.recipes import load_recipe
from .pocket import Evaluate, Judging, PocketRow, Train, compare_runs, made_cache
from .pocket_report import Arm
from .pocket_run import PocketRun, step_of, train_with_launcher
from .tables import claim

SUITE = "pocket_holdout"
NUM_EXECUTED_STEPS = 8
KEY = ("objective", "output", "trained", "seed")


@dataclass(frozen=True, kw_only=True)
class TransferSettings:
    """What all runs of such a study share."""

    num_steps: int = 300
    """Optimizer steps of 64 samples on the held-out tasks; 300 take about a minute on two CPU cores."""
    learning_rate: float = 1e-3
    """Peak on the held-out tasks, the same for all runs; it falls to zero on a cosine. What suits one way of training best need
    not suit another: findings hold for this rate."""
    episodes: int = 15
    """Init states per held-out task on which every run is judged, at most 25."""
    holdout_demos: int = 25
    """Demonstrations per held-out task."""
    pretraining_steps: int = 1200
    """Optimizer steps of the pretraining, if there is no --pretrained; 1,200 take about five minutes."""
    demos: int = 75
    """Demonstrations per task of the pretraining, if there is neither --pretrained nor --cache."""
    noise: float = 0.3
    """On what the demonstrating expert executes, as in `vlatune collect`."""
    num_workers: int | None = None
    """Simulator processes; one per CPU core if not given."""

    @property
    def depended_on(self) -> dict[str, Any]:
        """What rows depend on besides their key, the pretrained weights and the held-out cache."""
        return {name: getattr(self, name) for name in ("num_steps", "learning_rate", "episodes")}


@dataclass(frozen=True, kw_only=True)
class Start:
    """What every run begins with."""

    pretrained: Path
    """A checkpoint, RUN/checkpoints/step_X."""
    cache: Path
    """Of the held-out tasks, in the pretrained policy's own tokens."""


@dataclass(frozen=True, kw_only=True)
class TransferConfig:
    """The settings that these studies have in common."""

    out: Path
    """Folder for results.csv, summary.csv, pairs.csv, figure.png, findings.md, and the runs."""
    pretrained: Path | None = None
    """The policy to begin with, for instance runs/quickstart/pocket/checkpoints/step_002400: a flow policy of the recipe pocket, all
    of it trained. Trained in OUT/pretraining if not given."""
    cache: Path | None = None
    """The cache that it is trained on, for instance runs/quickstart/cache; made in OUT/pretraining if not given."""
    shared: Path | None = None
    """Folder of another such study (freeze, align), whose pretraining/ and holdout/ are used instead of own ones in OUT."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Training seeds: order of the samples, noise, first weights of adapters. There is one pretrained policy for all of them."""
    settings: TransferSettings = field(default_factory=TransferSettings)

    def __post_init__(self) -> None:
        if not self.seeds:
            raise ValueError("--seeds needs at least one value")
        if self.pretrained is not None and self.cache is not None:
            raise ValueError(
                "--cache is what a policy is pretrained on, and --pretrained is one that has been: leave out one of them"
            )

    def run_from(self, start: Start, name: str, **changes: Any) -> PocketRun:
        """A run in OUT/runs/<name>."""
        return PocketRun(
            out=self.out / "runs" / name,
            cache=start.cache,
            pretrained=start.pretrained,
            num_steps=self.settings.num_steps,
            learning_rate=self.settings.learning_rate,
            **changes,
        )


@dataclass(frozen=True, kw_only=True)
class TransferRow(PocketRow):
    """One run that began with the pretrained policy, judged on the held-out tasks."""

    output: str
    """What the expert's output means to a regression or RS-IMLE: `action` or `aligned`; `action` for the others, which have
    no such switch."""
    trained: str
    """`full`, `lora` or `expert`; or nothing: `none` (the pretrained policy as it is), `statistics` (its weights with the held-out
    tasks' statistics)."""


def run_transfer(
    config: TransferConfig,
    runs_from: Callable[[Start], Sequence[PocketRun]],
    *,
    arm_of: Callable[[Mapping[str, Any]], Arm],
    question: str,
    remarks: Sequence[str] = (),
    train: Train = train_with_launcher,
    evaluate: Evaluate = sweep,
) -> Path:
    """Pretrain, record and prepare what is missing, then `pocket.compare_runs`; returns `config.out`."""
    start = ready(config, train)
    weights = file_sha256(start.pretrained / "model.safetensors")[:16]
    digest = Cache.open(start.cache).digest
    claim(config.out, {**config.settings.depended_on, "pretrained_weights": weights, "cache_digest": digest})
    judging = Judging(
        episodes=config.settings.episodes,
        executed=(NUM_EXECUTED_STEPS,),
        num_workers=config.settings.num_workers,
        suite=SUITE,
        row_type=TransferRow,
        key=KEY,
    )
    return compare_runs(
        config.out,
        runs_from(start),
        judging,
        arm_of=arm_of,
        question=question,
        remarks=["All runs began with one pretrained policy.", *remarks, statistics_apart(start)],
        train=train,
        evaluate=evaluate,
    )


def ready(config: TransferConfig, train: Train) -> Start:
    """What is given or there, and the rest made now. Raises `DataError` where it is another study's."""
    folder, settings = config.shared or config.out, config.settings
    pretrained = config.pretrained or pretrain(folder / "pretraining", config.cache, settings, train)
    check_pretrained(pretrained)
    language = pretrained / "language"
    tokenizer = json.loads((language / "language.json").read_text())["identity"]["tokenizer"]
    holdout = folder / "holdout"
    claim(holdout, {"demos": settings.holdout_demos, "noise": settings.noise, "tokenizer": tokenizer})
    cache = made_cache(
        holdout, demos=settings.holdout_demos, noise=settings.noise, suite=SUITE, tokenizer=str(language)
    )
    return Start(pretrained=pretrained, cache=cache)


def pretrain(folder: Path, cache: Path | None, settings: TransferSettings, train: Train) -> Path:
    """The checkpoint of a flow policy, trained from random weights on the suite pocket: FOLDER/run's last."""
    own = {"demos": settings.demos, "noise": settings.noise}
    content = own if cache is None else {"cache_digest": Cache.open(cache).digest}
    claim(folder, {"num_steps": settings.pretraining_steps, **content})
    run = PocketRun(out=folder / "run", cache=cache or folder / "cache", num_steps=settings.pretraining_steps)
    if not run.is_trained:
        if cache is None:
            made_cache(folder, demos=settings.demos, noise=settings.noise)
        train(run)
    return run.judged


def check_pretrained(checkpoint: Path) -> None:
    """Raises `DataError` if runs could not begin with it."""
    is_named = checkpoint.parent.name == "checkpoints" and re.fullmatch(r"step_\d+", checkpoint.name)
    if (
        not is_named
        or step_of(checkpoint) not in complete_checkpoints(checkpoint.parents[1])
        or not step_of(checkpoint)
    ):
        raise DataError(
            f"--pretrained {checkpoint} is no complete checkpoint of a trained policy; give a folder like RUN/checkpoints/step_002400"
        )
    objective = json.loads((checkpoint / "config.json").read_text())["policy"]["objective"]["type"]
    if objective != "flow" or (checkpoint / "base.json").exists():
        part = " and holds only a part of its weights" if (checkpoint / "base.json").exists() else ""
        raise DataError(
            f"--pretrained {checkpoint} was trained with the objective {objective}{part}; give a checkpoint of a run with "
            "objective flow and --trained full"
        )


def statistics_apart(start: Start) -> str:
    """A sentence on how the held-out tasks' normalisation differs from that of the pretrained policy."""
    before, now = Statistics.load(start.pretrained / "normalisation.json"), Cache.open(start.cache).statistics
    policy = load_recipe("pocket").policy
    actions = _apart(before.actions, now.actions, policy.action_normalisation)
    return (
        "Against the pretraining's statistics, those of the held-out demonstrations scale actions by "
        f"{actions}, and states by {_apart(before.state, now.state, policy.state_normalisation)}."
    )


def _apart(before: FieldStatistics, now: FieldStatistics, mode: NormaliserMode) -> str:
    """`0.95 to 1.10 and move their centre by up to 0.03 of a scale`, over dimensions."""
    was, is_now = Normaliser(before, mode), Normaliser(now, mode)
    ratio_D = is_now.scale_D / was.scale_D
    moved_D = (is_now.centre_D - was.centre_D).abs() / was.scale_D
    return f"{ratio_D.min():.2f} to {ratio_D.max():.2f} and move their centre by up to {moved_D.max():.2f} of a scale"
