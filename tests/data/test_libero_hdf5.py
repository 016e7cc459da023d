import importlib.util
import re
import runpy
from pathlib import Path

import h5py
import numpy as np
import pytest

from vlatune.data.episodes import DataError
from vlatune.data.sources.libero_hdf5 import LiberoHdf5Source, language_of
from vlatune.data.sources.libero_hdf5_writer import Demo, merge_demos, write_demo


def test_keys_are_files_by_name_and_demos_by_number(write_demos, tmp_path):
    write_demos(tmp_path / "b_demo.hdf5", (2,) * 12)
    write_demos(tmp_path / "sub" / "a_demo.hdf5", (2, 2))
    source = LiberoHdf5Source(tmp_path)
    assert list(source.keys()) == [f"b_demo.hdf5/demo_{i}" for i in range(12)] + [
        f"sub/a_demo.hdf5/demo_{i}" for i in range(2)
    ]
    assert set(source.fingerprint()) == {"b_demo.hdf5", "sub/a_demo.hdf5"}
    assert list(LiberoHdf5Source(tmp_path / "b_demo.hdf5").keys())[2] == "b_demo.hdf5/demo_2"


def test_hidden_files_and_folders_are_not_demonstrations(write_demos, tmp_path):
    write_demos(tmp_path / "a_demo.hdf5", (2,))
    write_demos(tmp_path / ".parts" / "a" / "0.hdf5", (2,))
    write_demos(tmp_path / ".half_demo.hdf5", (2,))
    assert list(LiberoHdf5Source(tmp_path).keys()) == ["a_demo.hdf5/demo_0"]


def test_what_our_own_writer_wrote_reads_back(tmp_path):
    random = np.random.default_rng(0)
    demo = Demo(
        actions=random.uniform(-1, 1, (6, 7)),
        executed_actions=None,
        states=random.normal(size=(6, 20)),
        gripper_states=random.normal(size=(6, 2)),
        joint_states=random.normal(size=(6, 7)),
        ee_pos=random.normal(size=(6, 3)),
        ee_quat=random.normal(size=(6, 4)),
        ee_ori=random.normal(size=(6, 3)),
        images={c: random.integers(0, 256, (6, 8, 8, 3), dtype=np.uint8) for c in ("agentview", "eye_in_hand")},
        model_file="<mujoco/>",
        init_state_index=3,
    )
    with h5py.File(tmp_path / ".part", "w") as file:
        write_demo(file.create_group("data"), "demo_3", demo)
    merge_demos(tmp_path / "x_demo.hdf5", [tmp_path / ".part"], {"task_language": "do x", "problem_info": {}})
    source = LiberoHdf5Source(tmp_path)
    episode = source.read(source.keys()[0])
    assert episode.instruction == "do x"
    np.testing.assert_array_equal(episode.actions_NA, demo.actions.astype(np.float32))
    state = np.concatenate([demo.ee_pos, demo.ee_ori, demo.gripper_states], axis=1)
    np.testing.assert_array_equal(episode.state_NS, state.astype(np.float32))
    for camera, images in demo.images.items():
        np.testing.assert_array_equal(episode.pictures(camera), images)


def test_an_episode_is_what_the_file_holds(write_demos, tmp_path):
    path = write_demos(tmp_path / "pick_up_the_red_cube_demo.hdf5", (7, 5))
    episode = LiberoHdf5Source(path).read("pick_up_the_red_cube_demo.hdf5/demo_1")
    assert (episode.task, episode.instruction) == ("pick_up_the_red_cube", "pick up the red cube")
    with h5py.File(path) as file:
        demo = file["data/demo_1"]
        np.testing.assert_array_equal(episode.actions_NA, demo["actions"][()].astype(np.float32))
        for columns, name in ((slice(0, 3), "ee_pos"), (slice(3, 6), "ee_ori"), (slice(6, 8), "gripper_states")):
            np.testing.assert_array_equal(episode.state_NS[:, columns], demo["obs"][name][()].astype(np.float32))
        for camera in ("agentview", "eye_in_hand"):
            np.testing.assert_array_equal(episode.pictures(camera), demo["obs"][f"{camera}_rgb"][()])
    assert episode.state_NS.dtype == episode.actions_NA.dtype == np.float32


def test_liberos_own_files_are_shifted_so_that_observations_precede_their_actions(write_demos, tmp_path):
    """Row j was observed after action j: it belongs to action j + 1."""
    path = write_demos(tmp_path / "official_demo.hdf5", (5,), attributes={})
    episode = LiberoHdf5Source(path).read("official_demo.hdf5/demo_0")
    np.testing.assert_allclose(episode.actions_NA[:, 0] * 1000, [1, 2, 3, 4], atol=1e-4)
    np.testing.assert_allclose(episode.state_NS[:, 0] * 1000, [0, 1, 2, 3], atol=1e-4)
    np.testing.assert_array_equal(episode.pictures("agentview")[:, 0, 0, 1], [0, 1, 2, 3])


