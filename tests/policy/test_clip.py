"""The CLIP backbone against transformers' CLIPModel of the same (random) weights, and what a backbone must keep to."""

import dataclasses

import pytest
import torch
from small_policies import CAMERAS, make_batch
from transformers import CLIPConfig, CLIPModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from vlatune.data.batch import Repeats
from vlatune.policy.backbones.clip import Clip, ClipConfig, ClipTextConfig, ClipVisionConfig, as_clip_pixels

VISION = ClipVisionConfig(image_px=16, patch_px=8, width=24, mlp_dim=32, depth=2, num_heads=2)
TEXT = ClipTextConfig(max_tokens=16, width=16, mlp_dim=32, depth=2, num_heads=2)
END = 33  # an id that ends every text, and that our text pooling does not know
PREFIXES = {
    "vision_model.": "vision_tower.vision_model.",
    "visual_projection.": "vision_tower.visual_projection.",
    "text_model.": "text_tower.text_model.",
    "text_projection.": "text_tower.text_projection.",
}


def make_clip(features="pooled", config=None, **changes):
    torch.manual_seed(0)
    config = config or ClipConfig(vision=VISION, text=TEXT, embedding_width=20, features=features)
    arguments = {"vocab_size": 40, "encoder_width": None, "state_dim": 8, "cameras": CAMERAS, "reads": "tokens"}
    return Clip(config, **{**arguments, **changes})


def encode(clip, observation):
    return clip(observation, observation.state_BTS).tokens


@pytest.fixture
def observation():
    observation = make_batch().observation
    prompts = observation.prompts
    last_B = prompts.mask_BL.sum(-1, keepdim=True) - 1
    return dataclasses.replace(
        observation, prompts=dataclasses.replace(prompts, ids_BL=prompts.ids_BL.scatter(1, last_B, END))
    )


@pytest.fixture
def reference_model():
    torch.manual_seed(1)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "projection_dim": 20}
    text = {"vocab_size": 40, "hidden_size": 16, "max_position_embeddings": 16, "eos_token_id": END, **sizes}
    vision = {"image_size": 16, "patch_size": 8, "hidden_size": 24, **sizes}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=20)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return model


def load_reference(clip, model):
    weights = {name: tensor for name, tensor in model.state_dict().items() if name != "logit_scale"}
    names = {
        name: next(ours + name.removeprefix(old) for old, ours in PREFIXES.items() if name.startswith(old))
        for name in weights
    }
    clip.load_state_dict({names[name]: tensor for name, tensor in weights.items()})  # strict


def reference_pixels(images):
    mean, std = torch.tensor(OPENAI_CLIP_MEAN), torch.tensor(OPENAI_CLIP_STD)
    return ((images[:, -1] / 255 - mean) / std).permute(0, 3, 1, 2)


def test_pooled_features_are_transformers_embeddings(observation, reference_model):
    clip = make_clip()
    load_reference(clip, reference_model)
    tokens = encode(clip, observation)
    prompts = observation.prompts
    with torch.no_grad():
        text = reference_model.get_text_features(prompts.ids_BL, attention_mask=prompts.mask_BL.long()).pooler_output
        images = [
            reference_model.get_image_features(reference_pixels(observation.images[camera])).pooler_output
            for camera in CAMERAS
        ]
    assert torch.allclose(tokens["language"][0], text[:, None], atol=1e-4)
    assert torch.allclose(tokens["image"][0], torch.stack(images, dim=1), atol=1e-4)
    assert tokens["image"][1].tolist() == [[True, True], [True, True], [True, False]]
    assert tokens["language"][1].tolist() == [[True]] * 3


def test_patches_are_transformers_last_hidden_states(observation, reference_model):
    clip = make_clip("patches")
    load_reference(clip, reference_model)
    tokens = encode(clip, observation)
    prompts = observation.prompts
    with torch.no_grad():
        text = reference_model.text_model(prompts.ids_BL, attention_mask=prompts.mask_BL.long()).last_hidden_state
        tower = reference_model.vision_model
        hidden = tower(reference_pixels(observation.images[CAMERAS[1]])).last_hidden_state
        patches = tower.post_layernorm(hidden)[:, 1:]
    features, mask = tokens["language"]
    assert torch.allclose(features[mask], text[mask], atol=1e-4)
    assert torch.equal(mask, prompts.mask_BL)
    features, mask = tokens["image"]
    assert features.shape == (3, 8, 24)
    assert torch.allclose(features[:, 4:], patches, atol=1e-4)
    assert mask.tolist() == [[True] * 8, [True] * 8, [True] * 4 + [False] * 4]


def test_floats_and_bytes_are_the_same_pixels(observation):
    image = observation.images[CAMERAS[0]]
    floats = as_clip_pixels(image / 127.5 - 1)
    assert torch.allclose(floats, as_clip_pixels(image), atol=1e-6)
    assert torch.allclose(as_clip_pixels(image)[:, -1], reference_pixels(image), atol=1e-5)


