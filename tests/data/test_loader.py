import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from vlatune.data.batch import Batch
from vlatune.data.cache import Cache
from vlatune.data.loader import ChunkLoader, LoaderConfig
from vlatune.data.order import EndlessOrder
from vlatune.data.picture_memory import PictureMemory
from vlatune.data.prepare import PrepareConfig, prepare
from vlatune.data.prompt import prompt_text
from vlatune.data.read_ahead import NUM_READ_AHEAD
from vlatune.data.row_file import RowFile

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


def frames_of(batches) -> list[int]:
    return torch.cat([batch.sample_index_B for batch in batches]).tolist()


def take(loader: ChunkLoader, first_sample: int, num_batches: int) -> list[Batch]:
    return [batch for batch, _ in zip(loader.iterate(first_sample), range(num_batches), strict=False)]


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


def test_the_order_is_numpys_permutation_epoch_after_epoch():
    order = EndlessOrder(100, (5,))
    expected = np.concatenate([np.random.default_rng((5, epoch)).permutation(100) for epoch in range(4)])
    np.testing.assert_array_equal(order.samples(0, 400), expected)
    np.testing.assert_array_equal(order.samples(95, 210), expected[95:305])
    np.testing.assert_array_equal(order.samples(10, 3), expected[10:13])  # back to a permutation that it has let go
    assert order.samples(0, 3).dtype == np.int64


def test_a_permutation_is_made_once_an_epoch_and_is_four_bytes_a_sample(monkeypatch):
    order = EndlessOrder(1000, (5,))
    epochs = []
    made = np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda words: epochs.append(words[-1]) or made(words))
    for first in range(0, 3000, 7):
        order.samples(first, 7)
    assert epochs == [0, 1, 2, 3]  # the last batch reaches into epoch 3
    assert {p.dtype for p in order._permutations.values()} == {np.dtype(np.int32)}
    assert len(order._permutations) == 2


def test_another_world_size_and_batch_size_go_on_in_the_middle_of_an_epoch(small_cache):
    num_samples = ChunkLoader(small_cache, CONFIG).num_samples
    plan = [(2, 4, 2), (1, 3, 1), (4, 2, 3), (2, 5, 4)]  # ranks, samples a rank, micro-steps
    consumed, seen = 0, []
    for world_size, batch_size, num_steps in plan:
        config = replace(CONFIG, batch_size=batch_size)
        ranks = [ChunkLoader(small_cache, config, rank=rank, world_size=world_size) for rank in range(world_size)]
        of_ranks = [take(rank, consumed, num_steps) for rank in ranks]
        for step in range(num_steps):
            seen += frames_of(batches[step] for batches in of_ranks)
        consumed += world_size * batch_size * num_steps
    assert consumed > num_samples, "the plan is to cross an epoch's end"
    changes = np.cumsum([world_size * batch_size * num_steps for world_size, batch_size, num_steps in plan])
    assert (changes % num_samples).all(), "and to change within an epoch"
    straight = frames_of(take(ChunkLoader(small_cache, replace(CONFIG, batch_size=1)), 0, consumed))
    assert seen == straight
    assert sorted(seen[:num_samples]) == sorted(set(seen)), "an epoch has each frame once"


def test_iterate_gives_the_batches_in_order_from_any_sample_and_ends_its_thread(small_cache):
    loader = ChunkLoader(small_cache, CONFIG)
    iterator = loader.iterate(7 * CONFIG.batch_size)
    for step in range(7, 30):
        assert_equal(next(iterator), ChunkLoader(small_cache, CONFIG).batch(step))
    assert read_ahead_threads() == 1
    iterator.close()
    assert read_ahead_threads() == 0
    for _ in zip(loader.iterate(0), range(2), strict=False):
        pass
    assert read_ahead_threads() == 0


def test_a_negative_first_sample_is_refused(small_cache):
    with pytest.raises(ValueError, match="first_sample is -4; it is the number of samples consumed before, 0 or more"):
        ChunkLoader(small_cache, CONFIG).iterate(-4)


