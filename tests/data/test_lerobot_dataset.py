"""What is read from a LeRobot dataset."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_demonstrations import write_demos
from small_lerobot import (
    FRONT,
    WRIST,
    Recording,
    bars,
    change_column,
    change_info,
    numbers_in,
    open_dataset,
    read_pictures,
    recordings,
    whole,
    write_lerobot,
)

from vlatune.data.episodes import DataError
from vlatune.data.robots.libero_panda import LIBERO_PANDA, LIBERO_PANDA_JOINTS
from vlatune.data.sources.lerobot_dataset import task_names
from vlatune.data.sources.lerobot_hub import is_lerobot
from vlatune.data.sources.lerobot_pictures import BLOCK_FRAMES
from vlatune.data.sources.libero_hdf5 import LiberoHdf5Source

LAYOUTS = [(version, stored_as) for version in ("v2.0", "v2.1", "v3.0") for stored_as in ("video", "image")]


@pytest.fixture
def v2(tmp_path: Path) -> Path:
    return write_lerobot(tmp_path / "v2", recordings((7, 5)), version="v2.1", stored_as="image")


@pytest.fixture
def v3(tmp_path: Path) -> Path:
    return write_lerobot(tmp_path / "v3", recordings((7, 5, 9)))


@pytest.mark.parametrize(("version", "stored_as"), LAYOUTS)
def test_an_episode_is_what_was_recorded(version, stored_as, tmp_path):
    """In v3.0 two episodes share each file; the longest has more frames than a block."""
    recorded = recordings((7, BLOCK_FRAMES + 9, 5, 12, 6))
    source = open_dataset(write_lerobot(tmp_path, recorded, version=version, stored_as=stored_as))
    assert list(source.keys()) == [f"episode_{i:06d}" for i in range(5)]
    for key, recording in zip(source.keys(), recorded, strict=True):
        episode = source.read(key)
        assert episode.instruction == recording.instruction
        assert episode.task == recording.instruction.replace(" ", "_")
        for ours, theirs in (
            (episode.state_NS, recording.state_NS),
            (episode.actions_NA, recording.actions_NA),
            (whole(episode.images["agentview"]), recording.pictures[FRONT]),
            (whole(episode.images["eye_in_hand"]), recording.pictures[WRIST]),
            (whole(episode.images["agentview"]), recording.pictures[FRONT]),  # a second time
        ):
            np.testing.assert_array_equal(ours, theirs)
            assert ours.dtype == theirs.dtype
        assert max(len(block) for block in episode.images["agentview"]) <= BLOCK_FRAMES


@pytest.mark.parametrize("stored_as", ["video", "image"])
@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_an_hdf5_suite_converted_gives_the_same_episodes(version, stored_as, tmp_path):
    """Converted as LIBERO's published datasets were: pictures turned by 180 degrees."""
    for seed, task in enumerate(("pick_up_the_red_cube", "pick_up_the_blue_cube")):
        write_demos(tmp_path / f"{task}_demo.hdf5", (5, 7, 4), seed=seed)
    hdf5 = LiberoHdf5Source(tmp_path)
    demonstrations = list(map(hdf5.read, hdf5.keys()))
    for demonstration in demonstrations:
        demonstration.actions_NA[:, 6] = np.sign(demonstration.actions_NA[:, 6])
    converted = [
        Recording(
            instruction=it.instruction,
            state_NS=it.state_NS,
            actions_NA=it.actions_NA,
            pictures={
                FRONT: whole(it.images["agentview"])[:, ::-1, ::-1],
                WRIST: whole(it.images["eye_in_hand"])[:, ::-1, ::-1],
            },
        )
        for it in demonstrations
    ]
    folder = write_lerobot(tmp_path / "converted", converted, version=version, stored_as=stored_as)
    source = open_dataset(folder, stored_orientation="rot180")
    for key, demonstration in zip(source.keys(), demonstrations, strict=True):
        episode = source.read(key)
        assert (episode.task, episode.instruction) == (demonstration.task, demonstration.instruction)
        np.testing.assert_array_equal(episode.state_NS, demonstration.state_NS)
        np.testing.assert_array_equal(episode.actions_NA, demonstration.actions_NA)
        for camera in ("agentview", "eye_in_hand"):
            np.testing.assert_array_equal(whole(episode.images[camera]), whole(demonstration.images[camera]))


@pytest.mark.parametrize(
    ("orientation", "turned"),
    [("raw", lambda p: p), ("flipud", lambda p: p[:, ::-1]), ("rot180", lambda p: p[:, ::-1, ::-1])],
)
def test_pictures_are_turned_back(orientation, turned, tmp_path):
    (recording,) = recordings((4,))
    source = open_dataset(write_lerobot(tmp_path, [recording]), stored_orientation=orientation)
    pictures = whole(source.read("episode_000000").images["agentview"])
    np.testing.assert_array_equal(pictures, turned(recording.pictures[FRONT]))


