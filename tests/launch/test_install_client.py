"""The environment of openpi's client; that it is made and works is shown by tests/eval/test_serving_command.py."""

import os
import re
import subprocess
from pathlib import Path

LAUNCH = Path(__file__).parents[2] / "launch"


def start(folder: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    command = ["bash", str(LAUNCH / "install_client.sh"), str(folder)]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=60, env={**os.environ, **environment}
    )


def test_a_folder_with_other_things_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").touch()
    finished = start(tmp_path)
    assert finished.returncode == 2
    assert finished.stderr == (
        f"vlatune: {tmp_path} is not a virtual environment and not empty; name another folder.\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


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