def test_the_user_can_say_when_the_observations_were_recorded(write_demos, tmp_path):
    path = write_demos(tmp_path / "regenerated_demo.hdf5", (5,), attributes={})
    with h5py.File(path, "a") as file:
        del file["data"].attrs["problem_info"]
    key = "regenerated_demo.hdf5/demo_0"
    with pytest.raises(DataError, match="before or after their actions; add --observation-timing before_action"):
        LiberoHdf5Source(path).read(key)
    assert len(LiberoHdf5Source(path, observation_timing="before_action").read(key).actions_NA) == 5
    assert len(LiberoHdf5Source(path, observation_timing="after_action").read(key).actions_NA) == 4


def test_an_unknown_timing_is_refused(write_demos, tmp_path):
    path = write_demos(tmp_path / "odd_demo.hdf5", (5,), attributes={"observation_timing": "sometimes"})
    with pytest.raises(DataError, match="observation_timing 'sometimes'; it can be before_action or after_action"):
        LiberoHdf5Source(path).read("odd_demo.hdf5/demo_0")


def test_our_own_attribute_names_the_instruction(write_demos, tmp_path):
    attributes = {"observation_timing": "before_action", "task_language": "fetch it"}
    path = write_demos(tmp_path / "some_file_demo.hdf5", (5,), attributes=attributes)
    assert LiberoHdf5Source(path).read("some_file_demo.hdf5/demo_0").instruction == "fetch it"


@pytest.mark.parametrize(
    ("task", "language"),
    [
        ("KITCHEN_SCENE10_close_the_top_drawer_of_the_cabinet", "close the top drawer of the cabinet"),
        ("LIVING_ROOM_SCENE1_pick_up_the_alphabet_soup", "pick up the alphabet soup"),
        ("put_the_bowl_on_the_stove", "put the bowl on the stove"),
    ],
)
def test_language_comes_from_the_name(task, language):
    assert language_of(task) == language


def test_language_is_liberos_for_all_its_tasks(tmp_path):
    spec = importlib.util.find_spec("libero")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("hf-libero is not installed")
    benchmark = Path(next(iter(spec.submodule_search_locations))) / "libero" / "benchmark"
    text = (benchmark / "__init__.py").read_text()  # importing it would ask for paths on the terminal
    function = re.search(r"def grab_language_from_filename\(x\):\n(?:    .*\n)+", text)
    assert function
    (tmp_path / "theirs.py").write_text(function[0])
    grab_language = runpy.run_path(str(tmp_path / "theirs.py"))["grab_language_from_filename"]
    task_map = runpy.run_path(str(benchmark / "libero_suite_task_map.py"))["libero_task_map"]
    tasks = {task for suite in task_map.values() for task in suite}
    assert len(tasks) >= 130
    for task in tasks:
        assert language_of(task) == grab_language(task + ".bddl"), task


def test_no_hdf5_under_the_path(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing here")
    with pytest.raises(DataError, match=r"there is no HDF5 file under .*; give a \*\.hdf5 file or a folder"):
        LiberoHdf5Source(tmp_path)
    with pytest.raises(DataError, match="there is no such file or folder"):
        LiberoHdf5Source(tmp_path / "mistyped")


def test_truncated_file(write_demos, tmp_path):
    path = write_demos(tmp_path / "cut_demo.hdf5")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])
    with pytest.raises(
        DataError, match=r"cut_demo\.hdf5 is not a whole HDF5 file .*copy, download or collect it again"
    ):
        LiberoHdf5Source(path)


def test_damaged_chunk(write_demos, tmp_path):
    path = write_demos(tmp_path / "bad_demo.hdf5", (4,))
    with h5py.File(path, "a") as file:
        pictures = file["data/demo_0/obs/agentview_rgb"][()]
        del file["data/demo_0/obs/agentview_rgb"]
        file["data/demo_0/obs"].create_dataset("agentview_rgb", data=pictures, compression="gzip", fletcher32=True)
        chunk = file["data/demo_0/obs/agentview_rgb"].id.get_chunk_info(0)
    content = bytearray(path.read_bytes())
    content[chunk.byte_offset + 10] ^= 0xFF
    path.write_bytes(content)
    episode = LiberoHdf5Source(path).read("bad_demo.hdf5/demo_0")
    with pytest.raises(DataError, match=r"demo_0 of .*bad_demo\.hdf5 cannot be read"):
        episode.pictures("agentview")


def test_pictures_of_differing_size_in_one_file(write_demos, tmp_path):
    path = write_demos(tmp_path / "mixed_demo.hdf5", (4, 3))
    with h5py.File(path, "a") as file:
        del file["data/demo_1/obs/eye_in_hand_rgb"]
        file["data/demo_1/obs/eye_in_hand_rgb"] = np.zeros((3, 8, 16, 3), np.uint8)
    source = LiberoHdf5Source(path)
    source.read("mixed_demo.hdf5/demo_0")
    with pytest.raises(
        DataError, match=r"demo_1 of .* pictures of \(8, 16\) of camera eye_in_hand, .* \(16, 16\); one file"
    ):
        source.read("mixed_demo.hdf5/demo_1")


