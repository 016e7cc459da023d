"""LeRobot's processor files: what a policy does to states, actions and text before and after the model.

policy_preprocessor.json and policy_postprocessor.json list steps in order; a step's numbers lie in the safetensors file that it
names. Here the step that normalises is read, and whole lists are written so that LeRobot loads them (layout of LeRobot 0.6,
`DataProcessorPipeline.save_pretrained`)."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ...data.episodes import DataError
from ...data.normalise import NEAR_CONSTANT, FieldStatistics, NormaliserMode, Statistics
from .renaming import OLD_STATISTICS
from .weight_files import read_weights

PREPROCESSOR, POSTPROCESSOR = "policy_preprocessor", "policy_postprocessor"
NORMALISER, UNNORMALISER = "normalizer_processor", "unnormalizer_processor"
STATE, ACTION = "observation.state", "action"
MODES: dict[str, NormaliserMode] = {
    "MEAN_STD": "mean_std",
    "QUANTILES": "quantile",
    "MIN_MAX": "min_max",
    "IDENTITY": "identity",
}
"""LeRobot's names -> ours."""
COLUMNS: dict[NormaliserMode, tuple[str, ...]] = {
    "mean_std": ("mean", "std"),
    "quantile": ("q01", "q99"),
    "min_max": ("min", "max"),
    "identity": (),
}
"""What a mode needs."""
ALL_COLUMNS = ("mean", "std", "min", "max", "q01", "q99")
EPSILON = 1e-8
"""LeRobot's: what it divides by where nothing varies."""
OLD_FEATURES = {"buffer_observation_state": STATE, "buffer_action": ACTION}
"""What they were called when they lay among the weights."""
HOW_TO_GIVE_STATISTICS = "add --statistics FILE (a normalisation.json, or a cache's statistics.json, of your robot)"

Step = tuple[str, Mapping[str, Any]]
"""Registered name, config."""


@dataclass(frozen=True, kw_only=True)
class Normalisation:
    """What a LeRobot checkpoint says about its normalisation, in our words."""

    statistics: Statistics
    state_mode: NormaliserMode
    action_mode: NormaliserMode
    near_constant: float
    tokenizer_name: str | None = None
    """A hub name, or the path of the folder in the checkpoint; None where no step says."""


def read_normalisation(
    folder: Path,
    config: Mapping[str, Any],
    weights: Mapping[str, Tensor] | None = None,
    *,
    statistics: Statistics | None = None,
) -> Normalisation:
    """From the processor files, or, where a checkpoint is older than those, from its `weights`; `config` is its config.json.

    The state's numbers are the pre-processor's, the action's the post-processor's; with `statistics` (ours) only the modes and the
    tokenizer are read. Raises DataError for a mode that is not ours, for relative actions, and where a mode's statistics are
    missing (LeRobot would silently not normalise) or wider than their feature."""
    pre, post = _steps(folder, PREPROCESSOR), _steps(folder, POSTPROCESSOR)
    relative = any(step["config"].get("enabled") for step in pre if step["name"] == "relative_actions_processor")
    if relative or config.get("use_relative_actions"):
        raise DataError(
            f"{folder} was trained on actions relative to the state (use_relative_actions), which vlatune does not do"
        )
    modes: Mapping[str, str] = config.get("normalization_mapping", {})
    if not pre and not post:
        state_source = action_source = _Source.among_weights(folder, weights or {}, modes)
    else:
        state_source = _Source.of_step(folder, PREPROCESSOR, pre, NORMALISER, modes)
        action_source = _Source.of_step(folder, POSTPROCESSOR, post, UNNORMALISER, modes)
    state_mode, action_mode = state_source.mode(STATE, "STATE"), action_source.mode(ACTION, "ACTION")
    theirs = statistics is None
    if statistics is None:
        statistics = Statistics(
            # Beside a constant LeRobot's state explodes (it divides by an epsilon); ours moves as a raw number would.
            state=with_room(
                state_source.field(STATE, state_mode, config.get("input_features") or {}),
                EPSILON,
                unit_room,
                constant_at=-1.0,
            ),
            # A constant action comes out constant, whatever the model says.
            actions=with_room(
                action_source.field(ACTION, action_mode, config.get("output_features") or {}),
                EPSILON,
                hardly_any_room,
                constant_at=-1.0,
            ),
        )
    return Normalisation(
        statistics=statistics,
        state_mode=state_mode,
        action_mode=action_mode,
        near_constant=EPSILON if theirs else NEAR_CONSTANT,
        tokenizer_name=_tokenizer_name(folder, pre),
    )


