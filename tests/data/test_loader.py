import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from vlatune.data.batch import Batch
from vlatune.data.loader import ChunkLoader, LoaderConfig

CAMERAS = ("agentview", "eye_in_hand")
CONFIG = LoaderConfig(batch_size=4, horizon=3, cameras=CAMERAS, seed=5)


def assert_equal(one: Batch, two: Batch) -> None:
    torch.testing.assert_close(
        [one.actions_BHA, one.valid_BH, one.sample_index_B, one.observation.state_BTS, one.observation.prompts.ids_BL],
        [two.actions_BHA, two.valid_BH, two.sample_index_B, two.observation.state_BTS, two.observation.prompts.ids_BL],
        rtol=0,
        atol=0,
    )
    for camera in CAMERAS:
        assert torch.equal(one.observation.images[camera], two.observation.images[camera])


def read_ahead_threads() -> int:
    return sum(thread.name == "read-ahead" for thread in threading.enumerate())


def test_windows_equal_a_plain_loop_over_the_cache(small_cache):
    config = replace(CONFIG, observation_offsets=(-2, 0), embeddings=True)
    loader = ChunkLoader(small_cache, config)
    episodes = list(small_cache.episodes.itertuples())
    for step in range(loader.steps_per_epoch):
        batch = loader.batch(step)
        texts = []
        for b, frame in enumerate(batch.sample_index_B.tolist()):
            (episode,) = [e for e in episodes if e.start <= frame < e.start + e.length]
            assert episode.split == "train"
            texts.append(episode.instruction)
            last = episode.start + episode.length - 1
            for k, offset in enumerate(config.observation_offsets):
                seen = max(frame + offset, episode.start)
                np.testing.assert_array_equal(batch.observation.state_BTS[b, k], small_cache.state_NS[seen])
                for camera in CAMERAS:
                    np.testing.assert_array_equal(
                        batch.observation.images[camera][b, k], small_cache.images[camera][seen]
                    )
                    assert batch.observation.image_mask[camera][b, k] == (frame + offset >= episode.start)
            for h in range(config.horizon):
                assert batch.valid_BH[b, h] == (frame + h <= last)
                np.testing.assert_array_equal(batch.actions_BHA[b, h], small_cache.actions_NA[min(frame + h, last)])
        expected = small_cache.language.prompts(texts, embeddings=True)
        assert torch.equal(batch.observation.prompts.ids_BL, expected.ids_BL)
        assert torch.equal(batch.observation.prompts.embedding_BLE, expected.embedding_BLE)


def test_dtypes_and_shapes(small_cache):
    batch = ChunkLoader(small_cache, replace(CONFIG, observation_offsets=(-1, 0))).batch(0)
    assert batch.observation.images["agentview"].shape == (4, 2, 16, 16, 3)
    assert batch.observation.images["agentview"].dtype == torch.uint8
    assert (batch.observation.state_BTS.shape, batch.observation.state_BTS.dtype) == ((4, 2, 8), torch.float32)
    assert (batch.actions_BHA.shape, batch.actions_BHA.dtype) == ((4, 3, 7), torch.float32)
    assert (batch.valid_BH.shape, batch.valid_BH.dtype) == ((4, 3), torch.bool)
    assert batch.sample_index_B.dtype == torch.int64


