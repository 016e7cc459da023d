"""Where LIBERO and its assets are, found without importing LIBERO."""

import importlib.util
import os
from pathlib import Path

ASSETS_VARIABLE = "VLATUNE_LIBERO_ASSETS"


class AssetsError(Exception):
    """LIBERO's meshes and textures are not here; the message says what to set."""


def libero_folder() -> Path:
    """Where hf-libero is installed (`.../libero/libero`)."""
    spec = importlib.util.find_spec("libero")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            "LIBERO is not installed; `pip install --no-deps hf-libero==0.1.4` installs it (launch/install.sh does)"
        )
    return Path(next(iter(spec.submodule_search_locations))) / "libero"


def require_assets() -> Path:
    """The folder of LIBERO's assets; raises `AssetsError` where there is none."""
    given = os.environ.get(ASSETS_VARIABLE)
    folder = Path(given) if given else libero_folder() / "assets"
    if not (folder / "scenes").is_dir():
        raise AssetsError(
            f"LIBERO's suites need its assets, and {folder} has no `scenes` folder: set {ASSETS_VARIABLE} to the folder "
            "that has `scenes`, `textures` and the objects (the benchmark `pocket` needs none of them)"
        )
    return folder.resolve()
