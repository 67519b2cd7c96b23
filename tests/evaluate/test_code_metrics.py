"""Exact match, pass@k and likeness of code."""

import itertools
from collections import Counter

import numpy as np
import pytest
import sacrebleu
from hypothesis import given
from hypothesis import strategies as st

from downriver.core.errors import InputError
from downriver.evaluate.code_metrics import _bleu, _steps, exact_match_at_k, likeness, pass_at_k


def test_exact_match_by_hand():
    predictions = [["a", "b", "c"], ["x", " y ", "z"], ["p", "q", "r"]]
    found = exact_match_at_k(predictions, ["c", "y", "s"], ks=[1, 2, 3])
    assert found == {1: 0.0, 2: 1 / 3, 3: 2 / 3}
    assert exact_match_at_k([["x + 1"]], ["x+1"], ks=[1]) == {1: 0.0}
    assert exact_match_at_k([["x + 1  # one"]], ["x+1"], ks=[1], normalize="ast") == {1: 1.0}
    assert exact_match_at_k([["return 'a'"]], ['return "a"'], ks=[1], normalize="ast") == {1: 1.0}
    assert exact_match_at_k([["return a"]], ["return b"], ks=[1], normalize="ast") == {1: 0.0}
    assert exact_match_at_k([["1 +"]], ["1 + "], ks=[1], normalize="ast") == {1: 1.0}  # neither parses


@given(
    st.lists(st.lists(st.sampled_from("abc"), min_size=4, max_size=4), min_size=1, max_size=5), st.sampled_from("abc")
)
def test_exact_match_grows_with_k(predictions, reference):
    found = exact_match_at_k(predictions, [reference] * len(predictions), ks=[1, 2, 3, 4])
    assert list(found.values()) == sorted(found.values())
    assert found[4] == np.mean([reference in texts for texts in predictions])


def test_too_few_predictions_are_said():
    with pytest.warns(UserWarning, match="2 predictions"):
        assert exact_match_at_k([["a", "b"]], ["b"], ks=[5]) == {5: 1.0}


@pytest.mark.parametrize(("n", "c", "k"), [(10, 3, 1), (10, 3, 5), (6, 0, 2), (6, 6, 2), (7, 5, 3)])
def test_pass_at_k_is_the_share_of_draws(n, c, k):
    passed = [i < c for i in range(n)]
    draws = list(itertools.combinations(passed, k))
    assert pass_at_k(n, c, k) == pytest.approx(np.mean([any(draw) for draw in draws]))


def test_likeness():
    same = likeness(["def f(x):\n    return x + 1"] * 2, ["def f(x):\n    return x + 1"] * 2)
    assert (same.tokens, same.keywords, same.syntax, same.flow, same.mean) == (1, 1, 1, 1, 1)
    renamed = likeness(["return total + step"], ["return a + b"])
    assert renamed.syntax == 1 and renamed.tokens < 1  # trees have no names
    assert likeness(["return ("], ["return a"]).syntax == 0
    other = likeness(["while True:\n    pass"], ["return [x for x in y]"])
    assert other.mean < 0.5 and other.syntax < 0.5
    keyed, plain = likeness(["return z"], ["return a"]), likeness(["b = a"], ["b = c"])
    assert keyed.keywords > keyed.tokens and plain.keywords == plain.tokens


def test_data_flow_by_hand():
    """Parameters, assignments and uses; names are numbered as values reach them."""
    text = "def f(a, b):\n    c = a + b\n    c += a\n    return c"
    a, b, c = range(3)
    assert _steps(text) == Counter(
        [(a, ()), (b, ()), (a, (a,)), (b, (b,)), (c, (a, b)), (a, (a,)), (c, (c, a)), (c, (c,))]
    )
    loop = "def f(xs):\n    for x in xs:\n        y = x\n    return y"
    xs, x, y = range(3)
    assert _steps(loop) == Counter([(xs, ()), (xs, (xs,)), (x, (xs,)), (x, (x,)), (y, (x,)), (y, (y,))])
    each = "def f(xs):\n    return [x for x in xs]"
    assert _steps(each) == Counter([(xs, ()), (xs, (xs,)), (x, (xs,)), (x, (x,))])
    assert not _steps("return a + b") and not _steps("return (")


def test_flow_counts_where_values_come_from():
    reference = "def f(a, b):\n    c = a + b\n    return c"
    renamed = likeness(["def f(x, y):\n    z = x - y\n    return z"], [reference])
    assert renamed.flow == 1  # what is done to values is the tree's
    other = likeness(["def f(a, b):\n    c = b\n    return a"], [reference])
    assert other.flow is not None and 0 < other.flow < 1
    assert likeness(["return ("], [reference]).flow == 0
    assert other.mean == pytest.approx((other.tokens + other.keywords + other.syntax + other.flow) / 4)
    plain = likeness(["return a + b"], ["return a * b"])
    assert plain.flow is None and plain.mean == pytest.approx((plain.tokens + plain.keywords + plain.syntax) / 3)
    both = likeness(["return a", "return ("], ["return a", reference])
    assert both.flow == 0  # over all items together


def test_bleu_agrees_with_sacrebleu():
    said = ["return", "self", ".", "items", "[", "key", "]", "+", "1"]
    wanted = ["return", "self", ".", "values", "[", "key", "]", "or", "1"]
    expected = sacrebleu.sentence_bleu(
        " ".join(said), [" ".join(wanted)], smooth_method="add-k", smooth_value=1, tokenize="none"
    )
    assert _bleu(said, wanted, False) == pytest.approx(expected.score / 100, abs=1e-6)


def test_bad_input():
    with pytest.raises(InputError, match="one each"):
        exact_match_at_k([["a"]], [], ks=[1])
    with pytest.raises(InputError, match="ks"):
        exact_match_at_k([["a"]], ["a"], ks=[0])
    with pytest.raises(InputError, match="normalize"):
        exact_match_at_k([["a"]], ["a"], ks=[1], normalize="lower")
    with pytest.raises(InputError, match="k ≤ n"):
        pass_at_k(3, 1, 4)
    with pytest.raises(InputError, match="one each"):
        likeness([], [])
