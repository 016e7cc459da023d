import json

import numpy as np
import pytest
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
