from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import small_demonstrations
import torch

from vlatune.data.cache import Cache
from vlatune.data.loader import ChunkLoader, LoaderConfig
from vlatune.data.mixture import MixtureLoader, mixture_statistics
from vlatune.data.normalise import FieldStatistics, Normaliser
from vlatune.data.prepare import PrepareConfig, prepare
from vlatune.data.prompt import prompt_text

CAMERAS = ("agentview", "eye_in_hand")
CONFIG = LoaderConfig(batch_size=6, horizon=3, cameras=CAMERAS, seed=5)


@pytest.fixture(scope="module")
def caches(tmp_path_factory) -> list[Cache]:
    """Three of 35, 14 and 9 training frames; the later ones read the first one's tokens."""
    folder = tmp_path_factory.mktemp("mixture")
    made: list[Cache] = []
    for name, lengths in (("red", (20, 15, 8)), ("the_blue_one", (8, 6)), ("green", (9,))):
        small_demonstrations.write_demos(
            folder / name / f"pick_up_{name}_demo.hdf5", lengths, image_px=8, seed=len(made)
        )
        tokenizer = str(folder / "cache_red" / "language") if made else "trained"
        made.append(Cache.open(prepare(config_for(folder, name, tokenizer=tokenizer))))
    return made


def config_for(folder: Path, name: str, **settings) -> PrepareConfig:
    return PrepareConfig(
        **{
            "demos": folder / name,
            "out": folder / f"cache_{name}",
            "image_px": 8,
            "encoder": "none",
            "validation_share": 0.0,
            **settings,
        }
    )


def frames_of(loader, steps: range) -> list[int]:
    return [frame for step in steps for frame in loader.batch(step).sample_index_B.tolist()]


def place_of(caches, frame: int) -> int:
    return int(np.searchsorted(np.cumsum([cache.num_frames for cache in caches]), frame, side="right"))


def test_every_row_is_the_row_of_its_cache(caches):
    loader = MixtureLoader(caches, (1, 2, 1), replace(CONFIG, observation_offsets=(-1, 0)))
    for step in range(6):
        batch = loader.batch(step)
        firsts = np.cumsum([0, *(cache.num_frames for cache in caches)])
        texts = []
        for b, frame in enumerate(batch.sample_index_B.tolist()):
            place = place_of(caches, frame)
            cache, own = caches[place], frame - firsts[place]
            (episode,) = [e for e in cache.episodes.itertuples() if e.start <= own < e.start + e.length]
            texts.append(episode.instruction)
            for camera in CAMERAS:
                np.testing.assert_array_equal(batch.observation.images[camera][b, 1], cache.images[camera][own])
                assert batch.observation.image_mask[camera][b].tolist() == [own > episode.start, True]
            np.testing.assert_array_equal(batch.observation.state_BTS[b, 1], cache.state_NS[own])
            np.testing.assert_array_equal(batch.actions_BHA[b, 0], cache.actions_NA[own])
            assert batch.valid_BH[b, 1] == (own + 1 < episode.start + episode.length)
        expected = caches[0].language.prompts(texts)
        assert torch.equal(batch.observation.prompts.ids_BL, expected.ids_BL)
        assert torch.equal(batch.observation.prompts.mask_BL, expected.mask_BL)
        repeats = batch.observation.prompts.repeats
        assert torch.equal(expected.ids_BL[repeats.row_R][repeats.which_B], expected.ids_BL)
        assert len(repeats.row_R) < len(texts)


@pytest.mark.parametrize("weights", [(1, 1, 1), (0.7, 0.2, 0.1), (1, 100, 10), (3, 1, 2)])
def test_shares_are_right_after_any_number_of_samples(caches, weights):
    loader = MixtureLoader(caches, weights, replace(CONFIG, batch_size=1))
    expected = np.array(weights) / sum(weights)
    for count in [*range(2000), 10**12 + 7]:
        drawn = loader._num_drawn(count)
        assert sum(drawn) == count
        assert np.abs(drawn - count * expected).max() <= 1 + count * 2**-29


