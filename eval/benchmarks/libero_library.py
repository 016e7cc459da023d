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
import zlib
from pathlib import Path

from ...data.files import write_whole
from .libero_paths import AssetsError, libero_folder, require_assets
from .renderer import choose_renderer


def _write_config() -> None:
    """LIBERO's `config.yaml`, outside anybody's home directory; renamed into place, as workers start together."""
    folder = libero_folder()
    ours = f"vlatune-libero-{os.getuid()}-{zlib.crc32(str(folder).encode()):08x}"
    config = Path(os.environ.setdefault("LIBERO_CONFIG_PATH", str(Path(tempfile.gettempdir()) / ours)))
    target = config / "config.yaml"
    if target.exists():
        return
    places = {
        "benchmark_root": folder,
        "bddl_files": folder / "bddl_files",
        "init_states": folder / "init_files",
        "datasets": folder.parent / "datasets",
        "assets": folder / "assets",
    }
    config.mkdir(parents=True, exist_ok=True)
    write_whole(target, "".join(f"{key}: {path}\n" for key, path in places.items()).encode())


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
