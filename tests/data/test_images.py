import json

import numpy as np
import pytest
import torch
from PIL import Image

from vlatune.data.images import ImageRule


def pictures(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("orientation", "row", "column"), [("rot180", 7, 7), ("flipud", 7, 0), ("raw", 0, 0)], ids=lambda v: str(v)
)
def test_orientation_says_which_stored_corner_becomes_the_upper_left(orientation, row, column):
    stored = pictures(2, 8, 8)
    prepared = ImageRule(orientation=orientation, size_px=8).prepare(stored)
    assert prepared.flags.c_contiguous
    np.testing.assert_array_equal(prepared[:, 0, 0], stored[:, row, column])
    np.testing.assert_array_equal(np.sort(prepared, axis=None), np.sort(stored, axis=None))


def test_same_size_is_only_turned():
    stored = pictures(3, 16, 16)
    np.testing.assert_array_equal(ImageRule(size_px=16).prepare(stored), stored[:, ::-1, ::-1])


@pytest.mark.parametrize("shape", [(4, 8), (8, 4), (5, 8)])
def test_padding_is_centred_in_the_background_and_does_not_distort(shape):
    stored = pictures(2, *shape)
    prepared = ImageRule(orientation="raw", size_px=8, background=(1, 2, 3)).prepare(stored)
    top, left = (8 - shape[0]) // 2, (8 - shape[1]) // 2
    inside = np.zeros((8, 8), bool)
    inside[top : top + shape[0], left : left + shape[1]] = True
    np.testing.assert_array_equal(prepared[:, inside], stored.reshape(2, -1, 3))
    assert (prepared[:, ~inside] == (1, 2, 3)).all()


@pytest.mark.parametrize("size_px", [8, 24])
def test_resize_is_pil_bilinear(size_px):
    stored = pictures(2, 16, 16)
    prepared = ImageRule(orientation="flipud", size_px=size_px).prepare(stored)
    for n in range(2):
        expected = Image.fromarray(stored[n, ::-1].copy()).resize((size_px, size_px), Image.Resampling.BILINEAR)
        np.testing.assert_array_equal(prepared[n], np.asarray(expected))


def test_a_grey_picture_stays_grey_through_the_resize():
    grey = np.full((1, 30, 30, 3), 77, np.uint8)
    assert (ImageRule(size_px=13).prepare(grey) == 77).all()


def test_json_round_trip():
    rule = ImageRule(orientation="flipud", size_px=32, background=(9, 8, 7))
    assert ImageRule.from_json(json.loads(json.dumps(rule.to_json()))) == rule


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"orientation": "upside"}, "orientation is 'upside'; it can be rot180, flipud, raw"),
        ({"size_px": 0}, "size_px is 0; it must be at least 1"),
        ({"padding": "top"}, "padding is .top.; it can be centre, left_top"),
        ({"resize": "cv2"}, "resize is .cv2.; it can be pil_bilinear, pil_bicubic, torch_bilinear"),
        ({"background": (0, 0, 256)}, "three numbers from 0 to 255"),
    ],
)
def test_bad_rules_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ImageRule(**fields)


@pytest.mark.parametrize(
    "images", [np.zeros((2, 8, 8, 3)), np.zeros((8, 8, 3), np.uint8), np.zeros((2, 8, 8, 4), np.uint8)]
)
def test_bad_pictures_are_refused(images):
    with pytest.raises(ValueError, match="must be uint8 of shape"):
        ImageRule().prepare(images)


@pytest.mark.parametrize("shape", [(20, 16), (16, 20), (16, 16)])
def test_bicubic_after_padding_with_grey_is_siglips(shape):
    stored = pictures(1, *shape)
    rule = ImageRule(orientation="raw", size_px=24, background=(127, 127, 127), resize="pil_bicubic")
    side = max(shape)
    square = Image.new("RGB", (side, side), (127, 127, 127))
    square.paste(Image.fromarray(stored[0]), ((side - shape[1]) // 2, (side - shape[0]) // 2))
    expected = np.asarray(square.resize((24, 24), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(rule.prepare(stored)[0], expected)


@pytest.mark.parametrize("padding", ["centre", "left_top"])
@pytest.mark.parametrize("shape", [(12, 16), (16, 12), (16, 16)])
def test_lerobots_resize_comes_before_its_padding(shape, padding):
    """Bilinear at pixel centres, four neighbours, written out."""
    stored = pictures(1, *shape)
    prepared = ImageRule(orientation="raw", size_px=8, padding=padding, resize="torch_bilinear").prepare(stored)[0]
    rows, columns = shape[0] // 2, shape[1] // 2
    top, left = (8 - rows, 8 - columns) if padding == "left_top" else ((8 - rows) // 2, (8 - columns) // 2)
    source = stored[0].astype(float)
    # Halving puts every new centre between four old ones: their mean, without any antialiasing.
    expected = (source[0::2, 0::2] + source[0::2, 1::2] + source[1::2, 0::2] + source[1::2, 1::2]) / 4
    inside = prepared[top : top + rows, left : left + columns].astype(float)
    assert np.abs(inside - expected).max() <= 0.5
    assert prepared.astype(int).sum() == inside.sum()  # all else is black


@pytest.mark.parametrize("padding", ["centre", "left_top"])
@pytest.mark.parametrize("shape", [(36, 20), (20, 36), (36, 36), (30, 50)])
def test_lerobots_square_is_whole_where_its_arithmetic_rounds_down(shape, padding):
    """int(36 / (36 / 224)) is 223: LeRobot pads the rest."""
    stored = pictures(1, *shape)
    prepared = ImageRule(orientation="raw", size_px=224, padding=padding, resize="torch_bilinear").prepare(stored)
    ratio = max(shape) / 224
    rows, columns = int(shape[0] / ratio), int(shape[1] / ratio)
    assert (max(rows, columns) == 223) == (max(shape) == 36)
    image = torch.from_numpy(stored).permute(0, 3, 1, 2).float() / 255
    fitted = torch.nn.functional.interpolate(image, size=(rows, columns), mode="bilinear", align_corners=False)
    down, right = (224 - rows, 224 - columns) if padding == "left_top" else ((224 - rows) // 2, (224 - columns) // 2)
    edges = (right, 224 - columns - right, down, 224 - rows - down)
    expected = torch.nn.functional.pad(fitted, edges).permute(0, 2, 3, 1).numpy() * 255
    assert prepared.shape == expected.shape
    assert np.abs(prepared - expected).max() <= 0.5001


def test_lerobots_resize_does_not_smooth():
    """Shrunk fourfold, only the two middle pixels of four are read; PIL's averages over all."""
    stripes = np.zeros((1, 16, 16, 3), np.uint8)
    stripes[:, :, 0::4] = 255
    stripes[:, :, 3::4] = 255
    torch_rule, pil_rule = ImageRule(size_px=4, resize="torch_bilinear"), ImageRule(size_px=4)
    assert (torch_rule.prepare(stripes) == 0).all()
    assert (pil_rule.prepare(stripes) > 50).all()


def test_a_rule_of_an_older_cache_has_the_defaults():
    old = {"orientation": "rot180", "size_px": 8, "background": [0, 0, 0]}
    assert ImageRule.from_json(old) == ImageRule(size_px=8)
