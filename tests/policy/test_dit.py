"""RDT's diffusion transformer: against outputs that the reference code computed (a tiny random RDT), and its own rules."""

import dataclasses
import json
import pathlib

import pytest
import torch
from safetensors.torch import load_file

from vlatune.policy.experts.dit import DiTExpert, DiTExpertConfig
from vlatune.policy.objectives.diffusion import Diffusion
from vlatune.policy.objectives.objective import Draw
from vlatune.policy.prefix import Prefix, PrefixShape

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "rdt"


def golden_expert(norm_kind=None):
    sizes = json.loads((GOLDEN / "config.json").read_text())
    config = DiTExpertConfig(
        width=sizes["config"]["rdt"]["hidden_size"],
        depth=sizes["config"]["rdt"]["depth"],
        num_heads=sizes["config"]["rdt"]["num_heads"],
        num_image_tokens=sizes["img_cond_len"],
        num_language_tokens=sizes["max_lang_cond_len"],
        norm_kind=norm_kind or sizes["norm_kind"],
    )
    shape = PrefixShape(
        kv=None,
        tokens={"image": sizes["img_token_dim"], "language": sizes["lang_token_dim"]},
        state_dim=sizes["state_token_dim"],
    )
    expert = DiTExpert(config, prefix=shape, horizon=sizes["pred_horizon"], action_dim=sizes["action_dim"])
    weights = load_file(GOLDEN / "model.safetensors")
    expert.load_state_dict({name.removeprefix("model."): tensor for name, tensor in weights.items()})  # strict
    return expert


@pytest.fixture(scope="module")
def io():
    return load_file(GOLDEN / "io.safetensors")


@pytest.fixture(scope="module")
def prefix(io):
    images = io["img_tokens"]
    return Prefix(
        tokens={
            "image": (images, torch.ones_like(images[..., 0], dtype=torch.bool)),
            "language": (io["lang_tokens"], io["lang_mask"]),
        },
        state_BTS=io["state"],
        action_mask_BA=io["action_mask"][:, 0].bool(),
        control_hz_B=io["ctrl_freq"].float(),
    )


@pytest.fixture(scope="module")
def expert():
    return golden_expert()


def with_tokens(prefix, kind, features, mask):
    return dataclasses.replace(prefix, tokens={**prefix.tokens, kind: (features, mask)})


def relative_error(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@torch.no_grad()
def sampled(expert, prefix, io):
    return Diffusion().sample(expert.bind(prefix), io["sample_noise"]) * io["action_mask"]


def recorded_loss(bound, io):
    draw = Draw(noise_BHA=io["noise"], noise_level_B=io["timesteps"] / 1000)
    return Diffusion().loss(bound, io["actions"], torch.ones_like(io["actions"], dtype=torch.bool), draw).entries_BHA


def test_the_reference_loss(expert, prefix, io):
    with torch.no_grad():
        assert relative_error(recorded_loss(expert.bind(prefix), io).mean(), io["loss"]) < 1e-5


def test_the_reference_sample(expert, prefix, io):
    assert relative_error(sampled(expert, prefix, io), io["sample5"]) < 1e-5


@pytest.mark.parametrize("what", ["norm", "language mask", "image mask", "action mask", "frequency", "state", "order"])
def test_the_comparison_can_fail(expert, prefix, io, what):
    language, language_mask = prefix.tokens["language"]
    images, image_mask = prefix.tokens["image"]
    last_unseen = image_mask.clone()
    last_unseen[:, -9:] = False
    changed = {
        "language mask": with_tokens(prefix, "language", language, torch.ones_like(language_mask)),
        "image mask": with_tokens(prefix, "image", images, last_unseen),
        "action mask": dataclasses.replace(prefix, action_mask_BA=torch.ones_like(prefix.action_mask_BA)),
        "frequency": dataclasses.replace(prefix, control_hz_B=prefix.control_hz_B + 1),
        "state": dataclasses.replace(prefix, state_BTS=-prefix.state_BTS),
        "order": with_tokens(prefix, "image", images.flip(1), image_mask),
    }
    wrong = sampled(golden_expert("timm103") if what == "norm" else expert, changed.get(what, prefix), io)
    assert relative_error(wrong, io["sample5"]) > 1e-3


def test_masked_tokens_and_older_states_change_nothing(expert, prefix, io):
    language, mask = prefix.tokens["language"]
    noisy = torch.where(mask[..., None], language, torch.full_like(language, 7.0))
    changed = with_tokens(prefix, "language", noisy, mask)
    changed = dataclasses.replace(changed, state_BTS=torch.cat([torch.ones_like(io["state"]), io["state"]], dim=1))
    assert torch.allclose(sampled(expert, changed, io), sampled(expert, prefix, io), atol=1e-5)


def test_the_norms_are_those_of_their_timm(expert):
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)) + 2
    norm = expert.blocks[0].norm1
    deviation = (x - x.mean(-1, keepdim=True)).square().sum(-1, keepdim=True).div(63).sqrt()
    old = golden_expert("timm103").blocks[0].norm1(x)
    assert torch.allclose(old, x / deviation * norm.weight, rtol=1e-4)
    assert torch.allclose(norm(x), torch.nn.functional.rms_norm(x, (64,), norm.weight, 1e-6), rtol=1e-4)


