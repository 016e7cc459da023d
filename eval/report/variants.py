"""A run's variant: the one candidate that it is judged by, and how that candidate came to be the one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from ...data.episodes import DataError
from ..comparison import EPISODE, TASK
from .candidates import CANDIDATE, by_candidate, of_candidate, of_candidate_and_controls, of_settings
from .sources import read_runs
from .tables import same_protocol

Basis = Literal["held_out", "selected_on", "single"]
BASES: dict[Basis, str] = {
    "held_out": "judged on init states that had no part in the choice",
    "selected_on": "chosen on these very episodes: its rate is biased upwards",
    "single": "the only candidate: nothing was chosen",
}


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One run, and the candidate that stands for it."""

    name: str
    rows: pd.DataFrame
    """Every row of the run under the protocol and seed of the choice, controls and other candidates included."""
    judged: pd.DataFrame
    """The candidate's own episodes, by which it is judged."""
    basis: Basis
    num_candidates: int | None
    """Among how many it was chosen; None where the rows do not tell."""
    num_other_rows: int
    """Rows under another protocol or seed, left out."""

    @property
    def half(self) -> str:
        return str(self.judged["split"].iloc[0])

    @property
    def candidate(self) -> Mapping[str, Any]:
        """The columns of `CANDIDATE`."""
        return {name: self.judged[name].iloc[0] for name in CANDIDATE}

    @property
    def selection(self) -> pd.DataFrame:
        """All candidates on the selection half (on the report half, where there is no other)."""
        policy = self.rows[self.rows["actor"] == "policy"]
        selection = policy[policy["split"] == "selection"]
        return selection if len(selection) else policy

    @property
    def over_training(self) -> pd.DataFrame:
        """Every checkpoint's selection, sampled as the variant is."""
        return self.selection[of_settings(self.selection, self.candidate)]

    @property
    def controls(self) -> pd.DataFrame:
        """The controls of this candidate, and actors without a policy, on the report half."""
        others = self.rows[(self.rows["split"] == "report") & (self.rows["actor"] != "policy")]
        return others[of_candidate_and_controls(others, self.candidate)]


def read_variants(paths: Sequence[Path]) -> list[Variant]:
    """One variant for each run in the CSVs. Raises what `read_runs` raises, and `DataError` where a candidate has two rows of an
    episode, as under two instructions."""
    return [variant_of(name, rows, chosen) for name, (rows, chosen) in read_runs(paths).items()]


def variant_of(name: str, rows: pd.DataFrame, chosen: Mapping[str, Any] | None) -> Variant:
    """The run's variant: what `chosen.json` names, where there is one; else the candidate with a report half (of several, the best
    on the selection half); else the best on the selection half, told as such. Best is as a sweep chooses: the highest success rate
    over tasks; of equals the later step, then fewer denoising steps, then more executed actions; among those that ran the most
    episodes (a race stops the others early)."""
    kept = same_protocol(rows, chosen)
    policy = kept[kept["actor"] == "policy"]
    selection, report = policy[policy["split"] == "selection"], policy[policy["split"] == "report"]
    candidate, chosen_on, num_candidates = _choice(name, selection, report, chosen)
    own = report[of_candidate(report, candidate)]
    judged = own if len(own) else selection[of_candidate(selection, candidate)]
    _refuse(name, judged, chosen)
    overlap = judged.merge(chosen_on[EPISODE], on=EPISODE)
    basis: Basis = "single" if num_candidates == 1 else "selected_on" if len(overlap) else "held_out"
    return Variant(
        name=name,
        rows=kept,
        judged=judged,
        basis=basis,
        num_candidates=num_candidates,
        num_other_rows=len(rows) - len(kept),
    )


def _choice(
    name: str, selection: pd.DataFrame, report: pd.DataFrame, chosen: Mapping[str, Any] | None
) -> tuple[Mapping[Any, Any], pd.DataFrame, int | None]:
    """The candidate, the episodes on which it was chosen, and among how many (None: the rows do not tell)."""
    if chosen:
        return {"weights_hash": chosen["weights_hash"], **chosen["settings"]}, selection, chosen["num_candidates"]
    reported = by_candidate(report).to_dict("records")
    if len(reported) == 1:
        return reported[0], selection, len(by_candidate(selection)) or None
    if reported:
        both = pd.concat([selection[of_candidate(selection, candidate)] for candidate in reported])
        if len(by_candidate(both)) < len(reported):  # not all of them can be compared where nobody is judged
            return best_candidate(name, report), report, len(reported)
        return best_candidate(name, both), selection, len(by_candidate(selection))
    return best_candidate(name, selection), selection, len(by_candidate(selection))


def best_candidate(name: str, rows: pd.DataFrame) -> Mapping[Any, Any]:
    """The best of the candidates in `rows`, as `variant_of` says. Raises `DataError` where no episode ended."""
    of_tasks = by_candidate(rows, TASK)
    rated = of_tasks.groupby(CANDIDATE, dropna=False).agg(
        rate=("success_rate", lambda rates: rates.mean(skipna=False)),
        episodes=("episodes", "sum"),
        errors=("errors", "sum"),
    )
    rated = rated.reset_index().assign(started=lambda table: table["episodes"] + table["errors"])
    complete = rated[(rated["started"] == rated["started"].max()) & rated["rate"].notna()]
    if complete.empty:
        raise DataError(
            f"run {name}: no candidate ended an episode of every task; `vlatune sweep RUN` runs the errors again"
        )
    order = ["rate", "step", "num_sampling_steps", "num_executed_steps"]
    return complete.sort_values(order, ascending=[True, True, False, True]).iloc[-1].to_dict()


def _refuse(name: str, judged: pd.DataFrame, chosen: Mapping[str, Any] | None) -> None:
    """Raises `DataError` for episodes by which nothing can be judged."""
    if judged.empty and chosen:
        raise DataError(
            f"run {name}: chosen.json names {chosen['checkpoint']}, and no row is of its weights under its settings; give the CSV that "
            "the choice was made from, or move chosen.json away"
        )
    if (judged["outcome"] == "error").all():
        raise DataError(
            f"run {name}: every episode of {judged['checkpoint'].iloc[0]} ended in an error; `vlatune sweep RUN` runs them again"
        )
    twice = judged[judged.duplicated(EPISODE)]
    if len(twice):
        row = twice.iloc[0]
        raise DataError(
            f"run {name}: {row['checkpoint']} has two rows of {row['suite']} task {row['task_id']}, init state {row['init_state']}, seed "
            f"{row['seed']}, under different instructions; give CSVs that hold one of them"
        )
