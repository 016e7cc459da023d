"""A robot's numbers in a wider vector, and back."""

import pytest
import torch

from vlatune.data.vector_layout import LaidOut, VectorLayout


def test_there_and_back():
    laid_out = LaidOut(VectorLayout(name="rdt", width=12, slots=(7, 2, 9)), 3)
    x = torch.randn(2, 5, 3)
    wide = laid_out(x)
    assert wide.shape == (2, 5, 12)
    assert torch.equal(wide[..., [7, 2, 9]], x)
    assert wide.abs().sum() == pytest.approx(x.abs().sum().item(), rel=1e-6)
    assert torch.equal(laid_out.inverse(wide), x)
    assert laid_out.mask_W.nonzero().flatten().tolist() == [2, 7, 9]


def test_first_in_order_without_slots_and_the_same_without_a_layout():
    x = torch.randn(4, 7)
    padded = LaidOut(VectorLayout(name="padded", width=32), 7)(x)
    assert torch.equal(padded[:, :7], x)
    assert not padded[:, 7:].any()
    assert torch.equal(LaidOut(None, 7)(x), x)


def test_a_robot_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"'rdt' places 2 dimensions, the robot has 3"):
        LaidOut(VectorLayout(name="rdt", width=12, slots=(7, 2)), 3)
    with pytest.raises(ValueError, match=r"'padded' places 32 dimensions, the robot has 33"):
        LaidOut(VectorLayout(name="padded", width=32), 33)
    with pytest.raises(ValueError, match="must be distinct and within 0 to 11"):
        VectorLayout(name="rdt", width=12, slots=(7, 12))
