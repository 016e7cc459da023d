"""``vlatune serve CHECKPOINT``: a policy for robots and programs that are not ours, over a websocket.

An unmodified openpi-client is enough (`robot_loop.py` is an example). Nothing is kept between requests: what was decided before is the
client's to send along."""

import asyncio
import importlib.metadata
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import tyro

from ...data.images import Orientation
from ...data.raw_observation import RawObservation
from ...policy.execution import Compile, Precision
from ..run_folder import checkpoint_at, find_run
from .batching import Batcher, decide
from .limits import API_KEY_VARIABLE, Limits, read_api_key
from .observations import DELAY, EXECUTED, PREVIOUS, THERE, ObservationReader, Request
from .server import PolicyService
from .status import Status

if TYPE_CHECKING:
    from ...policy.acting import ActingPolicy

LOCAL = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Answer observations with action chunks over a websocket, as openpi's clients ask."""

    checkpoint: Annotated[Path, tyro.conf.Positional]
    """A run (its last checkpoint is taken), or a checkpoint's folder."""
    weights: Literal["raw", "ema"] = "raw"
    """The weights as trained, or their average over training."""
    device: str = "auto"
    """Where the policy runs: `auto`, `cpu`, `cuda`, `cuda:1`, …"""
    compile: Compile = "off"
    """Act through compiled programs: `on`, or `auto`, which does so on a GPU and says why where it cannot. A batch size or a prompt's
    length (in steps of 8 tokens) that has not come before takes its time once."""
    precision: Precision = "float32"
    """Of backbone and expert."""
    num_sampling_steps: int | None = None
    """Integration (or denoising) steps per chunk; as trained if not given."""
    num_candidates: int = 1
    """Chunks drawn for a decision, of which the one is taken that best goes on with the client's `previous_actions`."""
    real_time_chunking: Literal["off", "exponential", "linear", "ones", "zeros"] = "off"
    """Hold each chunk to what the client's `previous_actions` still have planned, so that a robot need not stop between chunks: what planned
    steps count, after those that the client's `inference_delay` says will be over."""
    max_guidance: float = 5.0
    """Real-time chunking: a correction's greatest weight; at most the number of sampling steps."""
    orientation: Orientation = "raw"
    """How pictures that come have been turned: `raw` (as a camera or simulator gives them) or, as openpi's LIBERO example sends them,
    `rot180`; it is undone, and the policy's own turning applied."""
    camera: Mapping[str, str] = field(default_factory=dict)
    """A camera of the policy and one more key of its picture, besides `observation/CAMERA` and `CAMERA`."""
    prompt: str = ""
    """The instruction for observations that bring none."""
    host: str = "127.0.0.1"
    """Where to listen; 0.0.0.0: for other machines, too."""
    port: int = 8000
    """0: the system chooses one, and the first line says which."""
    api_key_file: Path | None = None
    """A file with a key that clients must show; else the environment's VLATUNE_API_KEY, if it is set."""
    max_batch_size: int = 8
    """Requests that one forward answers at most."""
    warm_up: bool = True
    """Let the policy answer made-up observations before anybody is let in: at one, two, four, … up to the largest batch size, with
    one instruction: prompts of other lengths are not warm."""
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        for name, lowest in {"num_sampling_steps": 1, "num_candidates": 1, "max_batch_size": 1, "port": 0}.items():
            number = getattr(self, name)
            if number is not None and number < lowest:
                raise ValueError(f"--{name.replace('_', '-')} is {number}; at least {lowest} is needed")
        if self.port > 65_535:
            raise ValueError(f"--port is {self.port}; it can be 0 to 65535")


def main(argv: Sequence[str] | None = None) -> None:
    """The command line. Ctrl-C ends as with every command, after what runs is done; SIGTERM as well, with exit code 0; a
    second of either ends it at once, with 130 or 143.

    Raises `DataError` where a checkpoint or key is not there, `ValueError` where a setting does not fit the policy, or nobody can listen
    there; all of it before the first client."""
    config = tyro.cli(ServeConfig, args=None if argv is None else list(argv), prog="vlatune serve")
    api_key = read_api_key(config.api_key_file)
    run = find_run(config.checkpoint)
    checkpoint = checkpoint_at(config.checkpoint, run, averaged=config.weights == "ema")
    policy = load(config, checkpoint.path)
    reader = reader_of(policy, config)
    label = f"{run.name}/{checkpoint.name}"
    if asyncio.run(serve(policy, reader, label, api_key, config)) == signal.SIGINT:
        raise KeyboardInterrupt


async def serve(
    policy: "ActingPolicy",
    reader: ObservationReader,
    checkpoint: str,
    api_key: str | None,
    config: ServeConfig,
) -> signal.Signals:
    """Serves `checkpoint`, as clients are to call it, until a signal comes, and gives that. Raises `ValueError` where it cannot listen."""
    stop: asyncio.Future[signal.Signals] = asyncio.get_running_loop().create_future()
    batcher = Batcher(policy, max_batch_size=config.max_batch_size, max_waiting=config.limits.waiting)
    with Status() as status:
        try:
            _stop_at_signals(stop, status)
            if config.warm_up:
                await warm_up(batcher, policy, config, status)
            # Only now is it known whether the policy could be compiled.
            metadata = metadata_of(policy, reader, checkpoint)
            service = PolicyService(batcher=batcher, reader=reader, metadata=metadata, api_key=api_key, status=status)
            async with service.listening(config.host, config.port) as port:
                status.say(f"{checkpoint} of {policy.robot} listens on ws://{config.host}:{port}")
                if api_key is None and config.host not in LOCAL:
                    status.say(
                        f"no API key: whoever reaches port {port} is answered; --api-key-file or {API_KEY_VARIABLE} sets one"
                    )
                return await stop
        finally:
            await batcher.close()