def normalization_mapping(state_mode: NormaliserMode, action_mode: NormaliserMode) -> dict[str, str]:
    """Our modes as LeRobot's config.json and its steps have them."""
    theirs = {ours: name for name, ours in MODES.items()}
    return {"VISUAL": "IDENTITY", "STATE": theirs[state_mode], "ACTION": theirs[action_mode]}


def write_processors(
    folder: Path,
    *,
    kind: str,
    statistics: Statistics,
    state_mode: NormaliserMode,
    action_mode: NormaliserMode,
    config: Mapping[str, Any],
    tokenizer_name: str,
    max_length: int,
    near_constant: float = NEAR_CONSTANT,
) -> None:
    """Both lists and their files, into an existing folder, for `kind` pi0, pi05 or smolvla, with the features of LeRobot's `config`
    (its config.json).

    Dimensions that our normaliser does not scale (under `near_constant`) get the numbers with which LeRobot's does the same."""
    norm_map = normalization_mapping(state_mode, action_mode)
    features = {**config["input_features"], **config["output_features"]}
    tensors = {
        f"{feature}.{column}": torch.tensor(values, dtype=torch.float32)
        for feature, field in ((STATE, statistics.state), (ACTION, statistics.actions))
        for column, values in _columns(with_room(field, near_constant, unit_room, constant_at=0.0)).items()
    }
    normalise: Step = (NORMALISER, {"eps": EPSILON, "features": features, "norm_map": norm_map})
    unnormalise: Step = (
        UNNORMALISER,
        {"eps": EPSILON, "features": dict(config["output_features"]), "norm_map": norm_map},
    )
    tokenise: Step = (
        "tokenizer_processor",
        {
            "max_length": max_length,
            "task_key": "task",
            "padding_side": "right",
            "padding": config.get("pad_language_to", "max_length"),
            "truncation": True,
            "tokenizer_name": tokenizer_name,
        },
    )
    # LeRobot's commands put the user's device in its place; the file itself must load on any machine.
    device: Step = ("device_processor", {"device": "cpu", "float_dtype": None})
    first: list[Step] = [("rename_observations_processor", {"rename_map": {}}), ("to_batch_processor", {})]
    relative: Step = ("relative_actions_processor", {"enabled": False, "exclude_joints": [], "action_names": None})
    absolute: Step = ("absolute_actions_processor", {"enabled": False})
    match kind:
        case "pi0":
            before = [*first, ("pi0_new_line_processor", {}), tokenise, device, relative, normalise]
            after = [unnormalise, absolute, device]
        case "pi05":
            # The prompt holds the normalised state, so this one normalises before it tokenises.
            prompt: Step = ("pi05_prepare_state_tokenizer_processor_step", {})
            before = [*first, relative, normalise, prompt, tokenise, device]
            after = [unnormalise, absolute, device]
        case "smolvla":
            before = [*first, ("smolvla_new_line_processor", {}), tokenise, device, normalise]
            after = [unnormalise, device]
        case _:
            raise ValueError(f"kind is {kind!r}; it can be pi0, pi05 or smolvla")
    _write_steps(folder, PREPROCESSOR, before, tensors)
    _write_steps(folder, POSTPROCESSOR, after, tensors)


