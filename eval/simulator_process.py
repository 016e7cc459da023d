"""A simulator worker's process: episodes in, questions and outcomes out.

It holds one environment per task that it has seen and never touches an accelerator. It asks through a pipe, the pictures lying in memory that
both sides see, and gets chunks of actions back."""

import multiprocessing
import os
import signal
import traceback
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from ..data.episodes import DataError
from ..data.raw_observation import RawObservation
from ..data.robots.card import RobotCard
from ..data.robots.libero_panda import LIBERO_PANDA
from .actors import make_decide
from .benchmarks.benchmark import Benchmark, Environment, EpisodeProtocol, Task
from .benchmarks.libero_paths import AssetsError
from .benchmarks.renderer import RendererError
from .delay import InferenceDelay
from .results import EpisodeKey
from .rollout import EpisodeOutcome, roll_out
from .shared_pictures import PictureWriter, Places
from .video import VideoRecorder

MakeBenchmark = Callable[[], Benchmark]
"""Picklable by name (a module's function, or `functools.partial` of one): workers call it in their own process."""


@dataclass(frozen=True, kw_only=True)
class EpisodeSpec:
    """One episode to run."""

    key: EpisodeKey
    task: Task
    protocol: EpisodeProtocol
    robot: RobotCard = LIBERO_PANDA
    """The card whose state the policy reads."""
    cameras: tuple[str, ...] = ()
    """Those that the policy reads."""
    observation_offsets: tuple[int, ...] = (0,)
    """Control steps, relative to a decision, whose observations the policy reads."""
    temporal_ensemble: float | None = None
    """The coefficient of `rollout.roll_out`."""
    delay: InferenceDelay = field(default_factory=InferenceDelay)
    """How late decisions are."""
    video: Path | None = None
    """Where the mp4 goes, without the outcome and `.mp4`: `videos/step_000400__task00…__init07__policy`."""


@dataclass(frozen=True, kw_only=True)
class Ready:
    """The worker's first words."""


@dataclass(frozen=True, kw_only=True)
class Ask:
    decision: int
    raw: RawObservation
    """Without its pictures."""
    places: Places


@dataclass(frozen=True, kw_only=True)
class Done:
    outcome: EpisodeOutcome
    video: Path | None
    renderer: str


@dataclass(frozen=True, kw_only=True)
class Failed:
    reason: str
    while_starting: bool


def work(connection: Connection, make_benchmark: MakeBenchmark, max_environments: int) -> None:
    """A worker's life: episodes until told to stop, or until the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    environments: OrderedDict[tuple[Task, EpisodeProtocol, RobotCard], Environment] = OrderedDict()
    parent = multiprocessing.parent_process()
    assert parent is not None and parent.pid is not None
    pictures = PictureWriter(connection, parent.pid)
    try:
        benchmark = None
        connection.send(Ready())
        while (spec := connection.recv()) is not None:
            starting = True
            try:
                benchmark = benchmark or make_benchmark()
                environment = _environment(environments, benchmark, spec, max_environments)
                starting = False
                connection.send(_run_episode(connection, pictures, benchmark, environment, spec))
            except Exception as problem:  # whatever a simulator raises is this episode's error
                if isinstance(problem, (EOFError, BrokenPipeError, ConnectionResetError)):
                    raise
                connection.send(Failed(reason=_in_words(problem), while_starting=starting))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the parent has gone: there is nobody to tell
    finally:
        for environment in environments.values():
            environment.close()


def _in_words(problem: Exception) -> str:
    if isinstance(problem, (DataError, RendererError, AssetsError)):
        return str(problem)  # already says what to type
    place = traceback.extract_tb(problem.__traceback__)[-1]
    return f"{type(problem).__name__}: {problem} ({Path(place.filename).name}:{place.lineno})"


def _environment(
    held: OrderedDict[tuple[Task, EpisodeProtocol, RobotCard], Environment],
    benchmark: Benchmark,
    spec: EpisodeSpec,
    max_environments: int,
) -> Environment:
    name = (spec.task, spec.protocol, spec.robot)
    if name not in held:
        if len(held) == max_environments:
            held.popitem(last=False)[1].close()
        held[name] = benchmark.make_environment(*name)
    held.move_to_end(name)
    return held[name]


def _run_episode(
    connection: Connection, pictures: PictureWriter, benchmark: Benchmark, environment: Environment, spec: EpisodeSpec
) -> Done:
    def ask(decision: int, raw: RawObservation) -> np.ndarray:
        places = pictures.write(raw.images)
        connection.send(Ask(decision=decision, raw=replace(raw, images={}), places=places))
        chunk_HA: np.ndarray = connection.recv()
        return chunk_HA

    key = spec.key
    decide = make_decide(key, environment, cameras=spec.cameras, ask=ask, make_expert=benchmark.make_expert)
    recorder = None
    if spec.video is not None:
        recorder = VideoRecorder(spec.video, instruction=key.instruction, fps=environment.robot.control_hz)
    try:
        outcome = roll_out(
            environment,
            decide,
            init_state=key.init_state,
            seed=key.seed,
            max_steps=spec.protocol.max_steps,
            num_executed_steps=key.num_executed_steps,
            observation_offsets=spec.observation_offsets,
            temporal_ensemble=spec.temporal_ensemble,
            delay=spec.delay,
            reads_images=bool(spec.cameras),
            render_every_step=recorder is not None,
            on_step=recorder.on_step if recorder else None,
            on_end=recorder.on_end if recorder else None,
        )
        video = recorder.finish(outcome.success, outcome.failure_mode) if recorder else None
    finally:
        if recorder:
            recorder.abandon()
    return Done(outcome=outcome, video=video, renderer=os.environ.get("MUJOCO_GL", ""))
