import itertools
import multiprocessing
import os
import random
import threading
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from small_lerobot import FRONT, WRIST, Recording, write_lerobot
from tqdm import tqdm

from vlatune.data import cache_writer
from vlatune.data.cache import Cache, unfinished_path, verify_cache
from vlatune.data.cache_writer import CacheWriter
from vlatune.data.episodes import DataError, Episode
from vlatune.data.prepare import PrepareConfig, main, prepare, split_episodes
from vlatune.data.sources.libero_hdf5 import LiberoHdf5Source


def config(demos: Path, out: Path, **changes) -> PrepareConfig:
    return PrepareConfig(**{"demos": demos, "out": out, "image_px": 8, "encoder": "none", **changes})


def contents(cache: Path) -> dict[str, bytes]:
    return {p.relative_to(cache).as_posix(): p.read_bytes() for p in sorted(cache.rglob("*")) if p.is_file()}


def test_equal_inputs_give_equal_bytes_and_nothing_is_left_over(demos, tmp_path):
    one = prepare(config(demos, tmp_path / "one", encoder="seeded-t5"))
    moved = demos.rename(tmp_path / "moved")
    two = prepare(config(moved, tmp_path / "two", encoder="seeded-t5"))
    assert contents(one) == contents(two)
    verify_cache(one)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["moved", "one", "two"]


def test_a_finished_cache_is_left_as_it_is(demos, tmp_path, capsys):
    arguments = [str(demos), "--out", str(tmp_path / "cache"), "--image-px", "8", "--encoder", "none"]
    main(arguments)
    assert "made:" in capsys.readouterr().out
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*")}
    unfinished_path(tmp_path / "cache").mkdir()  # killed after renaming, before cleaning up
    main(arguments)
    assert "left as it is:" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*")} == before
    assert not unfinished_path(tmp_path / "cache").exists()


def test_errors_end_the_command_in_one_sentence(tmp_path):
    with pytest.raises(SystemExit, match="vlatune prepare: there is no HDF5 file under"):
        main([str(tmp_path), "--out", str(tmp_path / "cache")])
    with pytest.raises(SystemExit, match="vlatune prepare: size_px is 0; it must be at least 1"):
        main([str(tmp_path), "--out", str(tmp_path / "cache"), "--image-px", "0"])


def test_another_setting_is_refused_with_what_differs(demos, tmp_path):
    prepare(config(demos, tmp_path / "cache"))
    with pytest.raises(
        DataError, match=r"image_px was 8 and is now 16; orientation was 'rot180' and is now 'raw'.*rm -r .*--out"
    ):
        prepare(config(demos, tmp_path / "cache", image_px=16, orientation="raw"))


def test_other_demonstrations_are_refused_with_what_differs(demos, tmp_path, write_demos):
    prepare(config(demos, tmp_path / "cache"))
    (demos / "pick_up_the_blue_cube_demo.hdf5").unlink()
    write_demos(demos / "pick_up_the_red_cube_demo.hdf5", seed=9)
    write_demos(demos / "open_it_demo.hdf5")
    expected = "gone: pick_up_the_blue_cube_demo.hdf5; new: open_it_demo.hdf5; changed: pick_up_the_red_cube_demo.hdf5"
    with pytest.raises(DataError, match=expected):
        prepare(config(demos, tmp_path / "cache"))


def test_a_folder_that_is_not_a_cache_is_refused(demos, tmp_path):
    (tmp_path / "precious").mkdir()
    with pytest.raises(DataError, match="precious is there already and is not a cache; give another --out"):
        prepare(config(demos, tmp_path / "precious"))


class Killed(BaseException):
    pass


