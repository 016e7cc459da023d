"""The MLP expert: what its condition is made of, and its size with CLIP."""

import dataclasses

import pytest
import torch
from small_policies import CAMERAS, make_batch

from vlatune.policy.backbones.clip import Clip, ClipConfig, ClipTextConfig, ClipVisionConfig
from vlatune.policy.backbones.paligemma import PaliGemma
from vlatune.policy.experts.mlp import Fusion, FusionConfig, MLPExpert, MLPExpertConfig
from vlatune.policy.experts.pooling import PoolingConfig
from vlatune.policy.objectives.draws import DrawKeys
from vlatune.policy.objectives.flow import Flow
from vlatune.policy.prefix import Prefix, PrefixShape
from vlatune.train.recipes import load_recipe

SHAPE = PrefixShape(kv=None, tokens={"image": 12, "language": 10}, state_dim=8)
FUSION = FusionConfig(state_width=8, hidden_width=24, width=16)
SMALL = MLPExpertConfig(
    pooling=PoolingConfig(width=16, num_heads=2), fusion=FUSION, noise_level_width=8, width=32, num_layers=2
)


def make_expert(config=SMALL, shape=SHAPE):
    torch.manual_seed(0)
    return MLPExpert(config, prefix=shape, horizon=4, action_dim=7)


def make_prefix():
    random = torch.Generator().manual_seed(1)
    return Prefix(
        tokens={
            "image": (
                torch.randn(3, 2, 12, generator=random),
                torch.tensor([[True, True], [True, True], [True, False]]),
            ),
            "language": (torch.randn(3, 5, 10, generator=random), torch.arange(5) < torch.tensor([[2], [5], [1]])),
        },
        state_BTS=torch.randn(3, 1, 8, generator=random),
    )


def make_noisy():
    random = torch.Generator().manual_seed(2)
    return torch.randn(3, 4, 7, generator=random), torch.rand(3, generator=random)


def test_standardised_tokens_have_mean_0_and_deviation_1_where_they_are():
    fusion = make_expert(dataclasses.replace(SMALL, fusion=dataclasses.replace(FUSION, standardise=True))).standardised
    random = torch.Generator().manual_seed(5)
    narrow = 3 + torch.randn(12, generator=random) + 0.02 * torch.randn(64, 2, 12, generator=random)
    there_BN = torch.tensor([True, True]).expand(64, 2).clone()
    there_BN[40:, 1] = False
    instruction = torch.randn(1, 5, 10, generator=random).expand(64, 5, 10)  # one for all: nothing varies
    tokens = {"image": (narrow, there_BN), "language": (instruction, torch.ones(64, 5, dtype=torch.bool))}
    prefix = Prefix(tokens=tokens, state_BTS=torch.randn(64, 1, 8, generator=random))
    assert not fusion.is_calibrated
    fusion.calibrate(prefix)
    assert fusion.is_calibrated
    found_BW = fusion._tokens(prefix)
    first, second, language = found_BW.split([12, 12, 10], dim=-1)
    for camera, rows in ((first, slice(None)), (second, slice(40))):
        torch.testing.assert_close(camera[rows].mean(0), torch.zeros(12), atol=1e-3, rtol=0)
        torch.testing.assert_close(camera[rows].std(0, correction=0), torch.ones(12), atol=1e-3, rtol=0)
    assert not second[40:].any(), "an absent camera stays zeros"
    torch.testing.assert_close(language, torch.zeros(64, 10), atol=1e-4, rtol=0)
    assert all(not parameter.requires_grad for parameter in (fusion.token_mean, fusion.token_std))


@pytest.mark.parametrize("condition", ["pooling", "fusion"])
def test_masked_tokens_change_nothing_and_valid_ones_do(condition):
    expert, prefix = make_expert(dataclasses.replace(SMALL, condition=condition)), make_prefix()
    reference = expert.bind(prefix)(*make_noisy())
    assert reference.shape == (3, 4, 7)
    masked = {
        kind: (torch.where(mask[..., None], features, torch.nan), mask)
        for kind, (features, mask) in prefix.tokens.items()
    }
    assert torch.equal(expert.bind(dataclasses.replace(prefix, tokens=masked))(*make_noisy()), reference)
    for kind, (features, mask) in prefix.tokens.items():
        changed = dataclasses.replace(prefix, tokens={**prefix.tokens, kind: (-features, mask)})
        assert not torch.allclose(expert.bind(changed)(*make_noisy()), reference, atol=1e-5), kind
    x, level = make_noisy()
    assert not torch.allclose(expert.bind(prefix)(x, 1 - level), reference, atol=1e-5)
    assert not torch.allclose(expert.bind(prefix)(x.flip(1), level), reference, atol=1e-5)