def test_batches_that_are_held_are_never_written_to(small_cache):
    loader = ChunkLoader(small_cache, CONFIG)
    held = take(loader, 0, 5 * NUM_READ_AHEAD)
    views = [
        loader.batch(step).observation.images["agentview"][1:, 0] for step in range(5)
    ]  # the batch itself is dropped
    for step in range(40):
        loader.batch(step)
    for step, batch in enumerate(held):
        assert_equal(batch, ChunkLoader(small_cache, CONFIG).batch(step))
    for step, view in enumerate(views):
        expected = ChunkLoader(small_cache, CONFIG).batch(step).observation.images["agentview"][1:, 0]
        assert torch.equal(view, expected)


def test_batches_that_are_dropped_give_their_memory_to_later_ones(small_cache):
    loader = ChunkLoader(small_cache, CONFIG)
    addresses = {image.data_ptr() for batch in take_each(loader, 60) for image in batch.observation.images.values()}
    assert len(addresses) <= (NUM_READ_AHEAD + 3) * len(CAMERAS)


def take_each(loader: ChunkLoader, num_batches: int):
    """As a training loop does: one batch is held at a time."""
    iterator = loader.iterate(0)
    for _ in range(num_batches):
        yield next(iterator)
    iterator.close()


def test_picture_memory_is_aligned_and_bounded():
    memory = PictureMemory((2, 1, 3, 3, 3), most=2)
    lent = [memory.lend(pinned=False) for _ in range(5)]
    assert len({tensor.data_ptr() for tensor in lent}) == 5
    assert all(tensor.data_ptr() % 64 == 0 for tensor in lent)
    assert len(memory._blocks) == 2
    first = lent[0].data_ptr()
    del lent
    assert memory.lend(pinned=False).data_ptr() == first


def test_rows_are_those_of_the_file(tmp_path):
    rows = np.random.default_rng(0).integers(0, 256, (50, 4, 3), dtype=np.uint8)
    (tmp_path / "rows").write_bytes(rows.tobytes())
    file = RowFile(tmp_path / "rows", np.memmap(tmp_path / "rows", np.uint8, "r", shape=rows.shape))
    index = np.array([49, 0, 7, 7])
    assert file.is_cold, "nothing is known yet"
    file.announce(index)
    was_cold = []
    for _ in range(10):  # several: the thread's own program may be read from disk, too
        out = np.zeros((4, 4, 3), np.uint8)
        file.take(index, out)
        was_cold.append(file.is_cold)
        np.testing.assert_array_equal(out, rows[index])
    assert not all(was_cold), "nothing was read from disk, for it had just been written"


def test_the_next_batches_rows_are_announced_while_the_disk_is_read(small_cache, monkeypatch):
    announced, taken = [], []
    take_rows = RowFile.take

    def take_and_stay_cold(file, index, out):
        take_rows(file, index, out)
        taken.append((file._path, index.tolist()))
        file.is_cold = True

    monkeypatch.setattr(RowFile, "announce", lambda file, index: announced.append((file._path, index.tolist())))
    monkeypatch.setattr(RowFile, "take", take_and_stay_cold)
    iterator = ChunkLoader(small_cache, replace(CONFIG, observation_offsets=(-1, 0)))._batches(0, pinned=False)
    for step in range(12):
        next(iterator)
        assert announced[: len(taken)] == taken
        assert len(announced) == (step + 2) * len(CAMERAS)


@pytest.mark.parametrize("style", ["instruction", "newline", "pi05"])
@pytest.mark.parametrize("embeddings", [False, True])
def test_prompts_are_those_of_their_texts(small_cache, style, embeddings):
    loader = ChunkLoader(small_cache, replace(CONFIG, prompt=style, embeddings=embeddings))
    episodes = list(small_cache.episodes.itertuples())
    for step in range(4):
        batch = loader.batch(step)
        frames = batch.sample_index_B.tolist()
        instructions = [e.instruction for f in frames for e in episodes if e.start <= f < e.start + e.length]
        states = batch.observation.state_BTS[:, -1].numpy()
        texts = [prompt_text(style, text, state) for text, state in zip(instructions, states, strict=True)]
        expected = small_cache.language.prompts(texts, embeddings=embeddings)
        assert torch.equal(batch.observation.prompts.ids_BL, expected.ids_BL)
        assert torch.equal(batch.observation.prompts.mask_BL, expected.mask_BL)
        repeats = batch.observation.prompts.repeats
        if repeats is not None:
            assert len(repeats.row_R) == len(set(texts))
            assert torch.equal(expected.ids_BL[repeats.row_R][repeats.which_B], expected.ids_BL)
        assert (repeats is not None) == (style != "pi05" and not embeddings), "known where texts hold no state"
        if embeddings:
            assert torch.equal(batch.observation.prompts.embedding_BLE, expected.embedding_BLE)


