"""Every adapter of every scope is in the forward, merging changes nothing, and files are PEFT's."""

import json
from dataclasses import replace

import peft
import pytest
import torch
from preset_policies import make_batch, make_policy

from vlatune.data.episodes import DataError
from vlatune.policy.lora import SCOPES, LoraConfig, adapter_targets, add_adapters, merge_adapter, save_adapter
from vlatune.policy.presets import PRESETS

SCOPES_OF_PRESETS = [
    (name, part, scope)
    for name, preset in PRESETS.items()
    for part in ("backbone", "expert")
    for scope in SCOPES[getattr(preset(tiny=True), part).type]
    if (name, part) != ("rdt", "backbone")  # its tower is frozen by the preset
]


def sample(policy, batch):
    noise = torch.randn(3, *policy.noise_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return policy.sample(batch.observation, noise)


def randomised(policy, seed=1):
    """Adapters start as nothing: their second matrix is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return policy


@pytest.mark.parametrize(("name", "part", "scope"), SCOPES_OF_PRESETS)
def test_every_adapter_moves_the_actions(name, part, scope):
    policy = make_policy(name).eval()
    batch = make_batch(policy.config)
    before = sample(policy, batch)
    other = "expert" if part == "backbone" else "backbone"
    config = LoraConfig(**{part: scope, other: "none"}, rank=2)
    targets = adapter_targets(policy, config)
    add_adapters(policy, config)
    assert torch.allclose(sample(policy, batch), before, atol=1e-6)
    trained = [parameter_name for parameter_name, p in policy.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * len(targets)
    modules = dict(policy.named_modules())
    for target in targets:
        second = modules[target].lora_B["default"].weight
        with torch.no_grad():
            second.normal_(std=2.0)
            moved = (sample(policy, batch) - before).abs().max()
            second.zero_()
        assert moved > 1e-6, target


def test_nobody_reads_the_last_prefix_layers_output_and_so_no_adapter_stands_there():
    policy = make_policy("pi05")
    last = policy.config.backbone.text.depth - 1
    targets = adapter_targets(policy, LoraConfig(backbone="attention+mlp", expert="none"))
    of_last = {target.rsplit(".", 1)[1] for target in targets if f"layers.{last}." in target}
    assert of_last == {"k_proj", "v_proj"}
    assert any("mlp.down_proj" in target for target in targets)


def test_rdts_fused_projections_are_named():
    targets = adapter_targets(make_policy("rdt"), LoraConfig(backbone="none", expert="cross_attn"))
    assert {target.rsplit(".", 1)[1] for target in targets} == {"q", "kv", "proj"}
    assert all(".cross_attn." in target for target in targets)


@pytest.mark.parametrize("name", ["pi05", "smolvla", "rdt"])
def test_saved_in_pefts_format_loaded_by_peft_and_merged_without_a_change(name, tmp_path):
    policy = make_policy(name).eval()
    batch = make_batch(policy.config)
    backbone = "none" if name == "rdt" else "attention"
    add_adapters(policy, LoraConfig(backbone=backbone, expert="attention+mlp", rank=3))
    adapted = sample(randomised(policy), batch)
    save_adapter(policy, policy.state_dict(), tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"

    plain_peft = peft.PeftModel.from_pretrained(make_policy(name).eval(), str(tmp_path))
    assert torch.allclose(sample(plain_peft.base_model.model, batch), adapted, atol=1e-6)

    fresh = make_policy(name).eval()
    base = sample(fresh, batch)
    assert not torch.allclose(base, adapted, atol=1e-3)
    merged = merge_adapter(fresh, tmp_path)
    assert torch.allclose(sample(merged, batch), adapted, atol=1e-4)
    assert not any("lora" in parameter_name for parameter_name in merged.state_dict())


@pytest.mark.parametrize(("scope", "per_layer"), [("attention", 4), ("all", 6)])
def test_rdts_vision_tower_is_adapted_where_it_is_trained(scope, per_layer):
    config = PRESETS["rdt"](tiny=True)
    policy = make_policy(replace(config, backbone=replace(config.backbone, train_vision=True)))
    targets = adapter_targets(policy, LoraConfig(backbone=scope, expert="none"))
    assert len(targets) == per_layer * config.backbone.vision.depth


def test_refusals(tmp_path):
    policy = make_policy("pi05")
    with pytest.raises(ValueError, match=r"lora.expert is 'cross_attn', and a gemma has none, attention"):
        adapter_targets(policy, LoraConfig(expert="cross_attn"))
    with pytest.raises(ValueError, match="both 'none'"):
        adapter_targets(policy, LoraConfig(backbone="none", expert="none"))
    with pytest.raises(ValueError, match="nothing of this siglip_t5 is in it"):
        adapter_targets(make_policy("rdt"), LoraConfig(backbone="all", expert="none"))
    with pytest.raises(DataError, match=r"no adapter_config\.json"):
        merge_adapter(policy, tmp_path)
    with pytest.raises(ValueError, match="has no adapters"):
        save_adapter(policy, policy.state_dict(), tmp_path)
    add_adapters(policy, LoraConfig(rank=2))
    save_adapter(policy, policy.state_dict(), tmp_path)
    with pytest.raises(DataError, match="does not fit these weights"):
        merge_adapter(make_policy("smolvla"), tmp_path)