@pytest.mark.parametrize("condition", ["pooling", "fusion"])
def test_padding_of_a_prompt_changes_nothing(condition):
    expert, prefix = make_expert(dataclasses.replace(SMALL, condition=condition)), make_prefix()
    features, mask = prefix.tokens["language"]
    padded = torch.cat([features, features], dim=1), torch.cat([mask, torch.zeros_like(mask)], dim=1)
    longer = dataclasses.replace(prefix, tokens={**prefix.tokens, "language": padded})
    reference = expert.bind(prefix)(*make_noisy())
    assert torch.allclose(expert.bind(longer)(*make_noisy()), reference, atol=1e-6)
    copies = {**prefix.tokens, "language": (features[:, :1].expand(-1, 5, -1), mask)}
    first = {**prefix.tokens, "language": (features[:, :1], mask[:, :1])}
    if condition == "fusion":  # the mean of equal tokens is the token
        many, one = (expert.bind(dataclasses.replace(prefix, tokens=tokens)) for tokens in (copies, first))
        assert torch.allclose(many(*make_noisy()), one(*make_noisy()), atol=1e-6)


def test_fusion_keeps_cameras_apart_and_one_image_token_is_their_mean():
    prefix = make_prefix()
    features, mask = prefix.tokens["image"]
    swapped = dataclasses.replace(prefix, tokens={**prefix.tokens, "image": (features.flip(1), mask.flip(1))})
    for num_image_tokens, apart in ((2, True), (1, False)):
        torch.manual_seed(0)
        fusion = Fusion(dataclasses.replace(FUSION, num_image_tokens=num_image_tokens), SHAPE)
        assert torch.allclose(fusion(prefix), fusion(swapped), atol=1e-6) != apart


@pytest.mark.parametrize(
    ("pose_dims", "mlps"),
    [
        ((0, 1, 2, 3, 4, 5), {"pose_mlp": (0, 5), "proprioception_mlp": (6, 7)}),
        ((7, 0), {"pose_mlp": (0, 7), "proprioception_mlp": (1, 6)}),
        ((), {"proprioception_mlp": (0, 7)}),
        (tuple(range(8)), {"pose_mlp": (0, 7)}),
    ],
)
def test_each_entry_of_the_state_has_its_mlp(pose_dims, mlps):
    fusion, prefix = Fusion(dataclasses.replace(FUSION, pose_dims=pose_dims), SHAPE), make_prefix()
    assert {name for name, _ in fusion.named_children()} == {*mlps, "fusion_mlp"}
    for name, dims in mlps.items():
        outputs = []
        getattr(fusion, name).register_forward_hook(lambda module, args, out, outputs=outputs: outputs.append(out))
        fusion(prefix)
        for dim in range(8):
            state = prefix.state_BTS.clone()
            state[..., dim] += 1
            fusion(dataclasses.replace(prefix, state_BTS=state))
        changed = {dim for dim, out in enumerate(outputs[1:]) if not torch.equal(out, outputs[0])}
        assert set(dims) <= changed
        assert changed == set(pose_dims if name == "pose_mlp" else set(range(8)) - set(pose_dims))


@pytest.mark.parametrize("pose_dims", [(0, 8), (-1,), (1, 1)])
def test_pose_dims_that_the_state_does_not_have_are_refused(pose_dims):
    with pytest.raises(ValueError, match="and the state has 8 entries; give distinct numbers from 0 to 7"):
        Fusion(dataclasses.replace(FUSION, pose_dims=pose_dims), SHAPE)


def test_another_number_of_image_tokens_is_refused():
    fusion = Fusion(dataclasses.replace(FUSION, num_image_tokens=3), SHAPE)
    with pytest.raises(ValueError, match="num_image_tokens is 3, and the backbone gives 2 image tokens"):
        fusion(make_prefix())