def test_a_long_episode_comes_in_blocks(write_demos, tmp_path):
    path = write_demos(tmp_path / "long_demo.hdf5", (150,), attributes={})
    episode = LiberoHdf5Source(path).read("long_demo.hdf5/demo_0")
    assert [len(block) for block in episode.images["agentview"]] == [
        64,
        64,
        21,
    ]  # the last was seen after the last action
    np.testing.assert_array_equal(episode.pictures("agentview")[:, 0, 0, 1], np.arange(149))


def test_the_suite_is_the_folder_liberos_files_are_in(write_demos, tmp_path):
    for folder, suite in (("libero_spatial", "libero_spatial"), ("libero_90", "libero_90"), ("mine", "")):
        path = write_demos(tmp_path / folder / "a_demo.hdf5", (2,))
        assert LiberoHdf5Source(path).read("a_demo.hdf5/demo_0").suite == suite


def test_not_in_liberos_format(tmp_path):
    with h5py.File(tmp_path / "other.hdf5", "w") as file:
        file["numbers"] = [1]
    with pytest.raises(DataError, match=r"other\.hdf5 has no group `data`"):
        LiberoHdf5Source(tmp_path)


def test_no_demonstration(write_demos, tmp_path):
    write_demos(tmp_path / "none_demo.hdf5", ())
    with pytest.raises(DataError, match="no demonstration is in .*collect some first"):
        LiberoHdf5Source(tmp_path)


@pytest.mark.parametrize(
    "key", ["actions", "obs/ee_pos", "obs/ee_ori", "obs/gripper_states", "obs/eye_in_hand_rgb", "obs"]
)
def test_missing_key(write_demos, tmp_path, key):
    path = write_demos(tmp_path / "t_demo.hdf5")
    with h5py.File(path, "a") as file:
        del file[f"data/demo_1/{key}"]
    source = LiberoHdf5Source(path)
    source.read("t_demo.hdf5/demo_0")
    with pytest.raises(DataError, match=rf"demo_1 of .*t_demo\.hdf5 has no `{key}.*`; it has .*states"):
        source.read("t_demo.hdf5/demo_1")


@pytest.mark.parametrize("key", ["actions", "obs/ee_ori"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_not_finite(write_demos, tmp_path, key, value):
    path = write_demos(tmp_path / "t_demo.hdf5")
    with h5py.File(path, "a") as file:
        file[f"data/demo_1/{key}"][3, 1] = value
    with pytest.raises(DataError, match=rf"demo_1 of .* NaN or infinity in `{key}`, first in row 3"):
        LiberoHdf5Source(path).read("t_demo.hdf5/demo_1")


@pytest.mark.parametrize("key", ["actions", "obs/ee_pos", "obs/agentview_rgb"])
def test_parts_of_differing_length(write_demos, tmp_path, key):
    path = write_demos(tmp_path / "t_demo.hdf5", (5,))
    with h5py.File(path, "a") as file:
        shorter = file[f"data/demo_0/{key}"][:-1]
        del file[f"data/demo_0/{key}"]
        file[f"data/demo_0/{key}"] = shorter
    with pytest.raises(DataError, match="demo_0 of .* has parts of differing length"):
        LiberoHdf5Source(path).read("t_demo.hdf5/demo_0")


@pytest.mark.parametrize(
    ("key", "shape"), [("actions", (5, 8)), ("obs/ee_pos", (5,)), ("obs/agentview_rgb", (5, 16, 16))]
)
def test_parts_of_another_shape(write_demos, tmp_path, key, shape):
    path = write_demos(tmp_path / "t_demo.hdf5", (5,))
    with h5py.File(path, "a") as file:
        del file[f"data/demo_0/{key}"]
        file[f"data/demo_0/{key}"] = np.zeros(shape, np.uint8)
    with pytest.raises(DataError, match=rf"has `{key}` of .*shape \({shape[0]}.*; it must be"):
        LiberoHdf5Source(path).read("t_demo.hdf5/demo_0")


def test_empty_demo(write_demos, tmp_path):
    path = write_demos(tmp_path / "t_demo.hdf5", (4, 4))
    with h5py.File(path, "a") as file:
        demo = file["data/demo_1"]
        for key in ("actions", *(f"obs/{name}" for name in demo["obs"])):
            none = demo[key][:0]
            del demo[key]
            demo[key] = none
    with pytest.raises(DataError, match="demo_1 of .* is empty"):
        LiberoHdf5Source(path).read("t_demo.hdf5/demo_1")


def test_unknown_key(write_demos, tmp_path):
    path = write_demos(tmp_path / "t_demo.hdf5")
    with pytest.raises(DataError, match="there is no demonstration 't_demo.hdf5/demo_9'"):
        LiberoHdf5Source(path).read("t_demo.hdf5/demo_9")
