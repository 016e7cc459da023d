"""All 130 tasks of LIBERO load and start; twenty of them run to their step limit, through the sweep's own workers."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from vlatune.eval.benchmarks import load_benchmark
from vlatune.eval.sweep_plan import Wanted, make_plan
from vlatune.eval.workers import WorkerPool

SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90")
WHOLE = {(suite, task_id) for suite in SUITES for task_id in (0, 3, 6, 9)}
"""Those that run to the end."""


@pytest.mark.libero
@pytest.mark.slow
@pytest.mark.timeout(3600)  # four minutes on two quiet cores
def test_every_task_loads_and_twenty_roll_out():
    plan = make_plan(
        load_benchmark("libero"),
        Wanted(suites=SUITES, selection_episodes=1, report_episodes=1, image_px=64, actors=("zero",)),
    )
    specs = []
    for spec in plan.specs(
        "selection", "zero", policy=None, checkpoint=None, num_executed_steps=1, videos=Path("none")
    ):
        limit = spec.protocol.max_steps if (spec.task.suite, spec.task.task_id) in WHOLE else 2
        protocol = replace(spec.protocol, max_steps=limit)
        specs.append(replace(spec, protocol=protocol, key=replace(spec.key, max_steps=limit)))
    assert len(specs) == 130
    with WorkerPool(partial(load_benchmark, "libero"), num_workers=2, max_environments=1) as pool:
        results = {(r.spec.task.suite, r.spec.task.task_id): r for r in pool.run(specs, None)}
    assert [f"{r.spec.task.name}: {r.error}" for r in results.values() if r.error] == []
    assert len(results) == 130
    for place, result in results.items():
        outcome, limit = result.outcome, result.spec.protocol.max_steps
        assert (outcome.success, outcome.num_steps) == (False, limit), f"{place}: nobody moved, and nothing was done"
        assert outcome.failure_mode
    assert {place for place, result in results.items() if result.outcome.num_steps > 200} == WHOLE
    spatial = results["libero_spatial", 0].outcome
    # The first picture takes a twelfth of the time; one for each step would take nine tenths of it.
    assert spatial.render_s < 0.5 * spatial.wall_s, "an actor that reads no pictures has none rendered"