def test_prompts_are_as_wide_as_their_batch_needs(tmp_path, write_demos):
    write_demos(tmp_path / "demos" / "go_demo.hdf5", (4,))
    write_demos(
        tmp_path / "demos" / "put_both_the_moka_pots_and_the_bowl_on_the_stove_then_turn_it_off_demo.hdf5", (4,)
    )
    config = PrepareConfig(
        demos=tmp_path / "demos",
        out=tmp_path / "cache",
        image_px=8,
        encoder="none",
        tokenizer="trained",
        validation_share=0,
    )
    cache = Cache.open(prepare(config))
    loader = ChunkLoader(cache, replace(CONFIG, batch_size=1))
    widths = set()
    for step in range(8):
        prompts = loader.batch(step).observation.prompts
        expected = cache.language.prompts([cache.episodes["instruction"][int(loader.batch(step).sample_index_B >= 4)]])
        assert torch.equal(prompts.ids_BL, expected.ids_BL)
        widths.add(prompts.ids_BL.shape[1])
    assert len(widths) == 2


def test_prompts_of_texts_alone_are_tokenised_once_and_others_off_the_consumers_thread(small_cache, monkeypatch):
    asked = []
    prompts = small_cache.language.prompts
    monkeypatch.setattr(
        small_cache.language,
        "prompts",
        lambda texts, **settings: asked.append(threading.current_thread().name) or prompts(texts, **settings),
    )
    take(ChunkLoader(small_cache, replace(CONFIG, prompt="newline")), 0, 6)
    assert len(asked) == 2, "two tasks"
    asked.clear()
    take(ChunkLoader(small_cache, replace(CONFIG, prompt="pi05")), 0, 6)
    assert set(asked) == {"read-ahead"}


def test_an_error_in_the_thread_reaches_the_reader(small_cache, monkeypatch):
    loader = ChunkLoader(small_cache, CONFIG)
    read = loader._read

    def failing(first_sample, *, pinned):
        if first_sample == 2 * CONFIG.batch_size:
            raise OSError("the disk went away")
        return read(first_sample, pinned=pinned)

    monkeypatch.setattr(loader, "_read", failing)
    iterator = loader.iterate(0)
    next(iterator)
    next(iterator)
    with pytest.raises(OSError, match="the disk went away"):
        next(iterator)
    assert read_ahead_threads() == 0


@pytest.mark.gpu
def test_batches_arrive_on_the_device_unchanged_while_it_computes(small_cache):
    device = torch.device("cuda")
    busy = torch.ones(4000, 4000, device=device)
    iterator = ChunkLoader(small_cache, replace(CONFIG, embeddings=True)).iterate(0, device=device)
    for step in range(50):
        batch = next(iterator)
        assert batch.observation.images["agentview"].device.type == "cuda"
        assert batch.sample_index_B.device.type == "cpu"
        busy = busy @ busy / 4000  # so that the host runs ahead, and memory is given back before it has been read
        late = batch.to("cuda")
        assert_equal(late.to("cpu"), ChunkLoader(small_cache, replace(CONFIG, embeddings=True)).batch(step))
    iterator.close()


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
    cache = Cache.open(prepare(PrepareConfig(demos=demos, out=tmp_path / "cache", image_px=8, encoder="none")))
    ChunkLoader(cache, CONFIG)
    with pytest.raises(ValueError, match="has no text embeddings; prepare it again with --encoder"):
        ChunkLoader(cache, replace(CONFIG, embeddings=True))
