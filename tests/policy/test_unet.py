"""The U-Net against outputs that diffusion_policy computed, and over PaliGemma's tokens."""

import dataclasses
import json
import pathlib

import pytest
import torch
from safetensors.torch import load_file
from small_policies import CAMERAS, make_batch

from vlatune.policy.backbones.paligemma import PaliGemma
from vlatune.policy.experts.pooling import PoolingConfig
from vlatune.policy.experts.unet import BoundUNetExpert, UNetExpert, UNetExpertConfig, embed_step, native_time
from vlatune.policy.objectives.draws import DrawKeys
from vlatune.policy.objectives.flow import Flow
from vlatune.policy.prefix import PrefixShape
from vlatune.train.recipes import load_recipe

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "unet"
POOLINGS = ("average", "attention", "typed_attention")


def relative_error(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.fixture
def golden():
    sizes = json.loads((GOLDEN / "config.json").read_text())
    io = load_file(GOLDEN / "io.safetensors")
    expert = UNetExpert(
        UNetExpertConfig(
            pooling=PoolingConfig(width=sizes["global_cond_dim"]),
            down_dims=tuple(sizes["down_dims"]),
            kernel_size=sizes["kernel_size"],
            num_groups=sizes["n_groups"],
            step_embed_dim=sizes["diffusion_step_embed_dim"],
            film_scale=sizes["cond_predict_scale"],
        ),
        prefix=PrefixShape(kv=None, tokens={}, state_dim=1),
        horizon=io["sample"].shape[1],
        action_dim=sizes["input_dim"],
    )
    expert.unet.load_state_dict(load_file(GOLDEN / "model.safetensors"))  # strict
    with torch.no_grad():
        yield expert, io


def golden_output(expert, io):
    return BoundUNetExpert(expert, io["global_cond"])(io["sample"], io["timesteps"] / 100)


def test_output(golden):
    expert, io = golden
    assert relative_error(golden_output(expert, io), io["output"]) < 1e-5


def test_the_comparison_can_fail(golden):
    expert, io = golden
    assert (
        relative_error(BoundUNetExpert(expert, io["global_cond"])(io["sample"], io["timesteps"] / 50), io["output"])
        > 1e-3
    )
    for name, parameter in expert.unet.named_parameters():
        if name.endswith("cond_encoder.1.bias"):
            parameter[: len(parameter) // 2] += 1  # scale read as 1 + scale
    assert relative_error(golden_output(expert, io), io["output"]) > 1e-2


def test_whole_steps_come_back_exactly_and_levels_between_are_kept():
    steps = torch.arange(1001)
    assert torch.equal(native_time(steps / 1000, 1000.0), steps.double())
    assert torch.equal(native_time(steps[:101] / 100, 100.0), steps[:101].double())
    between = torch.tensor([0.12345, 0.9871])
    assert torch.allclose(native_time(between, 100.0), between.double() * 100, atol=1e-9)
    level = torch.tensor([0.3, 0.31234], requires_grad=True)
    native_time(level, 100.0).sum().backward()
    assert torch.allclose(level.grad, torch.full((2,), 100.0))


def test_step_features():
    features = embed_step(torch.tensor([3.0]), 6)
    frequencies = torch.tensor([1.0, 0.01, 0.0001])
    assert torch.allclose(features, torch.cat([(3 * frequencies).sin(), (3 * frequencies).cos()])[None], atol=1e-6)


@pytest.mark.parametrize(("horizon", "nearest"), [(10, "8 or 12"), (3, "4"), (50, "48 or 52")])
def test_a_horizon_that_cannot_be_halved_is_refused(horizon, nearest):
    with pytest.raises(ValueError, match=f"policy.horizon is {horizon}; .* multiple of 4: give {nearest}$"):
        UNetExpert(
            UNetExpertConfig(), prefix=PrefixShape(kv=None, tokens={}, state_dim=1), horizon=horizon, action_dim=7
        )


@pytest.mark.parametrize("wrong", [{"down_dims": ()}, {"down_dims": (20, 40)}, {"num_groups": 16, "down_dims": (24,)}])
def test_features_that_groups_do_not_divide_are_refused(wrong):
    with pytest.raises(ValueError, match=r"expert.down_dims is \(.*give at least one"):
        UNetExpertConfig(**wrong)


@pytest.mark.parametrize("wrong", [{"kernel_size": 4}, {"step_embed_dim": 7}, {"step_embed_dim": 2}])
def test_odd_sizes_are_refused(wrong):
    with pytest.raises(ValueError, match="give an odd and an even number"):
        UNetExpertConfig(**wrong)


def test_full_size_runs_on_meta():
    with torch.device("meta"):
        shape = PrefixShape(kv=None, tokens={"image": 2048, "language": 2048}, state_dim=8)
        expert = UNetExpert(UNetExpertConfig(), prefix=shape, horizon=16, action_dim=7)
        out = BoundUNetExpert(expert, torch.empty(2, 512))(torch.empty(2, 16, 7), torch.empty(2))
    assert out.shape == (2, 16, 7)
    assert sum(p.numel() for p in expert.unet.parameters()) == 72_558_855


class Model(torch.nn.Module):
    """A tiny PaliGemma and a U-Net over its tokens; parameters that nothing reads are frozen, as `Policy` does it."""

    def __init__(self, pooling, state="none", film_scale=True):
        super().__init__()
        torch.manual_seed(0)
        config = dataclasses.replace(load_recipe("tiny").policy.backbone, state=state)
        self.backbone = PaliGemma(
            config, vocab_size=32, encoder_width=None, state_dim=8, cameras=CAMERAS, reads="tokens"
        )
        self.expert = UNetExpert(
            UNetExpertConfig(
                pooling=PoolingConfig(kind=pooling, width=16, num_heads=2),
                down_dims=(16, 32),
                step_embed_dim=16,
                film_scale=film_scale,
            ),
            prefix=self.backbone.shape,
            horizon=4,
            action_dim=7,
        )
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape))
        for parameter in (*self.backbone.unread_parameters(), *self.expert.unread_parameters()):
            parameter.requires_grad_(False)

    def bind(self, observation):
        prefix = self.backbone(observation, observation.state_BTS)
        return self.expert.bind(dataclasses.replace(prefix, state_BTS=observation.state_BTS))


