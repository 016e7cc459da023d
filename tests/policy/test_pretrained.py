"""Weights from elsewhere: plain models that transformers itself wrote, public policies, our own checkpoints."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from preset_policies import make_policy
from safetensors.torch import load_file, save_file

from vlatune.data.episodes import DataError
from vlatune.policy.backbones.siglip import SiglipConfig, encode_cameras
from vlatune.policy.checkpoints.pretrained import load_pretrained
from vlatune.policy.checkpoints.public import read_public
from vlatune.policy.experts.pooling import PoolingConfig
from vlatune.policy.experts.unet import UNetExpertConfig

GOLDEN = Path(__file__).parents[1] / "golden"


def siglip_sizes(vision):
    return {
        "image_size": vision.image_px,
        "patch_size": vision.patch_px,
        "hidden_size": vision.width,
        "intermediate_size": vision.mlp_dim,
        "num_hidden_layers": vision.depth,
        "num_attention_heads": vision.num_heads,
    }


def text_sizes(text, depth=None):
    return {
        "hidden_size": text.width,
        "intermediate_size": text.mlp_dim,
        "num_hidden_layers": depth or text.depth,
        "num_attention_heads": text.num_heads,
        "num_key_value_heads": text.num_kv_heads,
        "head_dim": text.head_dim,
        "vocab_size": 50,
    }


def plain_model(kind, policy):
    """A small random model of transformers' own class, with the sizes of the policy's backbone."""
    backbone = policy.config.backbone
    torch.manual_seed(7)
    if kind == "paligemma":
        config = transformers.PaliGemmaConfig(
            vision_config=transformers.SiglipVisionConfig(**siglip_sizes(backbone.vision), vision_use_head=False),
            text_config=transformers.GemmaConfig(**text_sizes(backbone.text)),
            projection_dim=backbone.text.width,
        )
        return transformers.PaliGemmaForConditionalGeneration(config)
    if kind == "smolvlm":
        config = transformers.SmolVLMConfig(
            vision_config=siglip_sizes(backbone.vision),
            text_config={"model_type": "llama", **text_sizes(backbone.text, depth=backbone.text.depth + 2)},
            scale_factor=backbone.scale_factor,
        )
        return transformers.SmolVLMForConditionalGeneration(config)
    if kind == "siglip":
        text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        return transformers.SiglipModel(
            transformers.SiglipConfig(vision_config=siglip_sizes(backbone.vision), text_config=text)
        )
    text = backbone.text
    return transformers.CLIPModel(
        transformers.CLIPConfig(
            vision_config=siglip_sizes(backbone.vision),
            text_config={
                "vocab_size": 50,
                "hidden_size": text.width,
                "intermediate_size": text.mlp_dim,
                "num_hidden_layers": text.depth,
                "num_attention_heads": text.num_heads,
            },
            projection_dim=backbone.embedding_width,
        )
    )


@pytest.mark.parametrize(
    ("preset", "kind", "untouched"),
    [
        ("pi05", "paligemma", ["expert"]),
        ("smolvla", "smolvlm", ["backbone.state_proj", "expert"]),
        ("rdt", "siglip", ["expert"]),
        ("clip_flow", "clip", ["expert"]),
    ],
)
def test_plain_models_fill_the_backbone(preset, kind, untouched, tmp_path):
    policy = make_policy(preset)
    model = plain_model(kind, policy)
    model.save_pretrained(tmp_path)
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    taken, left = load_pretrained(policy, [str(tmp_path)])
    assert left == untouched
    assert taken[0].num_tensors == sum(not name.startswith(tuple(untouched)) for name in before)
    for name, tensor in policy.state_dict().items():
        assert torch.equal(tensor, before[name]) == name.startswith(tuple(untouched)), name
    if kind in ("paligemma", "siglip"):
        vision = model.model.vision_tower if kind == "paligemma" else model.vision_model
        pixels = torch.randn(1, 1, policy.config.backbone.image_px, policy.config.backbone.image_px, 3).clamp(-1, 1)
        ours = encode_cameras(policy.backbone.vision_tower, _seen(pixels), ["camera"])[0]
        theirs = vision(pixels[:, 0].permute(0, 3, 1, 2)).last_hidden_state
        assert torch.allclose(ours, theirs, atol=1e-5)


def _seen(pixels):
    from vlatune.data.batch import Observation, Prompts

    nothing = torch.zeros(1, 0)
    return Observation(
        images={"camera": pixels}, image_mask={}, state_BTS=nothing, prompts=Prompts(ids_BL=nothing, mask_BL=nothing)
    )


def policy_like(checkpoint, horizon=10):
    """A policy of our robot with the sizes of a public checkpoint."""
    config = dataclasses.replace(
        checkpoint.config, state_normalisation="mean_std", action_normalisation="mean_std", horizon=horizon
    )
    if config.backbone.type == "siglip_t5":
        layout = dataclasses.replace(config.state_layout, slots=tuple(range(8)))
        vision = SiglipConfig(image_px=42, patch_px=14, width=48, mlp_dim=96, depth=1, num_heads=2)
        config = dataclasses.replace(config, backbone=dataclasses.replace(config.backbone, vision=vision))
        config = dataclasses.replace(
            config, state_layout=layout, action_layout=dataclasses.replace(layout, slots=tuple(range(7)))
        )
    return make_policy(config)


@pytest.mark.parametrize("name", ["pi0", "pi05", "smolvla", "rdt"])
def test_public_policies_fill_backbone_and_expert(name):
    checkpoint = read_public(GOLDEN / name)
    policy = policy_like(checkpoint, checkpoint.config.horizon)
    taken, left = load_pretrained(policy, [str(GOLDEN / name)])
    assert left == (["backbone.vision_tower"] if name == "rdt" else [])
    own = policy.state_dict()
    for weight, tensor in checkpoint.weights.items():
        assert torch.equal(own[weight], tensor), weight
    assert taken[0].num_tensors == len(checkpoint.weights)


def test_a_recorded_unet_fills_the_unet_and_leaves_the_pooling():
    preset = make_policy("clip_unet").config
    unet = UNetExpertConfig(
        pooling=PoolingConfig(kind="attention", width=24, num_heads=2), down_dims=(16, 32, 64), step_embed_dim=32
    )
    policy = make_policy(dataclasses.replace(preset, expert=unet))
    taken, left = load_pretrained(policy, [str(GOLDEN / "unet")])
    assert taken[0].parts == ("expert.unet",)
    assert "expert" in left  # the pooling


def test_a_shorter_chunk_takes_the_same_weights():
    checkpoint = read_public(GOLDEN / "pi05")
    assert load_pretrained(policy_like(checkpoint, horizon=4), [str(GOLDEN / "pi05")])[1] == []


def test_a_later_source_overrides_and_a_part_is_refused(tmp_path):
    checkpoint = read_public(GOLDEN / "pi05")
    policy = policy_like(checkpoint)
    whole, half = tmp_path / "whole", tmp_path / "half"
    for folder in (whole, half):
        shutil.copytree(GOLDEN / "pi05", folder)
    weights = load_file(whole / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, whole / "model.safetensors")
    load_pretrained(policy, [str(GOLDEN / "pi05"), str(whole)])
    assert torch.equal(policy.state_dict()["expert.norm.dense.bias"], checkpoint.weights["expert.norm.dense.bias"] + 1)

    kept = policy.state_dict()["expert.norm.dense.bias"].clone()
    del weights["model.paligemma_with_expert.gemma_expert.model.layers.2.mlp.up_proj.weight"]
    save_file(weights, half / "model.safetensors")
    with pytest.raises(DataError, match=r"1 missing \(first: expert\.layers\.2\.mlp\.up_proj\.weight\)"):
        load_pretrained(policy, [str(half)])
    assert torch.equal(policy.state_dict()["expert.norm.dense.bias"], kept)


def test_sizes_that_differ_are_refused():
    policy = make_policy("pi05")
    with pytest.raises(DataError, match=r"does not fit this policy: .*of another shape \(first: backbone.*is \("):
        load_pretrained(policy, [str(GOLDEN / "pi05")])


def test_a_name_that_is_nowhere_is_refused():
    with pytest.raises(DataError, match=r"there is no folder no/such-model, and the hub cannot give it"):
        load_pretrained(make_policy("pi05"), ["no/such-model"])
