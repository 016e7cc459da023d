"""What a sweep will run: which tasks and init states, on which half, and each episode's key. Refuses what cannot be."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..data.robots import LIBERO_PANDA, robot_named
from .actors import wrong_instruction
from .benchmarks.benchmark import Benchmark, EpisodeProtocol, Task
from .policy_server import PolicyUnderTest
from .results import EpisodeKey
from .run_folder import Checkpoint
from .workers import EpisodeSpec

Split = Literal["selection", "report"]
DEFAULT_NUM_EXECUTED_STEPS = 8


@dataclass(frozen=True, kw_only=True)
class SweepPlan:
    """Tasks with their protocol, and how many init states of each half are run. Each task's init states are cut in the middle:
    checkpoints are chosen on the first half (from its start) and judged on the second (from its start)."""

    tasks: Sequence[tuple[Task, EpisodeProtocol]]
    episodes: dict[Split, int]
    seed: int
    num_videos: int
    """Episodes recorded per task, checkpoint and actor in each half."""

    def num_episodes(self, split: Split) -> int:
        return len(self.tasks) * self.episodes[split]

    def init_states(self, task: Task, split: Split) -> range:
        start = 0 if split == "selection" else task.num_init_states // 2
        return range(start, start + self.episodes[split])

    def specs(
        self,
        split: Split,
        actor: str,
        *,
        policy: PolicyUnderTest | None,
        checkpoint: Checkpoint | None,
        num_executed_steps: int,
        videos: Path,
    ) -> list[EpisodeSpec]:
        """Every episode of one actor on one half, task by task."""
        specs = []
        for task, protocol in self.tasks:
            given = task.language
            if actor == "wrong_instruction":
                given = wrong_instruction(task, [other for other, _ in self.tasks if other.suite == task.suite])
            for k, init_state in enumerate(self.init_states(task, split)):
                key = EpisodeKey(
                    weights_hash=policy.weights_hash if policy else "",
                    actor=actor,
                    benchmark=task.benchmark,
                    suite=task.suite,
                    task_id=task.task_id,
                    init_state=init_state,
                    seed=self.seed,
                    instruction=given,
                    protocol=protocol.name,
                    max_steps=protocol.max_steps,
                    num_settle_steps=protocol.num_settle_steps,
                    image_px=protocol.image_px,
                    sampling=json.dumps(dict(policy.sampling), sort_keys=True) if policy else "",
                    num_sampling_steps=policy.num_sampling_steps if policy else None,
                    num_executed_steps=num_executed_steps,
                )
                name = "__".join(
                    (
                        checkpoint.name if checkpoint else "no_checkpoint",
                        f"{task.suite}_task{task.task_id:02d}_{task.name}"[:80],
                        f"init{init_state:02d}",
                        f"{actor}_{key.digest().hex()[:8]}",
                    )
                )
                specs.append(
                    EpisodeSpec(
                        key=key,
                        task=task,
                        protocol=protocol,
                        robot=robot_named(policy.robot) if policy else LIBERO_PANDA,
                        cameras=policy.cameras if policy else (),
                        video=videos / name if k < self.num_videos else None,
                    )
                )
        return specs


def make_plan(
    benchmark: Benchmark,
    *,
    suites: Sequence[str],
    tasks: Sequence[int],
    protocol: str,
    selection_episodes: int,
    report_episodes: int,
    seed: int,
    num_videos: int,
    actors: Sequence[str],
) -> SweepPlan:
    """The plan; raises `ValueError` naming what is not there and what is, and `NoExpert` where a scripted actor is wanted
    and there is none."""
    offered = benchmark.suites()
    chosen: list[tuple[Task, EpisodeProtocol]] = []
    for suite in suites or [next(iter(offered))]:
        if suite not in offered:
            raise ValueError(f"benchmark {benchmark.name!r} has no suite {suite!r}; it has {', '.join(offered)}")
        protocols = benchmark.protocols(suite)
        if protocol and protocol not in protocols:
            raise ValueError(f"suite {suite!r} has no protocol {protocol!r}; it has {', '.join(protocols)}")
        rules = protocols[protocol] if protocol else next(iter(protocols.values()))
        by_id = {task.task_id: task for task in offered[suite]}
        lacking = sorted(set(tasks) - set(by_id))
        if lacking:
            raise ValueError(
                f"suite {suite!r} has no task {', '.join(map(str, lacking))}; it has {', '.join(map(str, by_id))}"
            )
        chosen += [(task, rules) for task_id, task in by_id.items() if not tasks or task_id in tasks]
    for task, _ in chosen:
        half = {"selection": task.num_init_states // 2, "report": task.num_init_states - task.num_init_states // 2}
        for split, wanted in (("selection", selection_episodes), ("report", report_episodes)):
            if not 1 <= wanted <= half[split]:
                raise ValueError(
                    f"--{split}-episodes {wanted}: task {task.name!r} has {half[split]} init states for {split}; "
                    f"ask for 1 to {half[split]}"
                )
        if "wrong_instruction" in actors:
            wrong_instruction(task, [other for other, _ in chosen if other.suite == task.suite])
        if "scripted" in actors:
            benchmark.make_expert(task)
    episodes: dict[Split, int] = {"selection": selection_episodes, "report": report_episodes}
    return SweepPlan(tasks=chosen, episodes=episodes, seed=seed, num_videos=num_videos)


def executed_steps(policy: PolicyUnderTest, wanted: int | None) -> int:
    """How many of a chunk's actions are executed; raises `ValueError` for what the policy cannot do."""
    if policy.observation_offsets != (0,):
        raise ValueError(
            f"the policy reads observation offsets {policy.observation_offsets}; simulator workers give the current one only"
        )
    if wanted is None:
        return min(DEFAULT_NUM_EXECUTED_STEPS, policy.horizon)
    if not 1 <= wanted <= policy.horizon:
        raise ValueError(
            f"--num-executed-steps {wanted}: the policy's chunks have {policy.horizon}; 1 to {policy.horizon}"
        )
    return wanted