def _write_steps(folder: Path, pipeline: str, steps: list[Step], tensors: dict[str, Tensor]) -> None:
    entries: list[dict[str, Any]] = []
    for index, (name, step_config) in enumerate(steps):
        entry: dict[str, Any] = {"registry_name": name, "config": step_config}
        if name in (NORMALISER, UNNORMALISER):
            entry["state_file"] = f"{pipeline}_step_{index}_{name}.safetensors"
            save_file(tensors, folder / entry["state_file"])
        entries.append(entry)
    (folder / f"{pipeline}.json").write_text(json.dumps({"name": pipeline, "steps": entries}, indent=2) + "\n")


def _steps(folder: Path, pipeline: str) -> list[dict[str, Any]]:
    """Each with `name`, `config` and perhaps `state_file`; empty if there is no such file."""
    file = folder / f"{pipeline}.json"
    if not file.is_file():
        return []
    try:
        steps = json.loads(file.read_text())["steps"]
        return [{"config": {}, **step, "name": step.get("registry_name") or step["class"]} for step in steps]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{file} is not a list of LeRobot's processor steps ({error!r}); copy it again") from error


@dataclass(frozen=True)
class _Source:
    """Where the statistics of one direction come from."""

    file: Path
    """For messages."""
    tensors: Mapping[str, Tensor]
    """`<feature>.<column>` -> (D,)."""
    modes: Mapping[str, str]
    """LeRobot's kind of feature -> LeRobot's mode."""
    unread: frozenset[str] = frozenset()
    """Features that the step leaves as they are."""

    @classmethod
    def of_step(
        cls, folder: Path, pipeline: str, steps: list[dict[str, Any]], name: str, modes: Mapping[str, str]
    ) -> "_Source":
        step = next((step for step in steps if step["name"] == name), None)
        if step is None:
            there = ", ".join(step["name"] for step in steps) or "no such file"
            raise DataError(
                f"{folder}/{pipeline}.json has no step {name} ({there}), so nothing says how to normalise; copy the whole "
                f"checkpoint, or {HOW_TO_GIVE_STATISTICS}"
            )
        state_file = step.get("state_file")
        file = folder / (state_file or f"{pipeline}.json")
        if state_file and not file.is_file():
            raise DataError(
                f"{folder}/{pipeline}.json names {state_file}, which is not there; copy the whole checkpoint, or {HOW_TO_GIVE_STATISTICS}"
            )
        chosen = step["config"].get("normalize_observation_keys")
        return cls(
            file=file,
            tensors=read_weights(file) if state_file else {},
            modes=step["config"].get("norm_map") or modes,
            unread=frozenset({STATE}) if chosen is not None and STATE not in chosen else frozenset(),
        )

    @classmethod
    def among_weights(cls, folder: Path, weights: Mapping[str, Tensor], modes: Mapping[str, str]) -> "_Source":
        found: dict[str, Tensor] = {}
        for name, tensor in weights.items():
            plain = name.removeprefix("model.")
            if plain.startswith(OLD_STATISTICS):
                feature, _, column = plain.partition(".")[2].rpartition(".")
                found[f"{OLD_FEATURES.get(feature, feature)}.{column}"] = tensor
        return cls(file=folder, tensors=found, modes=modes)

    def mode(self, feature: str, kind: str) -> NormaliserMode:
        """Raises DataError where it is not said, or not one of ours."""
        if feature in self.unread:
            return "identity"
        if kind not in self.modes:
            raise DataError(f"{self.file} does not say how {kind} is normalised: normalization_mapping must name it")
        if self.modes[kind] not in MODES:
            raise DataError(
                f"{self.file} normalises {kind} with {self.modes[kind]!r}, which vlatune does not have; it has {', '.join(MODES)}"
            )
        return MODES[self.modes[kind]]

    def field(self, feature: str, mode: NormaliserMode, features: Mapping[str, Any]) -> FieldStatistics:
        """Raises DataError where the mode's statistics are missing, not finite, or wider than in config.json's `features`."""
        columns = {
            column: tuple(self.tensors[f"{feature}.{column}"].double().flatten().tolist())
            for column in ALL_COLUMNS
            if f"{feature}.{column}" in self.tensors
        }
        missing = [column for column in COLUMNS[mode] if column not in columns]
        if missing:
            raise DataError(
                f"{self.file} has no {feature}.{missing[0]} to normalise with ({mode}); it has {self._described()}. To go on, "
                f"{HOW_TO_GIVE_STATISTICS}"
            )
        # Before processor files, LeRobot filled what nobody gave with infinity.
        endless = next((name for name in COLUMNS[mode] if not torch.tensor(columns[name]).isfinite().all()), None)
        if endless is not None:
            raise DataError(f"{self.file}: {feature}.{endless} is not finite; to go on, {HOW_TO_GIVE_STATISTICS}")
        width = math.prod(features[feature]["shape"]) if feature in features else None
        wide = next((name for name, values in columns.items() if width is not None and len(values) > width), None)
        if wide is not None:
            raise DataError(
                f"{self.file}: {feature}.{wide} has {len(columns[wide])} numbers, and config.json's {feature} has {width}; the two "
                f"are not of one checkpoint. Copy it again, or {HOW_TO_GIVE_STATISTICS}"
            )
        count = self.tensors.get(f"{feature}.count")
        return FieldStatistics(**columns, count=0 if count is None else int(count.flatten()[0]))

    def _described(self) -> str:
        names = sorted(self.tensors)
        return f"{len(names)} others: {', '.join(names[:3])}{', …' if len(names) > 3 else ''}" if names else "none"


