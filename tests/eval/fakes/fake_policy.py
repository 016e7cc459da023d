"""A policy that sees the dots, reads the instruction and trembles: the less, the more `skill` its checkpoint has."""

import copy
import json
import sys
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
from fake_point_world import COLOURS, PX

from vlatune.eval.run_folder import Checkpoint
from vlatune.eval.sweep import SweepConfig


class FakePolicy:
    cameras = ("agentview",)
    observation_offsets = (0,)
    horizon = 10
    action_dim = 7
    robot = "libero_panda"
    device = "cpu"

    def __init__(self, skill: float, weights_hash: str, delay_s: float = 0.0, num_candidates: int = 1):
        self.skill, self.weights_hash, self.delay_s = skill, weights_hash, delay_s
        self.num_sampling_steps = 4
        self.num_candidates = num_candidates
        self.reads_previous = num_candidates > 1
        self.noise_shape = (10, 7) if num_candidates == 1 else (num_candidates, 10, 7)
        self.previous_seen: list[np.ndarray] = []
        self.batch_sizes: list[int] = []
        self.cameras_seen: set[str] = set()

    @property
    def sampling(self):
        settings = {"solver": "euler", "num_sampling_steps": self.num_sampling_steps}
        return settings if self.num_candidates == 1 else {**settings, "num_candidates": self.num_candidates}

    def with_sampling_steps(self, num_sampling_steps):
        """One step trembles twice as much."""
        other = copy.copy(self)
        other.num_sampling_steps = num_sampling_steps
        other.skill = self.skill if num_sampling_steps > 1 else 2 * self.skill - 1
        return other

    def act(self, observations, noise_BHA, *, previous=None, num_executed_steps=None, inference_delay=0):
        """With several candidates: trembles as candidate 0 does at an episode's first decision, as candidate 1 at later ones."""
        self.batch_sizes.append(len(observations))
        if self.num_candidates > 1:
            assert num_executed_steps is not None
            self.previous_seen.append(previous)
            began = np.isnan(previous).any(axis=(1, 2))
            noise_BHA = noise_BHA[np.arange(len(began)), np.where(began, 0, 1)]
        time.sleep(self.delay_s)
        chunks = []
        for raw, noise_HA in zip(observations, noise_BHA, strict=True):
            self.cameras_seen |= set(raw.images)
            image = raw.images["agentview"][0]
            channel = next(k for k, colour in enumerate(COLOURS) if colour in raw.instruction)
            seen = np.argwhere(image[:, :, channel])
            target = seen[0] / (PX - 1) * 2 - 1 if len(seen) else np.zeros(2)
            way = target - raw.state_TS[0, :2]
            chunk_HA = np.zeros((self.horizon, 7), np.float32)
            left = way.copy()
            for action_A in chunk_HA:
                action_A[:2] = np.clip(left / 0.1, -1, 1)
                left -= 0.1 * action_A[:2]
            chunk_HA[:, :2] = self.skill * chunk_HA[:, :2] + (1 - self.skill) * noise_HA[:, :2]
            chunks.append(chunk_HA)
        return np.stack(chunks)


def load_policy(checkpoint: Checkpoint, config: SweepConfig) -> FakePolicy:
    settings = json.loads((checkpoint.path / "fake.json").read_text())
    if checkpoint.averaged:
        settings |= json.loads((checkpoint.path / "ema.safetensors").read_text())
    return FakePolicy(**settings, num_candidates=config.num_candidates)


def load_mortal_policy(checkpoint: Checkpoint, config: SweepConfig, *, last_row: int) -> FakePolicy:
    """One that decides nothing more once so many episodes are written: its sweep waits for its death, and never ends before it."""
    policy = load_policy(checkpoint, config)
    act, log = policy.act, config.runs[0] / "evaluation" / "episodes.csv"

    def act_or_wait(*arguments, **settings):
        if log.read_text().count("\n") > last_row:
            threading.Event().wait()
        return act(*arguments, **settings)

    policy.act = act_or_wait
    return policy


def write_run(run: Path, skills: dict[int, float], delay_s: float = 0.0) -> Path:
    """A run folder with a checkpoint of each skill, and a loss curve."""
    run.mkdir(parents=True)
    for step, skill in skills.items():
        folder = run / "checkpoints" / f"step_{step:06d}"
        folder.mkdir(parents=True)
        config = {"skill": skill, "weights_hash": f"{run.name}-{step}", "delay_s": delay_s}
        (folder / "fake.json").write_text(json.dumps(config))
        (folder / "COMPLETE").touch()
    lines = ["step,loss,validation_loss,grad_norm,learning_rate,samples_per_s,data_wait_share,elapsed_s"]
    for step in range(0, max(skills, default=0) + 1, 10):
        lines.append(f"{step},{1 / (1 + step / 50):.4f},{'' if step % 50 else 0.5},1.0,0.001,900,0.01,{step * 0.3:.1f}")
    (run / "metrics.csv").write_text("\n".join(lines) + "\n")
    (run / "config.json").write_text(json.dumps({"recipe": "fake", "seed": 0}))
    return run


def main() -> None:
    """A sweep of fakes as a process of its own, to be killed: fake_policy.py RUN TROUBLE [episodes of the selection half [the row after
    which it waits for that]]."""
    import fake_point_world

    from vlatune.data.episodes import DataError
    from vlatune.eval.sweep import sweep

    config = SweepConfig(
        runs=(Path(sys.argv[1]),),
        selection_episodes=int(sys.argv[3]) if len(sys.argv) > 3 else 4,
        report_episodes=5,
        controls=True,
        videos=0,
        num_workers=2,
        batch_size=2,
    )
    load = partial(load_mortal_policy, last_row=int(sys.argv[4])) if len(sys.argv) > 4 else load_policy
    try:
        sweep(config, make_benchmark=partial(fake_point_world.make, Path(sys.argv[2])), load_policy=load)
    except DataError as problem:
        sys.exit(f"fake sweep: {problem}")


if __name__ == "__main__":
    main()
