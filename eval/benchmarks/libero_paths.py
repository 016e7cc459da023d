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


DOWNLOADED = Path("~/.cache/libero/assets")
"""Where LIBERO's own downloader (LeRobot's too) puts them."""
HOW_TO_DOWNLOAD = f"hf download lerobot/libero-assets --repo-type dataset --local-dir {DOWNLOADED}"


def require_assets() -> Path:
    """The folder of LIBERO's assets: the one that is set, else beside LIBERO, else where its downloader puts them.

    Raises `AssetsError` where there is none. Nothing is downloaded unasked."""
    given = os.environ.get(ASSETS_VARIABLE)
    candidates = [Path(given)] if given else [libero_folder() / "assets", DOWNLOADED.expanduser()]
    for folder in candidates:
        if (folder / "scenes").is_dir():
            return folder.resolve()
    raise AssetsError(
        f"LIBERO's suites need its assets, and no `scenes` folder is in {' or '.join(map(str, candidates))}: type "
        f"`{HOW_TO_DOWNLOAD}`, or set {ASSETS_VARIABLE} to a folder that has them (the benchmark `pocket` needs none)"
    )
