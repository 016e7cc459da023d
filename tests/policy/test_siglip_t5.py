"""RDT's backbone: the order of its image tokens, grey pictures for what is missing, and one call of the tower."""

import pytest
import torch

from vlatune.data.batch import Observation, Prompts
from vlatune.policy.backbones.siglip import SiglipConfig
from vlatune.policy.backbones.siglip_t5 import SiglipT5, SiglipT5Config

CAMERAS = ("agentview", "eye_in_hand")
PX = 20  # no multiple of the patch's 8 pixels, as 384 is none of 14
VISION = SiglipConfig(image_px=PX, patch_px=8, width=16, mlp_dim=24, depth=1, num_heads=2)


def make_backbone(config=None, cameras=CAMERAS, **overrides):
    torch.manual_seed(0)
    settings = {"vocab_size": 10, "encoder_width": 12, "state_dim": 3, "cameras": cameras, "reads": "tokens"}
    return SiglipT5(config or SiglipT5Config(vision=VISION), **{**settings, **overrides}).eval()


def make_observation(cameras=CAMERAS, batch=2, num_offsets=2):
    generator = torch.Generator().manual_seed(0)
    shape = (batch, num_offsets, PX, PX, 3)
    return Observation(
        images={
            camera: torch.randint(0, 256, shape, generator=generator, dtype=torch.int64).byte() for camera in cameras
        },
        image_mask={camera: torch.ones(batch, num_offsets, dtype=torch.bool) for camera in cameras},
        state_BTS=torch.zeros(batch, num_offsets, 3),
        prompts=Prompts(
            ids_BL=torch.zeros(batch, 5, dtype=torch.long),
            mask_BL=torch.tensor([[True, True, True, False, False], [True, True, True, True, True]]),
            embedding_BLE=torch.randn(batch, 5, 12, generator=generator),
        ),
    )


@torch.no_grad()
def encoded(backbone, images):
    """(…, px, px, 3) uint8 -> (…, N, D), image by image."""
    rows = [
        backbone.vision_tower((image.movedim(-1, 0)[None] / 127.5) - 1).last_hidden_state[0]
        for image in images.flatten(0, -4)
    ]
    return torch.stack(rows).unflatten(0, images.shape[:-3])


@torch.no_grad()
def image_slots(backbone, observation):
    """(B, T, slots, N, D)."""
    tokens, mask = backbone(observation, observation.state_BTS).tokens["image"]
    assert mask.shape == tokens.shape[:2]
    assert mask.all()
    return tokens.unflatten(1, (2, 3, 4))


GREY = torch.full((1, 1, PX, PX, 3), 127, dtype=torch.uint8)


def test_tokens_stand_observation_by_observation_slot_by_slot():
    backbone, observation = make_backbone(), make_observation()
    slots = image_slots(backbone, observation)
    for index, camera in enumerate(CAMERAS):
        expected = encoded(backbone, observation.images[camera])
        assert torch.allclose(slots[:, :, index], expected, atol=1e-5)
        assert not torch.allclose(slots[:, :, index], expected.flip(1), atol=1e-2)
    assert torch.allclose(slots[:, :, 2], encoded(backbone, GREY).expand(2, 2, -1, -1), atol=1e-5)


def test_a_missing_camera_or_moment_is_a_grey_picture():
    backbone, observation = make_backbone(), make_observation()
    grey = encoded(backbone, GREY)[0, 0]
    observation.image_mask["agentview"][1, 0] = False
    slots = image_slots(backbone, observation)
    assert torch.allclose(slots[1, 0, 0], grey, atol=1e-5)
    assert not torch.allclose(slots[0, 0, 0], grey, atol=1e-2)
    without = image_slots(backbone, make_observation(cameras=("eye_in_hand",)))
    assert torch.allclose(without[:, :, 0], grey.expand(2, 2, -1, -1), atol=1e-5)
    assert not torch.allclose(without[:, :, 1], grey.expand(2, 2, -1, -1), atol=1e-2)


