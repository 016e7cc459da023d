"""A robot loop that asks a policy server through openpi's own client: an example to copy from.

    bash launch/install_client.sh                       an environment with openpi-client and the simulators, without torch
    vlatune serve runs/pocket                           the server, in vlatune's own environment
    .venv/openpi-client/bin/python -m vlatune.eval.serving.robot_loop --benchmark pocket --episodes 5

The robot is a benchmark's simulator; for a real one, `reset` and `step` are yours. A sweep (`vlatune sweep`) is what compares
policies: it fixes the noise, writes rows, and survives crashes."""

import statistics
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tyro

from ...data.robots import robot_named
from ..benchmarks import load_benchmark
from ..benchmarks.benchmark import Environment, SimObservation, Task
from .limits import read_api_key

TURN_BACK = {"raw": (1, 1), "rot180": (-1, -1), "flipud": (-1, 1)}
"""The server's `picture_orientation` -> the steps through rows and columns that make a raw picture so."""


@dataclass(frozen=True, kw_only=True)
class RobotLoopConfig:
    """Run episodes of a benchmark with the actions of a policy server (`vlatune serve`)."""

    host: str = "127.0.0.1"
    """Where the server is."""
    port: int = 8000
    """Its port."""
    api_key_file: Path | None = None
    """A file with its key; else the environment's VLATUNE_API_KEY, if it is set."""
    benchmark: str = "pocket"
    """pocket or libero."""
    suite: str = ""
    """One of its suites; the first if not given."""
    tasks: tuple[int, ...] = ()
    """Tasks of the suite, by number; all if none are given."""
    episodes: int = 1
    """Episodes of each task."""
    first_init_state: int = 0
    """The first one's; the next ones follow."""
    max_steps: int | None = None
    """Control steps of an episode; as the benchmark's own protocol says if not given."""
    num_executed_steps: int = 5
    """Steps of a chunk that are carried out before the next is asked for."""
    seed: int = 7
    """Of the simulator."""


class PolicyClient(Protocol):
    """openpi's `WebsocketClientPolicy`."""

    def infer(self, obs: dict) -> dict: ...
    def get_server_metadata(self) -> dict: ...


@dataclass(frozen=True, kw_only=True)
class Episode:
    """How one went."""

    success: bool
    num_steps: int
    round_trip_ms: tuple[float, ...]
    """Of each decision: packing, the network, the server, unpacking."""


def main(argv: Sequence[str] | None = None) -> None:
    """The command line. Raises `ValueError` for a suite or task that is not there, or settings that do not fit the server's policy."""
    from openpi_client.websocket_client_policy import WebsocketClientPolicy  # type: ignore[import-not-found]

    config = tyro.cli(RobotLoopConfig, args=None if argv is None else list(argv), description=__doc__)
    benchmark = load_benchmark(config.benchmark)
    tasks = tasks_of(benchmark.suites(), config)
    client = WebsocketClientPolicy(config.host, config.port, api_key=read_api_key(config.api_key_file))
    metadata = client.get_server_metadata()
    print(f"{metadata['checkpoint']} of {metadata['robot']}, chunks of {metadata['action_horizon']}")
    if not 1 <= config.num_executed_steps <= metadata["action_horizon"]:
        raise ValueError(
            f"--num-executed-steps is {config.num_executed_steps}, and chunks have {metadata['action_horizon']} steps; give 1 to as many"
        )
    episodes = []
    for task in tasks:
        protocol = next(iter(benchmark.protocols(task.suite).values()))
        environment = benchmark.make_environment(task, protocol, robot_named(metadata["robot"]))
        try:
            for init_state in range(config.first_init_state, config.first_init_state + config.episodes):
                episode = run_episode(
                    client,
                    environment,
                    init_state=init_state,
                    seed=config.seed,
                    max_steps=config.max_steps or protocol.max_steps,
                    num_executed_steps=config.num_executed_steps,
                )
                episodes.append(episode)
                print(
                    f"{task.suite} {task.task_id} {task.language!r}, init state {init_state}: {'success' if episode.success else 'failure'} after "
                    f"{episode.num_steps} steps, {len(episode.round_trip_ms)} decisions, median "
                    f"{statistics.median(episode.round_trip_ms):.1f} ms",
                    flush=True,
                )
        finally:
            environment.close()
    print(f"{sum(episode.success for episode in episodes)} of {len(episodes)} episodes succeeded")


def tasks_of(suites: Mapping[str, Sequence[Task]], config: RobotLoopConfig) -> list[Task]:
    """Raises `ValueError` for a suite or task that is not there."""
    suite = config.suite or next(iter(suites))
    if suite not in suites:
        raise ValueError(f"{config.benchmark} has no suite {suite!r}; it has {', '.join(suites)}")
    there = {task.task_id: task for task in suites[suite]}
    unknown = [number for number in config.tasks if number not in there]
    if unknown:
        raise ValueError(f"suite {suite} has no task {unknown[0]}; it has {min(there)} to {max(there)}")
    return [there[number] for number in config.tasks or there]


def run_episode(
    client: PolicyClient,
    environment: Environment,
    *,
    init_state: int,
    seed: int,
    max_steps: int,
    num_executed_steps: int,
) -> Episode:
    """Observe, ask, carry out the chunk's first steps, and again, until success or the last step."""
    metadata, limit = client.get_server_metadata(), environment.robot.action_limit
    seen = deque([environment.reset(init_state, seed)], maxlen=1 - min(metadata["observation_offsets"]))
    chunk_HA: np.ndarray | None = None
    num_steps, round_trip_ms = 0, []
    while num_steps < max_steps and not seen[-1].success:
        message = message_of(seen, num_steps, environment.task.language, metadata)
        if metadata["needs_previous"]:
            message["num_executed_steps"] = num_executed_steps
            if chunk_HA is not None:
                message["previous_actions"] = chunk_HA
        begun_s = time.perf_counter()
        chunk_HA = client.infer(message)["actions"]
        round_trip_ms.append(1000 * (time.perf_counter() - begun_s))
        for action_A in chunk_HA[:num_executed_steps]:
            seen.append(environment.step(np.clip(action_A, -limit, limit), render=True))
            num_steps += 1
            if seen[-1].success or num_steps == max_steps:
                break
    return Episode(success=seen[-1].success, num_steps=num_steps, round_trip_ms=tuple(round_trip_ms))


def message_of(
    seen: Sequence[SimObservation], num_steps: int, instruction: str, metadata: Mapping[str, Any]
) -> dict[str, Any]:
    """What the server reads: the newest observation or, where its policy looks back, one for each offset."""
    rows, columns = TURN_BACK[metadata["picture_orientation"]]
    offsets = metadata["observation_offsets"]
    read = [seen[max(offset, -num_steps) - 1] for offset in offsets]
    message: dict[str, Any] = {"observation/state": np.stack([one.state_S for one in read]), "prompt": instruction}
    for camera in metadata["cameras"]:
        message[f"observation/{camera}"] = np.stack([one.images[camera][::rows, ::columns] for one in read])
    if len(offsets) > 1:
        message["there"] = num_steps + np.asarray(offsets) >= 0
    return message


if __name__ == "__main__":
    main()
