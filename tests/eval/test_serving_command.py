"""`vlatune serve`, as a person starts it, with a checkpoint; and openpi's own client in the environment it needs."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from running_server import Client, RecordingPolicy, observation, reader, running_server
from small_policies import make_policy
from websockets.sync.client import connect

from vlatune.data.episodes import DataError
from vlatune.data.language import Language
from vlatune.data.raw_observation import RawObservation
from vlatune.eval.benchmarks import load_benchmark
from vlatune.eval.serving import robot_loop
from vlatune.eval.serving.limits import API_KEY_VARIABLE, Limits
from vlatune.eval.serving.robot_loop import RobotLoopConfig, tasks_of
from vlatune.eval.serving.serve import ServeConfig, load, main, metadata_of, reader_of
from vlatune.policy.acting import load_policy
from vlatune.policy.checkpoints.folder import write_policy
from vlatune.policy.checkpoints.layout import COMPLETE
from vlatune.policy.objectives.regression import Regression
from vlatune.policy.policy import Policy

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A policy that needs no noise: what it answers is what it answers."""
    noisy = make_policy()
    policy = Policy(replace(noisy.config, objective=Regression()), noisy.embodiment, noisy.statistics)
    policy.load_state_dict(noisy.state_dict())
    return written(policy, tmp_path_factory.mktemp("runs") / "demo" / "checkpoints" / "step_000005")


def written(policy: Policy, folder: Path) -> Path:
    folder.mkdir(parents=True)
    write_policy(folder, policy, policy.state_dict(), Language.build(["reach the red dot"], encoder="none"), {})
    (folder / COMPLETE).touch()
    return folder


class Serving:
    """The command in a process of its own, until it listens."""

    def __init__(self, *words: object, **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "vlatune.launch.cli", "serve", *map(str, words), "--device", "cpu", "--port", "0"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        )
        self.said: list[str] = []
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said.append(line)
            found = re.search(r"listens on ws://127.0.0.1:(\d+)", line)
            if found:
                self.port = int(found[1])
                return
        raise AssertionError(f"{self.said} {self.process.communicate()}")

    def end(self, caught: signal.Signals) -> tuple[int, str]:
        """Exit code and stderr."""
        self.process.send_signal(caught)
        said, errors = self.process.communicate(timeout=120)
        self.said.append(said)
        return self.process.returncode, errors


@pytest.fixture
def serving(checkpoint) -> Iterator[Serving]:
    server = Serving(checkpoint.parents[1], "--max-batch-size", 3, **{API_KEY_VARIABLE: "k3y"})
    yield server
    server.process.kill()
    server.process.communicate()


def test_the_command_answers_as_the_policy_does(serving, checkpoint):
    def ask(seeds) -> list[np.ndarray]:
        headers = {"Authorization": "Api-Key k3y"}
        with connect(f"ws://127.0.0.1:{serving.port}", compression=None, additional_headers=headers) as connection:
            client = Client(connection)
            answers = [client.ask(observation(seed))["actions"] for seed in seeds]
            assert client.metadata == expected_metadata
            return answers

    policy = load_policy(checkpoint, device="cpu")
    settings = ServeConfig(checkpoint=checkpoint.parents[1])
    expected_metadata = metadata_of(policy, reader_of(policy, settings), "demo/step_000005")
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, [range(k, 40, 8) for k in range(8)]))
    for k, of_client in enumerate(answers):
        for seed, answer in zip(range(k, 40, 8), of_client, strict=True):
            alone = policy.act(reader().read(observation(seed)).raw)
            np.testing.assert_allclose(answer, alone, atol=1e-5)
    assert np.ptp([answer[0] for of_client in answers for answer in of_client], axis=0).max() > 0.01
    assert [line.split(" ", 1)[1].split(":")[0] for line in serving.said[:3]] == [
        f"warm at batch size {size}" for size in (1, 2, 3)
    ]
    code, errors = serving.end(signal.SIGINT)
    assert (code, errors) == (130, "\nvlatune serve: stopped\n")
    assert "SIGINT: no new clients; answering each client's request in progress" in serving.said[-1]


def test_what_metadata_says(checkpoint):
    config = ServeConfig(
        checkpoint=checkpoint, orientation="rot180", camera={"agentview": "observation/front"}, num_candidates=1
    )
    policy = load(config, checkpoint)
    metadata = metadata_of(policy, reader_of(policy, config), "demo/step_000005")
    assert metadata["checkpoint"] == "demo/step_000005"
    assert metadata["weights_hash"] == policy.weights_hash
    assert metadata["sampling"] == {"objective": "regression", "num_sampling_steps": 1}
    assert (metadata["robot"], metadata["control_hz"], metadata["state_dim"]) == ("libero_panda", 20.0, 8)
    assert (metadata["action_horizon"], metadata["action_dim"]) == (policy.horizon, 7)
    assert metadata["picture_orientation"] == "rot180"
    assert metadata["observation_keys"] == {
        "agentview": ["observation/agentview", "agentview", "observation/front"],
        "eye_in_hand": ["observation/eye_in_hand", "eye_in_hand", "observation/wrist_image"],
        "state": ["observation/state", "state"],
    }
    assert metadata["needs_previous"] is False


