"""The four slices: what is replaced and what is not, whose answer is the target, how many rows there are."""

import collections

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from downriver.core.errors import InputError
from downriver.data.synth.context import SLICES, ContextMixer, ContextPrompt, ask, counterfactual, mentions, normalised
from downriver.models import ScriptedChat, small

CITIES = ["Paris", "Rome", "Oslo", "Lima", "Bonn", "Cairo", "Quito", "Dakar"]


def rows(**more):
    return [
        {
            "id": f"q{i}",
            "question": f"What is the capital of Land{i}?",
            "context": f"{city} is the capital of Land{i}. Few leave {city}.",
            "answer": city,
            "type": "city",
            "article": f"Land{i // 2}",
            "aliases": [f"City of {city}"],
            **more,
        }
        for i, city in enumerate(CITIES)
    ]


def memory(prompts):
    """A model that knows the even lands, and says Nowhere of the others."""
    answers = []
    for prompt in prompts:
        number = int(prompt.rsplit("Land", 1)[1].split("?")[0])
        answers.append(f" {CITIES[number]}\nQuestion: more" if number % 2 == 0 else "Nowhere")
    return answers


def test_whole_words_only_and_nothing_else_changes():
    text = "US, USA, the US's (US) plus US-made; us."
    changed, n = counterfactual(text, "US", "Peru")
    assert (changed, n) == ("Peru, USA, the Peru's (Peru) plus Peru-made; us.", 4)
    assert counterfactual(text, "US", "Peru", case=False)[1] == 5
    assert counterfactual(text, "US", "US") == (text, 4)
    # the longest name wins, and a name is no pattern
    assert counterfactual("New York City, New York.", "New York", "Rome", ["New York City"])[0] == "Rome, Rome."
    assert counterfactual("C++ and C", "C++", r"\1") == (r"\1 and C", 1)
    assert counterfactual("nothing", "x", "y", aliases=[""]) == ("nothing", 0)


@given(st.lists(st.sampled_from(["Ann", "Anna", "Bob", "ann", ".", "  ", "Ann's"])), st.booleans())
def test_no_name_remains_and_the_rest_is_byte_for_byte(words, case):
    text = " ".join(words)
    changed, n = counterfactual(text, "Ann", "Zoe", aliases=["Bob"], case=case)
    assert not mentions(changed, ["Ann", "Bob"], case=case)
    before = text.replace("Bob", "Ann")
    after = changed.replace("Zoe", "Ann" if case else "ANN")
    assert (after == before) if case else (after.lower() == before.lower())
    assert n == changed.count("Zoe")


def test_irrelevant_and_empty_rows_teach_the_models_own_answers_never_the_gold_ones():
    mixer = ContextMixer(memory, rows(), weights=(1, 1, 1, 1), seed=3)
    built = mixer.build()
    gold = dict(zip([f"q{i}" for i in range(8)], CITIES, strict=True))
    own = mixer.closed_book_answers(shots=2)
    assert own["q1"] == "Nowhere" and own["q2"] == "Oslo"
    for row in built:
        city, target = gold[row["question_id"]], row["target"]
        if row["slice"] == "relevant":
            assert target == city and city in row["input"]
        elif row["slice"] == "counterfactual":
            assert target != city and target in CITIES and city not in row["input"] and target in row["input"]
        else:
            assert target == own[row["question_id"]]
            assert not mentions(row["input"], [city, target])
            assert ("Context:" in row["input"]) == (row["slice"] == "irrelevant")
    assert collections.Counter(built["slice"]) == dict.fromkeys(SLICES, 8)
    assert mixer.counts["memory is right"] == 4
    assert built[:] == ContextMixer(memory, rows(), seed=3).build()[:]
    assert built[:] != ContextMixer(memory, rows(), seed=4).build()[:]


@pytest.mark.parametrize("weights", [(2, 1, 1, 0), (1, 0, 0, 0), (1, 0.5, 0.25, 0.5)])
def test_slices_follow_the_weights(weights):
    mixer = ContextMixer(memory, rows(), weights=weights)
    built = mixer.build()
    sizes = [list(built["slice"]).count(name) for name in SLICES]
    assert sizes == [int(8 * w / max(weights)) for w in weights]
    assert [mixer.counts.get(name, 0) for name in SLICES] == sizes
    assert len({(r["slice"], r["question_id"]) for r in built}) == len(built)  # none twice


def test_rules_of_substitution():
    mixed = [{**row, "type": "city" if i < 4 else "port"} for i, row in enumerate(rows())]
    for rule, allowed in [("corpus", [CITIES[:4], CITIES[4:]]), ("type_swap", [CITIES[4:], CITIES[:4]])]:
        for row in ContextMixer(memory, mixed, substitute=rule).conflicts():
            assert row["new_answer"] in allowed[int(row["question_id"][1]) >= 4]
    for row in ContextMixer(memory, rows(), substitute="alias").conflicts():
        assert row["new_answer"] == f"City of {row['answer']}"
        assert row["counterfactual"].count(row["new_answer"]) == 2
    made = ContextMixer(memory, rows(), substitute=lambda row: row["answer"] + "ville").conflicts()
    assert made["new_answer"][:] == [city + "ville" for city in CITIES]
    writer = ScriptedChat(lambda messages: "Ys" if "plausible but different" in messages[-1]["content"] else "?")
    assert set(ContextMixer(memory, rows(), substitute="llm", writer=writer).conflicts()["new_answer"]) == {"Ys"}