def masked_part_changed(observation):
    """Other pixels in cameras that a sample lacks, other ids where prompts are padded."""
    return dataclasses.replace(
        observation,
        images={
            camera: torch.where(observation.image_mask[camera][..., None, None, None], image, 255 - image)
            for camera, image in observation.images.items()
        },
        prompts=dataclasses.replace(
            observation.prompts, ids_BL=torch.where(observation.prompts.mask_BL, observation.prompts.ids_BL, 7)
        ),
    )


@pytest.fixture
def noisy():
    random = torch.Generator().manual_seed(0)
    return torch.randn(3, 4, 7, generator=random), torch.rand(3, generator=random)


@pytest.mark.parametrize("film_scale", [True, False])
@pytest.mark.parametrize("state", ["none", "token"])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_every_trained_parameter_gets_a_gradient(pooling, state, film_scale):
    model, batch = Model(pooling, state, film_scale), make_batch()
    objective = Flow(num_draws=2)
    draw = objective.draw(batch.actions_BHA, DrawKeys(seed=0, step=0, sample_index_B=batch.sample_index_B))
    valid = batch.valid_BH[..., None].expand_as(batch.actions_BHA)
    loss = objective.loss(model.bind(batch.observation), batch.actions_BHA, valid, draw)
    (loss.entries_BHA * loss.weight_BHA).sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("pooling", POOLINGS)
def test_only_what_is_masked_changes_nothing(pooling, noisy):
    model, observation = Model(pooling), make_batch().observation
    with torch.no_grad():
        reference = model.bind(observation)(*noisy)
        assert torch.allclose(model.bind(masked_part_changed(observation))(*noisy), reference, atol=1e-6)
        for changed in (
            dataclasses.replace(observation, images={c: 255 - image for c, image in observation.images.items()}),
            dataclasses.replace(
                observation, prompts=dataclasses.replace(observation.prompts, ids_BL=31 - observation.prompts.ids_BL)
            ),
            dataclasses.replace(observation, state_BTS=-observation.state_BTS),
        ):
            assert not torch.allclose(model.bind(changed)(*noisy), reference, atol=1e-5)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_fan_out_is_repetition(pooling, noisy):
    model, observation = Model(pooling), make_batch().observation
    x, level = (tensor.repeat_interleave(2, dim=0) for tensor in noisy)
    x = x + torch.arange(6.0)[:, None, None]  # candidates differ
    with torch.no_grad():
        bound = model.bind(observation)
        together = bound.fan_out(2)(x, level)
        for k in range(2):
            assert torch.allclose(together[k::2], bound(x[k::2], level[k::2]), atol=1e-5)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_bfloat16_is_close(pooling, noisy):
    model, observation = Model(pooling), make_batch().observation
    with torch.no_grad():
        reference = model.bind(observation)(*noisy)
        rounded = model.to(torch.bfloat16).bind(observation)(*noisy)
    assert rounded.dtype == torch.float32
    assert relative_error(rounded, reference) < 0.05
