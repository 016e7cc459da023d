"""``vlatune check``: what is installed here and what is missing, each line with what to type about it."""

import importlib.metadata
import importlib.resources
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import threading
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

INSTALL = "bash launch/install.sh"
PACKAGES = (
    "torch",
    "deepspeed",
    "accelerate",
    "transformers",
    "peft",
    "sentencepiece",
    "numpy",
    "h5py",
    "pandas",
    "hf-libero",
    "robosuite",
    "mujoco",
    "bddl",
)
RENDER = """
import mujoco
scene = '<mujoco><worldbody><light pos="0 0 2"/><geom type="sphere" size=".3"/></worldbody></mujoco>'
model = mujoco.MjModel.from_xml_string(scene)
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
with mujoco.Renderer(model, 48, 64) as renderer:
    renderer.update_scene(data)
    image = renderer.render()
assert image.std() > 10, f"the rendered sphere is a flat image (brightest pixel {image.max()})"
"""


@dataclass(frozen=True, kw_only=True)
class CheckConfig:
    """Show what is installed here and what is missing, each with what to type. Exit code 1 if something needed is missing."""

    render: bool = True
    """Render a small scene in a subprocess: the only proof that there is a renderer (a second or two)."""
    hub: bool = True
    """Ask whether the Hugging Face hub answers (two seconds at most; nothing is downloaded)."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the table."""

    what: str
    status: Literal["ok", "note", "missing"]
    """`note` is something that vlatune can do without."""
    found: str
    mend: str = ""
    """What to type, where there is something to mend."""


def check_python() -> Finding:
    return Finding(what="Python", status="ok", found=f"{platform.python_version()} ({sys.executable})")


def pinned_versions() -> dict[str, str]:
    """package -> the version that every published figure was measured with."""
    text = importlib.resources.files("vlatune.launch").joinpath("constraints.txt").read_text()
    pins = (line.partition("#")[0].strip().split("==") for line in text.splitlines())
    return {pin[0].lower(): pin[1] for pin in pins if len(pin) == 2}


def check_package(name: str, pins: dict[str, str]) -> Finding:
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(what=name, status="missing", found="not installed", mend=INSTALL)
    pin = pins.get(name.lower(), version)
    if version.partition("+")[0] != pin.partition("+")[0]:
        return Finding(what=name, status="note", found=f"{version}, measured with {pin}", mend=INSTALL)
    return Finding(what=name, status="ok", found=version)


def check_accelerator() -> Finding:
    what = "accelerator"
    if importlib.util.find_spec("torch") is None:
        return Finding(what=what, status="missing", found="unknown: there is no torch", mend=INSTALL)
    import torch

    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        names = ", ".join(f"{device.name} {device.total_memory / 2**30:.0f} GiB" for device in devices)
        return Finding(what=what, status="ok", found=f"CUDA: {names}")
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    found = f"CPU: {available_cores()} cores, {memory_gib:.0f} GiB"
    if shutil.which("nvidia-smi") is None:
        return Finding(what=what, status="note", found=f"{found}; no NVIDIA GPU")
    mend = f"VLATUNE_TORCH=cuda {INSTALL}" if torch.version.cuda is None else "nvidia-smi"
    return Finding(what=what, status="note", found=f"{found}; torch {torch.__version__} sees no GPU here", mend=mend)


