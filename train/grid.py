"""``vlatune train RECIPE --grid NAME=VALUE,VALUE``: a run for every combination of settings, one after another, and a table of them.

Each is an ordinary run in a process of its own, so what holds for runs holds for a grid: stopped at any moment, it goes on."""

import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
import torch
import tyro
from accelerate.utils.other import get_free_port
from tqdm import tqdm

from ..data.episodes import DataError
from ..data.files import full_disk_said, write_whole
from .checkpoint import refuse_other_settings
from .engine import world_size
from .grid_plan import Member, plan_grid
from .grid_process import Stop, run_member
from .runs import aligned, last_values
from .training_data import TrainingData

LAST_VALUES = ("step", "loss", "validation_loss", "action_error", "action_magnitude", "samples_per_s")
"""Columns of metrics.csv that the table shows the last number of."""


@dataclass(frozen=True, kw_only=True)
class GridOptions:
    """Train every combination of the values, one run after another, and write a table of them: OUT/grid.csv. Each run is a process of its
    own, in OUT/NAME=VALUE,NAME=VALUE, and its output goes to the file of that name with .log. Finished runs are not started again,
    unfinished ones go on and failed ones are tried again, so stopped at any moment the same command continues; one that fails does not
    stop the others. All other settings are those of a single run and hold for all: `vlatune train RECIPE --help` lists them."""

    grid: tyro.conf.UseAppendAction[tuple[str, ...]]
    """A setting and its values: `--grid lora.rank=8,16,32 --grid seed=0,1`. A value of several words stands in quotes:
    `--grid 'optimizer.betas=0.9 0.95,0.9 0.99'`."""
    out: Path | None = None
    """The grid's folder; the recipe's if not given."""
    ranks: int | None = None
    """Processes of each run: one is plain Python, several are started by the deepspeed launcher. As many as there are CUDA devices if not
    given, and one where there is none."""
    dry_run: bool = False
    """Print every run's command, and start nothing."""


def main(recipe: str, words: Sequence[str]) -> None:
    """Raises ValueError or DataError, in one sentence and before anything is started, for what no run of the grid could be; SystemExit
    with code 1 after the last run if one failed, and with 128 and the signal's number if the grid was told to stop."""
    options, settings = tyro.cli(GridOptions, args=words, prog=f"vlatune train {recipe}", return_unknown_args=True)
    if world_size() > 1:
        raise ValueError(
            f"--grid starts every run's {world_size()} ranks by itself; start it without the launcher: vlatune train {recipe} --grid … "
            f"--ranks {world_size()}"
        )
    ranks = checked_ranks(options.ranks)
    members = plan_grid(recipe, options.grid, settings, out=options.out, ranks=ranks)
    if options.dry_run:
        print("\n".join(shlex.join(command(member, ranks)) for member in members))
        return
    refuse_what_cannot_run(members, ranks)
    with full_disk_said(members[0].config.out):
        train_members(members, ranks)


def checked_ranks(asked: int | None) -> int:
    """How many processes each run has."""
    devices = torch.cuda.device_count()
    if asked is not None and (asked < 1 or 0 < devices < asked):
        has = f"1 to {devices}, one per CUDA device" if devices else "1 or more"
        raise ValueError(f"--ranks {asked}: a run here can have {has}")
    return asked or devices or 1


def refuse_what_cannot_run(members: Sequence[Member], ranks: int) -> None:
    """Raises DataError or ValueError for data that is not there or does not fit, and for folders that hold other runs than these."""
    out = members[0].config.out.parent
    if (out / "config.json").exists():
        raise DataError(f"{out} holds a run; type --out with another folder, in which the runs of the grid will lie")
    for member in members:
        data = TrainingData.open(member.config, rank=0, world_size=ranks)
        stored = member.config.out / "config.json"
        if stored.exists():
            # All but the precision, which the run itself resolves: to ask a GPU for its kind here would keep memory on it.
            now = json.loads(json.dumps(asdict(member.config), default=str))
            now |= {"cache_digest": data.digest, "language_digest": data.language_digest, "world_size": ranks}
            refuse_other_settings(member.config.out, {**json.loads(stored.read_text()), **now})


def command(member: Member, ranks: int) -> list[str]:
    """What starts the member."""
    run = ["vlatune.train.run", *member.words]
    if ranks == 1:
        return [sys.executable, "-m", *run]
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--log_level", "warning"]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not torch.cuda.is_available():
        # One thread a rank: left to itself each would take every core.
        launcher = ["env", "DS_ACCELERATOR=cpu", "OMP_NUM_THREADS=1", *launcher, "--num_accelerators", str(ranks)]
    elif visible:  # beside --num_gpus the launcher ignores it, and takes the machine's first devices
        launcher += ["--include", f"localhost:{','.join(visible.split(',')[:ranks])}"]
    else:
        launcher += ["--num_gpus", str(ranks)]
    return [*launcher, "--master_port", str(get_free_port()), "--module", *run]


def train_members(members: Sequence[Member], ranks: int) -> None:
    """Train what is not finished, with the table on disk up to date all along, and print it."""
    out = members[0].config.out.parent
    out.mkdir(parents=True, exist_ok=True)
    errors: dict[str, str] = {}
    unfinished = [member for member in members if not member.is_finished]
    done = len(members) - len(unfinished)
    with Stop() as stop, tqdm(total=len(members), initial=done, desc="grid", unit="run", dynamic_ncols=True) as bar:
        for member in unfinished:
            write_whole(out / "grid.csv", table(members, errors).to_csv(index=False).encode())
            bar.set_postfix_str(f"{member.name}, see {member.log}")
            error = run_member(command(member, ranks), member.log, stop, num_ranks=ranks)
            if stop.signal is not None:
                break
            if not member.is_finished:
                errors[member.name] = error
                bar.write(f"{member.name} failed: {error}")
            bar.update()
    result = table(members, errors)
    write_whole(out / "grid.csv", result.to_csv(index=False).encode())
    print(f"{aligned(result.dropna(axis='columns', how='all'))}\n{best(result)}table: {out / 'grid.csv'}")
    if stop.signal is not None:
        print("stopped on request; the same command goes on", file=sys.stderr)
        raise SystemExit(128 + stop.signal)
    if errors:
        print(
            f"vlatune train: {len(errors)} of {len(members)} runs failed; mend what {out / 'grid.csv'} and their logs (.log beside their "
            "folders) say, and type the same command: it tries them again",
            file=sys.stderr,
        )
        raise SystemExit(1)


def table(members: Sequence[Member], errors: Mapping[str, str]) -> pd.DataFrame:
    """A row a member, in the grid's order: its values, whether it is done, what it reached, and why it failed."""
    rows = []
    for member in members:
        last = last_values(member.config.out)
        status = "done" if member.is_finished else "failed" if member.name in errors else "waiting"
        row: dict[str, object] = {**member.values, "status": status}
        row |= {name: last.get(name, float("nan")) for name in LAST_VALUES}
        row |= {"seconds": last.get("elapsed_s", float("nan")), "folder": str(member.config.out)}
        rows.append({**row, "error": errors.get(member.name)})
    return pd.DataFrame(rows).astype({"step": "Int64"})


def best(result: pd.DataFrame) -> str:
    """A line that names the finished run of the lowest validation loss; nothing where none has one."""
    done = result[(result["status"] == "done") & result["validation_loss"].notna()]
    if done.empty:
        return ""
    first = done.sort_values("validation_loss", kind="stable").iloc[0]
    return f"lowest validation loss: {first['validation_loss']:.4g}, {first['folder']}\n"
