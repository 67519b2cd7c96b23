"""Talkers: shapes, scale-free states, and messages that find their partners."""

import pytest
import torch
import torch.nn.functional as F

from downriver.core import InputError
from downriver.nn.talker import Talker, info_nce, normalised, on_scale_of


def test_a_talker_goes_from_states_to_messages_and_back_whatever_the_scale():
    talker = Talker(6, 4, hidden=5)
    states = torch.randn(3, 7, 6)
    message = talker.encode(states)
    assert message.shape == (3, 7, 4) and talker.decode(message).shape == states.shape
    torch.testing.assert_close(talker.encode(100 * states + 3), message, atol=1e-4, rtol=1e-3)
    assert sum(p.numel() for p in talker.parameters()) == (6 * 5 + 5 + 5 * 4 + 4) + (4 * 5 + 5 + 5 * 6 + 6)
    assert Talker(6, 4).encoder[1].out_features == 8


@pytest.mark.parametrize("widths", [(0, 4), (4, 0), (4, 4, 0)])
def test_widths_below_one_are_refused(widths):
    with pytest.raises(InputError, match="1 or more expected"):
        Talker(*widths)


def test_normalised_and_back_on_scale():
    x, y = torch.randn(5, 8), 7 * torch.randn(5, 8) + 3
    torch.testing.assert_close(normalised(y), F.layer_norm(y, (8,)))
    torch.testing.assert_close(on_scale_of(y, y), y, atol=1e-5, rtol=1e-5)
    moved = on_scale_of(x, y)
    torch.testing.assert_close(moved.mean(1), y.mean(1))
    torch.testing.assert_close(moved.std(1), y.std(1), rtol=1e-3, atol=1e-3)


def test_info_nce_is_the_cross_entropy_of_the_right_partner():
    torch.manual_seed(0)
    x, y = torch.randn(6, 4), torch.randn(6, 4)
    cosines = F.cosine_similarity(x[:, None], y[None], dim=-1) / 0.1
    expected = -(cosines.log_softmax(1).diag().mean() + cosines.log_softmax(0).diag().mean()) / 2
    torch.testing.assert_close(info_nce(x, y), expected)
    assert info_nce(x, x) < info_nce(x, y)
