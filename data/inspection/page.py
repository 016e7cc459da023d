"""``vlatune inspect CACHE``: an HTML page that needs no other file, its pictures as PNGs, and two CSVs.

Torch, pandas and matplotlib are imported where the work begins: `--help` answers at once.
"""

import base64
import io
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from ..episodes import DataError

if TYPE_CHECKING:
    from ..cache import Cache
    from .concerns import Concern, Inspected
    from .contact_sheet import TaskSheet

PAGE, WARNINGS, TASKS = "index.html", "warnings.csv", "tasks.csv"


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """Look at a cache before training on it: pictures, histograms, tasks, instructions and warnings, on one page."""

    cache: Annotated[Path, tyro.conf.Positional]
    """The cache that `vlatune prepare` made."""
    out: Path | None = None
    """The folder to write; by default CACHE.inspect, beside the cache. An earlier inspection there is replaced."""
    episodes_per_task: int = 3
    """Episodes of each task on the contact sheet."""
    max_episodes: int = 48
    """Episodes on the contact sheet in all."""
    picture_px: int = 88
    """Side of a picture on the contact sheet, in pixels."""
    checked_pairs: int = 8
    """Pairs of consecutive pictures, an episode and camera, in which a camera that stands still is looked for."""

    def __post_init__(self) -> None:
        for name in ("episodes_per_task", "max_episodes", "picture_px", "checked_pairs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")


def inspect(config: InspectConfig) -> Path:
    """Write the inspection's folder, whole or not at all; returns the page. Raises `DataError` where there is no whole cache, or
    where the folder is something else."""
    return write_inspection(config)[0]


def write_inspection(config: InspectConfig) -> "tuple[Path, list[Concern]]":
    """`inspect`, and the warnings that it found."""
    from ..cache import Cache
    from .concerns import concerns, look

    cache = Cache.open(config.cache)
    out = config.out or config.cache.resolve().with_name(f"{config.cache.resolve().name}.inspect")
    _refuse_other_folder(out)
    inspected = look(cache, config.checked_pairs)
    found = concerns(inspected)
    unfinished = out.with_name(f"{out.name}.tmp{os.getpid()}")
    unfinished.mkdir(parents=True)
    try:
        _write(config, inspected, found, unfinished)
        shutil.rmtree(out, ignore_errors=True)
        unfinished.rename(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return out / PAGE, found


def _refuse_other_folder(out: Path) -> None:
    earlier = (out / PAGE).is_file() and (out / WARNINGS).is_file()
    if out.exists() and not earlier and not (out.is_dir() and not any(out.iterdir())):
        raise DataError(f"{out} is there already and is not an inspection; give another --out")


def _write(config: InspectConfig, inspected: "Inspected", found: "list[Concern]", folder: Path) -> None:
    import jinja2

    from . import contact_sheet, figures, tables
    from .concerns import CHECKS, not_checked

    cache, survey = inspected.cache, inspected.survey
    tasks = tables.by_task(survey)
    tasks.to_csv(folder / TASKS, index=False)
    tables.of_concerns(found).to_csv(folder / WARNINGS, index=False)

    def kept(name: str, png: bytes) -> str:
        (folder / f"{name}.png").write_bytes(png)
        return "data:image/png;base64," + base64.b64encode(png).decode()

    chosen = contact_sheet.choose_episodes(cache.episodes, config.episodes_per_task, config.max_episodes)
    sheets = contact_sheet.task_sheets(cache, chosen, config.picture_px)
    first = chosen.iloc[0]
    pictures = {
        "orientation": kept(
            "orientation", _png(contact_sheet.orientation_sheet(cache, int(first["start"]), 2 * config.picture_px))
        ),
        "actions": kept("actions", figures.histograms(inspected.actions)),
        "state": kept("state", figures.histograms(inspected.state)),
        "over_time": kept("over_time", figures.over_time(survey, cache.robot.control_hz)),
    }
    here = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(here), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    page = environment.get_template("template.html").render(
        style=(here / "style.css").read_text(),
        name=cache.path.resolve().name,
        cache=cache,
        config=config,
        facts=_facts(cache),
        duration=_duration(cache.num_frames / cache.robot.control_hz),
        concerns=found,
        checks=list(CHECKS),
        not_checked=not_checked(inspected),
        picture=pictures,
        orientation_source=first["source"],
        sheets=[(sheet, kept(_file_name(k, sheet), _png(sheet.image))) for k, sheet in enumerate(sheets, start=1)],
        num_shown=len(chosen),
        actions=inspected.actions,
        state=inspected.state,
        tasks=tasks.to_dict("records"),
        instructions=tables.by_instruction(cache).to_dict("records"),
        percent=lambda share: f"{100 * share:.1f} %",
    )
    (folder / PAGE).write_text(page)


def _facts(cache: "Cache") -> list[tuple[str, str]]:
    """(what, in words) for the page's head."""
    robot, rule, manifest = cache.robot, cache.image_rule, cache.manifest
    suites = sorted(cache.episodes["suite"].unique())
    size = sum(record.size for record in manifest.files.values())
    return [
        ("path", str(cache.path.resolve())),
        ("digest", cache.digest),
        ("suites", ", ".join(suite or "(none named)" for suite in suites)),
        ("size on disk", f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"),
        ("robot", f"{robot.name}, {robot.control_hz:g} Hz, actions within ±{robot.action_limit:g}"),
        ("state", ", ".join(robot.state_names)),
        ("actions", ", ".join(robot.action_names)),
        ("gripper", f"{robot.gripper_open:g} opens, {robot.gripper_closed:g} closes"),
        ("cameras", ", ".join(manifest.cameras)),
        (
            "pictures",
            f"turned {rule.orientation}, {rule.size_px} px, {rule.resize}, padding {rule.padding} with {rule.background}",
        ),
        ("tokenizer", _identity(manifest.language["tokenizer"])),
        ("text encoder", _identity(manifest.language["encoder"])),
    ]


def _identity(identity: Any) -> str:
    """The parts of a language's identity that a person knows it by, and the start of its digest."""
    if identity is None:
        return "none"
    shown = [str(identity[name]) for name in ("kind", "name", "revision") if identity.get(name)]
    if "vocab_size" in identity:
        shown.append(f"{identity['vocab_size']} pieces")
    shown += [f"{name} {str(value)[:12]}" for name, value in identity.items() if "sha256" in name]
    return ", ".join(shown)


def _duration(seconds: float) -> str:
    if seconds >= 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.1f} s"


def _file_name(k: int, sheet: "TaskSheet") -> str:
    """A name that every file system takes."""
    return f"episodes_{k:03d}_{re.sub(r'[^A-Za-z0-9_-]+', '_', sheet.task)[:80]}"


def _png(image: Any) -> bytes:
    content = io.BytesIO()
    image.save(content, format="png")
    return content.getvalue()


def main(argv: Sequence[str] | None = None) -> None:
    config = tyro.cli(InspectConfig, args=argv, prog="vlatune inspect")
    try:
        page, found = write_inspection(config)
    except (DataError, ValueError) as error:
        raise SystemExit(f"vlatune inspect: {error}") from None
    for concern in found:
        print(f"warning, {concern.check}: {concern.sentence}")
    print(f"{len(found)} warning{'s' if len(found) != 1 else ''}; the page: {page}")


if __name__ == "__main__":
    main()
