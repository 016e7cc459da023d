"""Conditions hidden in training: how often, apart from one another, alike in any batch; noise on the state; the empty text."""

from dataclasses import replace

import pytest
import torch
from small_text_models import without_empty_text, write_gemma_model

from vlatune.data.batch import Observation, Prompts
from vlatune.data.condition_dropout import ConditionsConfig, harden
from vlatune.data.embed import EmbedConfig, embed
from vlatune.data.episodes import DataError
from vlatune.data.language import Language
from vlatune.data.normalise import FieldStatistics
from vlatune.data.text_encoder import SeededT5, SeededT5Config

CAMERAS = ("agentview", "eye_in_hand")
STATE = FieldStatistics(mean=(7.0, -7.0, 0.5), std=(2.0, 0.01, 0.0), count=10)
EMPTY_TEXT = Prompts(
    ids_BL=torch.tensor([[1]]), mask_BL=torch.tensor([[True]]), embedding_BLE=torch.tensor([[[0.25, -1.0]]])
)
RDT = ConditionsConfig(dropout=0.1, state_noise_db=40.0)


def make_observation(batch: int, frames: int = 2) -> Observation:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.zeros(batch, frames, 1, 1, 3, dtype=torch.uint8)
    return Observation(
        images=dict.fromkeys(CAMERAS, pixels),
        image_mask=dict.fromkeys(CAMERAS, torch.ones(batch, frames, dtype=torch.bool)),
        state_BTS=torch.randn(batch, frames, 3, generator=generator),
        prompts=Prompts(
            ids_BL=torch.randint(2, 9, (batch, 4), generator=generator),
            mask_BL=torch.tensor([True, True, True, False]).expand(batch, -1),
            embedding_BLE=torch.randn(batch, 4, 2, generator=generator),
        ),
    )


def change(observation: Observation, config: ConditionsConfig, index_B: torch.Tensor, *, seed=0, step=4, **settings):
    settings = {"state": STATE, "empty_text": EMPTY_TEXT, **settings}
    return harden(observation, config, seed=seed, step=step, sample_index_B=index_B, **settings)


def hidden_in(found: Observation) -> torch.Tensor:
    """(B, conditions) bool."""
    assert found.hidden is not None
    pictures = [~found.image_mask[camera][:, frame] for camera in CAMERAS for frame in range(2)]
    is_mean = (found.state_BTS == torch.tensor(STATE.mean)).all(dim=2)
    assert torch.equal(is_mean[:, 0], is_mean[:, 1])
    is_empty = found.prompts.mask_BL.sum(dim=1) == 1
    conditions = [found.hidden.control_hz_B, found.hidden.action_mask_B, is_mean[:, 0], is_empty, *pictures]
    return torch.stack(conditions, dim=1)


def test_nothing_is_touched_unless_asked_for():
    observation = make_observation(4)
    assert change(observation, ConditionsConfig(), torch.arange(4), empty_text=None) is observation
    noisy = change(observation, ConditionsConfig(state_noise_db=40.0), torch.arange(4), empty_text=None)
    assert replace(noisy, state_BTS=observation.state_BTS) == observation
    missing = replace(observation, image_mask=dict.fromkeys(CAMERAS, torch.zeros(4, 2, dtype=torch.bool)))
    found = change(missing, RDT, torch.arange(4))
    assert not any(mask.any() for mask in found.image_mask.values())


@pytest.mark.parametrize("rate", [0.1, 0.6])
def test_each_condition_is_hidden_at_the_rate_and_apart_from_the_others(rate):
    num_samples = 40_000
    found = change(make_observation(num_samples), ConditionsConfig(dropout=rate), torch.arange(num_samples))
    hidden = hidden_in(found).double()
    four_deviations = 4 * (rate * (1 - rate) / num_samples) ** 0.5
    assert hidden.shape == (num_samples, 8)
    assert (hidden.mean(dim=0) - rate).abs().max() < four_deviations
    correlation = torch.corrcoef(hidden.T) - torch.eye(8)
    assert correlation.abs().max() < 4.5 / num_samples**0.5
    # Nor does a sample's fate follow its neighbour's, or its own at the step before.
    before = hidden_in(
        change(make_observation(num_samples), ConditionsConfig(dropout=rate), torch.arange(num_samples), step=3)
    )
    for one, other in ((hidden[1:], hidden[:-1]), (hidden, before.double())):
        covariance = ((one - rate) * (other - rate)).mean(dim=0)
        assert (covariance / (rate * (1 - rate))).abs().max() < 4.5 / num_samples**0.5


