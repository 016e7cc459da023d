"""The environment of openpi's client; that it is made and works is shown by tests/eval/test_serving_command.py."""

import os
import re
import subprocess
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"


def start(folder: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    command = ["bash", str(LAUNCH / "install_client.sh"), str(folder)]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=60, env={**os.environ, **environment}
    )


@pytest.mark.parametrize("name", ["thesis.tex", "pyvenv.cfg", "vlatune.stamp"])
def test_a_folder_that_is_not_its_own_is_left_alone(name, tmp_path):
    """Another's environment, too: vlatune's own has the last two."""
    (tmp_path / name).touch()
    finished = start(tmp_path)
    assert finished.returncode == 2
    assert finished.stderr == (
        f"vlatune: {tmp_path} is not empty and was not made by launch/install_client.sh; name another folder, or remove it.\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_one_that_was_broken_off_is_begun_anew(tmp_path):
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/bash\n[ "$1 $2" != "-m venv" ] || { mkdir -p "${@: -1}/bin" && cp "$0" "${@: -1}/bin/python"; exit; }\n'
        f"[ -e {tmp_path}/online ]\n"
    )
    python.chmod(0o755)
    folder = tmp_path / "client"
    assert start(folder, VLATUNE_PYTHON=str(python)).returncode == 1
    (folder / "half").mkdir()
    (tmp_path / "online").touch()
    finished = start(folder, VLATUNE_PYTHON=str(python))
    assert finished.returncode == 0, finished.stderr
    assert (folder / "vlatune.stamp").exists() and not (folder / "half").exists()


def test_what_it_installs_is_pinned(tmp_path):
    """With a Python that makes environments of stubs."""
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/bash\n[ "$1 $2" != "-m venv" ] || { mkdir -p "${@: -1}/bin" && cp "$0" "${@: -1}/bin/python"; exit; }\n'
        f'echo "$*" >>{tmp_path}/calls\n'
    )
    python.chmod(0o755)
    folder = tmp_path / "client"
    for _ in range(2):  # the second finds nothing to do
        finished = start(folder, VLATUNE_PYTHON=str(python))
        assert finished.returncode == 0, finished.stderr
    calls = (tmp_path / "calls").read_text().splitlines()
    pips = [call for call in calls if call.startswith("-m pip")]
    assert len(pips) == 5
    assert all(f"--constraint {folder}/constraints.txt" in call for call in pips)
    pins = dict(
        line.split("#")[0].strip().split("==")
        for line in (folder / "constraints.txt").read_text().splitlines()
        if "==" in line
    )
    wanted = re.findall(r"[\w-]+", " ".join(pips[1].split("txt ")[1:] + pips[2].split("txt ")[1:]))
    unpinned = {name for name in wanted if name not in pins}
    assert unpinned == {"typing_extensions"}
    assert pins["numpy"].startswith("1.")
    assert pins["mujoco"] == "3.3.2"