@pytest.mark.parametrize(
    ("robot", "batch_cameras", "num_images"),
    [
        (CAMERAS, CAMERAS, 2 * 2 * 2 + 1),
        (CAMERAS, CAMERAS[:1], 2 * 2 + 1),
        ((*CAMERAS, "left"), (*CAMERAS, "left"), 2 * 2 * 3),
    ],
)
def test_the_tower_is_called_once_and_grey_is_encoded_once(robot, batch_cameras, num_images):
    backbone = make_backbone(cameras=robot)
    seen = []
    backbone.vision_tower.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[0]))
    image_slots(backbone, make_observation(cameras=batch_cameras))
    assert seen == [num_images]


def test_float_images_are_taken_as_they_are():
    backbone, observation = make_backbone(), make_observation()
    floats = Observation(
        images={camera: images.float() / 127.5 - 1 for camera, images in observation.images.items()},
        image_mask=observation.image_mask,
        state_BTS=observation.state_BTS,
        prompts=observation.prompts,
    )
    assert torch.allclose(image_slots(backbone, floats), image_slots(backbone, observation), atol=1e-5)


def test_language_tokens_are_the_cached_features():
    observation = make_observation()
    features, mask = make_backbone()(observation, observation.state_BTS).tokens["language"]
    assert torch.equal(features, observation.prompts.embedding_BLE)
    assert torch.equal(mask, observation.prompts.mask_BL)


def test_the_tower_is_trained_only_on_request():
    observation = make_observation()
    frozen = make_backbone()
    assert {id(p) for p in frozen.unread_parameters()} == {id(p) for p in frozen.parameters()}
    trained = make_backbone(SiglipT5Config(vision=VISION, train_vision=True))
    assert trained.unread_parameters() == []
    trained(observation, observation.state_BTS).tokens["image"][0].square().sum().backward()
    assert [name for name, parameter in trained.named_parameters() if parameter.grad is None] == []


def test_full_size_without_weights():
    config = SiglipT5Config()
    assert (config.image_px, config.num_observations, config.reads_embeddings) == (384, 2, True)
    with torch.device("meta"):
        backbone = make_backbone(config, encoder_width=4096, state_dim=128)
        observation = Observation(
            images={camera: torch.empty(1, 2, 384, 384, 3, dtype=torch.uint8) for camera in CAMERAS},
            image_mask={camera: torch.ones(1, 2, dtype=torch.bool) for camera in CAMERAS},
            state_BTS=torch.empty(1, 2, 128),
            prompts=Prompts(
                ids_BL=torch.zeros(1, 6, dtype=torch.long),
                mask_BL=torch.ones(1, 6, dtype=torch.bool),
                embedding_BLE=torch.empty(1, 6, 4096),
            ),
        )
        tokens, mask = backbone.to(torch.bfloat16)(observation, observation.state_BTS).tokens["image"]
    assert tokens.shape == (1, 4374, 1152)
    assert tokens.dtype == torch.bfloat16
    assert mask.shape == (1, 4374)
    assert backbone.shape.tokens == {"image": 1152, "language": 4096}
    assert sum(parameter.numel() for parameter in backbone.parameters()) == 412_987_248


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="--encoder"):
        make_backbone(encoder_width=None)
    with pytest.raises(ValueError, match="no layers whose keys and values"):
        make_backbone(reads="kv")
    with pytest.raises(ValueError, match="num_camera_slots is 3"):
        make_backbone(cameras=("a", "b", "c", "d"))
    backbone, single = make_backbone(), make_observation(num_offsets=1)
    with pytest.raises(ValueError, match="has 1 offsets"):
        backbone(single, single.state_BTS)
    observation = make_observation()
    ids_only = Prompts(ids_BL=observation.prompts.ids_BL, mask_BL=observation.prompts.mask_BL)
    unencoded = Observation(
        images=observation.images,
        image_mask=observation.image_mask,
        state_BTS=observation.state_BTS,
        prompts=ids_only,
    )
    with pytest.raises(ValueError, match="only token ids"):
        backbone(unencoded, observation.state_BTS)
