"""SmolVLM prefix and SmolVLA expert: against outputs that the reference code computed (a tiny random SmolVLA), against one
dense forward over all tokens, and what each must keep to itself."""

import dataclasses
import json
import pathlib

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional
from transformers.models.smolvlm.configuration_smolvlm import SmolVLMVisionConfig
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMVisionTransformer

from vlatune.data.batch import Observation, Prompts
from vlatune.policy.backbones.siglip import SiglipConfig, make_vision_tower
from vlatune.policy.backbones.smolvlm import SmolVLM, SmolVLMConfig
from vlatune.policy.experts.smolvla import BoundSmolVLAExpert, SmolVLAExpert, SmolVLAExpertConfig
from vlatune.policy.layers.decoder import DecoderConfig
from vlatune.policy.layers.noise_level_embedding import embed_noise_level
from vlatune.policy.objectives.flow import Flow
from vlatune.policy.objectives.objective import Draw
from vlatune.policy.prefix import Prefix, PrefixShape

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "smolvla"
CAMERAS = ("image0", "image1")
RENAMED = {  # the reference's names -> ours; its vocabulary head has no use here
    "vlm_with_expert.vlm.model.vision_model.": "backbone.vision_tower.",
    "vlm_with_expert.vlm.model.connector.modality_projection.proj.": "backbone.connector.",
    "vlm_with_expert.vlm.model.text_model.": "backbone.language_model.",
    "vlm_with_expert.lm_expert.": "expert.",
    "state_proj.": "backbone.state_proj.",
    "action_": "expert.action_",
}


def renamed(name):
    name = name.removeprefix("model.")
    for theirs, ours in RENAMED.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    raise KeyError(name)


def golden_configs():
    sizes = json.loads((GOLDEN / "sizes.json").read_text())
    norm_eps = json.loads((GOLDEN / "vlm" / "config.json").read_text())["text_config"]["rms_norm_eps"]
    vision, text = sizes["vision"], sizes["text"]
    decoder = DecoderConfig(
        family="llama",
        width=text["hidden_size"],
        depth=sizes["num_vlm_layers"],
        mlp_dim=text["intermediate_size"],
        num_heads=text["num_attention_heads"],
        num_kv_heads=text["num_key_value_heads"],
        head_dim=text["head_dim"],
        norm_eps=norm_eps,
    )
    backbone = SmolVLMConfig(
        vision=SiglipConfig(
            image_px=vision["image_size"],
            patch_px=vision["patch_size"],
            width=vision["hidden_size"],
            mlp_dim=vision["intermediate_size"],
            depth=vision["num_hidden_layers"],
            num_heads=vision["num_attention_heads"],
        ),
        scale_factor=sizes["scale_factor"],
        text=decoder,
        vocab_size=None,
    )
    expert = SmolVLAExpertConfig(
        decoder=dataclasses.replace(decoder, width=36, mlp_dim=256), self_attn_every=sizes["self_attn_every_n_layers"]
    )
    return backbone, expert


def make_backbone(config, vocab_size=512, reads="kv"):
    return SmolVLM(config, vocab_size=vocab_size, encoder_width=None, state_dim=32, cameras=CAMERAS, reads=reads)


def make_model(reads="kv"):
    """The reference's tiny model, with its weights."""
    backbone_config, expert_config = golden_configs()
    backbone = SmolVLM(backbone_config, vocab_size=512, encoder_width=None, state_dim=32, cameras=CAMERAS, reads=reads)
    expert = SmolVLAExpert(expert_config, prefix=backbone.shape, horizon=10, action_dim=32)
    model = torch.nn.ModuleDict({"backbone": backbone, "expert": expert})
    model.load_state_dict(  # strict: every tensor used, none random
        {
            renamed(name): tensor
            for name, tensor in load_file(GOLDEN / "model.safetensors").items()
            if not name.endswith("lm_head.weight")
        }
    )
    for parameter in (*backbone.unread_parameters(), *expert.unread_parameters()):
        parameter.requires_grad_(False)
    return model


