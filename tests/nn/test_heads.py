import pytest

from downriver.core.errors import InputError
from downriver.nn import linear_head


def test_a_head_has_the_shape_that_was_asked():
    head = linear_head(5, 3)
    assert head.weight.shape == (3, 5) and head.bias.shape == (3,)
    assert head.weight.abs().max() <= 5**-0.5


@pytest.mark.parametrize(("width", "outputs"), [(0, 2), (3, 0)])
def test_a_head_of_nothing_is_refused(width, outputs):
    with pytest.raises(InputError, match="at least one of each"):
        linear_head(width, outputs)
