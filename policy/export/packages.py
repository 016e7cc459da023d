"""The packages of the extra `export`, which nothing else here needs."""

import importlib
from typing import Any


def needed(package: str) -> Any:
    """The module. Raises ValueError with what to type where it is not installed."""
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"ONNX needs the package {package}, which is not installed; type: pip install onnx onnxscript onnxruntime (to act with what "
            "was exported, onnxruntime is enough)"
        ) from error