def stop_at_episode(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    append, count = CacheWriter.append, iter(range(100))

    def stopping(self, episode):
        if next(count) == number:
            raise Killed
        append(self, episode)

    monkeypatch.setattr(CacheWriter, "append", stopping)


def test_a_stopped_preparation_continues_and_cuts_off_half_written_rows(demos, tmp_path, monkeypatch):
    whole = contents(prepare(config(demos, tmp_path / "whole")))
    out = tmp_path / "cache"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_at_episode(patch, 3)
        prepare(config(demos, out))
    with pytest.raises(DataError, match="cache is unfinished"):
        Cache.open(out)
    work = unfinished_path(out)
    for name, content in (
        ("cache/images_agentview.u8", b"123"),
        ("cache/state.f32", b"x" * 999),
        ("progress.jsonl", b'{"so'),
    ):
        with (work / name).open("ab") as file:
            file.write(content)
    read: list[str] = []
    append = CacheWriter.append
    monkeypatch.setattr(CacheWriter, "append", lambda self, e: (read.append(e.key), append(self, e)))
    prepare(config(demos, out))
    assert len(read) == 2  # of five
    assert contents(out) == whole


def test_rows_that_did_not_reach_the_disk_are_written_again(demos, tmp_path, monkeypatch):
    whole = contents(prepare(config(demos, tmp_path / "whole")))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_at_episode(patch, 4)
        prepare(config(demos, tmp_path / "cache"))
    os.truncate(unfinished_path(tmp_path / "cache") / "cache" / "actions.f32", 300)
    assert contents(prepare(config(demos, tmp_path / "cache"))) == whole


@pytest.mark.parametrize("step", ["language", "statistics", "manifest", "rename"])
def test_killed_while_finishing(demos, tmp_path, monkeypatch, step):
    whole = contents(prepare(config(demos, tmp_path / "whole")))
    out = tmp_path / "cache"

    def killed(*_args, **_kwargs):
        raise Killed

    target = {
        "language": (cache_writer.Language, "save"),
        "statistics": (cache_writer.Statistics, "save"),
        "manifest": (cache_writer.Manifest, "to_bytes"),
        "rename": (Path, "rename"),
    }[step]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(*target, killed)
        prepare(config(demos, out))
    assert not out.exists()
    assert contents(prepare(config(demos, out))) == whole


def test_what_a_kill_left_half_written_is_not_part_of_the_cache(demos, tmp_path, monkeypatch):
    whole = contents(prepare(config(demos, tmp_path / "whole")))
    out = tmp_path / "cache"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_at_episode(patch, 3)
        prepare(config(demos, out))
    work = unfinished_path(out) / "cache"
    (work / "language").mkdir()
    for name in ("statistics.json.tmp77", "manifest.json.tmp77", "manifest.json", "language/language.json.tmp77"):
        (work / name).write_text("{")  # SIGKILL: nothing tidies up
    assert contents(prepare(config(demos, out))) == whole


NUM_EPISODES, NUM_KILLS = 160, 20


def prepare_to_be_killed(config: PrepareConfig) -> None:
    """Adds a few episodes and then waits for its death: however fast it is and however late that comes, none of the twenty finishes."""
    tqdm.set_lock(threading.RLock())  # its own is shared with the parent, who would wait for the dead for ever
    append, left = CacheWriter.append, itertools.count(NUM_EPISODES // NUM_KILLS - 1, -1)

    def append_or_wait(self: CacheWriter, episode: Episode) -> None:
        if next(left) == 0:
            threading.Event().wait()
        append(self, episode)

    CacheWriter.append = append_or_wait  # type: ignore[method-assign]
    prepare(config)


def test_killed_at_random_it_ends_bit_identical(tmp_path, write_demos):
    for k in range(4):
        write_demos(tmp_path / "demos" / f"task_{k}_demo.hdf5", (4,) * (NUM_EPISODES // 4), seed=k)
    whole = contents(prepare(config(tmp_path / "demos", tmp_path / "whole")))
    out = tmp_path / "cache"
    choose = random.Random(0)
    fork = multiprocessing.get_context("fork")  # torch and all are loaded already: a start takes milliseconds
    progress = unfinished_path(out) / "progress.jsonl"

    def num_lines() -> int:
        try:
            return progress.read_bytes().count(b"\n")
        except FileNotFoundError:
            return 0

    for _ in range(NUM_KILLS):
        before = num_lines()
        process = fork.Process(target=prepare_to_be_killed, args=(config(tmp_path / "demos", out),))
        process.start()
        while num_lines() == before:  # it advances by one episode at least
            assert process.is_alive()
            time.sleep(0.001)
        time.sleep(choose.uniform(0, 0.01))
        process.kill()  # SIGKILL
        process.join()
        assert not out.exists()
    prepare(config(tmp_path / "demos", out))
    assert contents(out) == whole
    verify_cache(out)


def test_an_unfinished_cache_of_something_else_is_refused(demos, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_at_episode(patch, 2)
        prepare(config(demos, tmp_path / "cache"))
    with pytest.raises(
        DataError, match=r"unfinished was begun from something else \(image_px was 8 and is now 16\); delete it"
    ):
        prepare(config(demos, tmp_path / "cache", image_px=16))


def test_two_at_once_are_refused(demos, tmp_path, monkeypatch):
    append, messages = CacheWriter.append, []

    def meanwhile(self, episode):
        append(self, episode)
        with pytest.raises(DataError) as raised:
            prepare(config(demos, tmp_path / "cache"))
        messages.append(str(raised.value))

    monkeypatch.setattr(CacheWriter, "append", meanwhile)
    prepare(config(demos, tmp_path / "cache"))
    assert len(messages) == 5
    assert all("another process is preparing" in message for message in messages)


def test_a_full_disk_is_one_sentence_and_can_be_continued(demos, tmp_path, monkeypatch):
    def full(_file):
        raise OSError(28, "No space left on device")

    with (
        monkeypatch.context() as patch,
        pytest.raises(DataError, match="the disk of .* is full; free some space and run the same"),
    ):
        patch.setattr(cache_writer, "_to_disk", full)
        prepare(config(demos, tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()
    verify_cache(prepare(config(demos, tmp_path / "cache")))


def test_a_damaged_demo_names_itself_and_leaves_no_cache(demos, tmp_path):
    with h5py.File(demos / "pick_up_the_red_cube_demo.hdf5", "a") as file:
        file["data/demo_2/actions"][0, 0] = np.nan
    with pytest.raises(DataError, match="demo_2 of .*red_cube_demo.hdf5 has NaN"):
        prepare(config(demos, tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()


def test_split_is_by_task_and_does_not_depend_on_the_other_tasks():
    tasks = ["a"] * 20 + ["b"] * 3 + ["c"]
    keys = [f"{task}.hdf5/demo_{k}" for k, task in enumerate(tasks)]
    splits = split_episodes(tasks, keys, 0.1)
    assert splits[:20].count("validation") == 2
    assert splits[20:23].count("validation") == 1
    assert splits[23] == "train"
    assert split_episodes(tasks[:20], keys[:20], 0.1) == splits[:20]
    assert split_episodes(tasks[::-1], keys[::-1], 0.1) == splits[::-1]
    assert split_episodes(tasks, keys, 0.0) == ["train"] * 24
    assert "train" in split_episodes(["b"] * 3, keys[:3], 0.99)


def test_bad_validation_share():
    with pytest.raises(ValueError, match="validation_share is 1.0; it must be at least 0 and less than 1"):
        PrepareConfig(demos=Path(), out=Path(), validation_share=1.0)


def test_a_lerobot_dataset_makes_the_cache_that_its_hdf5_files_make(tmp_path, write_demos):
    """One suite, recorded as HDF5 and converted as LIBERO's published conversions are: pictures turned by 180 degrees."""
    write_demos(tmp_path / "demos" / "pick_up_the_red_cube_demo.hdf5", (5, 7, 4))
    source = LiberoHdf5Source(tmp_path / "demos")
    episodes = list(map(source.read, source.keys()))
    for episode in episodes:
        episode.actions_NA[:, 6] = np.sign(episode.actions_NA[:, 6])  # a gripper is open or closed in them
    converted = [
        Recording(
            instruction=episode.instruction,
            state_NS=episode.state_NS,
            actions_NA=episode.actions_NA,
            pictures={
                FRONT: episode.pictures("agentview")[:, ::-1, ::-1],
                WRIST: episode.pictures("eye_in_hand")[:, ::-1, ::-1],
            },
        )
        for episode in episodes
    ]
    dataset = write_lerobot(tmp_path / "dataset", converted, version="v3.0", stored_as="image")
    of_files, of_dataset = (
        Cache.open(prepare(config(demos, tmp_path / f"cache_{demos.name}"))) for demos in (tmp_path / "demos", dataset)
    )
    np.testing.assert_array_equal(of_dataset.state_NS, of_files.state_NS)
    np.testing.assert_array_equal(of_dataset.actions_NA[:, :6], of_files.actions_NA[:, :6])
    assert set(of_dataset.episodes["instruction"]) == {"pick up the red cube"}
    for camera in ("agentview", "eye_in_hand"):
        np.testing.assert_array_equal(of_dataset.images[camera], of_files.images[camera])


def test_the_state_is_the_robot_cards(demos, tmp_path):
    cache = Cache.open(prepare(config(demos, tmp_path / "cache", robot="libero_panda_joints")))
    assert cache.robot.name == "libero_panda_joints"
    with h5py.File(demos / "pick_up_the_blue_cube_demo.hdf5") as file:
        joints = file["data/demo_0/obs/joint_states"][()]
    np.testing.assert_allclose(cache.state_NS[: len(joints), :7], joints, rtol=1e-6)
    assert ((cache.state_NS[:, 7] >= 0) & (cache.state_NS[:, 7] <= 1)).all()
    with pytest.raises(ValueError, match=r"no robot 'libero_pandas'; did you mean 'libero_panda'\?"):
        prepare(config(demos, tmp_path / "other", robot="libero_pandas"))


def test_idle_frames_are_left_out_on_request(tmp_path, write_demos):
    path = write_demos(tmp_path / "demos" / "wait_demo.hdf5", (6, 5))
    with h5py.File(path, "a") as file:
        file["data/demo_0/actions"][2:4] = file["data/demo_0/actions"][1]
        file["data/demo_0/actions"][2:4, :6] = 0
    cache = Cache.open(prepare(config(tmp_path / "demos", tmp_path / "cache", drop_noops=True)))
    assert list(cache.episodes["length"]) == [4, 5]
    assert cache.images["agentview"].shape[0] == cache.num_frames == 9
