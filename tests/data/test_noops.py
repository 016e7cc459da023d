import numpy as np
import pytest

from vlatune.data.episodes import DataError, Episode
from vlatune.data.noops import moving_frames, without_noops

GRIPPER = 6


def actions(*rows: tuple[float, float]) -> np.ndarray:
    """(N, 7) from each frame's motion along x and its gripper."""
    actions_NA = np.zeros((len(rows), 7), np.float32)
    for n, (dx, gripper) in enumerate(rows):
        actions_NA[n, 0], actions_NA[n, GRIPPER] = dx, gripper
    return actions_NA


def test_the_rule():
    rows = [
        (0, 1),  # the first, still: dropped whatever its gripper says
        (1, -1),  # moves
        (0, -1),  # still, gripper as in the last kept one: dropped
        (0, 1),  # still, and the gripper changes: kept
        (9e-5, 1),  # less than 1e-4
        (2e-4, 1),  # more
        (0, -1),  # the gripper opens
        (0, -1),
    ]
    expected = [False, True, False, True, False, True, True, False]
    assert moving_frames(actions(*rows), GRIPPER).tolist() == expected


def test_every_part_of_the_episode_loses_the_same_frames():
    actions_NA = actions(*[(n % 3, -1) for n in range(10)])  # frames 0, 3, 6, 9 are still
    numbered = np.arange(10, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)
    episode = Episode(
        key="a",
        task="t",
        instruction="t",
        images={"front": [numbered[:4], numbered[4:7], numbered[7:]]},
        state_NS=np.arange(10, dtype=np.float32)[:, None],
        actions_NA=actions_NA,
    )
    kept = without_noops(episode, GRIPPER)
    assert kept.state_NS[:, 0].tolist() == kept.pictures("front")[:, 0, 0, 0].tolist() == [1, 2, 4, 5, 7, 8]
    np.testing.assert_array_equal(kept.actions_NA, actions_NA[[1, 2, 4, 5, 7, 8]])


def test_an_episode_that_never_moves_is_refused():
    episode = Episode(
        key="x_demo.hdf5/demo_0",
        task="t",
        instruction="t",
        images={},
        state_NS=np.zeros((3, 1), np.float32),
        actions_NA=actions((0, -1), (0, -1), (0, -1)),
    )
    with pytest.raises(
        DataError, match=r"x_demo.hdf5/demo_0 has no action that moves anything; .*without --drop-noops"
    ):
        without_noops(episode, GRIPPER)
