"""Our checkpoint folder: everything that acting needs, nothing that needs pickle.

step_000400/
    model.safetensors     weights, under the names of `Policy.state_dict()`; of a run that freezes some, what it trains
    base.json             where the frozen ones are, and their sha256: an earlier checkpoint of the run
    adapter/              LoRA adapters, in PEFT's own format
    ema.safetensors, ema_adapter/   the same, averaged over training, where the run keeps an average
    config.json           the resolved policy config and the embodiment it is tied to
    normalisation.json    statistics of state and actions
    language/             tokenizer and the instructions seen in training
    trainer/              optimizer state for resuming; only in the newest checkpoints
    COMPLETE              written last
"""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...data.episodes import DataError
from ...data.language import Language
from ...data.normalise import Statistics
from ..config import Embodiment, PolicyConfig
from ..lora import adapter_of, merge_adapter, merged_weights, plain_weights, save_adapter
from ..policy import Policy
from .layout import COMPLETE, EMA
from .weight_files import load_strict

FORMAT_VERSION = 3
WEIGHTS, BASE, ADAPTER = "model.safetensors", "base.json", "adapter"
EMA_ADAPTER = "ema_adapter"
Config = TypeVar("Config")
_ABSENT = object()


def write_policy(
    folder: Path,
    policy: Policy,
    weights: Mapping[str, Tensor],
    language: Path | Language,
    provenance: Mapping[str, Any],
    *,
    base: Path | None = None,
) -> None:
    """Write all but COMPLETE into an existing folder. `weights` are the policy's, gathered and on any device; `language` is one
    that was loaded, or the folder of one.

    With a `base`, a model.safetensors within reach of `folder`'s final place, only trained parameters and adapters are written;
    without one, every weight, with the adapters merged into them."""
    if base is not None:
        reference = {"weights": f"../{base.parent.name}/{base.name}", "sha256": _sha256(base)}
        (folder / BASE).write_text(json.dumps(reference, indent=1) + "\n")
    write_weights(folder, policy, weights, whole=base is None)
    config = {
        "format_version": FORMAT_VERSION,
        "policy": dataclasses.asdict(policy.config),
        "embodiment": dataclasses.asdict(policy.embodiment),
        "provenance": dict(provenance),
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    policy.statistics.save(folder / "normalisation.json")
    if isinstance(language, Language):
        language.save(folder / "language")
    else:
        shutil.copytree(language, folder / "language", dirs_exist_ok=True)


def write_weights(
    folder: Path, policy: Policy, weights: Mapping[str, Tensor], *, whole: bool, averaged: bool = False
) -> None:
    """The weights alone; `averaged`: under the names of the average. `policy` must hold them, too."""
    weights_name, adapter_name = (EMA, EMA_ADAPTER) if averaged else (WEIGHTS, ADAPTER)
    if whole:
        written = merged_weights(policy, weights)
    else:
        trained = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
        written = {name: tensor for name, tensor in plain_weights(policy, weights).items() if name in trained}
        if adapter_of(policy) is not None:
            save_adapter(policy, weights, folder / adapter_name)
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in written.items()}, folder / weights_name)


def read_policy(folder: Path, *, averaged: bool = False) -> tuple[Policy, Language, str]:
    """The policy with its weights (float32 as stored, on the CPU), its language, and its weights' hash; `averaged`: with the
    average over training.

    Raises DataError if the folder is no complete checkpoint of this format, or its weights do not fit its config."""
    if not (folder / COMPLETE).exists():
        raise DataError(
            f"{folder} is not a complete checkpoint (it has no file {COMPLETE}); give a folder like RUN/checkpoints/step_001000"
        )
    config = json.loads((folder / "config.json").read_text())
    if config.get("format_version") != FORMAT_VERSION:
        raise DataError(
            f"{folder} has checkpoint format {config.get('format_version')!r}, this vlatune reads {FORMAT_VERSION}; "
            "use the vlatune that wrote it"
        )
    policy = Policy(
        _parsed(PolicyConfig, config["policy"], folder),
        _parsed(Embodiment, config["embodiment"], folder),
        Statistics.load(folder / "normalisation.json"),
    )
    weights_file, adapter = (folder / EMA, folder / EMA_ADAPTER) if averaged else (folder / WEIGHTS, folder / ADAPTER)
    if not weights_file.is_file():
        raise DataError(f"{folder} has no {weights_file.name}: its run kept no average (ema.decay 0); give it without")
    weights, files = load_file(weights_file), [weights_file]
    if (folder / BASE).exists():
        base = _base_of(folder)
        weights, files = load_file(base) | weights, [*files, base]
    load_strict(policy, weights, weights_file)
    if adapter.is_dir():
        policy = merge_adapter(policy, adapter)
        files.append(adapter / "adapter_model.safetensors")
    # What the weights compute depends on these, too: another solver or orientation is another policy.
    settings = json.dumps([config["policy"], config["embodiment"]], sort_keys=True)
    parts = [settings, *map(_sha256, (folder / "normalisation.json", *files))]
    digest = hashlib.sha256("".join(parts).encode()).hexdigest()
    return policy, Language.load(folder / "language"), digest[:16]


def _base_of(folder: Path) -> Path:
    """The file with the weights that `folder`'s run kept frozen. Raises DataError if it is gone, or another one."""
    reference = json.loads((folder / BASE).read_text())
    file = folder / reference["weights"]
    if not file.is_file():
        raise DataError(
            f"{folder} stands on {file.resolve()}, which is not there; keep the run's checkpoints together, or write a whole one with "
            "`vlatune convert SOURCE OUT --to vlatune` where they still are"
        )
    if _sha256(file) != reference["sha256"]:
        raise DataError(
            f"{folder} stands on another {file.resolve()} than the one that is there: its sha256 is not the recorded one"
        )
    return file


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """Names the weights of a policy that is in no file of ours."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _parsed(kind: type[Config], stored: object, folder: Path) -> Config:
    """A config dataclass from its JSON. Unknown keys are errors; those that came later are missing in older checkpoints, and a field's
    default is what was before it."""
    try:
        config = TypeAdapter(kind).validate_python(stored)
    except ValidationError as error:
        first = error.errors()[0]
        raise DataError(f"{folder}/config.json: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    unknown = _unknown_keys(stored, json.loads(json.dumps(dataclasses.asdict(config))))  # type: ignore[call-overload]
    if unknown:
        raise DataError(
            f"{folder}/config.json: this vlatune's {kind.__name__} does not know {', '.join(unknown)}; use the vlatune that wrote it"
        )
    return config


def _unknown_keys(stored: object, known: object, place: str = "") -> list[str]:
    """Where `stored` has what `known` has not, or otherwise."""
    if isinstance(stored, dict) and isinstance(known, dict):
        inner = [_unknown_keys(stored[key], known.get(key, _ABSENT), f"{place}{key}.") for key in stored]
        return [name for names in inner for name in names]
    return [] if stored == known else [place.rstrip(".")]
