"""Which picture of a LeRobot dataset is which frame's."""

import re
from dataclasses import replace

import av
import numpy as np
import pyarrow.parquet as pq
import pytest
from small_lerobot import (
    FRONT,
    bars,
    numbers_in,
    open_dataset,
    read_pictures,
    recordings,
    whole,
    write_lerobot,
    write_video,
)

from vlatune.data.episodes import DataError
from vlatune.data.sources.lerobot_pictures import VideoPictures

LOSSY = {
    "h264 as LeRobot": ("libx264", {"g": "2", "crf": "30"}),
    "h264 one long group": ("libx264", {"g": "250", "bf": "3"}),
    "h264 open groups": ("libx264", {"g": "10", "bf": "8", "x264-params": "open-gop=1:b-adapt=0"}),
    "hevc open groups": ("libx265", {"x265-params": "log-level=none:keyint=10:open-gop=1:bframes=4:b-adapt=0"}),
    "AV1 as LeRobot": ("libsvtav1", {"g": "2", "crf": "30", "preset": "12"}),
    "AV1 one long group": ("libsvtav1", {"g": "250", "crf": "30", "preset": "12"}),
}


def lossy(name: str) -> dict[str, object]:
    codec, options = LOSSY[name]
    try:
        av.Codec(codec, "w")
    except av.error.FFmpegError:
        pytest.skip(f"this PyAV has no {codec} to encode with")
    return {"codec": codec, "options": options, "pix_fmt": "yuv420p"}


@pytest.mark.parametrize("encoding", LOSSY)
def test_every_frame_of_a_lossy_video_is_the_one_of_its_row(encoding, tmp_path):
    recorded = [
        replace(it, pictures={key: bars(len(it.actions_NA), i) for key in it.pictures})
        for i, it in enumerate(recordings((20, 9, 33, 14)))
    ]
    source = open_dataset(write_lerobot(tmp_path, recorded, episodes_per_file=4, fps=30, **lossy(encoding)))
    for i, key in enumerate(source.keys()):
        length = len(recorded[i].actions_NA)
        expected = [n % 16 for n in range(length)], [i] * length
        for camera in ("agentview", "eye_in_hand"):
            assert tuple(numbers_in(whole(source.read(key).images[camera]))) == expected


@pytest.mark.parametrize("encoding", [name for name in LOSSY if "group" in name])
def test_an_episode_may_begin_anywhere_in_a_video(encoding, tmp_path):
    """One stream over all episodes: hardly a frame is a keyframe. The times are off by what rounding makes of them."""
    write_video(tmp_path / "long.mp4", bars(60, 0), fps=20, **lossy(encoding))
    for start in range(56):
        frames = start + np.arange(4)
        pictures = VideoPictures(
            path=tmp_path / "long.mp4",
            times_s=frames / 20 + 0.01 * np.sin(start),
            fps=20,
            size=(64, 64),
            where="here",
        )
        assert numbers_in(whole(pictures))[0] == list(frames % 16)


def test_an_episode_is_decoded_from_its_own_keyframe_on(tmp_path):
    """What is before it in the file is not touched: there it is damaged, and is found to be when its turn comes."""
    random = np.random.default_rng(0)
    recorded = [
        replace(it, pictures={k: random.integers(0, 256, p.shape, np.uint8) for k, p in it.pictures.items()})
        for it in recordings((20, 20), size=(64, 64))
    ]
    folder = write_lerobot(tmp_path, recorded)
    file = folder / f"videos/{FRONT}/chunk-000/file-000.mp4"
    content = bytearray(file.read_bytes())
    start = content.index(b"mdat") + len(content) // 8
    content[start : start + 500] = bytes(500)
    file.write_bytes(content)
    np.testing.assert_array_equal(read_pictures(folder, "episode_000001"), recorded[1].pictures[FRONT])
    with pytest.raises(DataError, match=r"episode_000000 of .*file-000\.mp4 (is damaged at|cannot be decoded)"):
        read_pictures(folder, "episode_000000")


def test_pictures_that_a_decoder_invented_are_refused(tmp_path):
    """A bit flipped anywhere either ends the decoding, or the decoder fills in and says so, or it cannot know."""
    file, damaged = tmp_path / "whole.mp4", tmp_path / "damaged.mp4"
    random = np.random.default_rng(0)
    write_video(file, random.integers(0, 256, (12, 64, 64, 3), np.uint8), fps=20, **lossy("h264 as LeRobot"))
    content = file.read_bytes()
    start = content.index(b"mdat") + 1000
    pictures = VideoPictures(path=damaged, times_s=np.arange(12) / 20, fps=20, size=(64, 64), where="here")
    said = []
    for place in range(start, len(content) - 2000, (len(content) - 2000 - start) // 20):
        damaged.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        try:
            whole(pictures)
        except DataError as error:
            said.append(str(error))
    assert any(re.search(r"here: .*damaged\.mp4 is damaged at 0\.\d+ s; download", sentence) for sentence in said)


def test_pictures_are_read_only_when_they_are_asked_for(tmp_path):
    source = open_dataset(write_lerobot(tmp_path, recordings((7, 5))))
    episode = source.read("episode_000000")
    for video in tmp_path.glob("videos/*/*/*.mp4"):
        video.unlink()
    assert len(source.read("episode_000001").actions_NA) == 5
    with pytest.raises(DataError, match=r"episode_000000 of .*image2: .*file-000\.mp4 cannot be decoded \(.*No such"):
        next(iter(episode.images["eye_in_hand"]))


@pytest.mark.parametrize("rows_per_group", [3, 7, 100])
def test_stored_pictures_of_any_row_groups(rows_per_group, tmp_path):
    recorded = recordings((7, 11, 9))
    folder = write_lerobot(tmp_path, recorded, stored_as="image", episodes_per_file=3)
    file = folder / "data/chunk-000/file-000.parquet"
    pq.write_table(pq.read_table(file), file, row_group_size=rows_per_group)
    for i, recording in enumerate(recorded):
        np.testing.assert_array_equal(read_pictures(folder, f"episode_{i:06d}"), recording.pictures[FRONT])
