"""The one door to LIBERO and robosuite: importing this module imports them with their traps defused.

LIBERO asks questions on a terminal when its `config.yaml` is missing, asks the Hugging Face hub for assets when a
problem is built, and prints on import. So: its configuration is written first, at a place of ours; the hub is never
asked; what it prints is swallowed. Takes seconds: import it inside functions, or from modules that only a simulator
needs.
"""

import contextlib
import io
import logging
import os
import tempfile
from pathlib import Path

from .libero_paths import AssetsError, libero_folder, require_assets
from .renderer import choose_renderer


def _write_config() -> None:
    """LIBERO's `config.yaml`, outside anybody's home directory; renamed into place, as workers start together."""
    folder = libero_folder()
    default = Path(tempfile.gettempdir()) / f"vlatune-libero-{os.getuid()}"
    config = Path(os.environ.setdefault("LIBERO_CONFIG_PATH", str(default)))
    config.mkdir(parents=True, exist_ok=True)
    places = {
        "benchmark_root": folder,
        "bddl_files": folder / "bddl_files",
        "init_states": folder / "init_files",
        "datasets": folder.parent / "datasets",
        "assets": folder / "assets",
    }
    text = "".join(f"{key}: {path}\n" for key, path in places.items())
    target = config / "config.yaml"
    if target.exists() and (target.read_text() == text or config != default):
        return  # a configuration that the user chose is the user's
    with tempfile.NamedTemporaryFile("w", dir=config, suffix=".tmp", delete=False) as temporary:
        temporary.write(text)
    Path(temporary.name).replace(target)


choose_renderer()
os.environ.setdefault("HF_HUB_OFFLINE", "1")
_write_config()
logging.getLogger("robosuite_logs").setLevel(logging.ERROR)  # it warns about a private macro file at each start
with contextlib.redirect_stdout(io.StringIO()):
    import libero.libero as libero_root
    import libero.libero.envs as libero_envs
    import robosuite
    from robosuite.utils.binding_utils import MjRenderContext

# LIBERO's memory of where its assets are: with it set, to any folder that exists, nothing asks the hub.
libero_root._assets_path_cache = str(libero_folder())

_free = MjRenderContext.__del__


def _free_in_own_context(context: MjRenderContext) -> None:
    """robosuite frees textures and frame buffers by their numbers in whichever OpenGL context is current, and so takes
    those of another environment in the same process."""
    context.gl_ctx.make_current()
    _free(context)


MjRenderContext.__del__ = _free_in_own_context


def use_assets() -> None:
    """Point LIBERO at its assets; raises `AssetsError` where there are none."""
    libero_root._assets_path_cache = str(require_assets())


__all__ = ["AssetsError", "libero_envs", "robosuite", "use_assets"]