def test_a_sample_is_changed_alike_in_any_batch():
    index = torch.tensor([3, 10, 11, 500_000_000, 12, 7])
    config = ConditionsConfig(dropout=0.5, state_noise_db=20.0)
    observation = make_observation(6)

    def parts(found: Observation, chosen=slice(None)) -> list[torch.Tensor]:
        prompts = found.prompts
        whole = [found.state_BTS, prompts.ids_BL, prompts.mask_BL, prompts.embedding_BLE, hidden_in(found)]
        return [tensor[chosen] for tensor in whole]

    whole = change(observation, config, index)
    for chosen in ([4], [5, 0, 2]):
        few = replace(
            observation,
            image_mask={camera: mask[chosen] for camera, mask in observation.image_mask.items()},
            state_BTS=observation.state_BTS[chosen],
            prompts=Prompts(
                ids_BL=observation.prompts.ids_BL[chosen],
                mask_BL=observation.prompts.mask_BL[chosen],
                embedding_BLE=observation.prompts.embedding_BLE[chosen],
            ),
        )
        part = change(few, config, index[chosen])
        assert all(map(torch.equal, parts(part), parts(whole, chosen)))
    for other in (
        change(observation, config, index, seed=1),
        change(observation, config, index, step=5),
        change(observation, config, index + 1),
    ):
        assert not torch.equal(hidden_in(other), hidden_in(whole))
        assert not torch.equal(other.state_BTS, whole.state_BTS)


def test_all_is_drawn_on_the_observations_device_and_nothing_waits_for_it():
    """The meta device has no values to wait for, and mixes with no other."""
    observation = make_observation(4).to("meta")
    found = change(observation, RDT, torch.arange(4))
    assert found.hidden is not None
    assert found.prompts.embedding_BLE is not None
    changed = [found.state_BTS, found.image_mask["agentview"], found.prompts.embedding_BLE, found.hidden.control_hz_B]
    assert {tensor.device.type for tensor in changed} == {"meta"}


@pytest.mark.parametrize("decibels", [40.0, 10.0, -6.0])
def test_the_states_noise_is_normal_and_as_strong_as_asked(decibels):
    num_samples = 100_000
    observation = make_observation(num_samples)
    config = ConditionsConfig(state_noise_db=decibels)
    noise_BTS = change(observation, config, torch.arange(num_samples)).state_BTS.double() - observation.state_BTS
    assert (noise_BTS[..., 2] == 0).all()  # a dimension that never moves
    for d, deviation in enumerate(STATE.std[:2]):
        ratio_db = 10 * torch.log10(deviation**2 / noise_BTS[..., d].var())
        assert float(ratio_db) == pytest.approx(decibels, abs=0.06)
    unit = noise_BTS[..., :2].flatten(1) / noise_BTS[..., :2].flatten(1).std(dim=0)
    assert unit.mean(dim=0).abs().max() < 4.5 / num_samples**0.5
    assert ((unit.abs() < 1).double().mean(dim=0) - 0.6827).abs().max() < 0.006
    assert ((unit.abs() > 2.5758).double().mean(dim=0) - 0.01).abs().max() < 0.0015
    assert (torch.corrcoef(unit.T) - torch.eye(4)).abs().max() < 0.016


