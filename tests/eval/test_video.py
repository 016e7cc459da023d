"""Videos: upright, side by side, named by outcome, never half-written."""

import time

import imageio.v2 as imageio
import numpy as np
import pytest

from vlatune.eval.benchmarks.benchmark import SimObservation
from vlatune.eval.video import CAPTION_PX, GREEN, PANE_PX, RED, VideoRecorder, frame, remove_unfinished


def observation(corner=(0, 0), px=32) -> SimObservation:
    """Two cameras; the first is black with one white quarter, the second grey."""
    first = np.zeros((px, px, 3), np.uint8)
    half = px // 2
    first[corner[0] * half : (corner[0] + 1) * half, corner[1] * half : (corner[1] + 1) * half] = 255
    second = np.full((px, px, 3), 128, np.uint8)
    return SimObservation(
        images={"agentview": first, "eye_in_hand": second}, state_S=np.zeros(8), low_dim={}, success=False
    )


def test_cameras_are_side_by_side_and_upright():
    image = frame(observation(corner=(0, 0)), "do it", "step 3")
    assert image.shape == (PANE_PX + CAPTION_PX, 2 * PANE_PX, 3)
    assert all(side % 16 == 0 for side in image.shape[:2]), "the encoder's blocks"
    quarter = PANE_PX // 4
    assert image[3 * quarter, quarter].tolist() == [255, 255, 255], (
        "the first row is at the bottom, the first column left"
    )
    assert image[quarter, quarter].tolist() == [0, 0, 0]
    assert image[quarter, PANE_PX + quarter].tolist() == [128, 128, 128]


def test_the_caption_has_instruction_step_and_outcome():
    plain = frame(observation(), "do it", "step 3")
    for other in (frame(observation(), "do that", "step 3"), frame(observation(), "do it", "step 4")):
        assert (plain[PANE_PX:] != other[PANE_PX:]).any() and (plain[:PANE_PX] == other[:PANE_PX]).all()
    won = frame(observation(), "do it", "step 3", outcome="success", colour=GREEN)
    assert won[1, 1].tolist() == list(GREEN)
    long = frame(observation(), "word " * 100, "step 3")
    assert not (long[PANE_PX:, -8:] == 240).any(), "a long instruction is shortened, not cut at the edge"


def record(stem, success, num_steps=5):
    recorder = VideoRecorder(stem, instruction="do it", fps=20)
    for step in range(num_steps):
        recorder.on_step(step, observation(), np.zeros(3), np.zeros(7))
    recorder.on_end(observation())
    path = recorder.finish(success, "" if success else "missed_grasp")
    recorder.abandon()
    return path


@pytest.mark.parametrize(("success", "colour"), [(True, GREEN), (False, RED)])
def test_the_file_says_how_it_ended(tmp_path, success, colour):
    path = record(tmp_path / "videos" / "step_000400__task00__init03__policy", success)
    assert path.name == f"step_000400__task00__init03__policy__{'success' if success else 'failure'}.mp4"
    beside = path.with_suffix(".jpg")
    assert {found.name for found in path.parent.iterdir()} == {path.name, beside.name}, "nothing else is left"
    assert np.abs(imageio.imread(beside)[2, 100].astype(int) - colour).max() < 60
    frames = imageio.mimread(path)
    assert len(frames) == 5 + 20, "steps, and a second for the outcome"
    assert frames[0].shape == (PANE_PX + CAPTION_PX, 2 * PANE_PX, 3)
    assert np.abs(frames[-1][2, 100].astype(int) - colour).max() < 40
    assert np.abs(frames[0][2, 100].astype(int)).max() < 40, "only the last second shows the outcome"


def test_an_unfinished_video_is_removed(tmp_path):
    recorder = VideoRecorder(tmp_path / "a", instruction="do it", fps=20)
    recorder.on_step(0, observation(), np.zeros(3), np.zeros(7))
    deadline = time.monotonic() + 300
    while not list(tmp_path.glob(".partial-*-a.mp4")):
        assert time.monotonic() < deadline, "the encoder, a process of its own, opens the file"
        time.sleep(0.01)
    recorder.abandon()
    assert not list(tmp_path.iterdir())
    (tmp_path / ".partial-123-b.mp4").touch()
    (tmp_path / "b__success.mp4").touch()
    remove_unfinished(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["b__success.mp4"]


@pytest.mark.sim
def test_the_scene_is_the_right_way_up_and_not_mirrored():
    """Green tray and yellow plate appear where the simulator's own camera axes say they are."""
    from vlatune.eval.benchmarks import load_benchmark

    benchmark = load_benchmark("pocket")
    task = benchmark.suites()["pocket"][0]
    environment = benchmark.make_environment(task, benchmark.protocols("pocket")["pocket"])
    seen = environment.reset(0, 0)
    data = environment.domain.sim.data
    camera = environment.domain.sim.model.camera_name2id("agentview")
    right_3, up_3 = data.cam_xmat[camera].reshape(3, 3)[:, :2].T
    pane = frame(seen, task.language, "step 0")[:PANE_PX, :PANE_PX].astype(int)
    red, green, blue = np.moveaxis(pane, 2, 0)
    green_at = np.argwhere((green > 100) & (red < 80)).mean(axis=0)
    yellow_at = np.argwhere((green > 100) & (red > 150) & (blue < 80)).mean(axis=0)
    way_3 = seen.low_dim["green_tray_1_pos"] - seen.low_dim["yellow_plate_1_pos"]
    assert abs(way_3 @ right_3) > 0.1
    assert np.sign(green_at[1] - yellow_at[1]) == np.sign(way_3 @ right_3), "columns run to the camera's right"
    base_3 = data.get_body_xpos("robot0_base") - seen.low_dim["green_tray_1_pos"]
    assert base_3 @ up_3 > 0.2
    assert pane[: PANE_PX // 6, PANE_PX // 3 : 2 * PANE_PX // 3].std() > 2 * pane[-PANE_PX // 12 :].std(), (
        "the robot is above"
    )
    environment.close()