@pytest.mark.parametrize(
    "settings",
    [{"num_candidates": 3}, {"real_time_chunking": "linear", "max_guidance": 2.0}],
    ids=["best of 3", "real time"],
)
def test_decisions_that_go_on_with_the_last(settings, tmp_path):
    """The same noise through the server and past it."""
    config = ServeConfig(checkpoint=written(make_policy(), tmp_path / "step_000001"), device="cpu", **settings)
    served, own = load(config, config.checkpoint), load(config, config.checkpoint)
    served._random, own._random = np.random.default_rng(5), np.random.default_rng(5)
    asked = reader_of(served, config)
    with running_server(served, asked) as server, server.client() as client:
        assert "num_executed_steps is missing" in client.ask(observation())
        message = {**observation(), "num_executed_steps": 2, "inference_delay": 1}
        for _ in range(3):
            answer = client.ask(message)["actions"]
            request = asked.read(message)
            np.testing.assert_array_equal(
                answer,
                own.act(request.raw, previous=request.previous_HA, num_executed_steps=2, inference_delay=1),
            )
            message["previous_actions"] = answer
        assert "executed steps" in client.ask({**message, "num_executed_steps": served.horizon})


@pytest.mark.parametrize(
    ("settings", "error", "sentence"),
    [
        ({"checkpoint": Path("no/such")}, DataError, "there is no run folder no/such"),
        ({"weights": "ema"}, DataError, "kept no average"),
        ({"api_key_file": Path("no/key")}, DataError, "no/key cannot be read"),
        ({"camera": {"front": "x"}}, ValueError, "the policy has no camera 'front'"),
        ({"num_sampling_steps": 4}, ValueError, "'regression' always takes 1; leave it out"),
        ({"device": "tpu"}, ValueError, "there is no device 'tpu' here"),
        ({"port": 70_000}, ValueError, "--port is 70000; it can be 0 to 65535"),
        ({"max_batch_size": 0}, ValueError, "--max-batch-size is 0; at least 1 is needed"),
        ({"limits": Limits, "waiting": 0}, ValueError, "--limits.waiting is 0"),
    ],
)
def test_refused_before_the_first_client(settings, error, sentence, checkpoint, monkeypatch, capsys):
    words = {"checkpoint": checkpoint, **settings}
    words.pop("limits", None)
    argv = [str(words.pop("checkpoint"))]
    for name, value in words.items():
        flag = f"--limits.{name}" if "limits" in settings else f"--{name.replace('_', '-')}"
        argv += [flag, *(map(str, next(iter(value.items()))) if isinstance(value, dict) else [str(value)])]
    with pytest.raises((error, SystemExit)) as raised:
        main(argv)
    said = str(raised.value) + capsys.readouterr().err
    assert re.search(sentence, re.sub(r"[│\s]+", " ", said))


@pytest.fixture(scope="session")
def client_python() -> Path:
    """That of openpi-client's environment; made once, which takes a minute or two."""
    folder = Path(sys.prefix) / "openpi-client"
    made = subprocess.run(
        ["bash", str(ROOT / "launch" / "install_client.sh"), str(folder)],
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
        env={**os.environ, "VLATUNE_VENV": sys.prefix},
    )
    if made.returncode != 0 and re.search("No matching distribution|Could not find a version|connection", made.stderr):
        pytest.skip(
            f"openpi-client is not installed, and PyPI cannot be reached: {made.stderr.strip().splitlines()[-1]}"
        )
    assert made.returncode == 0, made.stdout + made.stderr
    return folder / "bin" / "python"


def drive(python: Path, port: int, *words: object) -> str:
    command = [python, "-m", "vlatune.eval.serving.robot_loop", "--port", port, *words]
    finished = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