def test_in_each_cache_nothing_comes_again_before_all_was_seen(caches):
    loader = MixtureLoader(caches, (0.5, 0.3, 0.2), CONFIG)
    frames = frames_of(loader, range(60))
    for place, cache in enumerate(caches):
        own = [frame for frame in frames if place_of(caches, frame) == place]
        assert len(own) > 2 * cache.num_frames
        for first in range(0, len(own) - cache.num_frames + 1, cache.num_frames):
            epoch = own[first : first + cache.num_frames]
            # Within a batch, too, a cache's rows come in the order of its sequence.
            assert len(set(epoch)) == cache.num_frames


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_the_global_batch_of_one_process(caches, world_size):
    one = MixtureLoader(caches, (2, 1, 1), CONFIG)
    share = replace(CONFIG, batch_size=CONFIG.batch_size // world_size)
    ranks = [MixtureLoader(caches, (2, 1, 1), share, rank=rank, world_size=world_size) for rank in range(world_size)]
    for step in range(2 * one.steps_per_epoch):
        together = Counter(frame for rank in ranks for frame in frames_of(rank, range(step, step + 1)))
        assert together == Counter(frames_of(one, range(step, step + 1)))


def test_another_world_size_goes_on_in_the_middle_of_an_epoch(caches):
    def take(world_size: int, batch_size: int, first_sample: int, num_steps: int) -> list[int]:
        frames = []
        for rank in range(world_size):
            config = replace(CONFIG, batch_size=batch_size)
            loader = MixtureLoader(caches, (2, 1, 1), config, rank=rank, world_size=world_size)
            batches = zip(loader.iterate(first_sample), range(num_steps), strict=False)
            frames += [frame for batch, _ in batches for frame in batch.sample_index_B.tolist()]
        return frames

    changed = take(2, 3, 0, 5) + take(1, 4, 30, 3) + take(3, 2, 42, 6)
    assert Counter(changed) == Counter(take(1, 1, 0, 78))


def test_a_batch_is_a_function_of_its_step_alone(caches):
    far = MixtureLoader(caches, None, CONFIG).batch(50)
    loader = MixtureLoader(caches, None, CONFIG)
    loader.batch(0)
    assert torch.equal(loader.batch(50).sample_index_B, far.sample_index_B)
    assert torch.equal(loader.batch(50).observation.images["agentview"], far.observation.images["agentview"])
    other = MixtureLoader(caches, None, replace(CONFIG, seed=6)).batch(50)
    assert not torch.equal(other.sample_index_B, far.sample_index_B)


def test_prompts_spell_out_the_state_as_one_policy_normalises_it(caches):
    config = replace(CONFIG, prompt="pi05", state_normalisation="min_max")
    together = mixture_statistics(caches)
    normaliser = Normaliser(together.state, "min_max")
    batch = MixtureLoader(caches, None, config).batch(3)
    texts = []
    for frame, state_S in zip(
        batch.sample_index_B.tolist(), normaliser(batch.observation.state_BTS[:, 0]).numpy(), strict=True
    ):
        place = place_of(caches, frame)
        texts.append(prompt_text("pi05", caches[place].episodes["instruction"].iloc[0], state_S))
    assert torch.equal(batch.observation.prompts.ids_BL, caches[0].language.prompts(texts).ids_BL)
    one = ChunkLoader(caches[1], config)
    given = ChunkLoader(caches[1], config, statistics=together)
    assert not torch.equal(one.batch(0).observation.prompts.ids_BL, given.batch(0).observation.prompts.ids_BL)


def test_without_weights_all_samples_count_the_same(caches):
    loader = MixtureLoader(caches, None, replace(CONFIG, batch_size=1))
    assert loader.num_samples == sum(cache.num_frames for cache in caches)
    assert loader._num_drawn(loader.num_samples) == [cache.num_frames for cache in caches]


def test_one_cache_alone_is_read_like_any_cache(caches):
    mixed, plain = MixtureLoader(caches[:1], (1,), CONFIG), ChunkLoader(caches[0], CONFIG)
    assert mixed.num_samples == plain.num_samples
    assert sorted(frames_of(mixed, range(30))[: plain.num_samples]) == sorted(set(frames_of(plain, range(30))))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ((1, 1), r"weights is \(1, 1\) for 3 caches; give one positive number for each"),
        ((1, 0, 1), "give one positive number for each"),
        ((1, float("nan"), 1), "give one positive number for each"),
        ((1, 1, 1e12), "the smallest is nothing beside the others: leave that cache out"),
    ],
)
def test_weights_that_are_none_are_refused(caches, weights, message):
    with pytest.raises(ValueError, match=message):
        MixtureLoader(caches, weights, CONFIG)


