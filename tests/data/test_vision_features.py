"""The store of vision features: what is written is read, whatever is killed in between, and only for its own cache."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from vlatune.data.cache import Cache
from vlatune.data.episodes import DataError
from vlatune.data.loader import ChunkLoader, LoaderConfig
from vlatune.data.mixture import MixtureLoader
from vlatune.data.vision_features import DTYPES, FeaturesPlan, FeatureStore, size_bytes
from vlatune.data.vision_features_writer import FeatureWriter

CAMERAS = ("agentview", "eye_in_hand")
CONFIG = LoaderConfig(batch_size=4, horizon=3, cameras=CAMERAS, observation_offsets=(-2, 0), seed=5)
BLOCK = 8


def plan_for(cache: Cache, dtype="bfloat16", **changes) -> FeaturesPlan:
    plan = FeaturesPlan(
        cache_digest=cache.digest,
        num_frames=cache.num_frames,
        cameras=cache.manifest.cameras,
        tower={"type": "clip", "weights": "1234"},
        dtype=dtype,
        shape=(3, 5),
    )
    return replace(plan, **changes)


def features_of(plan: FeaturesPlan, seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {camera: torch.randn(plan.num_frames, *plan.shape).to(DTYPES[plan.dtype]) for camera in plan.cameras}


def append(writer: FeatureWriter, features, first: int, last: int) -> None:
    for start in range(first, last, BLOCK):
        writer.append({camera: rows[start : min(start + BLOCK, last)] for camera, rows in features.items()})


def make_store(path, plan: FeaturesPlan, features) -> None:
    with FeatureWriter(path, plan) as writer:
        append(writer, features, 0, plan.num_frames)
        writer.finish()


@pytest.fixture
def store(small_cache, tmp_path):
    plan = plan_for(small_cache)
    make_store(tmp_path / "features", plan, features_of(plan))
    return tmp_path / "features"


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_loader_reads_the_rows_of_its_frames(small_cache, tmp_path, dtype):
    plan = plan_for(small_cache, dtype)
    features = features_of(plan)
    make_store(tmp_path / "features", plan, features)
    assert not (tmp_path / "features.unfinished").exists()
    pictures = ChunkLoader(small_cache, CONFIG)
    loader = ChunkLoader(small_cache, CONFIG, features=FeatureStore.open(tmp_path / "features", small_cache))
    starts = small_cache.episodes["start"].to_numpy()
    ahead = loader.iterate(0)
    for step in range(loader.steps_per_epoch):
        batch, expected = next(ahead), pictures.batch(step)
        seen = batch.observation
        assert not seen.images and seen.features is not None
        assert torch.equal(batch.sample_index_B, expected.sample_index_B)
        assert torch.equal(batch.actions_BHA, expected.actions_BHA)
        for camera in CAMERAS:
            assert torch.equal(seen.image_mask[camera], expected.observation.image_mask[camera])
            assert seen.features[camera].dtype == DTYPES[dtype]
            for b, frame in enumerate(batch.sample_index_B.tolist()):
                first = starts[starts <= frame].max()
                for k, offset in enumerate(CONFIG.observation_offsets):
                    assert torch.equal(seen.features[camera][b, k], features[camera][max(frame + offset, first)])
    ahead.close()


def test_no_picture_is_read(small_cache, store, monkeypatch):
    opened = FeatureStore.open(store, small_cache)
    alone = Cache.open(small_cache.path)
    monkeypatch.setattr(Cache, "_mapped", lambda _cache, name, *_: pytest.fail(f"{name} is read"))
    monkeypatch.setitem(alone.__dict__, "state_NS", small_cache.state_NS)
    monkeypatch.setitem(alone.__dict__, "actions_NA", small_cache.actions_NA)
    monkeypatch.setitem(alone.__dict__, "images", dict.fromkeys(CAMERAS))
    assert ChunkLoader(alone, CONFIG, features=opened).batch(0).observation.features


def test_batches_move_with_their_features(small_cache, store):
    batch = ChunkLoader(small_cache, CONFIG, features=FeatureStore.open(store, small_cache)).batch(0).to("meta")
    assert all(features.device.type == "meta" for features in batch.observation.features.values())
    assert ChunkLoader(small_cache, CONFIG).batch(0).to("meta").observation.features is None


def test_a_killed_writer_goes_on(small_cache, store, tmp_path):
    plan = plan_for(small_cache)
    features, out = features_of(plan), tmp_path / "killed"
    with FeatureWriter(out, plan) as writer:
        append(writer, features, 0, 2 * BLOCK)
    work = tmp_path / "killed.unfinished"
    with (work / "store" / "features_agentview.bin").open("ab") as file:
        file.write(b"half a block")
    (work / "store" / "manifest.json").write_text("{}")
    with pytest.raises(DataError, match=r"unfinished .* run the same `vlatune features` again"):
        FeatureStore.open(out, small_cache)
    with FeatureWriter(out, plan) as writer:
        assert writer.num_done == 2 * BLOCK
        with pytest.raises(ValueError, match="16 of 39 frames are written"):
            writer.finish()
        append(writer, features, writer.num_done, plan.num_frames)
        writer.finish()
    assert {file.name: file.read_bytes() for file in out.iterdir()} == {
        file.name: file.read_bytes() for file in store.iterdir()
    }


def test_what_was_lost_is_made_again(small_cache, tmp_path):
    plan = plan_for(small_cache)
    with FeatureWriter(tmp_path / "out", plan) as writer:
        append(writer, features_of(plan), 0, BLOCK)
    (tmp_path / "out.unfinished" / "store" / "features_eye_in_hand.bin").unlink()
    with FeatureWriter(tmp_path / "out", plan) as writer:
        assert writer.num_done == 0


def test_two_writers_do_not_meet(small_cache, tmp_path):
    plan = plan_for(small_cache)
    with FeatureWriter(tmp_path / "out", plan), pytest.raises(DataError, match="another process is making"):
        FeatureWriter(tmp_path / "out", plan)
    other = replace(plan, tower={"type": "clip", "weights": "5678"})
    with pytest.raises(DataError, match=r"tower.weights was '1234' and is now '5678'.*rm -r"):
        FeatureWriter(tmp_path / "out", other)
    with FeatureWriter(tmp_path / "out", plan) as writer, pytest.raises(ValueError, match="must be 8 x"):
        append(writer, features_of(replace(plan, dtype="float32")), 0, BLOCK)


def test_another_cache_is_refused(small_cache, tmp_path):
    plan = plan_for(small_cache, cache_digest="0" * 64)
    make_store(tmp_path / "features", plan, features_of(plan))
    with pytest.raises(DataError, match=r"made from another cache than .* \(sha256 00000000, not"):
        FeatureStore.open(tmp_path / "features", small_cache)
    with pytest.raises(DataError, match="made from another cache"):
        ChunkLoader(small_cache, CONFIG, features=FeatureStore(tmp_path / "features", plan))


def test_damage_is_named(small_cache, store, tmp_path):
    with pytest.raises(DataError, match="there is nothing at .* make them with"):
        FeatureStore.open(tmp_path / "nowhere", small_cache)
    with pytest.raises(DataError, match="is not the manifest of vision features"):
        FeatureStore.open(small_cache.path, small_cache)
    cut = shutil.copytree(store, tmp_path / "cut") / "features_agentview.bin"
    cut.write_bytes(cut.read_bytes()[:-2])
    with pytest.raises(DataError, match=r"agentview.bin is 1168 bytes instead of 1170: it was altered or cut"):
        FeatureStore.open(tmp_path / "cut", small_cache)
    cut.unlink()
    with pytest.raises(DataError, match=r"agentview.bin is gone"):
        FeatureStore.open(tmp_path / "cut", small_cache)
    manifest = json.loads((store / "manifest.json").read_text())
    del manifest["plan"]["shape"]
    (store / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="is damaged"):
        FeatureStore.open(store, small_cache)


def test_a_mixture_reads_each_caches_own(small_cache, store, tmp_path):
    plan = plan_for(small_cache)
    make_store(tmp_path / "second", plan, features_of(plan, seed=1))
    stores = [FeatureStore.open(store, small_cache), FeatureStore.open(tmp_path / "second", small_cache)]
    loader = MixtureLoader([small_cache, small_cache], None, CONFIG, features=stores)
    batch = loader.batch(0)
    assert batch.observation.features is not None and not batch.observation.images
    expected = torch.cat([features_of(plan)["agentview"], features_of(plan, seed=1)["agentview"]])
    assert torch.equal(batch.observation.features["agentview"][:, -1], expected[batch.sample_index_B])
    assert (batch.sample_index_B >= plan.num_frames).any() and (batch.sample_index_B < plan.num_frames).any()


def test_a_mixture_wants_features_of_one_tower_for_each(small_cache, store, tmp_path):
    caches, first = [small_cache, small_cache], FeatureStore.open(store, small_cache)
    with pytest.raises(ValueError, match="vision features for 1 of 2 caches"):
        MixtureLoader(caches, None, CONFIG, features=[first])
    other = FeatureStore(tmp_path / "other", replace(first.plan, tower={"type": "other"}))
    with pytest.raises(ValueError, match="of different towers or precisions"):
        MixtureLoader(caches, None, CONFIG, features=[first, other])


def test_sizes():
    assert size_bytes(58_213, 2, 1, 512, 4) == 58_213 * 2 * 512 * 4
    plan = FeaturesPlan(
        cache_digest="", num_frames=58_213, cameras=CAMERAS, tower={}, dtype="bfloat16", shape=(256, 1152)
    )
    assert plan.size_text == "58,213 frames x 2 cameras x 256 x 1152 bfloat16 = 68.7 GB"