def available_cores() -> int:
    """Cores that this process may use: fewer than the machine has in a container or under SLURM."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_renderer() -> Finding:
    from ..eval.benchmarks.renderer import RendererError, choose_renderer

    try:
        chosen = choose_renderer()
    except RendererError as error:
        return Finding(what="renderer", status="missing", found="none", mend=str(error))
    try:
        run = subprocess.run([sys.executable, "-c", RENDER], capture_output=True, text=True, timeout=60, check=False)
        complaint = run.stderr.strip().splitlines()[-1:] if run.returncode else []
        failed = bool(run.returncode)
    except subprocess.TimeoutExpired:
        failed, complaint = True, ["no image after 60 s"]
    if failed:
        found = f"MUJOCO_GL={chosen} fails: {''.join(complaint) or 'it crashed'}"
        return Finding(what="renderer", status="missing", found=found, mend=other_renderer(chosen))
    return Finding(what="renderer", status="ok", found=f"MUJOCO_GL={chosen}")


def other_renderer(chosen: str) -> str:
    return f"sudo apt-get install -y libosmesa6, then {INSTALL}" if chosen == "osmesa" else "export MUJOCO_GL=osmesa"


def check_compiler() -> Finding:
    """torch.compile and the Adam of engine zero2_offload are built on first use."""
    compiler = os.environ.get("CXX", "c++")
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    lacking = {
        "g++": shutil.which(compiler) is None,
        f"python3.{sys.version_info.minor}-dev": not header.exists(),
        "ninja": shutil.which("ninja") is None and importlib.util.find_spec("ninja") is None,
    }
    names = [name for name, is_lacking in lacking.items() if is_lacking]
    if names:
        mend = (
            INSTALL if names == ["ninja"] else f"sudo apt-get install -y {' '.join(n for n in names if n != 'ninja')}"
        )
        return Finding(what="compiler", status="missing", found=f"no {', no '.join(names)}", mend=mend)
    return Finding(what="compiler", status="ok", found=f"{compiler}, ninja, Python.h")


def check_ffmpeg() -> Finding:
    if importlib.util.find_spec("imageio_ffmpeg") is None:
        return Finding(what="ffmpeg", status="missing", found="not installed", mend=INSTALL)
    import imageio_ffmpeg

    try:
        return Finding(what="ffmpeg", status="ok", found=f"{imageio_ffmpeg.get_ffmpeg_version()} (imageio)")
    except (RuntimeError, OSError) as error:
        return Finding(
            what="ffmpeg", status="missing", found=str(error).splitlines()[0], mend="sudo apt-get install -y ffmpeg"
        )


def check_libero_assets() -> Finding:
    """Only LIBERO's own suites need them; `pocket` brings its scene along."""
    from ..eval.benchmarks.libero_paths import ASSETS_VARIABLE, HOW_TO_DOWNLOAD, AssetsError, require_assets

    what = "LIBERO assets"
    mend = f"{HOW_TO_DOWNLOAD}, or export {ASSETS_VARIABLE}=/folder/with/scenes/and/textures"
    try:
        return Finding(what=what, status="ok", found=str(require_assets()))
    except (AssetsError, ModuleNotFoundError):
        if given := os.environ.get(ASSETS_VARIABLE):  # asked for, and not there
            return Finding(what=what, status="missing", found=f"{given} has no `scenes` folder", mend=mend)
        return Finding(what=what, status="note", found="none; the benchmark `pocket` needs none", mend=mend)


def check_hub() -> Finding:
    """Public weights and tokenizers come from the Hugging Face hub; the quickstart needs none of them."""
    what = "Hugging Face hub"
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        return Finding(what=what, status="note", found="off, as HF_HUB_OFFLINE says", mend="unset HF_HUB_OFFLINE")
    address = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    answers: list[bool] = []

    def ask() -> None:
        try:
            with urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=2):
                answers.append(True)
        except (OSError, ValueError):  # unreachable, refused, or HF_ENDPOINT is no address
            answers.append(False)

    # In a thread that may be left behind: looking up a name takes its own time, whatever the timeout says.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(2)
    if answers == [True]:
        return Finding(what=what, status="ok", found=address)
    return Finding(what=what, status="note", found=f"{address} does not answer", mend="give weights as local folders")


def findings(config: CheckConfig) -> Iterator[Finding]:
    """Every line of the table, in its order, each as soon as it is known."""
    yield check_python()
    pins = pinned_versions()
    for name in PACKAGES:
        yield check_package(name, pins)
    checks: list[Callable[[], Finding]] = [check_accelerator, check_compiler, check_ffmpeg, check_libero_assets]
    checks += [check_renderer] * config.render + [check_hub] * config.hub
    for check in checks:
        yield check()


def line(finding: Finding) -> str:
    mend = f"  →  {finding.mend}" if finding.mend else ""
    return f"{finding.status:8} {finding.what:17} {finding.found}{mend}"


def main(argv: Sequence[str] | None = None) -> None:
    import tyro

    config = tyro.cli(CheckConfig, args=argv)
    num_missing = 0
    for finding in findings(config):
        print(line(finding), flush=True)
        num_missing += finding.status == "missing"
    if num_missing:
        print(f"\n{num_missing} needed thing(s) missing: what to type stands beside each.")
        raise SystemExit(1)
    print("\nEverything that vlatune needs is here.")


if __name__ == "__main__":
    main()