def test_a_cache_that_would_repeat_within_a_batch_is_refused(caches):
    with pytest.raises(
        ValueError, match=r"24 samples of each batch would come from .*cache_green, which has 9 train samples"
    ):
        MixtureLoader(caches, (1, 1, 2), replace(CONFIG, batch_size=24), world_size=2)


def test_no_cache_is_refused():
    with pytest.raises(ValueError, match="there is no cache to mix; give at least one"):
        MixtureLoader([], None, CONFIG)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"image_px": 16},
            r"cannot be mixed: image_rule is .* in the first and .*; prepare the second again as the first was",
        ),
        ({"tokenizer": "trained"}, r"cannot be mixed: tokenizer is .* \(--tokenizer .*cache_red/language gives"),
    ],
)
def test_caches_that_differ_are_refused(caches, tmp_path, settings, message):
    folder = caches[0].path.parent
    tokens = str(caches[0].language_path)
    changed = {"tokenizer": tokens, **settings}
    other = Cache.open(prepare(config_for(folder, "green", out=tmp_path / "other", **changed)))
    with pytest.raises(ValueError, match=message):
        MixtureLoader([caches[0], other], None, CONFIG)


def test_another_robot_is_refused(caches):
    robot = replace(caches[1].robot, action_names=(*caches[1].robot.action_names[:-1], "suction"))
    other = replace(caches[1], manifest=replace(caches[1].manifest, robot=robot))
    with pytest.raises(ValueError, match=r"the robot's action_names is \('dx', .*suction"):
        MixtureLoader([caches[0], other], None, CONFIG)


def test_encoders_have_to_be_equal_only_where_their_features_are_read(caches, tmp_path):
    folder = caches[0].path.parent
    settings = {"tokenizer": str(caches[0].language_path), "encoder": "seeded-t5"}
    other = Cache.open(prepare(config_for(folder, "green", out=tmp_path / "other", **settings)))
    MixtureLoader([caches[0], other], None, CONFIG)
    with pytest.raises(ValueError, match="cannot be mixed: encoder is None in the first and {"):
        MixtureLoader([caches[0], other], None, replace(CONFIG, embeddings=True))


def test_statistics_are_those_of_all_training_frames_together(caches, small_cache):
    both = [caches[0], small_cache]  # small_cache keeps episodes for validation
    found = mixture_statistics(both)
    is_train = np.repeat(small_cache.episodes["split"] == "train", small_cache.episodes["length"])
    assert not is_train.all()
    for field, tables in (("state", [c.state_NS for c in both]), ("actions", [c.actions_NA for c in both])):
        rows_ND = np.concatenate([tables[0], tables[1][is_train]])
        expected = FieldStatistics.compute(rows_ND)
        assert getattr(found, field) == expected
        np.testing.assert_allclose(getattr(found, field).mean, rows_ND.mean(axis=0, dtype=np.float64), atol=1e-12)
    assert mixture_statistics([small_cache]) == small_cache.statistics
