"""Episodes an hour of the sweep's simulators beside the plain loop, on LIBERO-Spatial, and whether they give the same results.

    python tests/bench/evaluation_throughput.py [--image-px 128 256] [--workers 1 2] [--json FILE]

The plain loop is what published evaluations do: one process, an environment built for every task, every step rendered. (They also
build it anew for every episode, which costs more; here it is reset.) The actor hashes both pictures of a decision and moves as the
hash says, so that one pixel that differs changes the rest of the episode; rows and hashes must be equal. It costs nothing, and
no episode succeeds: all run to the step limit. Needs LIBERO's assets (VLATUNE_LIBERO_ASSETS).
"""

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from vlatune.eval.actors import make_decide
from vlatune.eval.benchmarks import load_benchmark
from vlatune.eval.policy_server import PolicyServer, Question
from vlatune.eval.results import EpisodeKey
from vlatune.eval.rollout import EpisodeOutcome, roll_out
from vlatune.eval.simulator_process import EpisodeSpec
from vlatune.eval.sweep_plan import Wanted, make_plan
from vlatune.eval.workers import WorkerPool

CHUNK = 8


@dataclass(frozen=True, kw_only=True)
class Options:
    """How much to measure."""

    suite: str = "libero_spatial"
    """Of the benchmark libero."""
    tasks: tuple[int, ...] = (0, 1)
    """Task ids."""
    episodes: int = 3
    """Init states per task."""
    max_steps: int | None = None
    """Control steps of an episode; the protocol's if not given."""
    image_px: tuple[int, ...] = (128, 256)
    """Sides of the two cameras' pictures."""
    workers: tuple[int, ...] = (1, 2)
    """Simulator processes."""
    json: Path | None = None
    """Write the figures here too."""


class HashingActor:
    """A policy whose chunk is a function of its pictures' every bit."""

    cameras = ("agentview", "eye_in_hand")
    observation_offsets = (0,)
    horizon = CHUNK
    action_dim = 7
    num_candidates = 1
    reads_previous = False
    num_sampling_steps = 1
    noise_shape = (CHUNK, 7)
    robot = "libero_panda"
    device = "cpu"
    weights_hash = "hashing"

    @property
    def sampling(self) -> dict[str, str]:
        return {"objective": "hash"}

    def act(self, observations: Sequence[Any], noise: np.ndarray, **_: Any) -> np.ndarray:
        return np.stack([self.chunk(raw) for raw in observations])

    def chunk(self, raw: Any) -> np.ndarray:
        seed = np.frombuffer(digest(raw.images), np.uint32).tolist()
        motion = np.random.default_rng(seed).uniform(-0.3, 0.3, (CHUNK, 7))
        return motion.astype(np.float32)


def digest(images: Any) -> bytes:
    state = hashlib.sha256()
    for camera in sorted(images):
        state.update(np.ascontiguousarray(images[camera]).data)
    return state.digest()


class NotingServer(PolicyServer):
    """Notes what every decision saw."""

    def __init__(self) -> None:
        super().__init__(HashingActor(), 1)  # type: ignore[arg-type]
        self.hashes: dict[tuple[EpisodeKey, int], bytes] = {}

    def answer(self, questions: Sequence[Question]) -> np.ndarray:
        for question in questions:
            self.hashes[question.key, question.decision] = digest(question.raw.images)
        return super().answer(questions)


def specs(options: Options, image_px: int) -> list[EpisodeSpec]:
    wanted = Wanted(
        suites=(options.suite,),
        tasks=options.tasks,
        selection_episodes=options.episodes,
        report_episodes=1,
        image_px=image_px,
        max_steps=options.max_steps,
    )
    plan = make_plan(load_benchmark("libero"), wanted)
    policy: Any = HashingActor()
    return plan.specs(
        "selection", "policy", policy=policy, checkpoint=None, num_executed_steps=CHUNK, videos=Path("none")
    )


def plain_loop(episodes: Sequence[EpisodeSpec], server: NotingServer) -> dict[EpisodeKey, EpisodeOutcome]:
    benchmark, outcomes = load_benchmark("libero"), {}
    environment, task = None, None
    for spec in episodes:
        if environment is None or spec.task != task:
            if environment is not None:
                environment.close()
            environment, task = benchmark.make_environment(spec.task, spec.protocol, spec.robot), spec.task
        key = spec.key
        decide = make_decide(
            key,
            environment,
            cameras=spec.cameras,
            ask=lambda decision, raw, key=key: server.answer([Question(key=key, decision=decision, raw=raw)])[0],  # type: ignore[misc]
            make_expert=benchmark.make_expert,
        )
        outcomes[key] = roll_out(
            environment,
            decide,
            init_state=key.init_state,
            seed=key.seed,
            max_steps=spec.protocol.max_steps,
            num_executed_steps=key.num_executed_steps,
            render_every_step=True,
        )
    if environment is not None:
        environment.close()
    return outcomes


def ours(
    episodes: Sequence[EpisodeSpec], server: NotingServer, num_workers: int
) -> dict[EpisodeKey, EpisodeOutcome | None]:
    with WorkerPool(partial(load_benchmark, "libero"), num_workers=num_workers) as pool:
        return {result.spec.key: result.outcome for result in pool.run(episodes, server)}


def lasting(outcome: EpisodeOutcome | None) -> dict[str, object]:
    """What of an outcome does not depend on the clock."""
    assert outcome is not None, "an episode was lost"
    clock = ("wall_s", "physics_s", "render_s", "decision_ms")
    return {name: value for name, value in asdict(outcome).items() if name not in clock}


def measure(options: Options, image_px: int) -> list[dict[str, object]]:
    episodes = specs(options, image_px)
    plain_server = NotingServer()
    start = time.perf_counter()
    expected = plain_loop(episodes, plain_server)
    plain_s = time.perf_counter() - start
    rows: list[dict[str, object]] = []
    for num_workers in options.workers:
        server = NotingServer()
        start = time.perf_counter()
        found = ours(episodes, server, num_workers)
        seconds = time.perf_counter() - start
        assert {key: lasting(outcome) for key, outcome in found.items()} == {
            key: lasting(outcome) for key, outcome in expected.items()
        }, "results differ from the plain loop's"
        assert server.hashes == plain_server.hashes, "a decision saw other pictures than in the plain loop"
        rows.append(
            {
                "image_px": image_px,
                "workers": num_workers,
                "episodes": len(episodes),
                "plain, episodes/h": round(3600 * len(episodes) / plain_s, 1),
                "ours, episodes/h": round(3600 * len(episodes) / seconds, 1),
                "ratio": round(plain_s / seconds, 2),
                "decisions with equal hashes": len(server.hashes),
            }
        )
        print(rows[-1], flush=True)
    return rows


def main(options: Options) -> None:
    rows = [row for image_px in options.image_px for row in measure(options, image_px)]
    header = list(rows[0])
    print(
        "\n".join(
            "| " + " | ".join(map(str, line)) + " |" for line in [header, *([r[n] for n in header] for r in rows)]
        )
    )
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
