"""Demonstrations written as LIBERO has them, whole or not at all."""

import json

import h5py
import numpy as np
import pytest

from vlatune.data.sources.libero_hdf5 import LiberoHdf5Source
from vlatune.data.sources.libero_hdf5_writer import Demo, merge_demos, replacing, write_demo


def demo(num_steps: int = 5, seed: int = 0, executed: bool = False) -> Demo:
    random = np.random.default_rng(seed)
    return Demo(
        actions=random.uniform(-1, 1, (num_steps, 7)),
        executed_actions=random.uniform(-1, 1, (num_steps, 7)) if executed else None,
        states=random.normal(size=(num_steps, 11)),
        gripper_states=random.normal(size=(num_steps, 2)),
        joint_states=random.normal(size=(num_steps, 7)),
        ee_pos=random.normal(size=(num_steps, 3)),
        ee_quat=random.normal(size=(num_steps, 4)),
        ee_ori=random.normal(size=(num_steps, 3)),
        images={
            name: random.integers(0, 256, (num_steps, 16, 16, 3), dtype=np.uint8)
            for name in ("agentview", "eye_in_hand")
        },
        model_file="<mujoco/>",
        init_state_index=1000 + seed,
    )


def part(path, written: Demo):
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["env_name"] = "Some_Problem"
        data.attrs["problem_info"] = json.dumps({"problem_name": "some_problem"})
        write_demo(data, "demo_0", written)
    return path


def test_every_dataset_and_attribute_of_libero(tmp_path):
    demos = [demo(5, seed=1), demo(7, seed=2)]
    parts = [part(tmp_path / f"{k}.hdf5", written) for k, written in enumerate(demos)]
    merge_demos(tmp_path / "task_demo.hdf5", parts, {"collect": {"noise": 0.5}})
    with h5py.File(tmp_path / "task_demo.hdf5", "r") as file:
        data = file["data"]
        assert (data.attrs["num_demos"], data.attrs["total"]) == (2, 12)
        assert (data.attrs["env_name"], data.attrs["observation_timing"]) == ("Some_Problem", "before_action")
        assert json.loads(data.attrs["collect"]) == {"noise": 0.5}
        assert list(data) == ["demo_0", "demo_1"]
        for written, group in zip(demos, data.values(), strict=True):
            n = len(written.actions)
            assert (group.attrs["num_samples"], group.attrs["model_file"]) == (n, "<mujoco/>")
            np.testing.assert_array_equal(group.attrs["init_state"], written.states[0])
            expected = {
                "actions": written.actions,
                "states": written.states,
                "robot_states": np.concatenate([written.gripper_states, written.ee_pos, written.ee_quat], axis=1),
                "rewards": np.eye(n, dtype=np.uint8)[-1],
                "dones": np.eye(n, dtype=np.uint8)[-1],
                "obs/gripper_states": written.gripper_states,
                "obs/joint_states": written.joint_states,
                "obs/ee_states": np.concatenate([written.ee_pos, written.ee_ori], axis=1),
                "obs/ee_pos": written.ee_pos,
                "obs/ee_ori": written.ee_ori,
                "obs/agentview_rgb": written.images["agentview"],
                "obs/eye_in_hand_rgb": written.images["eye_in_hand"],
            }
            for name, array in expected.items():
                np.testing.assert_array_equal(group[name][()], array, err_msg=name)
                assert group[name].dtype == (np.uint8 if array.dtype == np.uint8 else np.float64), name
            assert "executed_actions" not in group


def test_executed_actions_are_kept_where_they_differ(tmp_path):
    written = demo(executed=True)
    with h5py.File(part(tmp_path / "part.hdf5", written), "r") as file:
        np.testing.assert_array_equal(file["data/demo_0/executed_actions"][()], written.executed_actions)
        np.testing.assert_array_equal(file["data/demo_0/actions"][()], written.actions)


def test_the_reader_reads_it(tmp_path):
    written = demo(6)
    merge_demos(tmp_path / "put_it_there_demo.hdf5", [part(tmp_path / ".part", written)], {})
    source = LiberoHdf5Source(tmp_path)
    (key,) = source.keys()
    episode = source.read(key)
    assert (episode.task, episode.instruction) == ("put_it_there", "put it there")
    np.testing.assert_array_equal(episode.actions_NA, written.actions.astype(np.float32))
    np.testing.assert_array_equal(episode.pictures("agentview"), written.images["agentview"])
    state = np.concatenate([written.ee_pos, written.ee_ori, written.gripper_states], axis=1)
    np.testing.assert_array_equal(episode.state_NS, state.astype(np.float32))


def test_a_file_is_replaced_whole_or_left_as_it_was(tmp_path):
    target = tmp_path / "task_demo.hdf5"
    target.write_text("before")
    with pytest.raises(RuntimeError, match="power"), replacing(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError("power cut")
    assert target.read_text() == "before"
    with replacing(target) as temporary:
        temporary.write_text("after")
    assert target.read_text() == "after"
    assert list(tmp_path.iterdir()) == [target]