def with_room(
    field: FieldStatistics, near_constant: float, room: Callable[[float], float], *, constant_at: float
) -> FieldStatistics:
    """The same, with `room(value)` on either side of the middle where nothing varies: the one value of such a dimension comes to
    lie at `constant_at` of -1 .. 1.

    LeRobot divides by an epsilon there, which puts it at -1; our normaliser only centres, which puts it at 0. Written out as
    numbers, both formulas agree."""
    columns = _columns(field)
    for low, high in (("q01", "q99"), ("min", "max")):
        if low in columns and high in columns:
            pairs = [
                (a, b) if (b - a) / 2 >= near_constant else _around((a + b) / 2, room((a + b) / 2), constant_at)
                for a, b in zip(columns[low], columns[high], strict=True)
            ]
            columns[low], columns[high] = tuple(a for a, _ in pairs), tuple(b for _, b in pairs)
    if "std" in columns:
        middles = columns.get("mean", columns["std"])
        columns["std"] = tuple(
            std if std >= near_constant else room(middle) for std, middle in zip(columns["std"], middles, strict=True)
        )
    return FieldStatistics(**columns, count=field.count)


def _around(value: float, room: float, constant_at: float) -> tuple[float, float]:
    middle = value - room * constant_at
    return middle - room, middle + room


def unit_room(value: float) -> float:
    return 1.0


def hardly_any_room(value: float) -> float:
    """A power of two, so that adding it to `value` in float32 loses next to nothing; above the epsilon under which nothing is scaled."""
    beside = math.ldexp(1.0, math.frexp(value)[1] - 16) if value else 0.0
    return max(2 * EPSILON, beside)


def _columns(field: FieldStatistics) -> dict[str, tuple[float, ...]]:
    return {name: getattr(field, name) for name in ALL_COLUMNS if getattr(field, name) is not None}


def _tokenizer_name(folder: Path, steps: list[dict[str, Any]]) -> str | None:
    name = next((step["config"].get("tokenizer_name") for step in steps if step["name"] == "tokenizer_processor"), None)
    # LeRobot saves a tokenizer that was given as an object into the checkpoint, and names it by its path there.
    return str(folder / name) if name is not None and (folder / name).is_dir() else name
