"""Which runs a grid is made of: every combination of settings, each read as the command line would read it, before any is started."""

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from difflib import get_close_matches
from pathlib import Path

from ..policy.checkpoints.layout import complete_checkpoints
from .config import TrainConfig
from .recipes import load_recipe
from .run import read_config

LONGEST_NAME = 200
"""Letters of a member's folder; file systems take 255 bytes, and its log's name is longer."""


@dataclass(frozen=True, kw_only=True)
class Member:
    """One run of a grid."""

    values: Mapping[str, str]
    """Setting -> value, as typed."""
    words: tuple[str, ...]
    """Its whole command line: recipe, settings and folder."""
    config: TrainConfig

    @property
    def name(self) -> str:
        return self.config.out.name

    @property
    def log(self) -> Path:
        return self.config.out.with_name(f"{self.name}.log")

    @property
    def is_finished(self) -> bool:
        """Whether its last step's checkpoint is complete."""
        last_step = min(self.config.total_steps, self.config.stop_at_step or self.config.total_steps)
        return max(complete_checkpoints(self.config.out), default=-1) >= last_step


def plan_grid(
    recipe: str, grid: Sequence[str], settings: Sequence[str], *, out: Path | None, ranks: int
) -> list[Member]:
    """All combinations, the last setting's values changing fastest. Raises ValueError for a setting or a value that a run cannot have."""
    out = out or load_recipe(recipe).out
    known = setting_names(read_config(recipe, settings))
    chosen: dict[str, list[str]] = {}
    for text in grid:
        name, choices = parse(text, recipe, known)
        given = {word[2:].partition("=")[0].replace("_", "-") for word in settings if word.startswith("--")}
        if name in chosen or name in given:
            raise ValueError(f"--grid {text}: {name} is given a second time; give it once, with all of its values")
        chosen[name] = choices
    members: list[Member] = []
    for combination in itertools.product(*chosen.values()):
        values = dict(zip(chosen, combination, strict=True))
        folder = out / re.sub(r"[^\w.,=+-]", "_", ",".join(f"{name}={value}" for name, value in values.items()))
        of_grid = [word for name, value in values.items() for word in words_of(name, value, known[name])]
        words = [*settings, *of_grid, "--out", str(folder)]
        config = read_config(recipe, words)
        config.micro_batch_size(ranks)
        members.append(Member(values=values, words=(recipe, *words), config=config))
    refuse_clashes(members)
    return members


def setting_names(config: object, prefix: str = "") -> dict[str, object]:
    """Every setting as the command line has it -> its value in `config`: `then.0.lora.rank` -> 16. Parts that `config` leaves out are
    None, and have no settings of their own there."""
    names: dict[str, object] = {}
    assert is_dataclass(config)
    for field in fields(config):
        name, value = prefix + field.name.replace("_", "-"), getattr(config, field.name)
        if is_dataclass(value):
            names |= setting_names(value, f"{name}.")
        elif isinstance(value, tuple) and any(is_dataclass(each) for each in value):
            for index, each in enumerate(value):
                names |= setting_names(each, f"{name}.{index}.")
        else:
            names[name] = value
    return names


def parse(text: str, recipe: str, known: Iterable[str]) -> tuple[str, list[str]]:
    """`lora.rank=8,16` -> its name and its values. Raises ValueError for what is no setting or lacks a value."""
    typed, _, values = text.partition("=")
    name = typed.replace("_", "-").removeprefix("--")
    if not all(value.strip() for value in values.split(",")):
        raise ValueError(f"--grid {text}: type NAME=VALUE,VALUE,…, for instance --grid lora.rank=8,16,32")
    if name == "out":
        raise ValueError("--grid out: every run gets a folder of its own; --out FOLDER says where these lie")
    if name not in known:
        near = get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"--grid {typed}: there is no such setting; {hint}`vlatune train {recipe} --help` lists them")
    return name, [value.strip() for value in values.split(",")]


def words_of(name: str, value: str, default: object) -> list[str]:
    """The setting on the command line. A switch has two names there, and no value."""
    if not isinstance(default, bool):
        return [f"--{name}", *value.split()]
    if value.lower() not in ("true", "false"):
        raise ValueError(f"--grid {name}={value}: it is a switch; type --grid {name}=true,false")
    group, dot, last = name.rpartition(".")
    return [f"--{name}" if value.lower() == "true" else f"--{group}{dot}no-{last}"]


def refuse_clashes(members: Sequence[Member]) -> None:
    """Raises ValueError where two members would share a folder or a repository, or be one run in two folders; or where a folder's name is
    too long."""
    for member, other in itertools.combinations(members, 2):
        if member.name == other.name or member.config == replace(other.config, out=member.config.out):
            raise ValueError(f"two runs of the grid are the same: {member.name} and {other.name}; leave one value out")
        if (repository := member.config.hub.repo_id) is not None and repository == other.config.hub.repo_id:
            raise ValueError(
                f"--hub.repo-id {repository}: two runs of the grid would overwrite each other there; leave it out, and push the run that you "
                f"choose by its own command (--dry-run prints it) with --hub.repo-id"
            )
    for member in members:
        if len(member.name) > LONGEST_NAME:
            raise ValueError(
                f"the run's folder would be called {member.name}, which is longer than {LONGEST_NAME} letters; give shorter values, or fewer "
                "settings"
            )