def test_a_hidden_instruction_is_the_encoders_own_features_of_the_empty_text():
    language = Language.build(["put the red cube on the plate", "open the drawer"])
    texts = ["open the drawer", "put the red cube on the plate"] * 8
    observation = replace(make_observation(16), prompts=language.prompts(texts, embeddings=True))
    index = torch.arange(16)
    found = change(observation, ConditionsConfig(dropout=0.5), index, empty_text=language.empty_text)
    encoder = SeededT5(SeededT5Config(vocab_size=language.vocab_size))
    (alone_LE,) = encoder.encode_each([[1]])  # the end of a text
    was, now = observation.prompts, found.prompts
    hidden_B = now.mask_BL.sum(dim=1) == 1
    assert 0 < int(hidden_B.sum()) < 16
    padded_LE = torch.cat([alone_LE, torch.zeros(was.ids_BL.shape[1] - 1, language.embedding_width)])
    for b in range(16):
        expected = padded_LE if hidden_B[b] else was.embedding_BLE[b]
        assert torch.equal(now.embedding_BLE[b], expected)
        assert torch.equal(now.ids_BL[b], (torch.arange(8) == 0).long() if hidden_B[b] else was.ids_BL[b])
        assert torch.equal(now.mask_BL[b], torch.arange(8) == 0 if hidden_B[b] else was.mask_BL[b])


def test_an_older_language_is_read_as_before_and_refused_for_dropout(small_cache, tmp_path):
    small_cache.language.check_has_empty_text(folder=small_cache.language_path, cache=small_cache.path)
    config = EmbedConfig(
        caches=(small_cache.path,), out=tmp_path / "language", tokenizer="trained", encoder="seeded-t5"
    )
    new = Language.load(embed(config))
    old = Language.load(without_empty_text(config.out))
    assert old.known_texts == new.known_texts == small_cache.language.known_texts
    before, after = old.prompts(old.known_texts, embeddings=True), new.prompts(old.known_texts, embeddings=True)
    assert torch.equal(before.embedding_BLE, after.embedding_BLE)
    assert old.empty_text is None
    with pytest.raises(
        DataError,
        match=r"type vlatune embed .*cache --out LANGUAGE --tokenizer trained --encoder seeded-t5 and train with --language LANGUAGE",
    ):
        old.check_has_empty_text(folder=config.out, cache=small_cache.path)
    with pytest.raises(DataError, match=r"was made from something else \(new: the empty text\); delete it"):
        embed(config)
    old.save(tmp_path / "copied")
    assert Language.load(tmp_path / "copied").known_texts == old.known_texts


def test_a_tokenizer_that_ends_no_text_has_no_empty_one(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0, "open": 1}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(tmp_path)
    language = Language.build(["open"], tokenizer=str(tmp_path))
    assert language.prompts(["open"], embeddings=True).embedding_BLE is not None
    with pytest.raises(DataError, match="makes no token of an empty text, .* set conditions.dropout to 0"):
        language.check_has_empty_text(folder=tmp_path, cache=tmp_path)
    model = write_gemma_model(tmp_path / "gemma.model", ["open"])
    ids_only = Language.build(["open"], tokenizer=str(model), encoder="none")
    assert ids_only.empty_text is None
    assert ids_only.table_texts == ("open",)


def test_wrong_settings_and_missing_features_are_refused():
    for rate in (-0.1, 1.0, float("nan")):
        with pytest.raises(
            ValueError, match=r"conditions\.dropout is .*; it must be at least 0 \(off\) and less than 1"
        ):
            ConditionsConfig(dropout=rate)
    with pytest.raises(ValueError, match=r"conditions\.state_noise_db is inf; give a number of decibels, or leave it"):
        ConditionsConfig(state_noise_db=float("inf"))
    observation = make_observation(2)
    ids_only = replace(observation, prompts=replace(observation.prompts, embedding_BLE=None))
    for seen, empty_text in ((observation, None), (ids_only, EMPTY_TEXT)):
        with pytest.raises(ValueError, match="and there are no text features; set it to 0"):
            change(seen, RDT, torch.arange(2), empty_text=empty_text)