def test_each_epoch_has_every_training_frame_once_and_its_own_order(small_cache):
    loader = ChunkLoader(small_cache, CONFIG)
    seen = torch.cat([loader.batch(step).sample_index_B for step in range(3 * loader.steps_per_epoch)]).numpy()
    train = np.concatenate(
        [np.arange(e.start, e.start + e.length) for e in small_cache.episodes.itertuples() if e.split == "train"]
    )
    assert loader.num_samples == len(train)
    assert loader.num_samples % CONFIG.batch_size, "the test needs a batch that spans two epochs"
    epochs = seen[: 3 * len(train)].reshape(3, -1)
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), train)
    assert (epochs[0] != epochs[1]).any()
    assert (epochs[1] != epochs[2]).any()


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_global_batch_of_one_process(small_cache, world_size):
    one = ChunkLoader(small_cache, CONFIG)
    share = replace(CONFIG, batch_size=CONFIG.batch_size // world_size)
    ranks = [ChunkLoader(small_cache, share, rank=rank, world_size=world_size) for rank in range(world_size)]
    for step in range(2 * one.steps_per_epoch):
        together = torch.cat([rank.batch(step).sample_index_B for rank in ranks])
        assert torch.equal(together, one.batch(step).sample_index_B)


def test_a_batch_is_a_function_of_its_step_alone(small_cache):
    loader = ChunkLoader(small_cache, CONFIG)
    far = loader.batch(100)
    loader.batch(0)
    assert_equal(loader.batch(100), far)
    assert_equal(ChunkLoader(small_cache, CONFIG).batch(100), far)
    other_seed = ChunkLoader(small_cache, replace(CONFIG, seed=6)).batch(100)
    assert not torch.equal(other_seed.sample_index_B, far.sample_index_B)


def test_validation_has_the_other_episodes(small_cache):
    loader = ChunkLoader(small_cache, replace(CONFIG, split="validation"))
    expected = small_cache.episodes.query("split == 'validation'")
    assert loader.num_samples == expected["length"].sum()
    frames = loader.batch(0).sample_index_B.numpy()
    assert all(((expected["start"] <= f) & (f < expected["start"] + expected["length"])).any() for f in frames)


def test_iterate_gives_the_batches_in_order_from_any_step_and_ends_its_thread(small_cache):
    loader = ChunkLoader(small_cache, CONFIG)
    iterator = loader.iterate(7)
    for step in range(7, 30):
        assert_equal(next(iterator), ChunkLoader(small_cache, CONFIG).batch(step))
    assert read_ahead_threads() == 1
    iterator.close()
    assert read_ahead_threads() == 0
    for _ in zip(loader.iterate(0), range(2), strict=False):
        pass
    assert read_ahead_threads() == 0


def test_an_error_in_the_thread_reaches_the_reader(small_cache, monkeypatch):
    loader = ChunkLoader(small_cache, CONFIG)
    batch = loader.batch

    def failing(step):
        if step == 2:
            raise OSError("the disk went away")
        return batch(step)

    monkeypatch.setattr(loader, "batch", failing)
    iterator = loader.iterate(0)
    next(iterator)
    next(iterator)
    with pytest.raises(OSError, match="the disk went away"):
        next(iterator)
    assert read_ahead_threads() == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0 and horizon 3; both must be at least 1"),
        ({"horizon": 0}, "both must be at least 1"),
        ({"observation_offsets": (0, 1)}, r"observation_offsets is \(0, 1\); it must be numbers of 0 or less"),
        ({"observation_offsets": ()}, "must be numbers of 0 or less"),
    ],
)
def test_bad_configs_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch_size": 40}, r"a batch of 40 on 2 ranks is more than the \d+ train samples of .*; give at most 1\d"),
        ({"cameras": ("agentview", "overhead")}, "has no camera 'overhead'; it has agentview, eye_in_hand"),
        ({"split": "test"}, "has no 'test' episodes; it has train, validation"),
    ],
)
def test_what_the_cache_cannot_give_is_refused(small_cache, fields, message):
    with pytest.raises(ValueError, match=message):
        ChunkLoader(small_cache, replace(CONFIG, **fields), world_size=2)


def test_a_bad_rank_is_refused(small_cache):
    with pytest.raises(ValueError, match="rank is 2 of 2; it must be 0 to 1"):
        ChunkLoader(small_cache, CONFIG, rank=2, world_size=2)


def test_embeddings_without_an_encoder_are_refused(small_cache, tmp_path, demos):
    from vlatune.data.cache import Cache
    from vlatune.data.prepare import PrepareConfig, prepare

    cache = Cache.open(prepare(PrepareConfig(demos=demos, out=tmp_path / "cache", image_px=8, encoder="none")))
    ChunkLoader(cache, CONFIG)
    with pytest.raises(ValueError, match="has no text embeddings; prepare it again with --encoder"):
        ChunkLoader(cache, replace(CONFIG, embeddings=True))