def test_fan_out_is_repetition(expert, prefix, io):
    repeated = dataclasses.replace(
        prefix,
        tokens={kind: tuple(part.repeat_interleave(4, dim=0) for part in pair) for kind, pair in prefix.tokens.items()},
        state_BTS=prefix.state_BTS.repeat_interleave(4, dim=0),
        action_mask_BA=prefix.action_mask_BA.repeat_interleave(4, dim=0),
        control_hz_B=prefix.control_hz_B.repeat_interleave(4, dim=0),
    )
    generator = torch.Generator().manual_seed(0)
    x, level = torch.randn(12, 16, 128, generator=generator), torch.rand(12, generator=generator)
    with torch.no_grad():
        bound = expert.bind(prefix)
        fanned = bound.fan_out(4)(x, level)
        assert torch.allclose(fanned, expert.bind(repeated)(x, level), atol=1e-5)
        assert torch.allclose(fanned, bound.fan_out(2).fan_out(2)(x, level), atol=1e-5)
        assert not torch.allclose(fanned, bound.fan_out(4)(x.flip(0), level.flip(0)).flip(0), atol=1e-2)


def test_candidates_share_one_set_of_keys_and_values(expert, prefix):
    bound = expert.bind(prefix)
    for fanned, own in zip(bound.fan_out(3).conditions, bound.conditions, strict=True):
        assert all(ours is theirs for ours, theirs in zip(fanned, own, strict=True))


def test_every_parameter_gets_a_gradient(expert, prefix, io):
    expert.zero_grad()
    recorded_loss(expert.bind(prefix), io).mean().backward()
    assert [name for name, parameter in expert.named_parameters() if not parameter.grad.abs().max() > 0] == []


def test_bfloat16_is_close(prefix, io):
    out = sampled(golden_expert().to(torch.bfloat16), prefix, io)
    assert out.dtype == torch.float32
    assert 1e-6 < relative_error(out, io["sample5"]) < 0.1


def test_full_size_without_weights():
    shape = PrefixShape(kv=None, tokens={"image": 1152, "language": 4096}, state_dim=128)
    with torch.device("meta"):
        rdt = DiTExpert(DiTExpertConfig(), prefix=shape, horizon=64, action_dim=128)
        prefix = Prefix(
            tokens={
                "image": (torch.empty(2, 4374, 1152), torch.ones(2, 4374, dtype=torch.bool)),
                "language": (torch.empty(2, 30, 4096), torch.ones(2, 30, dtype=torch.bool)),
            },
            state_BTS=torch.empty(2, 2, 128),
            action_mask_BA=torch.ones(2, 128, dtype=torch.bool),
            control_hz_B=torch.empty(2),
        )
        assert rdt.bind(prefix).fan_out(2)(torch.empty(4, 64, 128), torch.empty(4)).shape == (4, 64, 128)
    state = rdt.state_dict()
    assert len(state) == 618
    assert sum(tensor.numel() for tensor in state.values()) == 1_228_319_872
    assert state["blocks.27.cross_attn.kv.weight"].shape == (4096, 2048)
    assert state["state_adaptor.0.weight"].shape == (2048, 256)


def test_from_scratch_it_starts_at_zero_and_positions_differ():
    shape = PrefixShape(kv=None, tokens={"image": 6, "language": 5}, state_dim=3)
    config = DiTExpertConfig(width=16, depth=2, num_heads=2, num_image_tokens=4, num_language_tokens=4)
    fresh = DiTExpert(config, prefix=shape, horizon=2, action_dim=3)
    prefix = Prefix(
        tokens={
            "image": (torch.randn(1, 3, 6), torch.ones(1, 3, dtype=torch.bool)),
            "language": (torch.randn(1, 2, 5), torch.ones(1, 2, dtype=torch.bool)),
        },
        state_BTS=torch.randn(1, 1, 3),
        action_mask_BA=torch.ones(1, 3, dtype=torch.bool),
        control_hz_B=torch.tensor([20.0]),
    )
    assert torch.equal(fresh.bind(prefix)(torch.randn(1, 2, 3), torch.ones(1)), torch.zeros(1, 2, 3))
    assert torch.pdist(fresh.img_cond_pos_embed[0]).min() > 0.1


def test_what_does_not_fit_is_refused(expert, prefix):
    def built(tokens, state_dim=7, **sizes):
        shape = PrefixShape(kv=(1, 1, 4), tokens=tokens, state_dim=state_dim)
        config = DiTExpertConfig(**{"width": 8, "depth": 2, "num_heads": 2, **sizes})
        return DiTExpert(config, prefix=shape, horizon=2, action_dim=7)

    with pytest.raises(ValueError, match="backbone writes none"):
        built({})
    with pytest.raises(ValueError, match=r"writes \['image'\]"):
        built({"image": 4})
    with pytest.raises(ValueError, match="one width"):
        built({"image": 4, "language": 4}, state_dim=8)
    with pytest.raises(ValueError, match="multiple of num_heads, 3"):
        built({"image": 4, "language": 4}, num_heads=3)
    with pytest.raises(ValueError, match="expert.depth is 1"):
        built({"image": 4, "language": 4}, depth=1)
    images, mask = prefix.tokens["image"]
    with pytest.raises(ValueError, match="num_image_tokens to 108 or more"):
        expert.bind(with_tokens(prefix, "image", images.repeat(1, 2, 1), mask.repeat(1, 2)))
    with pytest.raises(ValueError, match="carries none"):
        expert.bind(dataclasses.replace(prefix, tokens={}))
    with pytest.raises(ValueError, match=r"Policy\.prefix"):
        expert.bind(dataclasses.replace(prefix, control_hz_B=None))
