"""Prompt learning without labels: the simplex, the gradient, what is asked and paid, what is learnt, bad input."""

import itertools
import json

import numpy as np
import polars as pl
import pytest
from scipy.optimize import minimize
from sklearn.base import clone

from downriver.adapt import UnsupervisedPromptLearner
from downriver.adapt.unsupervised_prompts import LabelScorer, pmi_ngrams, policy_gradient, project_simplex
from downriver.core.errors import InputError
from downriver.models import small
from downriver.models.chat import HFChat, ScriptedChat

TEXTS = [f"{word} {i}" for i in range(10) for word in ("sun", "rain", "fog")]


def crowd(messages):
    """Answers well after the instruction «judge», and by the parity of the text's length without it."""
    *before, text = messages[-1]["content"].split("\n")
    text = text.removesuffix(" =>")
    if "judge" in before[0] if before else False:
        return "good" if "sun" in text else "bad"
    return "good" if len(text) % 2 else "bad"


def learner(**settings):
    settings = {"samples": 4, "epochs": 3, "k_demos": 2, "candidates": ["judge", "perhaps"], "n_tokens": 2} | settings
    return UnsupervisedPromptLearner(settings.pop("lm", ScriptedChat(crowd)), ["bad", "good"], **settings)


def test_the_projection_is_the_nearest_point_of_the_simplex():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(20, 5))
    found = project_simplex(rows)
    assert (found >= 0).all() and np.allclose(found.sum(axis=1), 1)
    assert np.allclose(project_simplex(found), found)
    for row, point in zip(rows[:6], found, strict=False):
        best = minimize(
            lambda x, row=row: ((x - row) ** 2).sum(),
            np.full(5, 0.2),
            bounds=[(0, 1)] * 5,
            constraints={"type": "eq", "fun": lambda x: x.sum() - 1},
            options={"ftol": 1e-14},
        )
        assert np.allclose(point, best.x, atol=1e-5)


def test_the_gradient_is_unbiased_and_quieter_than_without_a_baseline():
    rng = np.random.default_rng(1)
    table, p = 5 + rng.normal(size=(3, 3)), np.array([[0.2, 0.5, 0.3], [0.6, 0.1, 0.3]])
    exact = np.array([(table * p[1]).sum(axis=1), (table * p[0][:, None]).sum(axis=0)])  # ∂ E[L] / ∂ p_{i,c}
    estimates, plain = [], []
    for _ in range(6000):
        drawn = np.stack([rng.choice(3, size=5, p=row) for row in p], axis=1)
        losses = table[drawn[:, 0], drawn[:, 1]]
        estimates.append(policy_gradient(drawn, losses, p))
        picked = drawn[:, :, None] == np.arange(3)
        plain.append(np.tensordot(losses / 5, picked / p, axes=1))
    found = np.array(estimates)
    # the leave-one-out mean as a baseline shifts every ∂/∂p of a row alike, which the projection takes off again
    centred = found - found.mean(axis=2, keepdims=True)
    wanted = exact - exact.mean(axis=1, keepdims=True)
    error = centred.std(axis=0) / len(found) ** 0.5
    assert (np.abs(centred.mean(axis=0) - wanted) < 4 * error).all()
    assert found.var(axis=0).sum() < 0.2 * np.array(plain).var(axis=0).sum()


def test_the_released_estimate_has_a_sign_for_every_token():
    drawn, losses, p = np.array([[0], [1]]), np.array([1.0, 3.0]), np.array([[0.5, 0.25, 0.25]])
    assert policy_gradient(drawn, losses, p).tolist() == [[-2.0, 4.0, 0.0]]
    assert policy_gradient(drawn, losses, p, "bdpl").tolist() == [[-4.0, 8.0, 0.0]]


def test_it_finds_the_instruction_that_works():
    def answer(messages):
        """Sure and right with «judge»; else 6 of 8 right for even numbers, and 4 of 8 for odd ones."""
        *before, text = messages[-1]["content"].split("\n")
        text = text.removesuffix(" =>")
        right, wrong = ("good", "bad") if "sun" in text else ("bad", "good")
        if before and "judge" in before[0]:
            return [right] * 8
        number = int(text.split()[1])
        return [right, wrong] * 4 if number % 2 else [right] * 6 + [wrong] * 2

    wanted = ["good" if "sun" in text else "bad" for text in TEXTS]
    found = learner(lm=ScriptedChat(answer), epochs=10, learning_rate=0.3, calibrate=False, k_demos=0, agreement=1.1)
    found.fit(TEXTS)
    assert found.prompt_ == "judge judge" and (found.probabilities_[:, 0] > 0.65).all()
    assert found.predict(TEXTS).tolist() == wanted
    assert found.pseudo_labels_["label"].to_list() == wanted
    assert np.allclose(found.probabilities_.sum(axis=1), 1) and (found.probabilities_ >= 0).all()
    assert found.history_["loss"][-1] < found.history_["loss"][0]


