"""SmolVLA as its reference trains it: both transformers side by side, layer by layer, dense and obvious. One mask, repeated heads,
cameras one by one, nothing left out. What the policy's own forward is compared with, in tests and in tests/bench.

Norms and feed-forwards are the policy's own modules; how tokens are put together and attend is written again.

Shape letters: B batch, P prefix tokens, N prefix and action tokens, D width, H horizon, A action dims, d features of a head."""

import math

import torch
from dense_pi import Run, as_pixels, called, rope
from torch import Tensor
from torch.nn import functional

from vlatune.data.batch import Observation
from vlatune.policy.backbones.smolvlm import merge_patches
from vlatune.policy.layers.decoder import DecoderBlock
from vlatune.policy.layers.noise_level_embedding import embed_noise_level
from vlatune.policy.policy import Policy

Layers = tuple[DecoderBlock, DecoderBlock]
"""One of the backbone's, and the expert's beside it."""


def dense_smolvla_forward(
    policy: Policy, observation: Observation, x_BHA: Tensor, noise_level_B: Tensor, run: Run = called
) -> Tensor:
    """As `policy.bind(observation)(x_BHA, noise_level_B)`. `run` calls each camera's tower, the whole trunk, and within it each layer."""
    backbone, expert = policy.backbone, policy.expert
    text, horizon = policy.config.backbone.text, x_BHA.shape[1]

    def camera_tokens(pixels: Tensor) -> Tensor:
        patches = backbone.vision_tower(pixels).last_hidden_state
        return backbone.connector(merge_patches(patches, policy.config.backbone.scale_factor))

    tokens, valid = [], []
    for camera in (camera for camera in policy.embodiment.cameras if camera in observation.images):
        tokens.append(run(camera_tokens, as_pixels(observation.images[camera])) * math.sqrt(text.width))
        valid.append(observation.image_mask[camera].expand(-1, tokens[-1].shape[1]))
    tokens.append(backbone.language_model.embed_tokens(observation.prompts.ids_BL) * math.sqrt(text.width))
    valid.append(observation.prompts.mask_BL)
    state_BTS = policy.state_layout(policy.state_normaliser(observation.state_BTS))
    tokens.append(backbone.state_proj(state_BTS[:, -1:]))
    valid.append(torch.ones(len(x_BHA), 1 + horizon, dtype=torch.bool))
    prefix_BPD, valid_BN = torch.cat(tokens, 1), torch.cat(valid, 1)

    level_BHD = embed_noise_level(noise_level_B, policy.config.expert.decoder.width)[:, None].expand(-1, horizon, -1)
    mixed_BHD = torch.cat([expert.action_in_proj(x_BHA), level_BHD], -1)
    suffix_BHD = expert.action_time_mlp_out(functional.silu(expert.action_time_mlp_in(mixed_BHD)))

    # Images and language are block 0, the state 1, and every action one more; a token sees its own block and those before.
    block_N = torch.cat([torch.zeros(prefix_BPD.shape[1] - 1), torch.arange(1, horizon + 2)])
    mask_BNN = valid_BN[:, None, :] & (block_N[None, :] <= block_N[:, None])
    positions_BN = valid_BN.cumsum(1) - 1

    def trunk(prefix_BPD: Tensor, suffix_BHD: Tensor) -> Tensor:
        streams = [prefix_BPD, suffix_BHD]
        pairs = zip(backbone.language_model.layers, expert.layers, strict=True)
        for number, layers in enumerate(pairs):
            layer = cross_layer if number % policy.config.expert.self_attn_every else joint_layer
            streams = run(layer, layers, streams, positions_BN, mask_BNN)
        return expert.norm(streams[1])[0]

    return expert.action_out_proj(run(trunk, prefix_BPD, suffix_BHD))


def joint_layer(layers: Layers, streams: list[Tensor], positions_BN: Tensor, mask_BNN: Tensor) -> list[Tensor]:
    """Each stream through its own weights, all tokens in one attention."""
    normed = [layer.input_layernorm(x)[0] for layer, x in zip(layers, streams, strict=True)]

    def heads(name: str) -> Tensor:
        parts = [getattr(layer.self_attn, name)(x) for layer, x in zip(layers, normed, strict=True)]
        return layers[0].self_attn.heads(torch.cat(parts, 1))

    attended_BND = attend(
        rope(heads("q_proj"), positions_BN), rope(heads("k_proj"), positions_BN), heads("v_proj"), mask_BNN
    )
    parts = attended_BND.split([x.shape[1] for x in streams], 1)
    return [rest_of_layer(layer, x, part) for layer, x, part in zip(layers, streams, parts, strict=True)]


def cross_layer(layers: Layers, streams: list[Tensor], positions_BN: Tensor, mask_BNN: Tensor) -> list[Tensor]:
    """The prefix attends to itself; the actions, counted from 0, to their own projections of its keys and values."""
    (prefix_layer, layer), length = layers, streams[0].shape[1]
    attention = prefix_layer.self_attn
    normed_BPD, _ = prefix_layer.input_layernorm(streams[0])
    positions_BP = positions_BN[:, :length]
    queries, keys = (rope(attention.heads(p(normed_BPD)), positions_BP) for p in (attention.q_proj, attention.k_proj))
    values = attention.heads(attention.v_proj(normed_BPD))
    prefix_BPD = attend(queries, keys, values, mask_BNN[:, :length, :length])

    own = layer.self_attn
    flat_keys, flat_values = (x.transpose(1, 2).flatten(2) for x in (keys, values))
    steps_BH = positions_BN[:, length:] - positions_BN[:, length : length + 1]
    own_queries = rope(own.heads(own.q_proj(layer.input_layernorm(streams[1])[0])), steps_BH)
    own_keys, own_values = own.heads(own.k_proj(flat_keys)), own.heads(own.v_proj(flat_values))
    suffix_BHD = attend(own_queries, own_keys, own_values, mask_BNN[:, length:, :length])
    return [
        rest_of_layer(prefix_layer, streams[0], prefix_BPD),
        rest_of_layer(layer, streams[1], suffix_BHD),
    ]


def attend(queries: Tensor, keys: Tensor, values: Tensor, mask_BNN: Tensor) -> Tensor:
    """(B, heads, tokens, d) each, the keys' and values' heads repeated -> (B, tokens, heads * d)."""
    keys, values = (x.repeat_interleave(queries.shape[1] // x.shape[1], 1) for x in (keys, values))
    scores = queries @ keys.transpose(-1, -2) / math.sqrt(queries.shape[-1])
    attended = scores.masked_fill(~mask_BNN[:, None], -2.3819763e38).softmax(-1) @ values
    return attended.transpose(1, 2).flatten(2)


def rest_of_layer(layer: DecoderBlock, x: Tensor, attended: Tensor) -> Tensor:
    """What follows the attention, token by token."""
    x = x + layer.self_attn.o_proj(attended)
    return x + layer.mlp(layer.post_attention_layernorm(x)[0])