def test_openpis_names(tmp_path):
    recorded = recordings((4, 6), keys=("image", "wrist_image"))
    folder = write_lerobot(
        tmp_path, recorded, version="v2.0", stored_as="image", state="state", action="actions", fps=10
    )
    episode = open_dataset(folder).read("episode_000001")
    np.testing.assert_array_equal(whole(episode.images["eye_in_hand"]), recorded[1].pictures["wrist_image"])
    np.testing.assert_array_equal(episode.state_NS, recorded[1].state_NS)


def test_cameras_of_other_names_are_chosen(tmp_path):
    keys = ("observation.images.front", "observation.images.wrist_image", "observation.images.side")
    recorded = recordings((4,), keys=keys)
    folder = write_lerobot(tmp_path, recorded)
    with pytest.raises(
        DataError, match=rf"is the robot's agentview\? Its cameras: {', '.join(keys)}; .*--camera agentview {keys[0]}"
    ):
        open_dataset(folder)
    episode = open_dataset(folder, cameras={"agentview": keys[2]}).read("episode_000000")
    np.testing.assert_array_equal(whole(episode.images["agentview"]), recorded[0].pictures[keys[2]])
    np.testing.assert_array_equal(whole(episode.images["eye_in_hand"]), recorded[0].pictures[keys[1]])
    with pytest.raises(DataError, match=r"no camera 'observation\.images\.top'; its cameras: observation\.images\.fro"):
        open_dataset(folder, cameras={"agentview": "observation.images.top"})
    with pytest.raises(DataError, match="libero_panda has no camera 'front'; it has agentview, eye_in_hand"):
        open_dataset(folder, cameras={"front": keys[0]})


def test_two_keys_that_could_be_a_camera_are_asked_about(tmp_path):
    folder = write_lerobot(tmp_path, recordings((4,), keys=(FRONT, WRIST, "observation.images.wrist_image")))
    with pytest.raises(DataError, match=r"is the robot's eye_in_hand\?"):
        open_dataset(folder)


def test_a_robot_whose_state_is_the_joints(tmp_path):
    """As wide as the end effector's, so that the width alone would let it through."""
    folder = write_lerobot(tmp_path, recordings((4,)))
    with pytest.raises(DataError, match="'joint_positions'.*choose another robot card"):
        open_dataset(folder, robot=LIBERO_PANDA_JOINTS)
    file = folder / "data/chunk-000/file-000.parquet"
    table, joints = pq.read_table(file), np.arange(28, dtype=np.float32).reshape(4, 7)
    pq.write_table(table.append_column("observation.states.joint_state", pa.array(joints.tolist())), file)
    features = json.loads((folder / "meta/info.json").read_text())["features"]
    change_info(folder, features={**features, "observation.states.joint_state": {"dtype": "float32", "shape": [7]}})
    state_NS = open_dataset(folder, robot=LIBERO_PANDA_JOINTS).read("episode_000000").state_NS
    np.testing.assert_array_equal(state_NS[:, :7], joints)
    assert state_NS.shape == (4, 8)


def test_a_robot_of_ones_own(tmp_path):
    """Its card has no parts: the state is taken whole. A single number a frame is stored without a list."""
    robot = replace(
        LIBERO_PANDA,
        name="slider",
        state_names=("x_m",),
        state_parts=(),
        action_names=("dx",),
        cameras=("front",),
        still_action=(0.0,),
        gripper_action=0,
        gripper_open=0.0,
    )
    (recording,) = recordings((4,), keys=("observation.images.front",))
    recording = replace(recording, state_NS=recording.state_NS[:, :1], actions_NA=abs(recording.actions_NA[:, :1]))
    folder = write_lerobot(tmp_path, [recording])
    change_column(folder / "data/chunk-000/file-000.parquet", "action", pa.array(recording.actions_NA[:, 0]))
    episode = open_dataset(folder, robot=robot).read("episode_000000")
    np.testing.assert_array_equal(episode.state_NS, recording.state_NS)
    np.testing.assert_array_equal(episode.actions_NA, recording.actions_NA)
    assert list(episode.images) == ["front"]


