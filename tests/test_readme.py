"""README says what is true: its tree names every module, its Python runs, its commands exist."""

import pathlib
import re
import subprocess
import sys

import h5py
import numpy as np
import pytest
from small_policies import make_policy

from vlatune.data.cache import Cache
from vlatune.data.language import Language
from vlatune.launch.cli import COMMANDS
from vlatune.policy.checkpoints.folder import write_policy
from vlatune.policy.checkpoints.layout import COMPLETE
from vlatune.train.recipes import RECIPES

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
ROOMS = ("data", "policy", "train", "eval", "launch", "ds_configs")


def tree_paths() -> set[str]:
    """The files of README's tree, by their paths: folders are lines that end in a slash, two spaces deeper each."""
    block = re.search(r"```\n(data/ .*?)```", README, re.DOTALL)
    assert block is not None
    folders: list[str] = []
    found = set()
    for line in block[1].splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        name = line.split()[0].rstrip(",")
        folders = folders[:depth]
        if name.endswith("/"):
            folders.append(name)
        else:
            names = re.split(" {2,}", line.strip())[0].split(", ")
            found |= {"".join(folders) + name for name in names if "/" not in name}
    return found


def test_the_tree_names_every_module():
    modules = {
        str(path.relative_to(ROOT))
        for room in ROOMS
        for path in (ROOT / room).rglob("*")
        if path.suffix in (".py", ".sh") and path.name != "__init__.py"
    }
    assert modules - tree_paths() == set(), "not in README's tree"
    assert {path for path in tree_paths() if not (ROOT / path).exists()} == set(), "in README's tree but not there"


SAYS = ("load_policy", "(4, 7)"), ("MyFiles", "made my_cache")
"""Something of a snippet, and of what it prints here."""
ANALYSING = re.search(r"## Analysing the rows.*?(?=\n## )", README, re.DOTALL)
"""Its Python has a test of its own: tests/eval/test_readme_snippets.py."""


def test_the_python_runs(tmp_path):
    checkpoint = tmp_path / "runs" / "quickstart" / "pocket" / "checkpoints" / "step_002400"
    checkpoint.mkdir(parents=True)
    policy = make_policy()
    write_policy(checkpoint, policy, policy.state_dict(), Language.build(["put it there"], encoder="none"), {})
    (checkpoint / COMPLETE).write_text("")
    for task in ("fold_the_towel", "open_the_box"):
        write_strangers_file(tmp_path / "demos" / task / "episode_0.hdf5", 6)
    assert ANALYSING is not None
    snippets = re.findall(r"```python\n(.*?)```", README.replace(ANALYSING[0], ""), re.DOTALL)
    assert len(snippets) == len(SAYS)
    for snippet in snippets:
        finished = subprocess.run(
            [sys.executable, "-c", snippet], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert finished.returncode == 0, finished.stderr
        expected = next(printed for part, printed in SAYS if part in snippet)
        assert expected in finished.stdout
    cache = Cache.open(tmp_path / "my_cache")
    assert cache.robot.name == "two_arms"
    assert set(cache.episodes["instruction"]) == {"fold the towel", "open the box"}
    with h5py.File(tmp_path / "demos" / "fold_the_towel" / "episode_0.hdf5") as file:
        np.testing.assert_array_equal(cache.actions_NA[:6], file["action"][:].astype(np.float32))


def write_strangers_file(path, length):
    """As ALOHA and RDT have them."""
    random = np.random.default_rng(0)
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["observations/qpos"] = random.normal(size=(length, 14))
        file["action"] = random.normal(size=(length, 14))
        for camera in ("cam_high", "cam_left_wrist", "cam_right_wrist"):
            file[f"observations/images/{camera}"] = random.integers(0, 256, (length, 24, 32, 3), dtype=np.uint8)


@pytest.mark.parametrize("command", re.findall(r"^vlatune (\w+)", README, re.MULTILINE))
def test_the_commands_exist(command):
    assert command in COMMANDS


@pytest.mark.parametrize("recipe", re.findall(r"vlatune\.train\.run (\w+)", README))
def test_the_recipes_exist(recipe):
    assert recipe in RECIPES
