import colorsys
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from vlatune.data.augment import OPENPI, RDT, AugmentConfig, augment, uniform
from vlatune.data.batch import Observation, Prompts

CAMERAS = ("agentview", "eye_in_hand")
ALL = replace(OPENPI, hue=0.1, horizontal_flip="pictures_only")


def make_observation(batch: int = 6, frames: int = 2, px: int = 12) -> Observation:
    generator = torch.Generator().manual_seed(1)
    images = {
        camera: torch.randint(0, 256, (batch, frames, px, px, 3), dtype=torch.uint8, generator=generator)
        for camera in CAMERAS
    }
    return Observation(
        images=images,
        image_mask={camera: torch.ones(batch, frames, dtype=torch.bool) for camera in CAMERAS},
        state_BTS=torch.zeros(batch, frames, 8),
        prompts=Prompts(
            ids_BL=torch.zeros(batch, 8, dtype=torch.int64), mask_BL=torch.ones(batch, 8, dtype=torch.bool)
        ),
    )


def with_images(observation: Observation, **images) -> Observation:
    return replace(observation, images={**observation.images, **images})


def rows(observation: Observation, chosen) -> Observation:
    return replace(
        observation,
        images={camera: images[chosen] for camera, images in observation.images.items()},
        image_mask={camera: mask[chosen] for camera, mask in observation.image_mask.items()},
        state_BTS=observation.state_BTS[chosen],
    )


INDEX = torch.tensor([3, 10, 11, 12, 500_000_000, 7])


def change(observation: Observation, config: AugmentConfig, index=INDEX, *, seed=0, step=4, **settings) -> Observation:
    return augment(observation, config, seed=seed, step=step, sample_index_B=index, **settings)


def test_all_is_off_unless_asked_for():
    observation = make_observation()
    assert change(observation, AugmentConfig()) is observation
    still = change(observation, AugmentConfig(crop=1 - 1e-9, hue=1e-9))  # all of the arithmetic, and no change
    for camera in CAMERAS:
        assert torch.equal(still.images[camera], observation.images[camera])


@pytest.mark.parametrize("config", [OPENPI, RDT, ALL])
def test_a_sample_is_changed_alike_in_any_batch(config):
    observation = make_observation()
    whole = change(observation, config)
    for chosen in ([4], [5, 0, 2]):
        part = change(rows(observation, chosen), config, INDEX[chosen])
        for camera in CAMERAS:
            assert torch.equal(part.images[camera], whole.images[camera][chosen])
    assert torch.equal(change(observation, config).images["agentview"], whole.images["agentview"])
    for other in ({"seed": 1}, {"step": 5}):
        assert not torch.equal(change(observation, config, **other).images["agentview"], whole.images["agentview"])
    assert not torch.equal(change(observation, config, INDEX + 1).images["agentview"], whole.images["agentview"])


def test_shape_dtype_and_the_rest_of_the_observation_stay():
    observation = make_observation()
    changed = change(observation, ALL)
    for camera in CAMERAS:
        assert changed.images[camera].dtype == torch.uint8
        assert changed.images[camera].shape == observation.images[camera].shape
    assert changed.state_BTS is observation.state_BTS
    assert changed.prompts is observation.prompts


def test_all_frames_of_a_camera_are_changed_alike():
    observation = make_observation()
    image = observation.images["agentview"][:, :1].expand(-1, 2, -1, -1, -1)
    changed = change(with_images(observation, agentview=image, eye_in_hand=image), ALL)
    for camera in CAMERAS:
        assert torch.equal(changed.images[camera][:, 0], changed.images[camera][:, 1])
    assert not torch.equal(changed.images["agentview"], changed.images["eye_in_hand"])


def test_only_fixed_cameras_are_moved():
    observation = make_observation()
    moved = change(observation, AugmentConfig(crop=0.9, rotate_deg=5))
    assert not torch.equal(moved.images["agentview"], observation.images["agentview"])
    assert torch.equal(moved.images["eye_in_hand"], observation.images["eye_in_hand"])
    named = change(observation, AugmentConfig(crop=0.9, rotate_deg=5, moved_cameras=("eye_in_hand",)))
    assert torch.equal(named.images["agentview"], observation.images["agentview"])
    assert not torch.equal(named.images["eye_in_hand"], observation.images["eye_in_hand"])
    assert not AugmentConfig().moves_camera("Left_Wrist")