def test_questions_without_a_slice_are_counted_by_their_reason():
    odd = rows()
    odd[0]["context"] = "Nothing of the kind."
    odd[1]["answer"] = "The  ROME!"
    odd[1]["context"] = "The  ROME! it is."
    mixer = ContextMixer(memory, odd, substitute=lambda row: {"q1": "rome", "q2": "capital"}.get(row["id"], "Ys"))
    mixer.build()
    assert mixer.counts["answer not in its context"] == 1
    assert mixer.counts["the other answer is the same"] == 1  # equal as SQuAD compares
    assert mixer.counts["the other answer is in the context"] == 1
    mixer = ContextMixer(memory, rows(), substitute=lambda row: f"old {row['answer']}")
    with pytest.raises(InputError, match=r"slice 'counterfactual'.*the answer is still in the context': 8"):
        mixer.build()
    silent = ContextMixer(lambda prompts: [""] * len(prompts), rows())
    with pytest.raises(InputError, match=r"slice 'irrelevant'.*'memory is empty': 8"):
        silent.build()


def test_irrelevant_contexts():
    by_id = {row["id"]: row for row in rows()}
    for row in ContextMixer(memory, rows(), irrelevant="same_article").conflicts():
        partner = by_id[f"q{int(row['question_id'][1]) ^ 1}"]
        assert partner["context"] in row["irrelevant"]
    near = [{**row, "context": f"{row['context']} topic{i // 4}"} for i, row in enumerate(rows())]
    near[0]["question"] += " topic1"
    [first, *_] = ContextMixer(memory, near, irrelevant="bm25").conflicts()
    assert "topic1" in first["irrelevant"]
    # one that holds the right answer is never taken, whatever its case
    two = [rows()[0], {**rows()[1], "context": "Rome is not PARIS."}]
    with pytest.raises(InputError, match="'no irrelevant context': 1"):
        ContextMixer(memory, [two[0], {**two[1], "context": "Rome is not PARIS.", "answer": "Athens"}]).conflicts()


def test_bm25_ranks_as_rank_bm25_does():
    peer = pytest.importorskip("rank_bm25")
    from downriver.data.synth.context import _bm25

    texts = ["a b b c", "c d e", "b c d d f", "z"]
    asked = [{"context": text, "question": "b d"} for text in texts]
    scores = peer.BM25Plus([t.split() for t in texts], delta=0).get_scores(["b", "d"])
    assert _bm25(asked)(0)[:3].tolist() == scores.argsort()[::-1][:3].tolist()


def test_tags_are_written_and_read_again():
    built = ContextMixer(memory, rows(), tag_source=True).build()
    targets = {row["slice"]: row["target"] for row in built if row["question_id"] == "q0"}
    assert targets["relevant"] == "Paris (from context)" and targets["empty"] == "Paris"
    assert targets["irrelevant"] == "Paris (irrelevant context)"
    assert ask(lambda prompts: [targets["irrelevant"]], ["?"]) == ["Paris"]


def test_shots_are_other_questions(tmp_path):
    seen = []

    def answer(prompts):
        seen.extend(prompts)
        return memory(prompts)

    ContextMixer(answer, rows()).closed_book_answers(shots=3)
    for i, prompt in enumerate(seen):
        assert (
            prompt.count("Question:") == 4 and prompt.count(f"Land{i}?") == 1 and prompt.endswith(f"Land{i}?\nAnswer:")
        )
    lm = small("causal-lm", "nano")
    mixer = ContextMixer(lm, rows(), max_tokens=3)
    first = mixer.closed_book_answers(shots=0, cache=tmp_path)
    assert first == mixer.closed_book_answers(shots=0, cache=tmp_path) and any(tmp_path.iterdir())


def test_a_dataset_and_a_prompt_of_ones_own():
    prompt = ContextPrompt("{context} >> {question}", ">> {question}")
    mixer = ContextMixer(memory, Dataset.from_list(rows()), prompt=prompt)
    assert mixer.conflicts()[0]["closed_book"] == ">> What is the capital of Land0?"
    assert normalised("An  Apple, the U.S.") == "apple us"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"substitute": "popularity"}, "unknown rule of substitution 'popularity'"),
        ({"irrelevant": "dense"}, "unknown source of irrelevant contexts 'dense'"),
        ({"weights": (1, 1, 1)}, "weights are .*four numbers"),
        ({"weights": (1, -1, 1, 1)}, "weights are .*four numbers"),
        ({"weights": (0, 0, 0, 0)}, "weights are .*not all 0"),
    ],
)
def test_settings_out_of_range(settings, words):
    with pytest.raises(InputError, match=words):
        ContextMixer(memory, rows(), **settings)


def test_rows_that_are_not_as_expected():
    with pytest.raises(InputError, match="row 0, column 'context': None"):
        ContextMixer(memory, [{"question": "a?", "answer": "a"}])
    with pytest.raises(InputError, match="the id 'q0' stands twice"):
        ContextMixer(memory, [rows()[0], rows()[0]])
    with pytest.raises(InputError, match="no column 'article'"):
        ContextMixer(memory, rows(article=None), irrelevant="same_article")
    with pytest.raises(InputError, match="no column 'aliases'"):
        ContextMixer(memory, rows(aliases=[]), substitute="alias")
    with pytest.raises(InputError, match="shots is 8 of 8"):
        ContextMixer(memory, rows()).closed_book_answers(shots=8)
    with pytest.raises(InputError, match="gave 1 answers to 8 prompts"):
        ContextMixer(lambda prompts: ["x"], rows()).build()
