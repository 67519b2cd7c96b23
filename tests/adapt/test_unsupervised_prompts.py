"""Prompt learning without labels: the simplex, the gradient, what is asked and paid, what is learnt, bad input."""

import http.server
import itertools
import json
import threading

import numpy as np
import polars as pl
import pytest
from scipy.optimize import minimize
from sklearn.base import clone

from downriver.adapt import UnsupervisedPromptLearner
from downriver.adapt.prompt_critique import Critique
from downriver.adapt.unsupervised_prompts import LabelScorer, pmi_ngrams, policy_gradient, project_simplex
from downriver.core.errors import InputError
from downriver.models import small
from downriver.models.chat import HFChat, OpenAIChat, ScriptedChat

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


def answer(messages):
    """Sure and right with «judge»; else 6 of 8 right for even numbers, and 4 of 8 for odd ones."""
    *before, text = messages[-1]["content"].split("\n")
    text = text.removesuffix(" =>")
    right, wrong = ("good", "bad") if "sun" in text else ("bad", "good")
    if before and "judge" in before[0]:
        return [right] * 8
    number = int(text.split()[1])
    return [right, wrong] * 4 if number % 2 else [right] * 6 + [wrong] * 2


def test_it_finds_the_instruction_that_works():
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
    assert plan.answers == 8 and plan.requests == 8 * plan.calls
    longest = max(map(len, asked))
    assert 0.7 * np.mean([*map(len, asked)]) < plan.characters < 1.3 * longest
    assert plan.tokens == round(plan.requests * plan.characters / 4)
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


def test_nor_the_label_of_the_same_text_elsewhere():
    seen = []
    twice = [f"{word} {i}" for i in range(4) for word in ("sun", "rain")] * 3
    found = learner(lm=ScriptedChat(lambda m: seen.append(m[-1]["content"]) or crowd(m)), k_demos=4, rho=1, rho_max=1)
    found.fit(twice).predict(twice)
    assert any("=> " in query for query in seen)
    for query in seen:
        *lines, last = query.split("\n")
        assert not any(line.startswith(last.removesuffix("=>") + "=>") for line in lines)


def test_answers_are_counted_by_the_longest_word():
    said = ["not sure", "No.", "not sure at all", "NO", "perhaps", "yes", "yes!", "no"]
    scorer = LabelScorer(ScriptedChat({"?": said}), [" yes", " no", " not sure"])
    found = np.exp(scorer(["?"])[0])
    assert np.allclose(found, np.array([3, 4, 3]) / 10)  # two, three and two answers, and one more each


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


class Endpoint(http.server.BaseHTTPRequestHandler):
    """The protocol's chat completions, answered by ``crowd``; it counts what it is asked."""

    protocol_version = "HTTP/1.1"
    served = 0

    def log_message(self, *arguments):
        pass

    def do_POST(self):
        type(self).served += 1
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        said = {"role": "assistant", "content": crowd(body["messages"])}
        choice = {"index": 0, "message": said, "finish_reason": "stop"}
        usage = {"prompt_tokens": 5, "completion_tokens": 1, "total_tokens": 6}
        answer = {"id": "x", "object": "chat.completion", "created": 0, "model": "crowd", "choices": [choice]}
        data = json.dumps(answer | {"usage": usage}).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def test_over_an_endpoint_and_again_from_the_cache(tmp_path):
    pytest.importorskip("openai")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        chat = OpenAIChat("crowd", base_url=f"http://127.0.0.1:{server.server_port}/v1", cache=tmp_path)
        settings = {"lm": chat, "epochs": 1, "answers": 2, "samples": 2, "calibrate": False, "k_demos": 0}
        first = learner(**settings).fit(TEXTS)
        served = Endpoint.served
        assert first.calls_ < served <= first.plan(TEXTS).requests  # words that two prompts share are asked once
        again = learner(**settings).fit(TEXTS)
        assert Endpoint.served == served and again.pseudo_labels_.equals(first.pseudo_labels_)
        by_script = learner(**(settings | {"lm": ScriptedChat(crowd)})).fit(TEXTS)
        assert by_script.pseudo_labels_.equals(first.pseudo_labels_) and by_script.prompt_ == first.prompt_
    finally:
        server.shutdown()
        server.server_close()


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


def test_a_writer_criticises_and_the_best_prompt_stays():
    requests = []

    def write(messages):
        requests.append(messages[-1]["content"])
        return [
            "Too vague.\nInstruction: «perhaps so»",
            "It lacks a verb. Instruction: judge by the sun",
            "no mark\nguess",
        ]

    writer = ScriptedChat(write)
    found = learner(lm=ScriptedChat(answer), writer=writer, epochs=3, calibrate=False, k_demos=0, agreement=1.1).fit(
        TEXTS
    )
    assert found.prompt_ == "judge by the sun"
    assert found.predict(TEXTS).tolist() == ["good" if "sun" in text else "bad" for text in TEXTS]
    assert "(none yet)" in requests[0] and "judge by the sun" in requests[-1] and len(requests) == 3 * 3
    assert all("classes bad, good" in request and " => " in request for request in requests)
    assert found.calls_ <= found.plan(TEXTS).calls and not hasattr(found, "probabilities_")
    search = Critique(writer, ["a", "b"], samples=4)
    assert search.propose([("x", "a", 0.6)]) == ["", "perhaps so", "judge by the sun", "guess"]
    search.learn(np.array([0.5, 0.5, 0.7, 0.9]))
    assert search.best == ""


def test_candidates():
    texts = ["new york city", "in new york", "the city is big", "a big new house"]
    found = pmi_ngrams(texts, 6)
    assert found[0] == "new york" and len(found) == 6


def test_bad_input():
    for settings, match in [
        ({"template": "{prompt} {text}"}, "template"),
        ({"demo": "{text}"}, "demo"),
        ({"template": "{prompt}{demos}{text} {label}"}, "template .* 'label' in braces"),
        ({"demo": "{text} {label} {"}, "demo .* in braces"),
        ({"candidates": "all"}, "candidates"),
        ({"candidates": []}, "candidates are"),
        ({"learning_rate": 0}, "learning_rate"),
        ({"answers": 0}, "answers"),
        ({"samples": 1}, "samples"),
        ({"rho": 0.5, "rho_max": 0.2}, "rho"),
        ({"budget": 40}, "budget"),
    ]:
        with pytest.raises(InputError, match=match):
            learner(**settings).fit(TEXTS)
    with pytest.raises(InputError, match="no words for a prompt"):
        UnsupervisedPromptLearner(ScriptedChat(crowd), ["bad", "good"]).fit(["", " ", ""])
    with pytest.raises(InputError, match="two classes"):
        UnsupervisedPromptLearner(ScriptedChat(crowd), ["one"]).fit(TEXTS)
    for texts in ("sun and rain", ["sun", 3]):
        with pytest.raises(InputError, match="a list of strings"):
            learner().fit(texts)
    with pytest.raises(InputError, match="different words"):
        UnsupervisedPromptLearner(ScriptedChat(crowd), ["x", " X"]).fit(TEXTS)
    with pytest.raises(InputError, match="different words"):
        UnsupervisedPromptLearner(ScriptedChat(crowd), {"a": "x", "b": "x"}).fit(TEXTS)
