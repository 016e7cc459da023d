"""`vlatune convert SOURCE OUT --to lerobot|vlatune`: a checkpoint in another layout.

To LeRobot: weights under its names, its config and its processor files, so that a policy trained here runs there. To vlatune: a
public checkpoint as a complete checkpoint of ours, so that everything here takes it."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ..data.episodes import DataError
from .acting import read_any_policy
from .checkpoints.folder import write_policy
from .checkpoints.layout import COMPLETE
from .checkpoints.lerobot import write_lerobot
from .checkpoints.public import PublicOptions
from .lora import merge_adapter


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """A checkpoint in another layout."""

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """A checkpoint of ours, or a public one."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """The folder to write; it must not exist."""
    to: Literal["lerobot", "vlatune"]
    """The layout to write."""
    adapter: Path | None = None
    """A PEFT adapter folder to merge into the weights."""
    public: PublicOptions = field(default_factory=PublicOptions)


def main(argv: Sequence[str] | None = None) -> None:
    config = tyro.cli(tyro.conf.OmitArgPrefixes[ConvertConfig], prog="vlatune convert", args=argv)
    convert(config)
    print(f"{config.out}: {config.source} in the layout of {config.to}")


def convert(config: ConvertConfig) -> None:
    """Raises DataError if the source cannot be read, does not exist in that layout, or `out` is there already."""
    if config.out.exists():
        raise DataError(f"{config.out} exists; give a new folder")
    policy, language, _ = read_any_policy(config.source, config.public)
    if config.to == "lerobot" and language.kept_ids is not None:
        raise DataError(
            f"{config.source} was trained with a compact table of {len(language.kept_ids)} tokens, and LeRobot's layout holds all; give a "
            "checkpoint that was trained without --compact"
        )
    if config.adapter is not None:
        policy = merge_adapter(policy, config.adapter)
    unfinished = config.out.with_name(f"{config.out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    if config.to == "lerobot":
        write_lerobot(unfinished, policy, tokenizer=language.tokenizer_name)
    else:
        write_policy(unfinished, policy, policy.state_dict(), language, {"converted_from": str(config.source)})
        (unfinished / COMPLETE).write_text("converted\n")
    unfinished.rename(config.out)