def test_what_is_asked_is_what_was_planned():
    asked = []
    found = learner(
        lm=ScriptedChat(lambda messages: asked.append(messages[-1]["content"]) or crowd(messages)),
        candidates=[f"word{i}" for i in range(50)],
        epochs=2,
        agreement=1.1,
    )
    plan = found.plan(TEXTS)
    found.fit(TEXTS)
    assert plan.labelling == 3 * 31
    visited = [0.2 * 30 + 2, 0.8 * 30 + 2]  # and as many texts more as there are classes, where shares are rounded up
    assert plan.training == 4 * (sum(visited) + 2)
    assert plan.calls == plan.labelling + plan.training >= found.calls_ > plan.labelling
    assert len(set(asked)) == found.calls_
    small_budget = learner(budget=100, candidates=[f"word{i}" for i in range(50)], epochs=5, agreement=1.1).fit(TEXTS)
    assert small_budget.calls_ <= 100 and len(small_budget.pseudo_labels_) == 30


def test_the_same_seed_gives_the_same_and_pays_nothing_twice(tmp_path):
    def fit(count):
        def told(messages):
            count.append(1)
            return crowd(messages)

        chat = ScriptedChat(told, cache=tmp_path)
        return learner(lm=chat).fit(TEXTS)

    first, second = [], []
    a, b = fit(first), fit(second)
    assert a.pseudo_labels_.equals(b.pseudo_labels_) and a.prompt_ == b.prompt_ and a.history_.equals(b.history_)
    assert first and not second


def test_a_text_never_sees_its_own_label():
    seen = []
    found = learner(lm=ScriptedChat(lambda m: seen.append(m[-1]["content"]) or crowd(m)), k_demos=4).fit(TEXTS)
    found.predict(TEXTS)
    for query in seen:
        *lines, last = query.split("\n")
        assert not any(line.startswith(last.removesuffix("=>") + "=>") and line != last for line in lines)
    assert max(query.count("=>") for query in seen) == 5  # four demonstrations and the text
    labels = [line.split("=> ")[1] for line in seen[-1].split("\n") if "=> " in line]
    assert sorted(labels) == ["bad", "bad", "good", "good"]


def test_the_order_of_classes_changes_nothing():
    settings = {"samples": 4, "epochs": 2, "k_demos": 2, "candidates": ["judge", "perhaps"], "n_tokens": 2}
    found = [
        UnsupervisedPromptLearner(ScriptedChat(crowd), order, **settings).fit(TEXTS)
        for order in (["bad", "good"], ["good", "bad"])
    ]
    assert found[0].pseudo_labels_["label"].to_list() == found[1].pseudo_labels_["label"].to_list()
    assert np.allclose(found[0].predict_proba(TEXTS), found[1].predict_proba(TEXTS)[:, ::-1])


def test_a_language_model_in_this_process():
    chat = HFChat(small("causal-lm", "nano"), strings="text")
    scorer = LabelScorer(chat, [" yes", " no indeed"])  # words of several tokens: sums
    prompts = ["is it? =>", "was it? =>", "is it? =>"]
    found = scorer(prompts)
    assert scorer.calls == 2 and scorer.new(["is it? =>", "other"]) == 1
    pairs = list(itertools.product(prompts[:2], [" yes", " no indeed"]))
    totals = np.array([x.total for x in chat.loglikelihood(pairs)]).reshape(2, 2)
    expected = totals - np.logaddexp.reduce(totals, axis=1, keepdims=True)
    assert np.allclose(found[:2], expected) and np.array_equal(found[2], found[0])
    fitted = UnsupervisedPromptLearner(chat, ["yes", "no"], samples=2, epochs=1, n_tokens=2, n_candidates=4).fit(
        TEXTS[:6]
    )
    assert fitted.predict_proba(["more sun"]).shape == (1, 2)


def test_sklearn_and_the_exported_set(tmp_path):
    found = learner()
    assert clone(found).get_params()["samples"] == 4 and found.set_params(epochs=1).epochs == 1
    found.fit(TEXTS)
    count = found.export_finetuning_set(tmp_path / "set.jsonl", min_confidence=0.5)
    rows = [json.loads(line) for line in (tmp_path / "set.jsonl").read_text().splitlines()]
    assert len(rows) == count and set(rows[0]) == {"text", "label", "confidence"}
    expected = found.pseudo_labels_.filter(pl.col("confidence") >= 0.5)
    assert [row["text"] for row in rows] == expected["text"].to_list()
    with pytest.raises(InputError, match="min_confidence"):
        found.export_finetuning_set(tmp_path / "x", min_confidence=2)


def test_a_class_without_texts_is_named():
    with pytest.warns(UserWarning, match="'good'"):
        found = learner(lm=ScriptedChat(lambda messages: "bad"), epochs=1).fit(TEXTS)
    assert len(found.pseudo_labels_) == 30


def test_candidates():
    texts = ["new york city", "in new york", "the city is big", "a big new house"]
    found = pmi_ngrams(texts, 6)
    assert found[0] == "new york" and len(found) == 6


def test_bad_input():
    for settings, match in [
        ({"template": "{prompt} {text}"}, "template"),
        ({"demo": "{text}"}, "demo"),
        ({"candidates": "all"}, "candidates"),
        ({"samples": 1}, "samples"),
        ({"rho": 0.5, "rho_max": 0.2}, "rho"),
        ({"budget": 40}, "budget"),
    ]:
        with pytest.raises(InputError, match=match):
            learner(**settings).fit(TEXTS)
    with pytest.raises(InputError, match="two classes"):
        UnsupervisedPromptLearner(ScriptedChat(crowd), ["one"]).fit(TEXTS)
    with pytest.raises(InputError, match="different words"):
        UnsupervisedPromptLearner(ScriptedChat(crowd), {"a": "x", "b": "x"}).fit(TEXTS)
