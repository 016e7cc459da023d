"""LIBERO's fixed init states: arrays in a pickle inside a zip, read without trusting the pickle."""

import io
import pickle
import zipfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ....data.episodes import DataError

ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}
"""All that a pickled array needs; none of it runs code of the file's choosing."""


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no array needs")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


@lru_cache(maxsize=8)
def load_init_states(path: Path) -> np.ndarray:
    """(n, D) float64. Raises `DataError` where the file is missing, damaged or holds anything but an array."""
    try:
        with zipfile.ZipFile(path) as archive:
            (name,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            states = _ArrayUnpickler(io.BytesIO(archive.read(name))).load()
    except (OSError, ValueError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        raise DataError(f"{path} is not a file of LIBERO init states ({error}); reinstall hf-libero==0.1.4") from error
    if not isinstance(states, np.ndarray) or states.ndim != 2:
        raise DataError(f"{path} holds no (n, D) array of init states; reinstall hf-libero==0.1.4")
    return states.astype(np.float64)
