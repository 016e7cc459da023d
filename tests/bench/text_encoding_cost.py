"""What a training step saves by reading cached text features instead of running the text encoder:
`python tests/bench/text_encoding_cost.py` (CPU, under a minute).

An RDT-1B with its frozen vision tower in the step and T5-XXL, with an eighth of their widths; images, chunk and tokens at full
length (two observations, 384 pixels, 64 actions), one sample. Depths (6 of 28 blocks and 6 of 27 in the policy, 8 of 24 in the T5) are
such that the T5's share of the floating-point operations is the full models': the last two columns count both, without weights. Times
are this process's CPU time on one thread; ratios are medians over rounds of one run. On a GPU a small batch pays more: the XXL's
9.5 GB are read whatever the number of tokens, and are not there for a larger batch."""

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from preset_policies import embodiment_for, make_batch
from preset_policies import statistics as field_statistics
from torch.utils.flop_counter import FlopCounterMode
from transformers import T5Config, T5EncoderModel

from vlatune.data.batch import Batch
from vlatune.data.language import Language
from vlatune.data.normalise import Statistics
from vlatune.data.sentencepiece_tokenizer import SentencePieceTokenizer
from vlatune.data.text_encoder import SeededT5, SeededT5Config
from vlatune.data.vector_layout import VectorLayout
from vlatune.policy.backbones.siglip import SiglipConfig
from vlatune.policy.backbones.siglip_t5 import SiglipT5Config
from vlatune.policy.config import PolicyConfig
from vlatune.policy.experts.dit import DiTExpertConfig
from vlatune.policy.objectives.draws import DrawKeys
from vlatune.policy.policy import Policy
from vlatune.policy.presets import PRESETS

NUM_ROUNDS = 4
NUM_TOKENS = (16, 64, 256)
"""Of an instruction; LIBERO's have 8 to 24."""
XXL = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
SMALL_XXL = {"d_model": 512, "d_kv": 64, "d_ff": 1280, "num_layers": 8, "num_heads": 8}
VECTOR = VectorLayout(name="padded", width=128)
FULL = dataclasses.replace(PRESETS["rdt"](), state_layout=VECTOR, action_layout=VECTOR)
SMALL = dataclasses.replace(
    FULL,
    backbone=SiglipT5Config(
        vision=SiglipConfig(image_px=384, patch_px=14, width=144, mlp_dim=538, depth=6, num_heads=4)
    ),
    expert=DiTExpertConfig(width=256, depth=6, num_heads=8),
)


def make_policy(config: PolicyConfig, encoder_width: int) -> Policy:
    numbers = Statistics(state=field_statistics(8), actions=field_statistics(7))
    policy = Policy(config, embodiment_for(config, encoder_width=encoder_width), numbers)
    policy.backbone.requires_grad_(False)
    return policy


def make_language(num_tokens: int) -> Language:
    """One text of `num_tokens`, its end included, with the features of the small T5."""
    words = [f"{first}{second}" for first in "bcdfghklmnprst" for second in "aeiou"]
    text = " ".join(words[k % len(words)] for k in range(num_tokens - 1))
    tokenizer = SentencePieceTokenizer.train([text])
    encoder = SeededT5(SeededT5Config(vocab_size=tokenizer.vocab_size, **SMALL_XXL))
    language = Language(tokenizer, encoder, {}).with_texts([text], encoder.encode_each([tokenizer.encode(text)]))
    assert language.num_tokens == (num_tokens,)
    return language


def make_t5(sizes: dict[str, int], vocab_size: int) -> T5EncoderModel:
    """The same weights as `SeededT5`'s, to encode whole batches in the step."""
    torch.manual_seed(0)
    config = T5Config(vocab_size=vocab_size, **sizes, feed_forward_proj="gated-gelu", dropout_rate=0.0)
    return T5EncoderModel(config).eval()


def with_prompts(batch: Batch, language: Language, *, embeddings: bool) -> Batch:
    prompts = language.prompts(language.known_texts, embeddings=embeddings)
    return dataclasses.replace(batch, observation=dataclasses.replace(batch.observation, prompts=prompts))


@torch.no_grad()
def encoded(t5: T5EncoderModel, batch: Batch) -> Batch:
    prompts = batch.observation.prompts
    features = t5(input_ids=prompts.ids_BL, attention_mask=prompts.mask_BL.long()).last_hidden_state
    prompts = dataclasses.replace(prompts, embedding_BLE=features)
    return dataclasses.replace(batch, observation=dataclasses.replace(batch.observation, prompts=prompts))


def train(policy: Policy, batch: Batch) -> None:
    policy.zero_grad(set_to_none=True)
    keys = DrawKeys(seed=0, step=0, sample_index_B=batch.sample_index_B)
    policy(batch, keys).entries_BHA.mean().backward()


def share_of_operations(config: PolicyConfig, t5_sizes: dict[str, int], num_tokens: int) -> float:
    """The T5's floating-point operations over those of the policy's training step, for one sample; without weights."""
    with torch.device("meta"):
        policy, t5 = make_policy(config, t5_sizes["d_model"]), make_t5(t5_sizes, 32128)
        noise, level = torch.empty(1, *policy.noise_shape), torch.empty(1)
        features = torch.empty(1, num_tokens, t5_sizes["d_model"])
        ids, mask = torch.empty(1, num_tokens, dtype=torch.long), torch.empty(1, num_tokens, dtype=torch.bool)
    observation = make_batch(config, batch=1).to("meta").observation
    prompts = dataclasses.replace(observation.prompts, ids_BL=ids, mask_BL=mask, embedding_BLE=features)
    with FlopCounterMode(display=False) as step:
        policy.bind(dataclasses.replace(observation, prompts=prompts))(noise, level).square().mean().backward()
    with FlopCounterMode(display=False) as text, torch.no_grad():
        t5(input_ids=ids)
    return text.get_total_flops() / step.get_total_flops()


def seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def main() -> None:
    torch.set_num_threads(1)
    policy = make_policy(SMALL, SMALL_XXL["d_model"])
    batch = make_batch(SMALL, batch=1)
    print(
        "| tokens | step that encodes / step that reads | T5 alone / step that reads | operations, T5 / step | T5-XXL / RDT-1B |\n"
        "|---|---|---|---|---|"
    )
    for num_tokens in NUM_TOKENS:
        language = make_language(num_tokens)
        t5 = make_t5(SMALL_XXL, language.vocab_size)

        def read(language: Language = language) -> Batch:
            return with_prompts(batch, language, embeddings=True)

        def encode(language: Language = language, t5: T5EncoderModel = t5) -> Batch:
            return encoded(t5, with_prompts(batch, language, embeddings=False))

        there, computed = (each().observation.prompts.embedding_BLE for each in (read, encode))
        assert torch.allclose(there, computed, atol=1e-4)
        train(policy, encode())
        rounds = [
            (seconds(lambda: train(policy, read())), seconds(lambda: train(policy, encode())), seconds(encode))
            for _ in range(NUM_ROUNDS)
        ]
        ratios = sorted(encodes / reads for reads, encodes, _ in rounds)
        alone = statistics.median(alone / reads for reads, _, alone in rounds)
        shares = [share_of_operations(*pair, num_tokens) for pair in ((SMALL, SMALL_XXL), (FULL, XXL))]
        print(
            f"| {num_tokens} | {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) | {alone:.3f} | {shares[0]:.3f} | "
            f"{shares[1]:.3f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