def test_depth_and_odd_cameras_are_left_out(v2):
    features = json.loads((v2 / "meta/info.json").read_text())["features"]
    depth = {"dtype": "video", "shape": [16, 24, 3], "info": {"video.is_depth_map": True}}
    change_info(v2, features={**features, "image": depth, "observation.heat": {"dtype": "image", "shape": [16, 24, 1]}})
    assert len(read_pictures(v2)) == 7
    with pytest.raises(DataError, match=rf"no camera 'image'; its cameras: {FRONT}, {WRIST}$"):
        open_dataset(v2, cameras={"agentview": "image"})


@pytest.mark.parametrize("shape", [[16, 24, 3], [3, 16, 24]])
def test_shapes_are_told_by_the_three(v2, shape):
    """Published datasets call the axes of [120, 120, 3] channel, height, width."""
    features = json.loads((v2 / "meta/info.json").read_text())["features"]
    features[FRONT] |= {"shape": shape, "names": ["channel", "height", "width"]}
    change_info(v2, features=features)
    assert read_pictures(v2).shape == (7, 16, 24, 3)


def test_tasks_with_a_pandas_index_without_a_name(v3):
    table = pq.read_table(v3 / "meta/tasks.parquet")
    pq.write_table(table.rename_columns(["task_index", "__index_level_0__"]), v3 / "meta/tasks.parquet")
    assert open_dataset(v3).read("episode_000001").instruction == "pick up the blue cube"


def test_task_names():
    assert task_names(["Pick up the cup.", "open it"]) == {"Pick up the cup.": "pick_up_the_cup", "open it": "open_it"}
    shared = task_names(["Open it!", "open it", "打开它"])
    assert len(set(shared.values())) == 3
    assert shared["open it"].startswith("open_it_")
    assert shared["打开它"] == "打开它"


def test_is_lerobot(v2, v3, tmp_path):
    assert is_lerobot(v2)
    assert is_lerobot(str(v3))
    assert is_lerobot("lerobot/libero")
    assert not is_lerobot(tmp_path)
    assert not is_lerobot("demos/pick_up_demo.hdf5")
    assert not is_lerobot("/no/such/folder")
    assert not is_lerobot("libero")


def test_the_fingerprint_is_of_what_is_read(v3):
    before = open_dataset(v3).fingerprint()
    assert set(before) == {
        "meta/info.json",
        "meta/tasks.parquet",
        "meta/episodes/chunk-000/file-000.parquet",
        "data/chunk-000/",
        f"videos/{FRONT}/chunk-000/",
        f"videos/{WRIST}/chunk-000/",
    }
    (v3 / "meta/stats.json").write_text("{}")
    assert open_dataset(v3).fingerprint() == before
    with (v3 / f"videos/{WRIST}/chunk-000/file-001.mp4").open("ab") as file:
        file.write(b"\0")
    after = open_dataset(v3).fingerprint()
    assert [name for name in before if before[name] != after[name]] == [f"videos/{WRIST}/chunk-000/"]


@pytest.mark.skipif(importlib.util.find_spec("lerobot") is None, reason="needs the lerobot package (development only)")
@pytest.mark.parametrize("use_videos", [False, True])
def test_what_lerobot_itself_wrote(use_videos, tmp_path):
    """Checked with 0.4.4 (v3.0)."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    recorded = [
        replace(it, pictures={key: bars(len(it.actions_NA), i) for key in it.pictures})
        for i, it in enumerate(recordings((7, 30, 9)))
    ]
    features = {
        "observation.state": {"dtype": "float32", "shape": (8,), "names": None},
        "action": {"dtype": "float32", "shape": (7,), "names": None},
        **{
            key: {
                "dtype": "video" if use_videos else "image",
                "shape": (64, 64, 3),
                "names": ["height", "width", "channels"],
            }
            for key in (FRONT, WRIST)
        },
    }
    theirs = LeRobotDataset.create("me/bars", fps=10, root=tmp_path / "it", features=features, use_videos=use_videos)
    for it in recorded:
        for n in range(len(it.actions_NA)):
            pictures = {key: pictures[n] for key, pictures in it.pictures.items()}
            theirs.add_frame(
                {
                    "observation.state": it.state_NS[n],
                    "action": it.actions_NA[n],
                    "task": it.instruction,
                    **pictures,
                }
            )
        theirs.save_episode(parallel_encoding=False)
    theirs.finalize()
    source = open_dataset(tmp_path / "it")
    for i, (key, it) in enumerate(zip(source.keys(), recorded, strict=True)):
        episode, length = source.read(key), len(it.actions_NA)
        assert episode.instruction == it.instruction
        np.testing.assert_array_equal(episode.state_NS, it.state_NS)
        np.testing.assert_array_equal(episode.actions_NA, it.actions_NA)
        assert numbers_in(whole(episode.images["agentview"])) == [[n % 16 for n in range(length)], [i] * length]
