"""Plain vision and language models, as the hub has them: a backbone before it ever saw a robot."""

import json
from pathlib import Path

from torch import Tensor

from ...data.episodes import DataError
from . import renaming
from .weight_files import read_weights

PLAIN_MODELS = {
    "paligemma": renaming.PALIGEMMA,
    "smolvlm": renaming.SMOLVLM,
    "siglip": renaming.SIGLIP,
    "siglip_vision_model": renaming.SIGLIP,
    "clip": renaming.CLIP,
    "unet": renaming.UNET,
}
"""config.json's `model_type` (or `type`) -> names."""


def is_plain(folder: Path) -> bool:
    return _kind(folder) in PLAIN_MODELS


def read_plain(folder: Path) -> dict[str, Tensor]:
    """Weights under our names. Raises DataError if one is in no row of the model's table."""
    kind = _kind(folder)
    weights = read_weights(folder)
    ours, unknown = PLAIN_MODELS[kind].ours(weights)
    if unknown:
        raise DataError(f"{folder} has {len(unknown)} weights that a {kind} does not have, the first is {min(unknown)}")
    head = next(
        (weights[name] for name in ("lm_head.weight", "language_model.lm_head.weight") if name in weights), None
    )
    table = "backbone.language_model.embed_tokens.weight"
    return ours if head is None or table in ours else {**ours, table: head}  # tied: the file holds one of the two


def local_folder(source: str) -> Path:
    """A folder, or what the hub has under that name. Raises DataError if it is neither."""
    if Path(source).exists():
        return Path(source)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, ignore_patterns=["*.msgpack", "*.h5", "*.onnx", "*.gguf"]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise DataError(
            f"there is no folder {source}, and the hub cannot give it ({str(error).splitlines()[0]}); give a folder, or a name "
            "that the Hugging Face hub has and this machine can reach"
        ) from error


def _kind(folder: Path) -> str:
    file = folder / "config.json"
    config = json.loads(file.read_text()) if file.is_file() else {}
    return str(config.get("model_type") or config.get("type"))
