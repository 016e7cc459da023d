"""Without a GPU, torch comes as a CPU build, from wherever there is one."""

import json
import subprocess
import sys

import pytest

from vlatune.launch import choose_torch as module
from vlatune.launch.choose_torch import CPU_INDEX, choose_torch

FROM_CPU_INDEX = ["torch==2.13.0+cpu", "--extra-index-url", CPU_INDEX]
COMMON = ["filelock", "typing-extensions>=4.10.0", "sympy>=1.13.3", "networkx>=2.5.1", "jinja2"]
EXTRAS = ['optree>=0.13.0; extra == "optree"', 'triton>=3; extra == "compile"', "nvidia-ml-py; (extra == 'monitor')"]
# What PyPI's Linux file of torch 2.13.0 asks for.
CUDA = [
    'cuda-toolkit[cublas,cudart]==13.0.3; platform_system == "Linux"',
    'nvidia-cudnn-cu13==9.20.0.48; platform_system == "Linux"',
    'triton==3.7.1; platform_system == "Linux" and python_version < "3.15"',
]


def report(version: str, requires: list[str]) -> dict:
    return {"version": "1", "install": [{"metadata": {"name": "torch", "version": version, "requires_dist": requires}}]}


def test_cpu_build_comes_from_the_configured_source():
    assert choose_torch("2.13.0", report("2.13.0+cpu", COMMON + EXTRAS), system="Linux") == ["torch==2.13.0"]
    assert choose_torch("2.13.0", report("2.13.0", COMMON + EXTRAS), system="Linux") == ["torch==2.13.0"]


@pytest.mark.parametrize("line", [*CUDA, "nvidia_nccl_cu12==2.29.7", "pytorch-triton-rocm==3.5"])
def test_gpu_build_is_never_taken(line):
    """Any one of these lines gives it away."""
    assert choose_torch("2.13.0", report("2.13.0", [*COMMON, line]), system="Linux") == FROM_CPU_INDEX


@pytest.mark.parametrize("local", ["cu130", "rocm6.4", "xpu"])
def test_gpu_build_by_its_version(local):
    assert choose_torch("2.13.0", report(f"2.13.0+{local}", COMMON), system="Linux") == FROM_CPU_INDEX


def test_no_file_at_all_or_no_answer():
    assert choose_torch("2.13.0", {}, system="Linux") == FROM_CPU_INDEX


def test_already_installed():
    assert choose_torch("2.13.0", {"version": "1", "install": []}, system="Linux") == []


def test_elsewhere_than_linux_the_default_build_is_small():
    """The CPU index has no `+cpu` files for macOS."""
    assert choose_torch("2.13.0", report("2.13.0", COMMON + CUDA), system="Darwin") == ["torch==2.13.0"]


def test_as_the_installer_calls_it():
    def out(text: str) -> str:
        command = [sys.executable, module.__file__, "2.13.0"]
        return subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout

    assert out(json.dumps(report("2.13.0", COMMON + CUDA))).split() == FROM_CPU_INDEX
    assert out("").split() == FROM_CPU_INDEX
    assert out(json.dumps({"install": []})).split() == []