@pytest.mark.parametrize("features", ["pooled", "patches"])
def test_padding_of_a_prompt_changes_nothing(features, observation):
    clip, prompts = make_clip(features), observation.prompts
    other = dataclasses.replace(prompts, ids_BL=torch.where(prompts.mask_BL, prompts.ids_BL, END))
    longer = dataclasses.replace(
        prompts,
        ids_BL=torch.cat([prompts.ids_BL, torch.full((3, 8), END)], dim=1),
        mask_BL=torch.cat([prompts.mask_BL, torch.zeros(3, 8, dtype=torch.bool)], dim=1),
    )
    text, mask = encode(clip, observation)["language"]
    for changed in (other, longer):
        changed_text, changed_mask = encode(clip, dataclasses.replace(observation, prompts=changed))["language"]
        assert torch.allclose(changed_text[changed_mask], text[mask], atol=1e-5)


@pytest.mark.parametrize("features", ["pooled", "patches"])
def test_a_repeated_prompt_is_encoded_once(features, observation, monkeypatch):
    clip, prompts = make_clip(features), observation.prompts
    which_B = torch.tensor([1, 0, 1, 1])
    repeated = dataclasses.replace(prompts, ids_BL=prompts.ids_BL[which_B], mask_BL=prompts.mask_BL[which_B])
    observation = dataclasses.replace(
        observation,
        images={camera: image[which_B] for camera, image in observation.images.items()},
        image_mask={camera: mask[which_B] for camera, mask in observation.image_mask.items()},
        state_BTS=observation.state_BTS[which_B],
        prompts=repeated,
    )
    expected, expected_mask = encode(clip, observation)["language"]
    seen = []
    clip.text_tower.text_model.register_forward_pre_hook(
        lambda _module, _args, given: seen.append(len(given["input_ids"])), with_kwargs=True
    )
    repeats = Repeats(row_R=torch.tensor([1, 0]), which_B=torch.tensor([1, 0, 1, 1]))
    observation = dataclasses.replace(observation, prompts=dataclasses.replace(repeated, repeats=repeats))
    language, mask = encode(clip, observation)["language"]
    assert seen == [2]
    assert torch.equal(mask, expected_mask)
    torch.testing.assert_close(language, expected)


def test_an_absent_camera_is_not_computed_and_keeps_its_place(observation):
    clip = make_clip()
    batches = []
    clip.vision_tower.register_forward_pre_hook(
        lambda module, args, kwargs: batches.append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    both = encode(clip, observation)["image"][0]
    wrist_alone = dataclasses.replace(
        observation,
        images={CAMERAS[1]: observation.images[CAMERAS[1]]},
        image_mask={CAMERAS[1]: observation.image_mask[CAMERAS[1]]},
    )
    features, mask = encode(clip, wrist_alone)["image"]
    assert batches == [6, 3]  # one call of the tower for all cameras
    assert features[:, 0].abs().max() == 0
    assert torch.allclose(features[:, 1], both[:, 1], atol=1e-5)
    assert mask.tolist() == [[False, True], [False, True], [False, False]]


def test_nothing_is_trained_and_no_graph_is_kept(observation):
    clip = make_clip()
    assert {id(p) for p in clip.unread_parameters()} == {id(p) for p in clip.parameters()}
    assert not any(features.requires_grad for features, _ in encode(clip, observation).values())


@pytest.mark.parametrize("features", ["pooled", "patches"])
def test_bfloat16_is_close(features, observation):
    clip = make_clip(features)
    reference = encode(clip, observation)
    for kind, (features_BND, mask) in encode(clip.to(torch.bfloat16), observation).items():
        expected = reference[kind][0]
        assert features_BND.dtype == torch.bfloat16
        error = (features_BND - expected)[mask].abs().max() / expected[mask].abs().max()
        assert error < 0.05, kind


@pytest.mark.parametrize("features", ["pooled", "patches"])
def test_full_size_runs_on_meta(features):
    with torch.device("meta"):
        clip = make_clip(config=ClipConfig(features=features), vocab_size=49_408)
        observation = make_batch().observation
        tokens = encode(
            clip,
            dataclasses.replace(
                observation.to("meta"),
                images={c: torch.empty(3, 1, 224, 224, 3, dtype=torch.uint8) for c in CAMERAS},
            ),
        )
    assert (
        sum(p.numel() for p in clip.parameters()) == 149_620_736
    )  # openai/clip-vit-base-patch16's, but for logit_scale
    assert {kind: x.shape[1:] for kind, (x, _) in tokens.items()} == {
        "pooled": {"image": (2, 512), "language": (1, 512)},
        "patches": {"image": (392, 768), "language": (8, 512)},
    }[features]
    assert {kind: x.shape[-1] for kind, (x, _) in tokens.items()} == dict(clip.shape.tokens)


def test_an_expert_that_reads_keys_and_values_is_refused():
    with pytest.raises(ValueError, match="'clip' hands over tokens, and the expert reads keys and values"):
        make_clip(reads="kv")


def test_a_prompt_longer_than_the_tower_reads_is_refused(observation):
    long = dataclasses.replace(
        observation.prompts, ids_BL=torch.ones(3, 24, dtype=torch.int64), mask_BL=torch.ones(3, 24, dtype=torch.bool)
    )
    with pytest.raises(ValueError, match="padded to 24 tokens, and CLIP's text tower reads 16"):
        encode(make_clip(), dataclasses.replace(observation, prompts=long))
