import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from vlatune.data.cache import Cache, Manifest, read_manifest, verify_cache
from vlatune.data.episodes import DataError
from vlatune.data.images import ImageRule
from vlatune.data.normalise import Statistics
from vlatune.data.robots.libero_panda import LIBERO_PANDA
from vlatune.data.sources.libero_hdf5 import LiberoHdf5Source


@pytest.fixture
def copied(small_cache: Cache, tmp_path: Path) -> Path:
    """A cache that may be damaged."""
    return Path(shutil.copytree(small_cache.path, tmp_path / "cache"))


def test_it_holds_the_sources_episodes_prepared(small_cache):
    source = LiberoHdf5Source(small_cache.path.parent / "demos")
    assert list(small_cache.episodes["source"]) == list(source.keys())
    assert small_cache.num_frames == len(small_cache.state_NS) == sum(small_cache.episodes["length"]) == 39
    for row in small_cache.episodes.itertuples():
        episode = source.read(row.source)
        frames = slice(row.start, row.start + row.length)
        assert (row.task, row.instruction) == (episode.task, episode.instruction)
        np.testing.assert_array_equal(small_cache.state_NS[frames], episode.state_NS)
        np.testing.assert_array_equal(small_cache.actions_NA[frames], episode.actions_NA)
        for camera in ("agentview", "eye_in_hand"):
            prepared = small_cache.image_rule.prepare(episode.pictures(camera))
            np.testing.assert_array_equal(small_cache.images[camera][frames], prepared)
    assert small_cache.robot == LIBERO_PANDA
    assert small_cache.image_rule == ImageRule(size_px=16)
    assert small_cache.language.known_texts == ("pick up the blue cube", "pick up the red cube")


def test_statistics_are_of_the_training_episodes(small_cache):
    train = np.concatenate(
        [
            np.arange(row.start, row.start + row.length)
            for row in small_cache.episodes.itertuples()
            if row.split == "train"
        ]
    )
    assert small_cache.statistics == Statistics.compute(small_cache.state_NS[train], small_cache.actions_NA[train])
    assert small_cache.statistics.state.count == len(train) < small_cache.num_frames


def test_the_manifest_reads_back_as_it_was_written(small_cache):
    content = (small_cache.path / "manifest.json").read_bytes()
    assert Manifest.from_json(json.loads(content)) == small_cache.manifest
    assert small_cache.manifest.to_bytes() == content
    assert set(small_cache.manifest.files) == {
        p.relative_to(small_cache.path).as_posix() for p in small_cache.path.rglob("*") if p.is_file()
    } - {"manifest.json"}


def test_memory_maps_cannot_be_written(small_cache):
    with pytest.raises(ValueError, match="read-only"):
        small_cache.actions_NA[0] = 0


def test_a_whole_cache_verifies(small_cache):
    verify_cache(small_cache.path)


@pytest.mark.parametrize(
    "name", ["images_agentview.u8", "actions.f32", "statistics.json", "episodes.parquet", "language/table.safetensors"]
)
def test_altered_content_is_named(copied, name):
    content = bytearray((copied / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copied / name).write_bytes(content)
    Cache.open(copied)  # sizes only
    with pytest.raises(DataError, match=rf"{name} was altered: its checksum is not the manifest's"):
        verify_cache(copied)


def test_altered_size_is_named(copied):
    with (copied / "state.f32").open("ab") as file:
        file.write(b"more")
    with pytest.raises(DataError, match=r"state\.f32 has 1252 bytes instead of 1248: it was altered or cut"):
        Cache.open(copied)


def test_a_missing_file_is_named(copied):
    (copied / "images_eye_in_hand.u8").unlink()
    with pytest.raises(DataError, match=r"lacks images_eye_in_hand\.u8"):
        Cache.open(copied)


def test_not_a_cache(tmp_path):
    with pytest.raises(DataError, match="no manifest.json is in .*it is not a cache; make one with `vlatune prepare"):
        Cache.open(tmp_path)
    with pytest.raises(DataError, match="there is nothing at .*mistyped"):
        Cache.open(tmp_path / "mistyped")
    (tmp_path / "manifest.json").write_text('{"format": "something else"}')
    with pytest.raises(DataError, match="is not the manifest of a vlatune cache"):
        Cache.open(tmp_path)


def test_an_unfinished_cache(tmp_path):
    (tmp_path / "cache.unfinished").mkdir()
    with pytest.raises(DataError, match="cache is unfinished .*run the same `vlatune prepare` again: it continues"):
        Cache.open(tmp_path / "cache")


def test_another_format_version(copied):
    manifest = copied / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format_version": 2', '"format_version": 1'))
    with pytest.raises(DataError, match="has format version 1, this vlatune reads 2; delete it and run"):
        Cache.open(copied)


@pytest.mark.parametrize("damage", ["cut", "field", "rule"])
def test_a_damaged_manifest(copied, damage):
    manifest = copied / "manifest.json"
    value = json.loads(manifest.read_text())
    if damage == "field":
        del value["num_frames"]
    if damage == "rule":
        value["image_rule"]["orientation"] = "sideways"
    text = json.dumps(value)
    manifest.write_text(text[:100] if damage == "cut" else text)
    with pytest.raises(DataError, match=r"manifest\.json is damaged"):
        read_manifest(copied)
