"""``vlatune report RUN…``: summary.csv and a self-contained report/index.html from a sweep's rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..run_folder import find_run


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Turn the sweep's rows into summary.csv and report/index.html, which opens without a server."""

    runs: tuple[Path, ...]
    """Run folders that were swept (or evaluation folders, where the sweep was given --out)."""


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; raises what `write_report` raises."""
    import tyro

    positional = tyro.conf.configure(tyro.conf.PositionalRequiredArgs)
    config = tyro.cli(positional(ReportConfig), args=None if argv is None else list(argv), prog="vlatune report")
    if not config.runs:
        raise ValueError("no run folder was given; type for instance: vlatune report runs/pocket")
    for path in config.runs:
        print(write_report(path))


def write_report(path: Path) -> str:
    """Write `summary.csv` and `report/index.html` into the evaluation folder of the run at `path`; returns the table to
    print. Raises `DataError` if there is no run or no sweep."""
    from . import tables

    evaluation = tables.read_evaluation(find_run(path).path)
    page = evaluation.folder / "report" / "index.html"
    page.parent.mkdir(exist_ok=True)
    _replace(evaluation.folder / "summary.csv", tables.summary(evaluation).to_csv(index=False))
    _replace(page, _html(evaluation))
    return f"{_text(evaluation)}\n\nsummary: {evaluation.folder / 'summary.csv'}\nreport:  {page}"


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text(text)
    temporary.replace(path)


def _html(evaluation: Any) -> str:
    import jinja2

    from . import figures, tables

    here = Path(__file__).parent
    judged, checkpoints = tables.by_actor(evaluation), tables.by_checkpoint(evaluation)
    chosen_step = evaluation.chosen["step"] if evaluation.chosen else None
    seconds = tables.time_split(evaluation.rows)
    template = jinja2.Environment(
        loader=jinja2.FileSystemLoader(here), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    ).get_template("template.html")
    return template.render(
        style=(here / "style.css").read_text(),
        evaluation=evaluation,
        chosen=evaluation.chosen,
        names=tables.NAMES,
        checkpoints=checkpoints.to_dict("records"),
        judged=judged.to_dict("records"),
        by_task=_by_task(tables.by_task(evaluation), list(judged["actor"])),
        grid=_grid(tables.by_checkpoint_and_task(evaluation)),
        verdicts=_verdicts(judged.to_dict("records")),
        selection_states=tables.ranges(evaluation.selection["init_state"]),
        report_states=tables.ranges(evaluation.judged["init_state"]),
        failure_modes=tables.failure_modes(evaluation),
        seconds=seconds,
        videos=_videos(evaluation, chosen_step),
        errors=evaluation.rows[evaluation.rows["outcome"] == "error"].to_dict("records"),
        settings=tables.settings_and_versions(evaluation),
        steps_to_success=evaluation.judged_as("policy")["steps_to_success"].dropna(),
        figure={
            "success": figures.success_curve(checkpoints, chosen_step, judged) if len(checkpoints) else "",
            "loss": figures.loss_curve(evaluation.metrics, chosen_step) if evaluation.metrics is not None else "",
            "actors": figures.actors_chart(judged, tables.NAMES) if len(judged) else "",
            "time": figures.time_chart(seconds) if seconds else "",
        },
        percent=lambda share: f"{100 * share:.0f} %",
        percent1=lambda share: f"{100 * share:.1f}",
        p_value=_p_value,
    )


def _p_value(p: float) -> str:
    return "< 0.0001" if p < 1e-4 else f"= {p:.2g}"


def _by_task(table: Any, actors: Sequence[str]) -> dict[str, Any]:
    """Rows of the per-task table: instruction, then one cell per actor (None where it has no episode)."""
    cells = {(row["suite"], row["task_id"], row["actor"]): row for row in table.to_dict("records")}
    tasks = table[["suite", "task_id", "task_language"]].drop_duplicates().itertuples(index=False)
    rows = [(task.task_language, [cells.get((task.suite, task.task_id, actor)) for actor in actors]) for task in tasks]
    return {"actors": actors, "rows": rows}


def _grid(table: Any) -> dict[str, Any]:
    """Success per checkpoint (rows) and task (columns) on the selection half."""
    cells = {(row["step"], row["suite"], row["task_id"]): row for row in table.to_dict("records")}
    tasks = list(table[["suite", "task_id", "task_language"]].drop_duplicates().itertuples(index=False))
    steps = sorted(set(table["step"]))
    return {
        "tasks": [task.task_language for task in tasks],
        "rows": [(step, [cells.get((step, task.suite, task.task_id)) for task in tasks]) for step in steps],
    }


def _verdicts(judged: Sequence[Mapping[Any, Any]]) -> list[tuple[bool, str]]:
    """(is it well, sentence) for each control: its interval must lie below the policy's."""
    meaning = {
        "untrained": ("training made the difference", "no effect of training is shown"),
        "blind": ("the policy needs its images", "it is not shown that the policy sees"),
        "wrong_instruction": ("the policy heeds the instruction", "it is not shown that the policy listens"),
    }
    policy = next((row for row in judged if row["actor"] == "policy"), None)
    if policy is None:
        return []
    found = []
    for row in judged:
        if row["actor"] in meaning:
            apart = row["high"] < policy["low"]
            found.append((apart, meaning[row["actor"]][0 if apart else 1]))
    return found


def _videos(evaluation: Any, chosen_step: int | None) -> dict[str, list[dict[str, Any]]]:
    """Recorded episodes, failures first: `chosen` (the chosen checkpoint's own), `controls` and `others`."""
    rows = evaluation.rows[evaluation.rows["video"] != ""]
    rows = rows.sort_values(["outcome", "actor", "step", "suite", "task_id", "init_state"]).to_dict("records")
    groups: dict[str, list[dict[str, Any]]] = {"chosen": [], "controls": [], "others": []}
    for row in rows:
        own = row["actor"] == "policy" and row["step"] == chosen_step
        groups["chosen" if own else "controls" if row["actor"] != "policy" else "others"].append(row)
    return groups


def _text(evaluation: Any) -> str:
    """The table for the terminal."""
    from . import tables

    def percent(row: Any) -> str:
        share = f"{100 * row['success_rate']:5.1f} %" if row["episodes"] else "    –  "
        return (
            f"{share}  [{100 * row['low']:5.1f}, {100 * row['high']:5.1f}]  {row['successes']:>3}/{row['episodes']:<3}"
        )

    lines = [f"{evaluation.name}: success, 95 % Wilson interval, episodes"]
    if evaluation.chosen is None:
        lines.append("  the sweep has not chosen a checkpoint yet: selection half only")
    for row in tables.by_checkpoint(evaluation).to_dict("records"):
        mark = " <- chosen" if evaluation.chosen and row["step"] == evaluation.chosen["step"] else ""
        lines.append(f"  {row['checkpoint']:<30} {percent(row)}  selection{mark}")
    for row in tables.by_actor(evaluation).to_dict("records"):
        against = "" if row["actor"] == "policy" else f"  p {_p_value(row['p_value'])} against the policy"
        lines.append(f"  {tables.NAMES[row['actor']]:<30} {percent(row)}  report{against}")
    per_task = tables.by_task(evaluation)
    for row in per_task[per_task["actor"] == "policy"].to_dict("records"):
        lines.append(f"    {row['task_language']:<60} {percent(row)}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
