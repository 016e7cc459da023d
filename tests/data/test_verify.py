"""`vlatune verify`: every way in which a cache can be wrong, each planted so that no earlier check sees it."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from safetensors.torch import load_file, save_file
from small_demonstrations import write_demos

from vlatune.data.cache import Cache
from vlatune.data.episodes import DataError
from vlatune.data.images import ImageRule
from vlatune.data.prepare import PrepareConfig, prepare
from vlatune.data.verify import VerifyConfig, main, verify

DEMO = "pick_up_the_red_cube_demo.hdf5"


@pytest.fixture
def copied(small_cache: Cache, tmp_path: Path) -> Path:
    """A cache that may be damaged; its demonstrations lie beside it."""
    shutil.copytree(small_cache.path.parent / "demos", tmp_path / "demos")
    return Path(shutil.copytree(small_cache.path, tmp_path / "cache"))


def check(path: Path, *, demos: bool = False):
    return verify(VerifyConfig(cache=path, demos=path.parent / "demos" if demos else None))


def change_manifest(path: Path, *keys: str, value: object) -> None:
    file = path / "manifest.json"
    manifest = json.loads(file.read_text())
    place = manifest
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    file.write_text(json.dumps(manifest))


def forge_checksum(path: Path, name: str) -> None:
    """As somebody would who means the change."""
    content = (path / name).read_bytes()
    change_manifest(path, "files", name, value={"size": len(content), "sha256": hashlib.sha256(content).hexdigest()})


def change_numbers(path: Path, name: str, place: int, value: float) -> None:
    numbers = np.fromfile(path / name, np.float32)
    numbers[place] = value
    numbers.tofile(path / name)
    forge_checksum(path, name)


def change_episodes(path: Path, column: str, row: int, value: object) -> None:
    episodes = pd.read_parquet(path / "episodes.parquet")
    episodes.loc[row, column] = value
    episodes.to_parquet(path / "episodes.parquet", index=False)
    forge_checksum(path, "episodes.parquet")


def test_a_whole_cache_passes_every_check(small_cache):
    findings = verify(VerifyConfig(cache=small_cache.path, demos=small_cache.path.parent / "demos", samples=10))
    assert [finding.check for finding in findings] == [
        *("files", "settings", "rows", "episodes", "splits", "statistics", "language", "tokens", "source", "frames")
    ]
    about = {finding.check: finding.about for finding in findings}
    assert about["rows"] == "39 frames in each of 4 files; states and actions finite"
    assert about["episodes"].startswith("6 episodes of 2 tasks")
    assert about["splits"] == "4 training and 2 validation episodes, as a validation share of 0.1 gives them"
    assert re.match(r"10 of 39 frames, in \d episodes: the same pictures of agentview, eye_in_hand", about["frames"])


def test_a_flipped_byte(copied):
    content = bytearray((copied / "images_agentview.u8").read_bytes())
    content[1234] ^= 1
    (copied / "images_agentview.u8").write_bytes(content)
    with pytest.raises(DataError, match=r"images_agentview\.u8 was altered: its checksum is not the manifest's"):
        check(copied)


def test_a_cut_file(copied):
    content = (copied / "actions.f32").read_bytes()
    (copied / "actions.f32").write_bytes(content[:-28])
    with pytest.raises(DataError, match=r"actions\.f32 has 1064 bytes instead of 1092"):
        check(copied)
    forge_checksum(copied, "actions.f32")
    with pytest.raises(DataError, match=r"has 1064 bytes of actions\.f32; 39 frames are 1092"):
        check(copied)


def test_numbers_that_are_not_finite(copied):
    change_numbers(copied, "state.f32", 8 * 17 + 3, np.nan)
    with pytest.raises(DataError, match=r"has NaN or infinity in state\.f32, first in frame 17"):
        check(copied)


def test_another_image_rule_than_prepare_was_asked_for(copied):
    change_manifest(copied, "image_rule", "orientation", value="flipud")
    with pytest.raises(DataError, match=r"says image rule .*flipud.* and was prepared with .*rot180"):
        check(copied)


def test_settings_of_another_version(copied):
    change_manifest(copied, "settings", "sharpen", value=True)
    with pytest.raises(DataError, match=r"settings that this vlatune does not know \(.*sharpen"):
        check(copied)


@pytest.mark.parametrize(
    ("column", "row", "value", "sentence"),
    [
        ("start", 2, 11, r"has episode 2 at frames 11 to \d+; it must begin at 10"),
        ("length", 5, 8, r"says num_frames 39, and episodes\.parquet has 38"),
        ("length", 0, 0, r"has episode 0 at frames 0 to 0; it must begin at 0 and not be empty"),
        ("task", 0, "another", r"says num_tasks 2, and episodes\.parquet has 3"),
        ("source", 1, f"{DEMO}/demo_0", rf"has episode {DEMO}/demo_0 twice"),
        (
            "instruction",
            0,
            "never heard",
            r"an episode with the instruction 'never heard', which its language does not know",
        ),
    ],
)
def test_a_wrong_table_of_episodes(copied, column, row, value, sentence):
    change_episodes(copied, column, row, value)
    with pytest.raises(DataError, match=sentence):
        check(copied)


def test_episodes_on_the_wrong_side(copied):
    episodes = pd.read_parquet(copied / "episodes.parquet")
    of_task = episodes[episodes["task"] == "pick_up_the_red_cube"]
    for split, other in (("train", "validation"), ("validation", "train")):
        change_episodes(copied, "split", of_task.index[of_task["split"] == split][0], other)
    with pytest.raises(DataError, match=r"in '(train|validation)', and a validation share of 0\.1 puts it into"):
        check(copied)


@pytest.mark.parametrize("field", ["state", "actions"])
def test_edited_statistics_with_a_forged_checksum(copied, field):
    file = copied / "statistics.json"
    statistics = json.loads(file.read_text())
    statistics[field]["q99"][1] += 1e-6
    file.write_text(json.dumps(statistics))
    forge_checksum(copied, "statistics.json")
    name = {"state": "eef_y_m", "actions": "dy"}[field]
    with pytest.raises(DataError, match=rf"says q99 of {field} {name} is .*, and its frames give"):
        check(copied)


def test_statistics_of_other_frames(copied):
    file = copied / "statistics.json"
    statistics = json.loads(file.read_text())
    statistics["state"]["count"] += 1
    file.write_text(json.dumps(statistics))
    forge_checksum(copied, "statistics.json")
    with pytest.raises(DataError, match=r"has statistics of \d+ state rows, and there are \d+ training frames"):
        check(copied)


@pytest.mark.parametrize(
    ("tensor", "value", "sentence"),
    [
        ("ids", 3, r"has token ids \[3, .*\] for 'pick up the blue cube', and its tokenizer gives"),
        ("embeddings", float("nan"), r"has NaN or infinity in the embedding of 'pick up the blue cube'"),
    ],
)
def test_a_wrong_language_table(copied, tensor, value, sentence):
    file = copied / "language" / "table.safetensors"
    tensors = load_file(file)
    tensors[tensor][0] = value
    save_file(tensors, file)
    index = json.loads((copied / "language" / "language.json").read_text())
    index["table_sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    (copied / "language" / "language.json").write_text(json.dumps(index))
    for name in ("language/table.safetensors", "language/language.json"):
        forge_checksum(copied, name)
    with pytest.raises(DataError, match=sentence):
        check(copied)


def test_another_language_than_the_manifest_says(copied):
    change_manifest(copied, "language", "encoder", value=None)
    with pytest.raises(DataError, match="has another language than its manifest says"):
        check(copied)


def test_a_changed_source(copied):
    write_demos(copied.parent / "demos" / DEMO, (7, 5, 9), seed=99)
    with pytest.raises(
        DataError, match=rf"demos is not what the cache .* was made from \(changed: {DEMO}\); give the right --demos"
    ):
        check(copied, demos=True)


def test_the_wrong_source(copied, tmp_path):
    write_demos(tmp_path / "others" / DEMO, (3,))
    with pytest.raises(DataError, match=r"was made from \(gone: pick_up_the_blue_cube_demo\.hdf5; changed: "):
        verify(VerifyConfig(cache=copied, demos=tmp_path / "others"))
    with pytest.raises(DataError, match="there is no HDF5 file under .*nowhere"):
        verify(VerifyConfig(cache=copied, demos=tmp_path / "nowhere"))


def test_pictures_turned_another_way_than_the_cache_says(copied):
    """Planted with every checksum forged: only the demonstrations can tell."""
    for camera in ("agentview", "eye_in_hand"):
        file = copied / f"images_{camera}.u8"
        turned = np.fromfile(file, np.uint8).reshape(-1, 16, 16, 3)[:, :, ::-1]  # rot180 becomes flipud
        np.ascontiguousarray(turned).tofile(file)
        forge_checksum(copied, file.name)
    check(copied)
    with pytest.raises(
        DataError,
        match=r"another picture of agentview than frame \d of .* \(it is turned flipud, and the cache says rot180\)",
    ):
        check(copied, demos=True)


def test_one_changed_pixel_is_found_where_it_is_sampled(copied):
    pixels = np.fromfile(copied / "images_eye_in_hand.u8", np.uint8)
    pixels[16 * 16 * 3 * 20 + 5] ^= 1
    pixels.tofile(copied / "images_eye_in_hand.u8")
    forge_checksum(copied, "images_eye_in_hand.u8")
    with pytest.raises(DataError, match=r"has another picture of eye_in_hand than frame 2 of .*; delete it"):
        check(copied, demos=True)  # 64 samples: all 39 frames


@pytest.mark.parametrize(("name", "width"), [("state", 8), ("actions", 7)])
def test_other_numbers_than_the_demonstrations(copied, name, width, monkeypatch):
    """Statistics are made to fit as well."""
    change_numbers(copied, f"{name}.f32", 20 * width, 0.25)
    cache = Cache.open(copied)
    train_N = np.repeat(cache.episodes["split"] == "train", cache.episodes["length"]).to_numpy()
    type(cache.statistics).compute(cache.state_NS, cache.actions_NA, train_N).save(copied / "statistics.json")
    forge_checksum(copied, "statistics.json")
    check(copied)
    said = {"state": "states", "actions": "actions"}[name]
    with pytest.raises(DataError, match=rf"has other {said} than {DEMO}/demo_0, first in frame 2"):
        check(copied, demos=True)


def test_a_task_named_otherwise(copied):
    for row in range(3):
        change_episodes(copied, "suite", row, "libero_spatial")
    check(copied)
    with pytest.raises(DataError, match=r"has suite 'libero_spatial' for .*, and its source says ''"):
        check(copied, demos=True)


def test_a_cache_without_idle_frames_and_with_another_rule(tmp_path):
    """Settings come from the cache: nobody has to repeat them."""
    import h5py

    path = write_demos(tmp_path / "demos" / DEMO, (9, 9), image_px=12)
    with h5py.File(path, "r+") as file:
        for demo in ("demo_0", "demo_1"):
            file[f"data/{demo}/actions"][3:6, :6] = 0
            file[f"data/{demo}/actions"][:, 6] = 1
    config = PrepareConfig(
        demos=path.parent,
        out=tmp_path / "cache",
        image_px=8,
        orientation="flipud",
        background=(9, 9, 9),
        drop_noops=True,
        encoder="none",
    )
    cache = Cache.open(prepare(config))
    assert cache.num_frames == 12
    assert cache.image_rule == ImageRule(orientation="flipud", size_px=8, background=(9, 9, 9))
    assert check(cache.path, demos=True)[-1].about.startswith("12 of 12 frames, in 2 episodes")


def test_from_the_command_line(small_cache, copied, capsys):
    main([str(small_cache.path)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("files      9 files, ")
    assert lines[-1] == "frames     not compared with the demonstrations: --demos PATH does that"
    (copied / "state.f32").write_bytes((copied / "state.f32").read_bytes()[::-1])
    with pytest.raises(SystemExit, match=r"^vlatune verify: .*state\.f32 was altered") as stop:
        main([str(copied), "--demos", str(copied.parent / "demos")])
    assert isinstance(stop.value.code, str)  # printed on stderr, and exit status 1
    with pytest.raises(ValueError, match="samples is 0; it must be at least 1"):
        VerifyConfig(cache=copied, samples=0)


def test_equal_seeds_look_at_equal_frames(copied):
    """Five damaged frames, few samples: the same seed sees the same, and some seed sees the damage."""
    pixels = np.fromfile(copied / "images_agentview.u8", np.uint8).reshape(39, -1)
    pixels[20:25] = 0
    pixels.tofile(copied / "images_agentview.u8")
    forge_checksum(copied, "images_agentview.u8")

    def is_seen(seed: int) -> bool:
        try:
            verify(VerifyConfig(cache=copied, demos=copied.parent / "demos", samples=4, seed=seed))
        except DataError:
            return True
        return False

    seen = [is_seen(seed) for seed in range(6)]
    assert seen == [is_seen(seed) for seed in range(6)]
    assert any(seen)
    assert not all(seen)
