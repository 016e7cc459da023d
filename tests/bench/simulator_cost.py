"""What a control step costs, with and without pictures: pocket beside LIBERO-Spatial.

    python tests/bench/simulator_cost.py [--num-steps 60] [--json FILE]

LIBERO's row needs its assets (VLATUNE_LIBERO_ASSETS). Times are medians of one process: wall clock, and its own CPU time in
brackets, which says more on a machine that others use too.
"""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import tyro

from vlatune.eval.benchmarks import load_benchmark
from vlatune.eval.benchmarks.libero_paths import AssetsError

SIDES_PX = (64, 128, 256)


@dataclass(frozen=True, kw_only=True)
class Options:
    """How much to measure."""

    num_steps: int = 60
    """Control steps per figure."""
    json: Path | None = None
    """Write the figures here too."""


def timed(act: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Median (wall, CPU) milliseconds."""
    wall_ms, cpu_ms = [], []
    for _ in range(repeats):
        wall, cpu = time.perf_counter(), time.process_time()
        act()
        wall_ms.append(1000 * (time.perf_counter() - wall))
        cpu_ms.append(1000 * (time.process_time() - cpu))
    return statistics.median(wall_ms), statistics.median(cpu_ms)


def triangles_drawn(model: object) -> int:
    """Of the meshes that cameras see."""
    seen = (model.geom_group == 1) & (model.geom_dataid >= 0) & (model.geom_type == 7)  # type: ignore[attr-defined]
    return int(model.mesh_facenum[model.geom_dataid[seen]].sum())  # type: ignore[attr-defined]


def measure(benchmark_name: str, suite: str, options: Options) -> dict[str, object]:
    benchmark = load_benchmark(benchmark_name)
    task = benchmark.suites()[suite][0]
    protocol = next(iter(benchmark.protocols(suite).values()))
    still_A = np.array([0.0] * 6 + [-1.0])
    row: dict[str, object] = {"suite": suite}
    for side in SIDES_PX:
        environment = benchmark.make_environment(task, replace(protocol, image_px=side))
        environment.reset(0, seed=0)
        if side == SIDES_PX[0]:
            row["triangles"] = triangles_drawn(environment.domain.sim.model)  # type: ignore[attr-defined]
            row["reset"] = timed(lambda e=environment: e.reset(0, seed=0), 3)  # type: ignore[misc]
            row["step"] = timed(lambda e=environment: e.step(still_A, render=False), options.num_steps)  # type: ignore[misc]
        row[f"step + 2 x {side} px"] = timed(lambda e=environment: e.step(still_A, render=True), options.num_steps)  # type: ignore[misc]
        environment.close()
    return row


def table(rows: list[dict[str, object]]) -> str:
    """Markdown."""

    def cell(value: object) -> str:
        return f"{value[0]:.1f} ms ({value[1]:.1f})" if isinstance(value, tuple) else f"{value}"

    header = list(rows[0])
    lines = [header, ["---"] * len(header), *([cell(row[name]) for name in header] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(options: Options) -> None:
    rows = [measure("pocket", "pocket", options)]
    try:
        rows.append(measure("libero", "libero_spatial", options))
    except AssetsError as error:
        print(error)
    print(table(rows))
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
