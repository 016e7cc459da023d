"""Which torch to install on a machine without a GPU: never a CUDA build, which is several GB of no use there.

``launch/install.sh`` asks pip which file it would take from its configured sources (``pip install --dry-run --no-deps
--report - torch==X``) and pipes the answer in; what comes out are the arguments for the real ``pip install``, one a
line, or nothing where a fitting torch is there already. Standard library only: it runs before anything is installed.
"""

import json
import platform
import re
import sys
from collections.abc import Mapping
from typing import Any

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
GPU_PACKAGES = ("nvidia-", "cuda-", "triton", "pytorch-triton", "rocm")
"""How the names of the packages begin that only a build for GPUs asks for."""


def choose_torch(version: str, report: Mapping[str, Any], *, system: str) -> list[str]:
    """pip's arguments for torch `version` on `system` (as `platform.system()` says it), given pip's installation report
    (empty where pip found no file at all)."""
    if report and not report["install"]:
        return []
    if system != "Linux":  # there the ordinary builds are small
        return [f"torch=={version}"]
    if report and is_cpu_build(report["install"][0]["metadata"]):
        return [f"torch=={version}"]
    # The local version is on PyTorch's own index alone; torch's requirements may come from any source.
    return [f"torch=={version}+cpu", "--extra-index-url", CPU_INDEX]


def is_cpu_build(metadata: Mapping[str, Any]) -> bool:
    """Whether a torch file with this metadata runs without CUDA or ROCm libraries."""
    local = metadata["version"].partition("+")[2]
    if local:
        return bool(local.startswith("cpu"))
    return not any(requirement.lower().replace("_", "-").startswith(GPU_PACKAGES) for requirement in needed(metadata))


def needed(metadata: Mapping[str, Any]) -> list[str]:
    """The file's requirements, those of its extras left out."""
    return [line for line in metadata.get("requires_dist", ()) if not re.search(r";.*\bextra\b", line)]


def main() -> None:
    text = sys.stdin.read()
    report = json.loads(text) if text.strip() else {}
    print("\n".join(choose_torch(sys.argv[1], report, system=platform.system())))


if __name__ == "__main__":
    main()
