"""Which OpenGL draws the cameras: chosen once, before MuJoCo or robosuite is imported (both read `MUJOCO_GL` then)."""

import ctypes.util
import os
from pathlib import Path

KNOWN = ("egl", "osmesa", "glx", "glfw")
GPU_DEVICE = Path("/dev/nvidiactl")


class RendererError(Exception):
    """No OpenGL for off-screen cameras here; the message says what to type."""


def choose_renderer() -> str:
    """Set `MUJOCO_GL` (egl beside an NVIDIA GPU, otherwise osmesa, or egl where only that is installed) unless the caller's environment has, and return it.

    Raises `RendererError` where the library it needs is not installed. Cheap; safe to call again."""
    chosen = os.environ.get("MUJOCO_GL", "").lower().strip() or _default()
    if chosen not in KNOWN:
        raise RendererError(
            f"MUJOCO_GL is {chosen!r}, and rendering needs one of {', '.join(KNOWN)}: `unset MUJOCO_GL` picks one"
        )
    if chosen == "osmesa" and not _find("OSMesa"):
        raise RendererError(
            "no renderer: libOSMesa, which draws cameras without a GPU, is missing; install it with "
            "`apt-get install -y libosmesa6` (or, beside an NVIDIA GPU, set MUJOCO_GL=egl)"
        )
    if chosen == "egl" and not _find("EGL"):
        raise RendererError(
            "no renderer: MUJOCO_GL is egl and libEGL is missing; install it with `apt-get install -y libegl1` "
            "or draw on the CPU with `apt-get install -y libosmesa6` and MUJOCO_GL=osmesa"
        )
    os.environ["MUJOCO_GL"] = chosen
    if chosen in ("egl", "osmesa"):  # PyOpenGL, underneath, has its own switch
        os.environ.setdefault("PYOPENGL_PLATFORM", chosen)
    if chosen == "osmesa":  # no threads within a picture: ours are small, and simulators run side by side
        os.environ.setdefault("LP_NUM_THREADS", "0")
    return chosen


def _default() -> str:
    if GPU_DEVICE.exists() and _find("EGL"):
        return "egl"
    # Newer distributions have no OSMesa; Mesa's EGL draws on a CPU too.
    return "egl" if _find("EGL") and not _find("OSMesa") else "osmesa"


def _find(library: str) -> str | None:
    return ctypes.util.find_library(library)
