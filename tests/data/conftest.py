"""Demonstrations for the data room's tests."""

from collections.abc import Callable
from pathlib import Path

import pytest
import small_demonstrations

WriteDemos = Callable[..., Path]


@pytest.fixture(scope="session")
def write_demos() -> WriteDemos:
    """`write_demos(path, lengths, ...)`."""
    return small_demonstrations.write_demos


@pytest.fixture
def demos(tmp_path: Path) -> Path:
    """A folder with two tasks, of 3 and 2 demonstrations; 16-pixel images."""
    folder = tmp_path / "demos"
    small_demonstrations.write_demos(folder / "pick_up_the_red_cube_demo.hdf5", (7, 5, 9), seed=1)
    small_demonstrations.write_demos(folder / "pick_up_the_blue_cube_demo.hdf5", (6, 4), seed=2)
    return folder