def test_no_layers_are_refused():
    with pytest.raises(ValueError, match="num_layers is 0; it must be at least 1"):
        MLPExpertConfig(num_layers=0)


@pytest.mark.parametrize("condition", ["pooling", "fusion"])
def test_fan_out_is_repetition(condition):
    expert, prefix = make_expert(dataclasses.replace(SMALL, condition=condition)), make_prefix()
    x, level = (tensor.repeat_interleave(2, dim=0) for tensor in make_noisy())
    x = x + torch.arange(6.0)[:, None, None]  # candidates differ
    bound = expert.bind(prefix)
    together = bound.fan_out(2)(x, level)
    for k in range(2):
        assert torch.allclose(together[k::2], bound(x[k::2], level[k::2]), atol=1e-5)


def test_bfloat16_is_close():
    expert, prefix = make_expert(), make_prefix()
    with torch.no_grad():
        reference = expert.bind(prefix)(*make_noisy())
        rounded = expert.to(torch.bfloat16).bind(prefix)(*make_noisy())
    assert rounded.dtype == torch.float32
    assert (rounded - reference).abs().max() < 0.05 * reference.abs().max()


def make_backbone(name):
    arguments = {"vocab_size": 32, "encoder_width": None, "state_dim": 8, "cameras": CAMERAS, "reads": "tokens"}
    if name == "paligemma":
        return PaliGemma(load_recipe("tiny").policy.backbone, **arguments)
    vision = ClipVisionConfig(image_px=16, patch_px=8, width=24, mlp_dim=32, depth=1, num_heads=2)
    text = ClipTextConfig(width=16, mlp_dim=32, depth=1, num_heads=2)
    return Clip(ClipConfig(vision=vision, text=text, embedding_width=20), **arguments)


@pytest.mark.parametrize("backbone_name", ["paligemma", "clip"])
@pytest.mark.parametrize("condition", ["pooling", "fusion"])
def test_every_trained_parameter_gets_a_gradient(condition, backbone_name):
    torch.manual_seed(0)
    batch, objective = make_batch(), Flow(num_draws=2)
    backbone = make_backbone(backbone_name)
    fusion = dataclasses.replace(FUSION, num_image_tokens=2 if backbone_name == "clip" else 1)
    expert = make_expert(dataclasses.replace(SMALL, condition=condition, fusion=fusion), backbone.shape)
    model = torch.nn.ModuleDict({"backbone": backbone, "expert": expert})
    for parameter in (*backbone.unread_parameters(), *expert.unread_parameters()):
        parameter.requires_grad_(False)
    observation = batch.observation
    prefix = dataclasses.replace(backbone(observation, observation.state_BTS), state_BTS=observation.state_BTS)
    draw = objective.draw(batch.actions_BHA, DrawKeys(seed=0, step=0, sample_index_B=batch.sample_index_B))
    valid = batch.valid_BH[..., None].expand_as(batch.actions_BHA)
    objective.loss(expert.bind(prefix), batch.actions_BHA, valid, draw).entries_BHA.sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name
        else:
            assert parameter.grad is None, name


def test_the_small_baseline_trains_about_four_million():
    with torch.device("meta"):
        clip = Clip(ClipConfig(), vocab_size=49_408, encoder_width=None, state_dim=8, cameras=CAMERAS, reads="tokens")
        expert = MLPExpert(MLPExpertConfig(), prefix=clip.shape, horizon=16, action_dim=7)
        prefix = Prefix(
            tokens={
                "image": (torch.empty(2, 2, 512), torch.empty(2, 2, dtype=torch.bool)),
                "language": (torch.empty(2, 1, 512), torch.empty(2, 1, dtype=torch.bool)),
            },
            state_BTS=torch.empty(2, 1, 8),
        )
        out = expert.bind(prefix)(torch.empty(2, 16, 7), torch.empty(2))
    assert out.shape == (2, 16, 7)
    frozen = {id(p) for p in clip.unread_parameters()}
    trained = [p for p in (*clip.parameters(), *expert.parameters()) if id(p) not in frozen]
    assert sum(p.numel() for p in trained) == 3_880_560
