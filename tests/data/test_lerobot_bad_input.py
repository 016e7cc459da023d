"""What a LeRobot dataset may have wrong, each with its sentence."""

import json
import shutil
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_lerobot import (
    FRONT,
    LOSSLESS,
    LOSSLESS_OPTIONS,
    WRIST,
    bars,
    change_column,
    change_info,
    open_dataset,
    png,
    read_pictures,
    recordings,
    whole,
    write_lerobot,
    write_video,
)

from vlatune.data.episodes import DataError
from vlatune.data.sources.lerobot_pictures import StoredPictures, VideoPictures


@pytest.fixture
def v2(tmp_path: Path) -> Path:
    return write_lerobot(tmp_path / "v2", recordings((7, 5)), version="v2.1", stored_as="image")


@pytest.fixture
def v3(tmp_path: Path) -> Path:
    return write_lerobot(tmp_path / "v3", recordings((7, 5, 9)))


@pytest.mark.parametrize("version", ["v1.6", "v3.1", "v4.0"])
def test_another_version(v3, version):
    change_info(v3, codebase_version=version)
    with pytest.raises(DataError, match=rf"{version}; this vlatune reads v2.0, v2.1, v3.0: convert it with LeRobot's"):
        open_dataset(v3)


def test_no_dataset(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"has no meta/info\.json: it is no LeRobot dataset, or its download"):
        open_dataset(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # or it retries for most of a minute
    with pytest.raises(
        DataError, match="no folder nobody/nothing, and the hub cannot give .*hf download nobody/nothing --repo-type"
    ):
        open_dataset("nobody/nothing")


def test_a_name_on_the_hub_is_read_from_its_cache(v3, tmp_path, monkeypatch):
    """Without a network the hub's library gives what is there, whole or not."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub/datasets--somebody--cubes"
    shutil.copytree(v3, repository / "snapshots/abc")
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("abc")
    source = open_dataset("somebody/cubes")
    assert len(whole(source.read("episode_000002").images["agentview"])) == 9
    (repository / f"snapshots/abc/videos/{FRONT}/chunk-000/file-001.mp4").unlink()
    (repository / "blobs").mkdir()
    (repository / "blobs/0123.incomplete").touch()
    with pytest.raises(
        DataError,
        match=rf"lacks videos/{FRONT}/chunk-000/file-001\.mp4 \(0123\.incomplete was never finished\): the download or the copy was "
        "cut short; get the rest: hf download somebody/cubes --repo-type dataset$",
    ):
        open_dataset("somebody/cubes")


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        ("data/chunk-000/file-000.parquet", r"lacks data/chunk-000/file-000\.parquet and 1 more of its files"),
        ("data/chunk-000/file-001.parquet", r"lacks data/chunk-000/file-001\.parquet:"),
        ("meta/tasks.parquet", r"tasks\.parquet is missing"),
        ("meta/episodes/chunk-000/file-000.parquet", "lists 0 episodes and its info.json says 3"),
    ],
)
def test_an_interrupted_copy(v3, gone, said):
    (v3 / gone).unlink()
    if "000.parquet" in gone and "data" in gone:
        (v3 / f"videos/{WRIST}/chunk-000/file-001.mp4").unlink()
    with pytest.raises(DataError, match=said + ".*(get the|get it|download or copy).*"):
        open_dataset(v3)


def test_an_episode_that_is_listed_twice(v2):
    file = v2 / "meta/episodes.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines, lines[0]]))
    with pytest.raises(DataError, match="lists 3 episodes and its info.json says 2"):
        open_dataset(v2)


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
@pytest.mark.parametrize("name", ["info", "tasks", "episodes"])
def test_damaged_metadata(version, name, tmp_path):
    folder = write_lerobot(tmp_path, recordings((4,)), version=version)
    file = next(file for file in (folder / "meta").rglob("*.*") if name in str(file))
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(DataError, match=rf"{file.name} is damaged or not LeRobot's .*; get the dataset again"):
        open_dataset(folder)


def test_metadata_without_the_place_of_a_video(v3):
    file = v3 / "meta/episodes/chunk-000/file-000.parquet"
    pq.write_table(pq.read_table(file).drop_columns([f"videos/{WRIST}/from_timestamp"]), file)
    with pytest.raises(DataError, match="file-000.parquet is damaged or not LeRobot's .*image2/from_timestamp"):
        open_dataset(v3)


@pytest.mark.parametrize("name", ["observation.state", "action"])
def test_a_vector_of_another_width(v3, name):
    features = json.loads((v3 / "meta/info.json").read_text())["features"]
    change_info(v3, features={**features, name: {"dtype": "float32", "shape": [14]}})
    with pytest.raises(DataError, match=rf"14 numbers in `{name}` and robot libero_panda needs [78]; .*--robot"):
        open_dataset(v3)
    del features[name]
    change_info(v3, features=features)
    with pytest.raises(DataError, match=rf"has neither `{name}` nor `.*`, which robot libero_panda needs; its columns"):
        open_dataset(v3)


@pytest.mark.parametrize(
    "values", [[[0.0] * 9] * 7, [[0.0] * 8] * 6 + [[0.0] * 9], [None] + [[0.0] * 8] * 6, ["up"] * 7, [0.5] * 7]
)
def test_numbers_of_another_kind(v2, values):
    change_column(v2 / "data/chunk-000/episode_000000.parquet", "observation.state", pa.array(values))
    with pytest.raises(DataError, match=r"episode_000000 of .* than 8 numbers in each frame's `observation\.state`"):
        open_dataset(v2).read("episode_000000")


@pytest.mark.parametrize("value", [np.nan, np.inf, None])
def test_numbers_that_are_not_finite(v2, value):
    rows = [[0.0] * 6 + [1.0] for _ in range(7)]
    rows[3][2] = value
    change_column(v2 / "data/chunk-000/episode_000000.parquet", "action", pa.array(rows))
    with pytest.raises(DataError, match=r"episode_000000 of .* NaN or infinity in `action`, first in frame 3"):
        open_dataset(v2).read("episode_000000")


def test_a_gripper_of_another_convention(tmp_path):
    recorded = recordings((6, 6))
    recorded[1].actions_NA[:, 6] = np.arange(6) < 3
    recorded[0].actions_NA[:, 6] = 1  # closed all the time
    source = open_dataset(write_lerobot(tmp_path, recorded))
    assert len(source.read("episode_000000").actions_NA) == 6
    with pytest.raises(
        DataError, match="from 0 to 1; robot libero_panda opens at -1 and closes at 1: take a conversion"
    ):
        source.read("episode_000001")


def test_frames_of_several_tasks(v2):
    change_column(v2 / "data/chunk-000/episode_000000.parquet", "task_index", pa.array([0, 0, 0, 1, 1, 1, 1]))
    with pytest.raises(DataError, match=r"episode_000000 of .* 2 tasks \(task_index 0, 1\); an episode must have one"):
        open_dataset(v2).read("episode_000000")


def test_a_task_that_only_the_metadata_list_is_not_read(v2):
    file = v2 / "meta/episodes.jsonl"
    file.write_text(file.read_text().replace('["pick up the red cube"]', '["pick up the red cube", "wait"]'))
    assert open_dataset(v2).read("episode_000000").instruction == "pick up the red cube"


@pytest.mark.parametrize("text", [None, "  "])
def test_a_task_without_text(v2, text):
    lines = [] if text is None else [json.dumps({"task_index": 0, "task": text})]
    (v2 / "meta/tasks.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError, match="task_index 0, for which meta/tasks has no text"):
        open_dataset(v2).read("episode_000000")


@pytest.mark.parametrize("gone", ["timestamp", "task_index", "action"])
def test_a_missing_column(v2, gone):
    change_column(v2 / "data/chunk-000/episode_000001.parquet", gone, None)
    source = open_dataset(v2)
    source.read("episode_000000")
    with pytest.raises(DataError, match=rf"episode_000001\.parquet has no column `{gone}`; it has .*frame_index"):
        source.read("episode_000001")


def test_fewer_rows_than_the_metadata_say(v3):
    file = v3 / "data/chunk-000/file-000.parquet"
    pq.write_table(pq.read_table(file).slice(0, 9), file)
    source = open_dataset(v3)
    source.read("episode_000000")
    with pytest.raises(DataError, match=r"episode_000001 of .* has 2 rows in data/.* and should have 5"):
        source.read("episode_000001")


def test_frames_missing_or_at_other_times(v2):
    file = v2 / "data/chunk-000/episode_000000.parquet"
    table = pq.read_table(file)
    change_column(file, "frame_index", pa.array([0, 1, 2, 3, 5, 6, 7]))
    with pytest.raises(DataError, match="frames missing or out of order"):
        open_dataset(v2).read("episode_000000")
    pq.write_table(table, file)
    change_column(file, "timestamp", pa.array([0, 0.05, 0.1, 0.2, 0.25, 0.3, 0.35], pa.float32()))
    with pytest.raises(DataError, match="frame 3 at 0.2 s, which at the 20 frames a second .*; correct `fps`"):
        open_dataset(v2).read("episode_000000")
    change_column(file, "timestamp", pa.array([0, 0.05, None, 0.15, 0.2, 0.25, 0.3], pa.float32()))
    with pytest.raises(DataError, match="frame 2 at nan s"):
        open_dataset(v2).read("episode_000000")


def test_an_empty_episode(tmp_path):
    source = open_dataset(write_lerobot(tmp_path, recordings((0, 4)), stored_as="image"))
    assert len(source.read("episode_000001").actions_NA) == 4
    with pytest.raises(DataError, match="episode_000000 of .* is empty; remove it"):
        source.read("episode_000000")


def test_an_unknown_key(v2):
    with pytest.raises(DataError, match="there is no 'episode_000009' in"):
        open_dataset(v2).read("episode_000009")


def test_a_video_of_another_rate(v3):
    path = v3 / f"videos/{FRONT}/chunk-000/file-001.mp4"
    write_video(path, bars(9, 0)[:, :16, :24], fps=30, codec=LOSSLESS, options=LOSSLESS_OPTIONS, pix_fmt="rgb24")
    with pytest.raises(DataError, match=r"file-001\.mp4 has 30 frames a second and meta/info\.json says 20"):
        read_pictures(v3, "episode_000002")


@pytest.mark.parametrize("stored_as", ["video", "image"])
def test_pictures_of_another_size(tmp_path, stored_as):
    folder = write_lerobot(tmp_path, recordings((4,)), stored_as=stored_as)
    features = json.loads((folder / "meta/info.json").read_text())["features"]
    features[FRONT]["shape"] = [24, 16, 3]
    change_info(folder, features=features)
    with pytest.raises(DataError, match=r"has pictures of 16 x 24 .* and meta/info\.json says 24 x 16"):
        read_pictures(folder)


def test_an_unknown_codec(v3):
    file = v3 / f"videos/{FRONT}/chunk-000/file-000.mp4"
    content = file.read_bytes()
    place = content.rindex(b"avc1")
    file.write_bytes(content[:place] + b"zzzz" + content[place + 4 :])
    with pytest.raises(
        DataError, match=r"file-000\.mp4 has no video that can be decoded: .* codec that this machine's PyAV"
    ):
        read_pictures(v3)


@pytest.mark.parametrize("kept", [0, 0.1, 0.5, 0.9])
def test_a_truncated_video(v3, kept):
    file = v3 / f"videos/{FRONT}/chunk-000/file-000.mp4"
    content = file.read_bytes()
    file.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(
        DataError, match=r"file-000\.mp4 (cannot|has no video that can) be decoded.*download or copy it a"
    ):
        read_pictures(v3)


def test_a_video_with_too_few_frames(v3):
    path = v3 / f"videos/{FRONT}/chunk-000/file-000.mp4"
    write_video(path, bars(10, 0)[:, :16, :24], fps=20, codec=LOSSLESS, options=LOSSLESS_OPTIONS, pix_fmt="rgb24")
    assert len(read_pictures(v3, "episode_000000")) == 7
    with pytest.raises(DataError, match=r"has no picture at 0\.500 s or later: it is cut short or belongs to other"):
        read_pictures(v3, "episode_000001")


def test_a_video_that_has_left_out_frames(tmp_path):
    """Nothing is shown twice in place of a missing frame."""
    with av.open(str(tmp_path / "gap.mp4"), "w") as container:
        stream = container.add_stream("libx264", 20)
        stream.width = stream.height = 64
        for n in [*range(10), *range(11, 40)]:
            frame = av.VideoFrame.from_ndarray(bars(n + 1, 0)[n])
            frame.pts, frame.time_base = n, 1 / stream.average_rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    pictures = VideoPictures(path=tmp_path / "gap.mp4", times_s=np.arange(40) / 20, fps=20, size=(64, 64), where="here")
    with pytest.raises(DataError, match=r"no picture at 0\.500 s; the next one is at 0\.550 s"):
        whole(pictures)


def test_a_part_of_a_file_that_is_too_short(v3):
    """Episode 1's frames would be read into episode 0."""
    column = f"videos/{FRONT}/to_timestamp"
    change_column(v3 / "meta/episodes/chunk-000/file-000.parquet", column, pa.array([0.30, 0.6, 0.45]))
    with pytest.raises(DataError, match=r"episode_000000 of .* lasts until 0\.300 s .* ends at 0\.300 s"):
        open_dataset(v3).read("episode_000000")


def test_a_truncated_parquet_file(v2):
    file = v2 / "data/chunk-000/episode_000000.parquet"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"episode_000000\.parquet cannot be read \(.*\); download or copy it again"):
        open_dataset(v2).read("episode_000000")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda content: content[:60], "a picture in .* is damaged"),
        (lambda content: b"no picture", "a picture in .* is damaged"),
        (lambda content: None, "holds no pictures in `observation.images.image` but"),
    ],
)
def test_damaged_pictures(v2, spoil, said):
    file = v2 / "data/chunk-000/episode_000000.parquet"
    stored = pq.read_table(file)[FRONT].to_pylist()
    stored[4]["bytes"] = spoil(stored[4]["bytes"])
    change_column(file, FRONT, pa.array(stored))
    with pytest.raises(DataError, match=rf"episode_000000 of .*{FRONT}: .*{said}"):
        read_pictures(v2)


def test_pictures_without_colour(tmp_path):
    table = pa.table({"depth": pa.array([{"bytes": png(np.zeros((4, 4), np.uint8)), "path": ""}])})
    pq.write_table(table, tmp_path / "x.parquet")
    pictures = StoredPictures(
        path=tmp_path / "x.parquet", column="depth", first_row=0, num_frames=1, size=(4, 4), where="here"
    )
    with pytest.raises(DataError, match="here: .* holds pictures of mode L; they must be RGB"):
        whole(pictures)