def check_episodes(python: Path, benchmark: str, suite: str, task_id: int, orientation: str) -> None:
    """Two episodes of openpi's client: what the server reads is what this process's own simulator shows."""
    policy = RecordingPolicy()
    asked = reader(orientation=orientation, action_shape=(policy.horizon, policy.action_dim))
    metadata = {
        "checkpoint": "fake/step_000001",
        "robot": "libero_panda",
        "cameras": list(asked.cameras),
        "picture_orientation": orientation,
        "observation_offsets": [0],
        "action_horizon": policy.horizon,
        "needs_previous": False,
    }
    words = ["--benchmark", benchmark, "--suite", suite, "--tasks", task_id, "--episodes", 2, "--max-steps", 18]
    with running_server(policy, asked, metadata=metadata) as server:
        printed = drive(python, server.port, *words, "--num-executed-steps", 8)
    assert printed.count("failure after 18 steps, 3 decisions, median") == 2
    assert printed.endswith("0 of 2 episodes succeeded\n")
    assert [raw.instruction for raw in policy.seen] == [policy.seen[0].instruction] * 6
    own = load_benchmark(benchmark)
    task = own.suites()[suite][task_id]
    environment = own.make_environment(task, next(iter(own.protocols(suite).values())))
    for episode in range(2):
        shown = environment.reset(episode, 7)
        same_as_shown(policy.seen[3 * episode], shown)
        for action_A in policy.chunk_HA[:8]:
            shown = environment.step(action_A, render=True)
        same_as_shown(policy.seen[3 * episode + 1], shown)
    assert policy.seen[0].instruction == task.language
    environment.close()


def same_as_shown(raw: RawObservation, shown) -> None:
    for camera, picture in shown.images.items():
        np.testing.assert_array_equal(raw.images[camera][0], picture)
    np.testing.assert_allclose(raw.state_TS[0], shown.state_S, atol=1e-6)


@pytest.mark.slow
@pytest.mark.sim
def test_openpis_client_drives_pocket(client_python):
    check_episodes(client_python, "pocket", "pocket", 2, "rot180")


@pytest.mark.slow
@pytest.mark.sim
@pytest.mark.libero
def test_openpis_client_drives_libero(client_python):
    check_episodes(client_python, "libero", "libero_object", 0, "raw")


@pytest.mark.slow
def test_openpis_client_and_a_trained_policys_server(client_python, checkpoint):
    """With the key, a refusal as its RuntimeError, and its own broker of chunks."""
    server = Serving(checkpoint, **{API_KEY_VARIABLE: "k3y"})
    code = """
import sys, numpy as np
from openpi_client.action_chunk_broker import ActionChunkBroker
from openpi_client.websocket_client_policy import WebsocketClientPolicy
client = WebsocketClientPolicy("127.0.0.1", int(sys.argv[1]), api_key="k3y")
picture = np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3)
seen = {"observation/image": picture, "observation/wrist_image": picture, "observation/state": np.ones(8), "prompt": "reach it"}
try:
    client.infer({**seen, "prompt": 3})
except RuntimeError as error:
    print(error)
chunk = client.infer(seen)["actions"]
broker = ActionChunkBroker(client, action_horizon=3)
print(all(np.allclose(broker.infer(seen)["actions"], chunk[k % 3], atol=1e-5) for k in range(7)), np.__version__)
"""
    try:
        printed = subprocess.run(
            [client_python, "-c", code, str(server.port)], capture_output=True, text=True, check=True, timeout=120
        ).stdout
    finally:
        ended, errors = server.end(signal.SIGTERM)
    assert printed.splitlines() == [
        "Error in inference server:",
        "prompt is int 3; send the instruction as a text",
        "True 1.26.4",
    ]
    assert (ended, errors) == (0, "")


def test_suites_and_tasks_of_the_robot_loop():
    suites = load_benchmark("pocket").suites()
    assert len(tasks_of(suites, RobotLoopConfig())) == 4
    assert [task.task_id for task in tasks_of(suites, RobotLoopConfig(tasks=(2, 1)))] == [2, 1]
    with pytest.raises(ValueError, match="pocket has no suite 'pockt'; it has pocket, pocket_holdout"):
        tasks_of(suites, RobotLoopConfig(suite="pockt"))
    with pytest.raises(ValueError, match="suite pocket has no task 9; it has 0 to 3"):
        tasks_of(suites, RobotLoopConfig(tasks=(9,)))


def test_a_server_that_goes_leaves_no_simulator_open(monkeypatch):
    class GoneServer:
        def __init__(self, *_, **__) -> None: ...

        def get_server_metadata(self) -> dict:
            return {"checkpoint": "demo", "robot": "libero_panda", "action_horizon": 10, "observation_offsets": [0]}

        def infer(self, obs: dict) -> dict:
            raise AssertionError("not reached")

    def gone(*_):
        raise ConnectionError("the server has gone")

    closed = []
    environment = SimpleNamespace(
        robot=SimpleNamespace(action_limit=1.0), reset=gone, close=lambda: closed.append(True)
    )
    pocket = load_benchmark("pocket")
    benchmark = SimpleNamespace(
        suites=pocket.suites, protocols=pocket.protocols, make_environment=lambda *_: environment
    )
    monkeypatch.setattr(robot_loop, "load_benchmark", lambda _: benchmark)
    client = SimpleNamespace(WebsocketClientPolicy=GoneServer)
    monkeypatch.setitem(sys.modules, "openpi_client.websocket_client_policy", client)
    with pytest.raises(ConnectionError, match="the server has gone"):
        robot_loop.main([])
    assert closed == [True]
