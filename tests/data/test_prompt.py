"""What is tokenised, character by character."""

import numpy as np
import pytest
import torch

from vlatune.data.loader import ChunkLoader, LoaderConfig
from vlatune.data.normalise import Normaliser
from vlatune.data.prompt import prompt_text

STATE = np.array([-1.5, -1.0, -0.9999, 0.0, 0.999, 1.0, 2.0], np.float32)


def test_the_state_in_words():
    text = prompt_text("pi05", " pick_up the\nbowl ", STATE)
    assert text == "Task: pick up the bowl, State: -1 0 0 128 255 255 255;\nAction: "


def test_other_styles():
    assert prompt_text("instruction", "pick up the bowl", STATE) == "pick up the bowl"
    assert prompt_text("newline", "pick up the bowl", STATE) == "pick up the bowl\n"
    assert prompt_text("newline", "pick up the bowl\n", STATE) == "pick up the bowl\n"
    with pytest.raises(ValueError, match="it can be instruction, newline, pi05"):
        prompt_text("pi06", "pick up the bowl", STATE)  # type: ignore[arg-type]


def test_the_loader_writes_each_samples_own_normalised_state(small_cache):
    config = LoaderConfig(
        batch_size=4, horizon=3, cameras=("agentview",), prompt="pi05", state_normalisation="quantile"
    )
    batch = ChunkLoader(small_cache, config).batch(0)
    normaliser = Normaliser(small_cache.statistics.state, "quantile")
    frames = batch.sample_index_B.numpy()
    starts = small_cache.episodes["start"].to_numpy()
    episodes = np.searchsorted(starts, frames, side="right") - 1
    texts = [
        prompt_text(
            "pi05",
            small_cache.episodes["instruction"].iloc[episode],
            normaliser(torch.tensor(small_cache.state_NS[frame])).numpy(),
        )
        for episode, frame in zip(episodes, frames, strict=True)
    ]
    assert len(set(texts)) == len(texts)
    assert torch.equal(batch.observation.prompts.ids_BL, small_cache.language.prompts(texts).ids_BL)
