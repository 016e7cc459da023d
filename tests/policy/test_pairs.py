"""Any expert on any backbone whose prefix it can read: a training step and a chunk; the others are refused with the reason."""

import itertools
from dataclasses import replace

import pytest
import torch
from preset_policies import make_batch, make_policy

from vlatune.data.vector_layout import VectorLayout
from vlatune.policy.backbones import BACKBONES
from vlatune.policy.backbones.paligemma import PaliGemmaConfig
from vlatune.policy.config import PolicyConfig
from vlatune.policy.experts import EXPERTS
from vlatune.policy.experts.dit import DiTExpertConfig
from vlatune.policy.experts.gemma import GemmaExpertConfig
from vlatune.policy.experts.mlp import MLPExpertConfig
from vlatune.policy.experts.smolvla import SmolVLAExpertConfig
from vlatune.policy.experts.unet import UNetExpertConfig
from vlatune.policy.layers.decoder import DecoderConfig
from vlatune.policy.objectives.draws import DrawKeys
from vlatune.policy.objectives.flow import Flow
from vlatune.policy.presets import PRESETS

TINY = {name: preset(tiny=True) for name, preset in PRESETS.items()}
HEADS = DecoderConfig(width=32, depth=3, mlp_dim=48, num_heads=4, num_kv_heads=1, head_dim=8)
BACKBONE_CONFIGS = {
    "paligemma": TINY["pi05"].backbone,
    "paligemma with cached text and a state token": replace(TINY["pi05"].backbone, language="encoder", state="token"),
    "smolvlm": replace(TINY["smolvla"].backbone, text=replace(HEADS, family="llama")),
    "siglip_t5": TINY["rdt"].backbone,
    "clip": TINY["clip_flow"].backbone,
    "clip patches": TINY["clip_unet"].backbone,
}
POOLING = TINY["clip_unet"].expert.pooling
EXPERT_CONFIGS = {
    "gemma": GemmaExpertConfig(gemma=HEADS),
    "gemma with a state token": GemmaExpertConfig(gemma=HEADS, noise_level="action_token", state="token"),
    "smolvla": SmolVLAExpertConfig(decoder=replace(HEADS, family="llama")),
    "dit": DiTExpertConfig(width=32, depth=2, num_heads=4, num_image_tokens=96, num_language_tokens=32),
    **{
        f"unet, {kind}": replace(TINY["clip_unet"].expert, pooling=replace(POOLING, kind=kind))
        for kind in ("average", "attention", "typed_attention")
    },
    "mlp": MLPExpertConfig(condition="pooling", pooling=POOLING, width=32, num_layers=2),
}
assert {type(config) for config in EXPERT_CONFIGS.values()} == EXPERTS.keys()
assert {type(config) for config in BACKBONE_CONFIGS.values()} == BACKBONES.keys()
assert UNetExpertConfig in EXPERTS


def config_of(backbone, expert) -> PolicyConfig:
    layout = VectorLayout(name="padded", width=10)
    return PolicyConfig(
        backbone=BACKBONE_CONFIGS[backbone],
        expert=EXPERT_CONFIGS[expert],
        objective=Flow(num_draws=2, num_sampling_steps=2),
        horizon=4,
        state_layout=layout,
        action_layout=layout,
        observation_offsets=tuple(range(1 - BACKBONE_CONFIGS[backbone].num_observations, 1)),
    )


@pytest.mark.parametrize(("backbone", "expert"), list(itertools.product(BACKBONE_CONFIGS, EXPERT_CONFIGS)))
def test_trains_and_acts_or_is_refused(backbone, expert):
    config = config_of(backbone, expert)
    if config.expert.reads == "kv" and not backbone.startswith(("paligemma", "smolvlm")):
        with pytest.raises(ValueError, match="keys and values"):
            make_policy(config)
        return
    if expert == "dit" and ("state token" in backbone or backbone == "smolvlm"):
        with pytest.raises(ValueError, match="makes a token of the state itself"):
            make_policy(config)
        return
    policy = make_policy(config)
    batch = make_batch(config)
    loss = policy(batch, DrawKeys(seed=0, step=0, sample_index_B=batch.sample_index_B))
    ((loss.entries_BHA * loss.weight_BHA).sum() / loss.weight_BHA.sum()).backward()
    silent = [
        name
        for name, parameter in policy.named_parameters()
        if parameter.requires_grad and (parameter.grad is None or not parameter.grad.abs().max() > 0)
    ]
    # Scores all shift alike with a bias on the keys; a mean over tokens has no queries to train.
    assert [name for name in silent if not name.endswith(("k_proj.bias", "qkv.bias"))] == []
    noise = torch.randn(3, *policy.noise_shape)
    with torch.no_grad():
        actions = policy.sample(batch.observation, noise)
    assert actions.shape == (3, 4, 7)
    assert actions.isfinite().all()


def test_a_backbone_keeps_its_last_layer_only_for_who_reads_it():
    reading_kv = make_policy(config_of("paligemma", "gemma")).backbone.unread_parameters()
    reading_tokens = make_policy(config_of("paligemma", "mlp")).backbone.unread_parameters()
    assert len(reading_kv) == 7  # queries, output, norm, three of the feed-forward, and the final norm
    assert reading_tokens == []
    assert isinstance(BACKBONE_CONFIGS["paligemma"], PaliGemmaConfig)