def load(config: ServeConfig, folder: Path) -> "ActingPolicy":
    """Raises what `load_policy` and `with_sampling_steps` raise."""
    from ...policy.acting import load_policy
    from ...policy.objectives.real_time import RealTimeChunking

    policy = load_policy(
        folder,
        device=config.device,
        averaged=config.weights == "ema",
        num_candidates=config.num_candidates,
        real_time_chunking=RealTimeChunking.asked_for(config.real_time_chunking, config.max_guidance),
        compile=config.compile,
        precision=config.precision,
    )
    return policy if config.num_sampling_steps is None else policy.with_sampling_steps(config.num_sampling_steps)


def reader_of(policy: "ActingPolicy", config: ServeConfig) -> ObservationReader:
    """Raises `ValueError` for another key of a camera that the policy has not."""
    return ObservationReader(
        cameras=policy.cameras,
        num_offsets=len(policy.observation_offsets),
        state_dim=policy.policy.embodiment.state_dim,
        action_shape=(policy.horizon, policy.action_dim),
        reads_previous=policy.reads_previous,
        orientation=config.orientation,
        camera_keys=config.camera,
        default_prompt=config.prompt,
        limits=config.limits,
    )


def metadata_of(policy: "ActingPolicy", reader: ObservationReader, checkpoint: str) -> dict[str, Any]:
    """What a client is told on connecting: all that it must know to ask."""
    config, embodiment, limits = policy.policy.config, policy.policy.embodiment, reader.limits
    optional = [PREVIOUS, EXECUTED, DELAY] + ([THERE] if reader.num_offsets > 1 else [])
    return {
        "server": "vlatune",
        "version": importlib.metadata.version("vlatune"),
        "model": f"{config.backbone.type}, {config.expert.type}",
        "checkpoint": checkpoint,
        "weights_hash": policy.weights_hash,
        "sampling": dict(policy.sampling),
        "robot": policy.robot,
        "control_hz": embodiment.control_hz,
        "cameras": list(policy.cameras),
        "observation_keys": {name: list(keys) for name, keys in reader.keys.items()},
        "optional_keys": optional,
        "needs_previous": policy.reads_previous,
        "picture_orientation": reader.orientation,
        "observation_offsets": list(policy.observation_offsets),
        "state_dim": reader.state_dim,
        "action_horizon": policy.horizon,
        "action_dim": policy.action_dim,
        "prompt_style": config.prompt,
        "limits": {
            "message_bytes": limits.message_bytes,
            "picture_px": limits.picture_px,
            "prompt_characters": limits.prompt_characters,
            "requests_per_s": limits.requests_per_s,
        },
    }


async def warm_up(batcher: Batcher, policy: "ActingPolicy", config: ServeConfig, status: Status) -> None:
    """In the thread that will serve: what is compiled, captured or allocated at first use is then there, for one prompt's length."""
    for size in sorted({*(2**k for k in range(config.max_batch_size.bit_length())), config.max_batch_size}):
        requests = [made_up(policy, config)] * size
        for _ in range(2):  # the second time is what clients will see
            begun_s = time.perf_counter()
            await batcher.in_policys_thread(lambda r=requests: decide(policy, r))  # type: ignore[misc]
        status.say(f"warm at batch size {size}: {1000 * (time.perf_counter() - begun_s):.1f} ms")


def made_up(policy: "ActingPolicy", config: ServeConfig) -> Request:
    """Black pictures, a state of zeros, an instruction that the policy knows (or nearly any)."""
    num_offsets, px = len(policy.observation_offsets), policy.image_rule.size_px
    known = policy.language.known_texts
    return Request(
        raw=RawObservation(
            images={camera: np.zeros((num_offsets, px, px, 3), np.uint8) for camera in policy.cameras},
            state_TS=np.zeros((num_offsets, policy.policy.embodiment.state_dim), np.float32),
            instruction=config.prompt or (known[0] if known else "pick it up"),
        ),
        previous_HA=np.zeros((policy.horizon, policy.action_dim), np.float32) if policy.reads_previous else None,
        num_executed_steps=max(1, policy.horizon // 2) if policy.reads_previous else None,
    )


def _stop_at_signals(stop: "asyncio.Future[signal.Signals]", status: Status) -> None:
    """The first one stops in order; a second one, SIGINT or SIGTERM, ends the process at once, in the middle of a forward, too."""
    loop = asyncio.get_running_loop()

    def stopped_by(caught: signal.Signals) -> None:
        if stop.done():  # two can come at once
            return
        stop.set_result(caught)
        status.say(
            f"{caught.name}: no new clients; answering each client's request in progress; a second signal ends it at once"
        )
        loop.call_soon(hear, ended_by)

    def ended_by(caught: signal.Signals) -> None:
        status.say(f"{caught.name}: ended at once; requests in progress are not answered")
        os._exit(128 + caught)  # an ordinary exit would wait for the policy's thread

    def hear(handler: Callable[[signal.Signals], None]) -> None:
        for each in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(each, handler, each)

    hear(stopped_by)


if __name__ == "__main__":
    main()
