"""`profile.csv`: one row a setting."""

import json
import os
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.episodes import DataError
from .latency import Latency

if TYPE_CHECKING:
    import pandas as pd
    import torch

    from ..policy.acting import ActingPolicy

FILE_NAME = "profile.csv"


@dataclass(frozen=True, kw_only=True)
class ProfileRow:
    """One setting. Fields are the columns, in their order; `None` is an empty cell. `decision_ms`, `apart_ms`, `expert_call_ms` and the
    simulator's are medians; the parts of a decision are means over its middle half, and add up."""

    run: str
    """Name of the run's folder."""
    checkpoint: str
    """Folder of the checkpoint: `step_000400`, `step_000400-ema`."""
    step: int | None
    """Optimizer step of the checkpoint; empty for a converted one."""
    weights_hash: str
    objective: str
    sampling: str
    """All sampling settings, as JSON with sorted keys."""
    num_parameters: int
    batch_size: int
    """Observations of a decision."""
    num_sampling_steps: int
    """Integration (or denoising) steps per chunk."""
    num_expert_calls: int
    """Of a decision: as many as those steps, or more where the solver asks more than once a step."""
    horizon: int
    """Actions of a chunk."""
    num_executed_steps: int
    """Actions executed of each chunk before the next decision."""
    repeats: int
    """Decisions that were timed whole, and as many taken apart."""
    decision_ms: float
    """A decision: raw observations to raw actions, the device idle before and after."""
    decision_ms_p95: float
    decision_ms_p99: float
    """With less than 100 repeats nearly the slowest."""
    prepare_ms: float
    """Pictures turned and resized, texts tokenised, all of it stacked, on the host."""
    transfer_ms: float
    """Observation and noise to the device."""
    prefix_ms: float
    """What is computed once: the backbone, and what the expert makes of it."""
    expert_ms: float
    """All calls of the expert together."""
    expert_call_ms: float
    rest_ms: float
    """Between and after those calls: the solver's arithmetic, un-normalising, actions back to the host."""
    apart_ms: float
    """A whole decision while its parts are timed; beside `decision_ms` it says what that disturbs."""
    observations_per_s: float
    actions_per_s: float
    """Executed actions: `observations_per_s` times `num_executed_steps`."""
    benchmark: str
    """Whose simulator was measured; empty without one, as are the next three and all that it costs."""
    suite: str
    task: str
    renderer: str
    image_px: int
    """Side of the cameras' pictures."""
    physics_ms: float | None
    """A control step without pictures."""
    render_ms: float | None
    """All cameras' pictures of a control step."""
    reset_s: float | None
    """One reset, settling and first pictures included."""
    episode_steps: int | None
    """Control steps of the estimated episode; it and the next four are empty for batches, too."""
    episode_s: float | None
    """Estimate for one process that waits for its policy, videos and success left out."""
    episode_policy_s: float | None
    """Of these, seconds of decisions."""
    episode_physics_s: float | None
    episode_render_s: float | None
    device: str
    """`cpu`, `cuda`, `cuda:1`."""
    device_name: str
    threads: int
    """torch's on the processor."""
    cores: int
    """The machine's."""
    dtype: str
    """Of the weights."""
    load_average: float
    """Of the machine, over the minute before; well above 0 others were at work."""
    mujoco: str
    robosuite: str
    libero: str
    torch: str
    vlatune: str


COLUMNS = [field.name for field in fields(ProfileRow)]
_DTYPES: Mapping[Any, str] = {str: "str", int: "Int64", int | None: "Int64", float: "float64", float | None: "float64"}


def read(path: Path) -> "pd.DataFrame":
    """The rows of `profile.csv` (or of a folder that holds it, or of a run that holds `profile/profile.csv`) with the dtypes of the
    schema: text is never missing but empty. Raises `DataError` where there is none, or its columns are others."""
    import pandas as pd

    places = (path, path / FILE_NAME, path / "profile" / FILE_NAME)
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        raise DataError(f"no {FILE_NAME} at {path}; `vlatune profile RUN` writes RUN/profile/{FILE_NAME}")
    dtypes = {field.name: _DTYPES[field.type] for field in fields(ProfileRow)}
    found = list(pd.read_csv(file, nrows=0).columns)
    if found != COLUMNS:
        raise DataError(f"{file} has other columns than this version writes; type `vlatune profile` again")
    missing = {column: [""] for column, dtype in dtypes.items() if dtype != "str"}
    return pd.read_csv(file, dtype=dtypes, keep_default_na=False, na_values=missing)


def row_of(
    latency: Latency,
    num_executed_steps: int,
    sampling: Mapping[str, Any],
    episode_steps: int,
    episode: Mapping[str, float] | None,
    same: Mapping[str, Any],
) -> ProfileRow:
    """The row of one setting. `episode`: seconds by cause, if one was estimated; `same`: the columns that all rows share."""
    per_s = 1e3 * latency.batch_size / latency.median_ms
    parts = latency.parts_ms
    times: dict[str, Any] = {
        "decision_ms": latency.median_ms,
        "decision_ms_p95": latency.percentile_ms(95),
        "decision_ms_p99": latency.percentile_ms(99),
        **{f"{part}_ms": ms for part, ms in parts.items()},
        "expert_call_ms": latency.expert_call_ms,
        "apart_ms": latency.apart_ms,
        "observations_per_s": per_s,
        "actions_per_s": num_executed_steps * per_s,
    }
    estimated: dict[str, Any] = dict.fromkeys(
        ("episode_s", "episode_policy_s", "episode_physics_s", "episode_render_s")
    )
    if episode is not None:
        policy_s = sum(episode[part] for part in parts)
        seconds = (sum(episode.values()), policy_s, episode["physics"], episode["render"])
        estimated = {name: round(value, 4) for name, value in zip(estimated, seconds, strict=True)}
    return ProfileRow(
        **same,
        **{name: round(value, 4) for name, value in times.items()},
        **estimated,
        sampling=json.dumps(dict(sampling), sort_keys=True),
        batch_size=latency.batch_size,
        num_sampling_steps=latency.num_sampling_steps,
        num_expert_calls=latency.num_expert_calls,
        num_executed_steps=num_executed_steps,
        episode_steps=None if episode is None else episode_steps,
    )


def policy_columns(policy: "ActingPolicy") -> dict[str, Any]:
    """What the policy is, and what it runs on."""
    import torch

    return {
        "weights_hash": policy.weights_hash,
        "objective": policy.policy.config.objective.type,
        "num_parameters": sum(parameter.numel() for parameter in policy.policy.parameters()),
        "horizon": policy.horizon,
        "device": str(policy.device),
        "device_name": device_name(policy.device),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count() or 1,
        "dtype": str(next(policy.policy.parameters()).dtype).removeprefix("torch."),
    }


def device_name(device: "torch.device") -> str:
    """As the maker calls it; the processor's architecture where Linux does not say more."""
    if device.type == "cuda":
        import torch

        name: str = torch.cuda.get_device_name(device)
        return name
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.is_file() else None
    return model[1] if model else platform.machine()
