"""WordNet's files are parsed as their manual says; path similarity agrees with a hand-made tree."""

import numpy as np
import pytest

from downriver.tasks import wordnet
from downriver.tasks.wordnet import Synset


def tree() -> list[Synset]:
    """0 <- 1 <- 3, 0 <- 2 <- 4, and 5 below both 3 and 4."""
    above = {0: (), 1: (0,), 2: (0,), 3: (1,), 4: (2,), 5: (3, 4)}
    return [Synset("noun", i, 5, (f"word{i}",), f"definition {i}", up) for i, up in above.items()]


def test_path_similarity_is_one_over_one_plus_the_steps():
    pairs = wordnet.similar_pairs(tree(), 25, np.random.default_rng(0))
    steps = {(0, 1): 1, (0, 3): 2, (1, 2): 2, (3, 4): 2, (3, 5): 1, (1, 5): 2, (2, 3): 3, (0, 5): 3, (1, 4): 3}
    for a, b, score in pairs:
        i, j = sorted((int(a[-1]), int(b[-1])))
        if (i, j) in steps and (i, j) != (3, 4):  # through 0, four steps: a path goes by a common hypernym
            assert score == pytest.approx(1 / (1 + steps[i, j]))
        elif (i, j) == (3, 4):
            assert score == pytest.approx(1 / 5)
    assert len({(a, b) for a, b, _ in pairs}) == 25


def test_definitions_are_right_and_wrong_by_turns():
    pairs = wordnet.definition_pairs(tree(), 12, np.random.default_rng(0))
    for word, definition, score in pairs:
        assert (word[-1] == definition[-1]) == (score == 1)
    assert {score for _, _, score in pairs} == {0.0, 1.0}


@pytest.mark.assets
def test_the_real_database(asset):
    synsets = wordnet.read(asset("wordnet"))
    assert len(synsets) == 117659
    dog = next(s for s in synsets if s.words[:2] == ("dog", "domestic dog"))
    assert dog.definition.startswith("a member of the genus Canis")
    assert "barked" not in dog.definition  # the example sentence
    assert wordnet.CLASSES[dog.lexicographer] == "noun.animal"
    by_offset = {s.offset: s for s in synsets if s.pos == "noun"}
    assert {by_offset[up].words[0] for up in dog.hypernyms} == {"canine", "domestic animal"}
    assert sum(not s.hypernyms for s in by_offset.values()) == 1  # entity
