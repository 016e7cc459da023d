"""What a sweep will run: which tasks and init states, on which half, and each episode's key. Refuses what cannot be."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from ..data.robots import LIBERO_PANDA, robot_named
from .actors import wrong_instruction
from .benchmarks.benchmark import Benchmark, EpisodeProtocol, Task
from .delay import InferenceDelay
from .policy_server import PolicyUnderTest
from .results import EpisodeKey
from .run_folder import Checkpoint
from .simulator_process import EpisodeSpec

Split = Literal["selection", "report"]
DEFAULT_NUM_EXECUTED_STEPS = 8
DEFAULT_REPORT_EPISODES = 25


@dataclass(frozen=True, kw_only=True)
class SweepPlan:
    """Tasks with their protocol, and how many init states of each half are run. Each task's init states are cut in the middle:
    candidates are compared on the first half (from its start) and the chosen one is judged on the second (from its start). Without a
    selection (0 episodes) the second "half" is all of them."""

    tasks: Sequence[tuple[Task, EpisodeProtocol]]
    episodes: Mapping[Split, int]
    """Per task."""
    seed: int
    num_videos: int
    """Episodes recorded per task, candidate and actor in each half."""
    temporal_ensemble: float | None = None
    delay: InferenceDelay = field(default_factory=InferenceDelay)
    """Of a policy's decisions; actors without a policy know no delay."""

    @property
    def has_selection(self) -> bool:
        return self.episodes["selection"] > 0

    def num_episodes(self, split: Split) -> int:
        return len(self.tasks) * self.episodes[split]

    def init_states(self, task: Task, split: Split) -> range:
        start = task.num_init_states // 2 if split == "report" and self.has_selection else 0
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
                    sampling=self._sampling(policy) if policy else "",
                    num_sampling_steps=policy.num_sampling_steps if policy else None,
                    num_executed_steps=num_executed_steps,
                )
                specs.append(
                    EpisodeSpec(
                        key=key,
                        task=task,
                        protocol=protocol,
                        robot=robot_named(policy.robot) if policy else LIBERO_PANDA,
                        cameras=policy.cameras if policy else (),
                        observation_offsets=policy.observation_offsets if policy else (0,),
                        temporal_ensemble=self.temporal_ensemble if policy else None,
                        delay=self.delay if policy else InferenceDelay(),
                        video=video_stem(key, task, checkpoint, videos) if k < self.num_videos else None,
                    )
                )
        return specs

    def _sampling(self, policy: PolicyUnderTest) -> str:
        settings = dict(policy.sampling)
        if self.temporal_ensemble is not None:
            settings["temporal_ensemble"] = self.temporal_ensemble
        if self.delay.num_steps:
            settings["inference_delay"] = self.delay.num_steps
            settings["while_waiting"] = self.delay.while_waiting
        return json.dumps(settings, sort_keys=True)


def video_stem(key: EpisodeKey, task: Task, checkpoint: Checkpoint | None, videos: Path) -> Path:
    """The episode's video, as `EpisodeSpec.video` names it: no two episodes share one."""
    return videos / "__".join(
        (
            checkpoint.name if checkpoint else "no_checkpoint",
            f"{task.suite}_task{task.task_id:02d}_{task.name}"[:80],
            f"init{key.init_state:02d}",
            f"{key.actor}_{key.digest().hex()[:8]}",
        )
    )


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is asked of a benchmark; see `SweepConfig`."""

    suites: Sequence[str] = ()
    tasks: Sequence[int] = ()
    protocol: str = ""
    max_steps: int | None = None
    num_settle_steps: int | None = None
    image_px: int | None = None
    selection_episodes: int
    report_episodes: int | None = None
    seed: int = 0
    num_videos: int = 0
    temporal_ensemble: float | None = None
    delay: InferenceDelay = field(default_factory=InferenceDelay)
    actors: Sequence[str] = ()


def make_plan(benchmark: Benchmark, wanted: Wanted) -> SweepPlan:
    """The plan; raises `ValueError` naming what is not there and what is, and `NoExpert` where a scripted actor is wanted
    and there is none."""
    chosen = _chosen_tasks(benchmark, wanted)
    first_half = {task: task.num_init_states // 2 if wanted.selection_episodes else 0 for task, _ in chosen}
    default = DEFAULT_REPORT_EPISODES if wanted.selection_episodes else chosen[0][1].num_trials
    default = min(default, *(task.num_init_states - half for task, half in first_half.items()))
    episodes: dict[Split, int] = {
        "selection": wanted.selection_episodes,
        "report": default if wanted.report_episodes is None else wanted.report_episodes,
    }
    for task, _ in chosen:
        most = {"selection": task.num_init_states // 2, "report": task.num_init_states - first_half[task]}
        for split, count in episodes.items():
            least = 0 if split == "selection" else 1
            if not least <= count <= most[split]:
                raise ValueError(
                    f"--{split}-episodes {count}: task {task.name!r} has {most[split]} init states for {split}; "
                    f"ask for {least} to {most[split]}"
                )
        if "wrong_instruction" in wanted.actors:
            wrong_instruction(task, [other for other, _ in chosen if other.suite == task.suite])
        if "scripted" in wanted.actors:
            benchmark.make_expert(task)
    return SweepPlan(
        tasks=chosen,
        episodes=episodes,
        seed=wanted.seed,
        num_videos=wanted.num_videos,
        temporal_ensemble=wanted.temporal_ensemble,
        delay=wanted.delay,
    )


def _chosen_tasks(benchmark: Benchmark, wanted: Wanted) -> list[tuple[Task, EpisodeProtocol]]:
    offered = benchmark.suites()
    named = {
        "max_steps": wanted.max_steps,
        "num_settle_steps": wanted.num_settle_steps,
        "image_px": wanted.image_px,
    }
    changes: dict[str, Any] = {name: value for name, value in named.items() if value is not None}
    for name, value in changes.items():
        if value < (0 if name == "num_settle_steps" else 1):
            raise ValueError(f"--{name.replace('_', '-')} {value}: a positive number is needed")
    chosen: list[tuple[Task, EpisodeProtocol]] = []
    for suite in dict.fromkeys(wanted.suites) or [next(iter(offered))]:
        if suite not in offered:
            raise ValueError(f"benchmark {benchmark.name!r} has no suite {suite!r}; it has {', '.join(offered)}")
        protocols = benchmark.protocols(suite)
        if wanted.protocol and wanted.protocol not in protocols:
            raise ValueError(f"suite {suite!r} has no protocol {wanted.protocol!r}; it has {', '.join(protocols)}")
        rules = protocols[wanted.protocol] if wanted.protocol else next(iter(protocols.values()))
        by_id = {task.task_id: task for task in offered[suite]}
        lacking = sorted(set(wanted.tasks) - set(by_id))
        if lacking:
            raise ValueError(
                f"suite {suite!r} has no task {', '.join(map(str, lacking))}; it has {', '.join(map(str, by_id))}"
            )
        chosen += [
            (task, replace(rules, **changes))
            for task_id, task in by_id.items()
            if not wanted.tasks or task_id in wanted.tasks
        ]
    return chosen


def executed_steps(policy: PolicyUnderTest, wanted: int | None) -> int:
    """How many of a chunk's actions are executed; raises `ValueError` for what the policy cannot do."""
    if wanted is None:
        return min(DEFAULT_NUM_EXECUTED_STEPS, policy.horizon)
    if not 1 <= wanted <= policy.horizon:
        raise ValueError(
            f"--num-executed-steps {wanted}: the policy's chunks have {policy.horizon}; 1 to {policy.horizon}"
        )
    return wanted
