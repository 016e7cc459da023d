"""π0 and π0.5 as one joint attention over all tokens, dense and obvious: every layer of both transformers at once, one mask,
repeated heads, nothing cached. What the policy's own forward is compared with, in tests and in tests/bench."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from vlatune.policy.layers.noise_level_embedding import embed_noise_level
from vlatune.policy.policy import Policy

Run = Callable[..., Any]
"""`run(function, *arguments)`: how a part of the forward pass is called."""


def called(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


def checkpointed(function: Callable[..., Any], *arguments: Any) -> Any:
    """Computed again in the backward pass; within itself, once more."""
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


def as_pixels(images):
    """(B, 1, px, px, 3) uint8 -> (B, 3, px, px) in [-1, 1]."""
    return images[:, 0].permute(0, 3, 1, 2) / 127.5 - 1


def norm(layer_norm, x_BND, condition_BD):
    """Both kinds of norm, from their weights."""
    normed = x_BND * (x_BND.square().mean(-1, keepdim=True) + 1e-6) ** -0.5
    if condition_BD is None or not hasattr(layer_norm, "dense"):
        return normed * (1 + layer_norm.weight), 1.0
    scale, shift, gate = layer_norm.dense(condition_BD)[:, None].chunk(3, dim=-1)
    return normed * (1 + scale) + shift, gate


def rope(x_BHND, positions_BN):
    half = x_BHND.shape[-1] // 2
    frequencies = 10_000.0 ** -(torch.arange(half) / half)
    angle = positions_BN[:, None, :, None] * frequencies
    first, second = x_BHND[..., :half], x_BHND[..., half:]
    return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], dim=-1)


def dense_joint_forward(policy: Policy, observation, x_BHA, noise_level_B, run: Run = called):
    """As `policy.bind(observation)(x_BHA, noise_level_B)`. `run` calls each camera's tower, the whole trunk, and within it each layer."""
    backbone, expert = policy.backbone, policy.expert

    def camera_tokens(pixels):
        return backbone.multi_modal_projector(backbone.vision_tower(pixels).last_hidden_state)

    # tokens of the prefix
    tokens, valid = [], []
    for camera in (camera for camera in policy.embodiment.cameras if camera in observation.images):
        tokens.append(run(camera_tokens, as_pixels(observation.images[camera])))
        valid.append(observation.image_mask[camera].expand(-1, tokens[-1].shape[1]))
    tokens.append(backbone.language_model.embed_tokens(observation.prompts.ids_BL) * math.sqrt(tokens[0].shape[-1]))
    valid.append(observation.prompts.mask_BL)
    prefix = torch.cat(tokens, 1)

    # tokens of the expert
    state = policy.state_normaliser(observation.state_BTS)
    level = embed_noise_level(noise_level_B, policy.config.expert.gemma.width)
    actions = expert.action_in_proj(x_BHA)
    condition = None
    blocks = [0] * prefix.shape[1]
    if policy.config.expert.noise_level == "adaptive_norm":
        condition = functional.silu(expert.time_mlp_out(functional.silu(expert.time_mlp_in(level))))
        suffix = actions
        blocks += [1] * actions.shape[1]
    else:
        mixed = torch.cat([actions, level[:, None].expand_as(actions)], -1)
        actions = expert.action_time_mlp_out(functional.silu(expert.action_time_mlp_in(mixed)))
        suffix = torch.cat([expert.state_proj(state[:, -1:]), actions], 1)
        blocks += [1] + [2] * actions.shape[1]
    valid.append(torch.ones(suffix.shape[:2], dtype=torch.bool))
    valid = torch.cat(valid, 1)
    block = torch.tensor(blocks)
    mask = valid[:, None, :] & (block[None, :] <= block[:, None])  # a token sees its own block and those before
    positions = valid.cumsum(1) - 1

    def trunk(prefix, suffix):
        streams = [prefix, suffix]
        for layers in zip(backbone.language_model.layers, expert.layers, strict=True):
            streams = run(joint_layer, policy, layers, streams, (None, condition), positions, mask)
        return norm(expert.norm, streams[1][:, -x_BHA.shape[1] :], condition)[0]

    return expert.action_out_proj(run(trunk, prefix, suffix))


def joint_layer(policy: Policy, layers, streams, conditions, positions, mask):
    """Each stream through its own weights, all tokens in one attention."""
    head_dim, num_heads = policy.config.backbone.text.head_dim, policy.config.backbone.text.num_heads
    normed = [norm(l.input_layernorm, x, c) for l, x, c in zip(layers, streams, conditions, strict=True)]

    def heads(name):
        parts = [getattr(l.self_attn, name)(x) for l, (x, _) in zip(layers, normed, strict=True)]
        return torch.cat(parts, 1).unflatten(-1, (-1, head_dim)).transpose(1, 2)

    queries, keys, values = rope(heads("q_proj"), positions), rope(heads("k_proj"), positions), heads("v_proj")
    keys, values = (x.repeat_interleave(num_heads // x.shape[1], 1) for x in (keys, values))
    scores = queries @ keys.transpose(-1, -2) / math.sqrt(head_dim)
    attended = scores.masked_fill(~mask[:, None], -2.3819763e38).softmax(-1) @ values
    attended = attended.transpose(1, 2).flatten(2).split([x.shape[1] for x in streams], 1)
    out = []
    for layer, x, (_, gate), part, condition in zip(layers, streams, normed, attended, conditions, strict=True):
        x = x + layer.self_attn.o_proj(part) * gate
        after, gate = norm(layer.post_attention_layernorm, x, condition)
        gated = functional.gelu(layer.mlp.gate_proj(after), approximate="tanh") * layer.mlp.up_proj(after)
        out.append(x + layer.mlp.down_proj(gated) * gate)
    return out
