"""What `vlatune act` says on a terminal."""

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .act_rows import ErrorRow, score

if TYPE_CHECKING:
    import pandas as pd


def table(errors: Sequence[ErrorRow]) -> str:
    """A line a dimension, and one for all, with a column of each policy."""
    import pandas as pd

    sentence = "error: mean absolute difference from the demonstrated actions, raw units; magnitude: predicted over demonstrated size"
    policies = list(dict.fromkeys(row.policy for row in errors))
    names = list(dict.fromkeys(row.dimension for row in errors))
    letters = {policy: f" {chr(ord('A') + k)}" if len(policies) > 1 else "" for k, policy in enumerate(policies)}
    columns: dict[str, list[str]] = {"": [*names, "all"]}
    of_policies = {
        policy: [
            score([row for row in errors if row.policy == policy and name in (row.dimension, "all")])
            for name in columns[""]
        ]
        for policy in policies
    }
    for policy, scores in of_policies.items():
        columns[f"error{letters[policy]}"] = [*(f"{one.error:.4f}" for one in scores[:-1]), ""]
    for policy, scores in of_policies.items():
        columns[f"in deviations{letters[policy]}"] = [f"{one.error_in_deviations:.3f}" for one in scores]
    for policy, scores in of_policies.items():
        columns[f"magnitude{letters[policy]}"] = [f"{one.magnitude:.3f}" for one in scores]
    if errors[0].spread is not None:
        for policy, scores in of_policies.items():
            columns[f"spread{letters[policy]}"] = [f"{one.spread_in_deviations:.3f}" for one in scores]
        sentence += "; spread: standard deviation of the chunks drawn at one frame, in deviations"
    head = "\n".join(f"{letters[policy].strip() or 'policy'}: {policy}" for policy in policies)
    lines: str = pd.DataFrame(columns).to_string(index=False)
    return f"{head}\n{lines}\n{sentence}."


def times(predictions: "pd.DataFrame") -> str:
    """How long decisions took, roughly."""
    decisions = predictions[predictions["horizon_step"] == 0]
    medians = [
        f"{statistics.median(rows['decision_ms']):.1f} ({policy}, {len(rows)} decisions)"
        for policy, rows in decisions.groupby("policy", sort=False)
    ]
    return f"milliseconds per decision, median: {'; '.join(medians)}; `vlatune profile` measures latency with the device idle"