def test_masked_pictures_stay():
    observation = make_observation()
    mask = torch.ones(6, 2, dtype=torch.bool)
    mask[2, 0] = mask[4] = False
    masked = replace(observation, image_mask={"agentview": mask, "eye_in_hand": ~mask})
    changed = change(masked, ALL)
    free = change(observation, ALL)
    for camera in CAMERAS:
        there = masked.image_mask[camera]
        assert torch.equal(changed.images[camera][~there], observation.images[camera][~there])
        assert torch.equal(changed.images[camera][there], free.images[camera][there])


def test_a_crop_is_a_window_of_the_picture():
    """Of a picture that is a ramp in both directions, half as large a window: slope halved, its place between 0 and 0.5."""
    px = 64
    ramp = torch.arange(px, dtype=torch.uint8) * 2
    image = torch.stack([ramp.expand(px, px), ramp[:, None].expand(px, px), torch.zeros(px, px, dtype=torch.uint8)], -1)
    observation = with_images(make_observation(px=px), agentview=image.expand(6, 2, -1, -1, -1))
    index = torch.arange(6)
    crops = change(observation, AugmentConfig(crop=0.5), index).images["agentview"][:, 0].float()
    u_BK = uniform(index, 8, 0, 4, "agentview")
    inner = slice(2, -2)  # beyond the outermost pixels' centres lies the background
    expected = torch.arange(px) + 0.5
    for b in range(6):
        for axis, channel in ((0, 0), (1, 1)):
            first = float(u_BK[b, axis]) * (px - px / 2)
            profile = crops[b, 10, :, channel] if axis == 0 else crops[b, :, 10, channel]
            found = profile[inner]
            wanted = 2 * (first + expected * 0.5 - 0.5)[inner]
            assert (found - wanted).abs().max() <= 0.51, (b, axis)
    assert (crops[..., 2] == 0).all()


def test_rotation_turns_about_the_centre_by_the_drawn_angle():
    px = 65
    image = torch.zeros(px, px, 3, dtype=torch.uint8)
    image[30:35, 50:55] = 255  # right of the centre by 20
    observation = with_images(make_observation(px=px), agentview=image.expand(6, 2, -1, -1, -1))
    index = torch.arange(6)
    turned = change(observation, AugmentConfig(rotate_deg=40), index).images["agentview"][:, 0, ..., 0].double()
    angles = ((2 * uniform(index, 8, 0, 4, "agentview")[:, 2] - 1) * math.radians(40)).tolist()
    down, right = torch.meshgrid(torch.arange(px) - 32.0, torch.arange(px) - 32.0, indexing="ij")
    for b in range(6):
        x, y = ((turned[b] * axis).sum() / turned[b].sum() for axis in (right, down))
        # The grid says where each pixel comes from, so the picture turns the other way.
        assert float(x) == pytest.approx(20 * math.cos(angles[b]), abs=0.1)
        assert float(y) == pytest.approx(-20 * math.sin(angles[b]), abs=0.1)
    assert min(angles) < 0 < max(angles)


def test_what_comes_from_outside_has_the_backgrounds_colour():
    observation = make_observation(px=16)
    turned = change(observation, AugmentConfig(rotate_deg=180), background=(10, 20, 30)).images["agentview"]
    assert any(turned[b, 0, 0, 0].tolist() == [10, 20, 30] for b in range(6))
    plain = with_images(observation, agentview=torch.full((6, 2, 16, 16, 3), 77, dtype=torch.uint8))
    same = change(plain, AugmentConfig(rotate_deg=180, crop=0.8), background=(77, 77, 77)).images["agentview"]
    assert (same == 77).all()


def test_a_flip_is_exact_and_the_same_for_all_cameras():
    observation = make_observation()
    flipped = change(observation, AugmentConfig(horizontal_flip="pictures_only"))
    draws = []
    for camera in CAMERAS:
        mirrored = observation.images[camera].flip(3)
        is_flipped = [torch.equal(flipped.images[camera][b], mirrored[b]) for b in range(6)]
        is_same = [torch.equal(flipped.images[camera][b], observation.images[camera][b]) for b in range(6)]
        assert [a != b for a, b in zip(is_flipped, is_same, strict=True)] == [True] * 6
        draws.append(is_flipped)
    assert draws[0] == draws[1]
    assert 0 < sum(draws[0]) < 6