@pytest.fixture(scope="module")
def io():
    return load_file(GOLDEN / "io.safetensors")


@pytest.fixture(scope="module")
def observation(io):
    """Three samples with prompts of different lengths; the last lacks its second camera."""
    observation = Observation(
        images={camera: io[camera].permute(0, 2, 3, 1)[:, None] for camera in CAMERAS},
        image_mask={camera: io[f"image_mask{camera[-1]}"][:, None] for camera in CAMERAS},
        state_BTS=io["state"][:, None],
        prompts=Prompts(ids_BL=io["tokens"], mask_BL=io["token_mask"]),
    )
    assert not observation.image_mask["image1"].all()
    assert not observation.prompts.mask_BL.all()
    return observation


def bind(model, observation):
    return model["expert"].bind(model["backbone"](observation, observation.state_BTS))


def sample(model, observation, io, num_steps):
    with torch.no_grad():
        return Flow(num_sampling_steps=num_steps).sample(bind(model, observation), io["noise"])


def relative_error(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def test_loss(observation, io):
    draw = Draw(noise_BHA=io["noise"], noise_level_B=io["time"])
    valid_BHA = torch.ones_like(io["actions"], dtype=torch.bool)
    with torch.no_grad():
        loss = Flow().loss(bind(make_model(), observation), io["actions"], valid_BHA, draw)
    assert relative_error(loss.entries_BHA, io["loss"]) < 1e-5


@pytest.mark.parametrize("num_steps", [1, 10])
def test_samples(observation, io, num_steps):
    assert relative_error(sample(make_model(), observation, io, num_steps), io[f"sample{num_steps}"]) < 1e-5


def test_bidirectional_actions_are_told_apart(observation, io, monkeypatch):
    causal = BoundSmolVLAExpert.action_mask
    monkeypatch.setattr(BoundSmolVLAExpert, "action_mask", staticmethod(lambda x: torch.ones_like(causal(x))))
    assert relative_error(sample(make_model(), observation, io, 1), io["sample1"]) > 1e-2


def test_a_state_token_that_images_see_is_told_apart(observation, io, monkeypatch):
    monkeypatch.setattr(SmolVLM, "attention_mask", staticmethod(lambda mask_BP: mask_BP[:, None, None, :]))
    assert relative_error(sample(make_model(), observation, io, 1), io["sample1"]) > 1e-2


@pytest.mark.parametrize(
    "name",
    [
        "expert.norm.weight",
        "expert.layers.1.input_layernorm.weight",
        "expert.layers.2.post_attention_layernorm.weight",
        "backbone.language_model.layers.0.input_layernorm.weight",
        "backbone.language_model.layers.3.input_layernorm.weight",
        "backbone.vision_tower.post_layernorm.weight",
    ],
)
def test_a_perturbed_norm_is_told_apart(observation, io, name):
    model = make_model()
    with torch.no_grad():
        model.get_parameter(name).add_(0.5)
    assert relative_error(sample(model, observation, io, 1), io["sample1"]) > 1e-2


@pytest.mark.parametrize("grid", [4, 32])
def test_the_tower_places_patches_as_smolvlm_does(grid):
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    theirs = SmolVLMVisionTransformer(SmolVLMVisionConfig(image_size=2 * grid, patch_size=2, **sizes)).eval()
    config = SiglipConfig(image_px=2 * grid, patch_px=2, width=8, mlp_dim=8, depth=1, num_heads=1)
    ours = make_vision_tower(config).eval()
    ours.load_state_dict(theirs.state_dict())
    pixels = torch.randn(1, 3, 2 * grid, 2 * grid)
    with torch.no_grad():
        features, expected = ours(pixels).last_hidden_state, theirs(pixels).last_hidden_state
    assert torch.allclose(features, expected, atol=1e-5)


def plain_norm(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def plain_rotation(x_BHNd, positions_BN):
    """The first half of a head's features as real parts, the second as imaginary ones, turned."""
    half = x_BHNd.shape[-1] // 2
    rates = 10_000.0 ** (-torch.arange(half) / half)
    angle = positions_BN[:, None, :, None] * rates
    turned = torch.complex(x_BHNd[..., :half], x_BHNd[..., half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag], dim=-1)


def dense_forward(model, observation, x_BHA, level_B):
    """Every token of prefix and expert side by side, layer by layer, weights read by name."""
    backbone_config, expert_config = golden_configs()
    weights = dict(model.named_parameters())
    text = backbone_config.text
    batch, horizon = x_BHA.shape[:2]

    def linear(x, name):
        return functional.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def heads(x, name):
        return linear(x, name).reshape(batch, x.shape[1], -1, text.head_dim).transpose(1, 2)

    def mlp(x, name):
        hidden = functional.silu(linear(x, f"{name}.gate_proj")) * linear(x, f"{name}.up_proj")
        return linear(hidden, f"{name}.down_proj")

    tokens, valid = [], []
    for camera in CAMERAS:
        patches = model["backbone"].vision_tower(observation.images[camera][:, 0].permute(0, 3, 1, 2)).last_hidden_state
        grid = patches.reshape(batch, 4, 4, -1)
        for row in (0, 2):
            for column in (0, 2):
                square = grid[:, row : row + 2, column : column + 2].reshape(batch, 1, -1)
                tokens.append(linear(square, "backbone.connector") * text.width**0.5)
                valid.append(observation.image_mask[camera])
    tokens.append(weights["backbone.language_model.embed_tokens.weight"][observation.prompts.ids_BL] * text.width**0.5)
    tokens.append(linear(observation.state_BTS, "backbone.state_proj"))
    prefix = torch.cat(tokens, dim=1)
    length = prefix.shape[1]
    valid = torch.cat([*valid, observation.prompts.mask_BL, torch.ones(batch, 1 + horizon, dtype=torch.bool)], dim=1)

    level = embed_noise_level(level_B, expert_config.decoder.width)[:, None].expand(-1, horizon, -1)
    action = torch.cat([linear(x_BHA, "expert.action_in_proj"), level], dim=-1)
    action = linear(functional.silu(linear(action, "expert.action_time_mlp_in")), "expert.action_time_mlp_out")

    positions = valid.cumsum(1) - 1
    # Blocks: images and language 0, state 1, then every action one more; a token sees its own block and those before.
    block = torch.cat([torch.zeros(length - 1), torch.arange(1, horizon + 2)])
    mask = (block[None, :] <= block[:, None]) & valid[:, None, :]
    for layer in range(text.depth):
        theirs, ours = f"backbone.language_model.layers.{layer}", f"expert.layers.{layer}"
        normed = plain_norm(prefix, weights[f"{theirs}.input_layernorm.weight"], text.norm_eps)
        normed_action = plain_norm(action, weights[f"{ours}.input_layernorm.weight"], text.norm_eps)
        queries = plain_rotation(heads(normed, f"{theirs}.self_attn.q_proj"), positions[:, :length])
        keys = plain_rotation(heads(normed, f"{theirs}.self_attn.k_proj"), positions[:, :length])
        values = heads(normed, f"{theirs}.self_attn.v_proj")
        own_queries = heads(normed_action, f"{ours}.self_attn.q_proj")
        if layer % expert_config.self_attn_every == 0:
            own_queries = plain_rotation(own_queries, positions[:, length:])
            own_keys = plain_rotation(heads(normed_action, f"{ours}.self_attn.k_proj"), positions[:, length:])
            own_values = heads(normed_action, f"{ours}.self_attn.v_proj")
            layer_mask = mask
        else:
            own_queries = plain_rotation(own_queries, torch.arange(horizon).expand(batch, -1))
            flat_keys, flat_values = (x.transpose(1, 2).reshape(batch, length, -1) for x in (keys, values))
            own_keys = heads(flat_keys, f"{ours}.self_attn.k_proj")
            own_values = heads(flat_values, f"{ours}.self_attn.v_proj")
            # Columns: the prefix's keys, which the prefix sees; then their projections, which the actions see.
            from_prefix = functional.pad(mask[:, :length, :length], (0, length))
            from_actions = functional.pad(valid[:, None, :length].expand(-1, horizon, -1), (length, 0))
            layer_mask = torch.cat([from_prefix, from_actions], dim=1)
        repeats = text.num_heads // text.num_kv_heads
        all_keys = torch.cat([keys, own_keys], dim=2).repeat_interleave(repeats, dim=1)
        all_values = torch.cat([values, own_values], dim=2).repeat_interleave(repeats, dim=1)
        scores = torch.cat([queries, own_queries], dim=2) @ all_keys.transpose(-1, -2) / text.head_dim**0.5
        attended = scores.masked_fill(~layer_mask[:, None], -torch.inf).softmax(-1) @ all_values
        attended = attended.transpose(1, 2).reshape(batch, length + horizon, -1)
        prefix = prefix + linear(attended[:, :length], f"{theirs}.self_attn.o_proj")
        action = action + linear(attended[:, length:], f"{ours}.self_attn.o_proj")
        normed = plain_norm(prefix, weights[f"{theirs}.post_attention_layernorm.weight"], text.norm_eps)
        prefix = prefix + mlp(normed, f"{theirs}.mlp")
        normed = plain_norm(action, weights[f"{ours}.post_attention_layernorm.weight"], text.norm_eps)
        action = action + mlp(normed, f"{ours}.mlp")
    return linear(plain_norm(action, weights["expert.norm.weight"], text.norm_eps), "expert.action_out_proj")


def test_prefix_then_expert_is_one_dense_forward(observation, io):
    model = make_model()
    split = bind(model, observation)(io["actions"], io["time"])
    dense = dense_forward(model, observation, io["actions"], io["time"])
    assert relative_error(split, dense) < 1e-5
    weight = torch.randn(split.shape, generator=torch.Generator().manual_seed(0))
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    ours = torch.autograd.grad((split * weight).sum(), list(trained.values()))
    theirs = torch.autograd.grad((dense * weight).sum(), list(trained.values()))
    for name, gradient, expected in zip(trained, ours, theirs, strict=True):
        if name.endswith("k_proj.bias"):
            # The same for all keys, so a softmax does not see it: its gradient is rounding errors.
            assert gradient.abs().max() < 1e-5, name
        else:
            assert relative_error(gradient, expected) < 1e-5, name


def test_unread_parameters_are_exactly_those_without_a_gradient(observation, io):
    model = make_model()
    unread = {id(parameter) for parameter in model["backbone"].unread_parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    bind(model, observation)(io["actions"], io["time"]).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (id(parameter) in unread), name
    assert "backbone.language_model.norm.weight" in {n for n, p in model.named_parameters() if id(p) in unread}


def test_features_of_images_and_language_do_not_depend_on_the_state(observation):
    backbone = make_model(reads="tokens")["backbone"]
    assert backbone.unread_parameters() == []
    with torch.no_grad():
        prefix = backbone(observation, observation.state_BTS)
        other = backbone(observation, -observation.state_BTS)
    assert prefix.layers_kv is None
    assert {kind: features.shape[1:] for kind, (features, _) in prefix.tokens.items()} == {
        "image": (8, 48),
        "language": (16, 48),
        "state": (1, 48),
    }
    assert all(mask.shape == features.shape[:2] for features, mask in prefix.tokens.values())
    assert torch.equal(prefix.tokens["image"][0], other.tokens["image"][0])
    assert torch.equal(prefix.tokens["language"][0], other.tokens["language"][0])
    assert not torch.allclose(prefix.tokens["state"][0], other.tokens["state"][0], atol=1e-2)


def test_an_action_sees_those_before_it_and_none_after(observation, io):
    bound = bind(make_model(), observation)
    changed = io["actions"].clone()
    changed[:, 6] += 1
    with torch.no_grad():
        before, after = bound(io["actions"], io["time"]), bound(changed, io["time"])
    assert torch.allclose(before[:, :6], after[:, :6], atol=1e-6)
    assert ((before - after)[:, 6:].abs().amax(-1) > 1e-4).all()


def test_an_absent_camera_is_not_computed_and_equals_a_masked_one(observation, io):
    model = make_model()
    absent = dataclasses.replace(
        observation,
        images={"image0": observation.images["image0"]},
        image_mask={"image0": observation.image_mask["image0"]},
    )
    masked = dataclasses.replace(
        observation, image_mask={**observation.image_mask, "image1": torch.zeros(3, 1, dtype=torch.bool)}
    )
    seen = []
    hook = model["backbone"].vision_tower.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[0]))
    without, blind = sample(model, absent, io, 1), sample(model, masked, io, 1)
    hook.remove()
    assert seen == [3, 6]  # one call, for the images that there are
    assert relative_error(without, blind) < 1e-5
    assert relative_error(blind, io["sample1"]) > 1e-2


def test_bfloat16_stays_near_float32(observation, io):
    with torch.no_grad():
        expected = bind(make_model(), observation)(io["actions"], io["time"])
        output = bind(make_model().to(torch.bfloat16), observation)(io["actions"], io["time"])
    assert output.dtype == torch.float32
    assert relative_error(output, expected) < 0.05  # 0.022 measured: bfloat16 rounds each of some forty steps by 0.004


def test_fanning_out_is_repeating_the_observation(observation, io):
    bound = bind(make_model(), observation)
    generator = torch.Generator().manual_seed(0)
    x, level = torch.randn(6, 10, 32, generator=generator), torch.rand(6, generator=generator)
    with torch.no_grad():
        together = bound.fan_out(2)(x, level)
        for k in range(2):
            assert torch.allclose(together[k::2], bound(x[k::2], level[k::2]), atol=1e-5)


def test_the_whole_model_has_the_size_of_the_public_checkpoint_and_runs_on_meta():
    with torch.device("meta"):
        backbone = make_backbone(SmolVLMConfig())
        expert = SmolVLAExpert(SmolVLAExpertConfig(), prefix=backbone.shape, horizon=50, action_dim=32)
        # smolvla_base has 450,046,176, of which 49,280 x 960 are a vocabulary head.
        assert sum(p.numel() for module in (backbone, expert) for p in module.parameters()) == 402_737_376
        observation = Observation(
            images={camera: torch.zeros(1, 1, 512, 512, 3, dtype=torch.uint8) for camera in CAMERAS},
            image_mask={camera: torch.ones(1, 1, dtype=torch.bool) for camera in CAMERAS},
            state_BTS=torch.zeros(1, 1, 32),
            prompts=Prompts(ids_BL=torch.zeros(1, 48, dtype=torch.int64), mask_BL=torch.ones(1, 48, dtype=torch.bool)),
        )
        prefix = backbone(observation, observation.state_BTS)
        assert prefix.mask_BP.shape == (1, 2 * 64 + 48 + 1)
        assert expert.bind(prefix)(torch.zeros(1, 50, 32), torch.zeros(1)).shape == (1, 50, 32)


def test_what_does_not_fit_is_refused():
    backbone_config, expert_config = golden_configs()
    shape = PrefixShape(kv=(5, 2, 8), tokens={}, state_dim=32)
    with pytest.raises(ValueError, match=r"\(5, 2, 8\).*\(4, 2, 8\)"):
        SmolVLAExpert(expert_config, prefix=shape, horizon=10, action_dim=32)
    with pytest.raises(ValueError, match="carries none"):
        make_model()["expert"].bind(Prefix())
    with pytest.raises(ValueError, match="self_attn_every is 0"):
        SmolVLAExpertConfig(self_attn_every=0)
    with pytest.raises(ValueError, match="4 x 4 patches; choose a divisor of 4"):
        dataclasses.replace(backbone_config, scale_factor=3)
    with pytest.raises(ValueError, match="300 tokens and policy.backbone.vocab_size is 200"):
        make_backbone(dataclasses.replace(backbone_config, vocab_size=200), vocab_size=300)