@pytest.mark.parametrize(
    "config",
    [
        AugmentConfig(brightness=0.3),
        AugmentConfig(contrast=0.4),
        AugmentConfig(saturation=0.5),
        AugmentConfig(hue=0.5),
        AugmentConfig(brightness=0.3, contrast=0.4, saturation=0.5, hue=0.03),
        AugmentConfig(brightness=2.0, saturation=1.5, coloured_share=0.5),
    ],
)
def test_colours_equal_a_plain_loop(config):
    observation = make_observation(batch=6, px=8)
    changed = change(observation, config)
    chosen = 0
    for camera in CAMERAS:
        u_BK = uniform(INDEX, 8, 0, 4, camera).double().numpy()
        for b in range(6):
            for t in range(2):
                picture = observation.images[camera][b, t].double().numpy()
                expected = picture
                if u_BK[b, 3] < config.coloured_share:
                    chosen += 1
                    expected = plain_jitter(picture, config, 2 * u_BK[b, 4:8] - 1)
                found = changed.images[camera][b, t].double().numpy()
                assert np.abs(found - expected).max() <= 0.501
    assert chosen == 24 if config.coloured_share == 1 else 0 < chosen < 24


def plain_jitter(picture: np.ndarray, config: AugmentConfig, signed: np.ndarray) -> np.ndarray:
    def luma(x):
        return (x @ [0.299, 0.587, 0.114])[..., None]

    b, c, s = (
        max(0.0, 1 + amount * most)
        for amount, most in zip(signed, (config.brightness, config.contrast, config.saturation), strict=False)
    )
    picture = np.clip(picture * b, 0, 255)
    picture = np.clip(c * picture + (1 - c) * luma(picture).mean(), 0, 255)
    picture = np.clip(s * picture + (1 - s) * luma(picture), 0, 255)
    turned = np.empty_like(picture)
    for place in np.ndindex(picture.shape[:2]):
        hue, saturation, value = colorsys.rgb_to_hsv(*picture[place] / 255)
        turned[place] = colorsys.hsv_to_rgb((hue + signed[3] * config.hue) % 1, saturation, value)
    return turned * 255


def test_greys_have_no_hue():
    grey = torch.arange(0, 240, 2, dtype=torch.uint8)[: 6 * 2 * 4 * 2].reshape(6, 2, 4, 2)[..., None, None]
    grey = grey.expand(6, 2, 4, 2, 2, 3).flatten(3, 4)
    observation = with_images(make_observation(px=4), agentview=grey, eye_in_hand=grey)
    assert torch.equal(change(observation, AugmentConfig(hue=0.5)).images["agentview"], grey)


def test_draws_are_uniform_and_do_not_follow_one_another():
    u_BK = uniform(torch.arange(20_000), 8, 7, 3, "agentview")
    assert ((u_BK >= 0) & (u_BK < 1)).all()
    for k in range(8):
        share_10 = torch.histc(u_BK[:, k], bins=10, min=0, max=1) / 20_000
        assert (share_10 - 0.1).abs().max() < 0.01
    others = torch.cat([u_BK[1:, :1], u_BK[:-1], uniform(torch.arange(19_999), 1, 7, 4, "agentview")], dim=1)
    correlation = torch.corrcoef(torch.cat([others, uniform(torch.arange(19_999), 1, 7, 3, "wrist")], dim=1).T)
    assert (correlation - torch.eye(11)).abs().max() < 0.03


def test_draws_do_not_change_from_release_to_release():
    found = uniform(torch.tensor([0, 1]), 2, 5, 6, "agentview")
    assert (found * 2**24).tolist() == [[16767337, 14049865], [2078889, 4361714]]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"crop": 0.0}, r"crop is 0.0; it must be more than 0, and at most 1 \(off\)"),
        ({"crop": 1.1}, "crop is 1.1"),
        ({"rotate_deg": -1}, r"rotate_deg is -1; it must be at least 0 \(off\) and at most 180"),
        ({"brightness": -0.1}, "brightness is -0.1; it must be at least 0"),
        ({"contrast": float("nan")}, "contrast is nan"),
        ({"hue": 0.6}, "hue is 0.6; it must be at least 0 .* at most 0.5"),
        ({"coloured_share": 2}, "coloured_share is 2; it must be at least 0 and at most 1"),
        (
            {"horizontal_flip": True},
            "horizontal_flip is True; .* left in them is right in the picture: only for tasks without",
        ),
    ],
)
def test_bad_settings_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        AugmentConfig(**fields)


def test_a_camera_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="moved_cameras has 'overhead'; the pictures are of agentview, eye_in_hand"):
        change(make_observation(), AugmentConfig(crop=0.9, moved_cameras=("overhead",)))
