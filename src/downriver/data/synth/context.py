"""Questions with contexts that agree with a model's memory, contradict it, or have nothing to do with it.

Reach for it before ``adapt.kaft``, which teaches a model when to follow its context, and ``evaluate.context_use``,
which measures whether it does. Li et al., «Large Language Models with Controllable Working Memory» (November 2022);
rules of substitution after Longpre et al. (2021). Departures: an irrelevant context may hold neither the right answer
nor the model's own; a slice is cut, never repeated, to meet its weight; popularity is no rule here, for want of page
views.
"""

import collections
import math
import re
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import datasets
import numpy as np

from downriver.core.errors import InputError, unknown
from downriver.core.seeds import generator
from downriver.models.chat import ChatModel, HFChat
from downriver.models.model import Model

Substitute = Literal["corpus", "alias", "type_swap", "llm"]
Irrelevant = Literal["random", "same_article", "bm25"]
Slice = Literal["relevant", "counterfactual", "irrelevant", "empty"]
SLICES: tuple[Slice, ...] = get_args(Slice)
Answerer = Model | ChatModel | Callable[[list[str]], Sequence[str]]
TAGS = {"relevant": " (from context)", "counterfactual": " (from context)", "irrelevant": " (irrelevant context)"}
TRIES = 20
ASK_FOR_ANOTHER = (
    "Question: {question}\nThe answer is: {answer}\nName a plausible but different answer of the same kind.\nAnswer:"
)


@dataclass(frozen=True)
class ContextPrompt:
    """How question and context are put to a model; ``closed`` is the form without a context.

    >>> ContextPrompt().of("Who?", "It was Ann.")
    'Context: It was Ann.\\nQuestion: Who?\\nAnswer:'
    """

    opened: str = "Context: {context}\nQuestion: {question}\nAnswer:"
    closed: str = "Question: {question}\nAnswer:"

    def of(self, question: str, context: str = "") -> str:
        """The prompt, without blanks at its ends."""
        form = self.opened if context else self.closed
        return form.replace("{question}", question).replace("{context}", context).strip()


class ContextMixer:
    """Makes the four slices of knowledge-aware fine-tuning from questions, contexts, answers and a frozen model.

    relevant
        The context as it is; the target is the right answer a.
    counterfactual
        Every mention of a in the context replaced by another answer a'; the target is a'.
    irrelevant
        A context of another question; the target is the *model's own* closed-book answer m(q), right or wrong, so that
        fine-tuning teaches no new fact there.
    empty
        No context; the target is m(q).

    Parameters
    ----------
    model
        A causal ``Model``, a ``ChatModel``, or a function from prompts to answers: frozen, asked for m(q).
    questions
        Rows with ``question``, ``context`` and ``answer``; optional ``id``, ``aliases`` (other names of the answer),
        ``type`` (of the answer; without it, whether it has a digit) and ``article`` (of the context).
    substitute
        ``corpus``: another answer of the same type among the questions; ``type_swap``: one of another type; ``alias``:
        another name of the same answer; ``llm``: the model is asked for one (or ``writer``); or a function of a row.
    irrelevant
        ``random`` contexts, of the ``same_article``, or those that BM25 finds most like the question.
    weights
        Of the four slices. Equal ones are an assumption of ours; the paper states none.
    tag_source
        Targets say where they come from: «Paris (from context)», «Paris (irrelevant context)».
    prompt
        See ``ContextPrompt``. ``max_tokens`` of an answer, which ends with its line.

    ``counts`` says after ``build`` how many rows every slice has and why others have none. Raises ``InputError`` naming
    row and column for missing texts, equal ids, weights that are negative or all 0, and a slice without any row.

    >>> rows = [
    ...     {"question": "Capital of France?", "context": "Paris is in France.", "answer": "Paris", "type": "city"},
    ...     {"question": "Capital of Italy?", "context": "Rome is in Italy.", "answer": "Rome", "type": "city"},
    ... ]
    >>> mixer = ContextMixer(lambda prompts: ["Nice"] * len(prompts), rows)
    >>> for row in mixer.build().select(range(4)):
    ...     print(row["slice"], "|", row["input"].split("\\n")[0], "|", row["target"])
    relevant | Context: Paris is in France. | Paris
    counterfactual | Context: Rome is in France. | Rome
    irrelevant | Context: Rome is in Italy. | Nice
    empty | Question: Capital of France? | Nice
    """

    def __init__(
        self,
        model: Answerer,
        questions: datasets.Dataset | Iterable[Mapping[str, Any]],
        *,
        substitute: Substitute | Callable[[Mapping[str, Any]], str] = "corpus",
        irrelevant: Irrelevant = "random",
        weights: Sequence[float] = (1, 1, 1, 1),
        tag_source: bool = False,
        writer: Answerer | None = None,
        prompt: ContextPrompt | None = None,
        max_tokens: int = 16,
        seed: int = 0,
    ) -> None:
        if not callable(substitute) and substitute not in get_args(Substitute):
            raise unknown("rule of substitution", substitute, get_args(Substitute))
        if irrelevant not in get_args(Irrelevant):
            raise unknown("source of irrelevant contexts", irrelevant, get_args(Irrelevant))
        if len(weights) != 4 or min(weights) < 0 or not 0 < sum(weights) < math.inf:
            raise InputError(f"weights are {tuple(weights)}: four numbers of 0 or more, not all 0, are expected")
        self.model, self.substitute, self.irrelevant = model, substitute, irrelevant
        self.weights = dict(zip(SLICES, weights, strict=True))
        self.tag_source, self.writer, self.seed, self.max_tokens = tag_source, writer, seed, max_tokens
        self.prompt = prompt or ContextPrompt()
        self.rows = [_checked(number, row) for number, row in enumerate(questions)]
        if len({row["id"] for row in self.rows}) < len(self.rows):
            again = next(i for i, n in collections.Counter(row["id"] for row in self.rows).items() if n > 1)
            raise InputError(f"questions: the id {again!r} stands twice")
        for column, needed in (("article", irrelevant == "same_article"), ("aliases", substitute == "alias")):
            if needed and not any(row[column] for row in self.rows):
                raise InputError(f"questions have no column {column!r}, which {irrelevant} and {substitute} need")
        self.articles: dict[str, list[int]] = {}
        for number, row in enumerate(self.rows):
            if row["article"]:
                self.articles.setdefault(row["article"], []).append(number)
        self.memory: list[str] | None = None
        self.counts: dict[str, int] = {}

    def closed_book_answers(self, *, shots: int = 5, cache: bool | str | Path = False) -> dict[str, str]:
        """m(q) by question id: what the model answers without a context after ``shots`` questions with their answers.

        The shots are drawn from the other questions. One batched pass; ``cache`` (a folder) keeps the answers of a
        ``Model`` by its weights. ``build`` asks with five shots where this was not called before.
        """
        if not 0 <= shots < len(self.rows):
            raise InputError(f"shots is {shots} of {len(self.rows)} questions: fewer than the questions are expected")
        prompts = []
        for number, row in enumerate(self.rows):
            others = generator("shots", self.seed, row["id"]).choice(len(self.rows) - 1, size=shots, replace=False)
            shown = [self.rows[int(i) + (int(i) >= number)] for i in others]
            solved = [f"{self.prompt.of(s['question'])} {s['answer']}" for s in shown]
            prompts.append("\n\n".join([*solved, self.prompt.of(row["question"])]))
        self.memory = ask(self.model, prompts, max_tokens=self.max_tokens, cache=cache)
        return {row["id"]: answer for row, answer in zip(self.rows, self.memory, strict=True)}

    def build(self) -> datasets.Dataset:
        """The rows to fine-tune on: ``input``, ``target``, ``slice``, ``question_id``, in the order of the questions.

        A question is at most once in a slice, and the slices' sizes stand in the ratio of the weights.
        """
        found: dict[str, list[tuple[int, str, str]]] = {name: [] for name in SLICES}
        for number, item in enumerate(self._items()):
            own = item["memory"]
            cases = {
                "relevant": (item["relevant"], item["answer"]),
                "counterfactual": (item["counterfactual"], item["new_answer"]),
                "irrelevant": (item["irrelevant"], own),
                "empty": (item["closed_book"], own),
            }
            for name, (prompt, target) in cases.items():
                if prompt and target:
                    tag = TAGS.get(name, "") if self.tag_source else ""
                    found[name].append((number, prompt, target + tag))
        wanted = {name: weight for name, weight in self.weights.items() if weight > 0}
        if none := [name for name in wanted if not found[name]]:
            raise InputError(f"no question gives a row of the slice {none[0]!r} ({self.counts})")
        scale = min(len(found[name]) / weight for name, weight in wanted.items())
        rows = []
        for name, weight in wanted.items():
            size = int(scale * weight + 1e-9)
            chosen = sorted(generator("slice", self.seed, name).permutation(len(found[name]))[:size])
            rows += [(*found[name][i], name) for i in chosen]
            self.counts[name] = size
        rows.sort(key=lambda row: (row[0], SLICES.index(row[3])))
        return datasets.Dataset.from_list(
            [{"input": i, "target": t, "slice": s, "question_id": self.rows[n]["id"]} for n, i, t, s in rows]
        )

    def conflicts(self) -> datasets.Dataset:
        """What ``evaluate.knowledge_conflict_eval`` asks: one row a question that has both hard contexts.

        Prompts ``relevant``, ``counterfactual``, ``irrelevant`` and ``closed_book``, the answers ``answer``,
        ``aliases`` and ``new_answer``, the model's own ``memory`` and whether that is right (``known``), ``type``,
        ``question_id``.
        """
        items = [item for item in self._items() if item["counterfactual"] and item["irrelevant"]]
        if not items:
            raise InputError(f"no question has both a counterfactual and an irrelevant context ({self.counts})")
        return datasets.Dataset.from_list(items)

    def _items(self) -> list[dict[str, Any]]:
        """Every question with its prompts; an empty one where there is none. Writes down why."""
        if self.memory is None:
            self.closed_book_answers(shots=min(5, len(self.rows) - 1))
        assert self.memory is not None
        self.counts = collections.Counter(questions=len(self.rows))
        candidates = self._candidates()
        nearest = _bm25(self.rows) if self.irrelevant == "bm25" else None
        items = []
        for number, (row, own) in enumerate(zip(self.rows, self.memory, strict=True)):
            names = [row["answer"], *row["aliases"]]
            item = {"question_id": row["id"], "answer": row["answer"], "aliases": row["aliases"], "type": row["type"]}
            item |= {"memory": own, "known": normalised(own) in map(normalised, names), "new_answer": ""}
            item |= {"relevant": "", "counterfactual": "", "irrelevant": ""}
            item["closed_book"] = self.prompt.of(row["question"])
            self.counts["memory is empty"] += not own
            self.counts["memory is right"] += item["known"]
            if not mentions(row["context"], names):
                self.counts["answer not in its context"] += 1
            else:
                item["relevant"] = self.prompt.of(row["question"], row["context"])
                changed, new, why = self._changed(row, candidates(number))
                self.counts[why] += bool(why)
                item |= {"new_answer": new, "counterfactual": self.prompt.of(row["question"], changed) if new else ""}
            other = self._other(number, [*names, *([own] if own else [])], nearest)
            self.counts["no irrelevant context"] += not other
            item["irrelevant"] = self.prompt.of(row["question"], other) if other else ""
            items.append(item)
        self.counts = {name: int(count) for name, count in self.counts.items() if count}
        return items

    def _candidates(self) -> Callable[[int], list[str]]:
        """For the number of a question, the answers that may take the place of its own, in the order of trial."""
        if self.substitute == "llm":
            asked = [ASK_FOR_ANOTHER.format(question=r["question"], answer=r["answer"]) for r in self.rows]
            written = ask(self.model if self.writer is None else self.writer, asked, max_tokens=self.max_tokens)
            return lambda number: [written[number]]
        if callable(self.substitute):
            made = [str(self.substitute(row)).strip() for row in self.rows]
            return lambda number: [made[number]]
        if self.substitute == "alias":
            return lambda number: self.rows[number]["aliases"]
        same = self.substitute == "corpus"
        answers: dict[str, list[str]] = {}
        for row in self.rows:
            answers.setdefault(row["type"], []).append(row["answer"])
        pools = {
            kind: sorted({a for other, its in answers.items() if (other == kind) == same for a in its})
            for kind in answers
        }

        def drawn(number: int) -> list[str]:
            row = self.rows[number]
            pool = pools[row["type"]]
            order = generator("substitute", self.seed, row["id"]).permutation(len(pool))
            return [pool[i] for i in order[:TRIES]]

        return drawn

    def _changed(self, row: dict[str, Any], candidates: list[str]) -> tuple[str, str, str]:
        """The counterfactual context and its answer, or why there is none."""
        names, why = [row["answer"], *row["aliases"]], "no other answer"
        for new in candidates:
            gone = [n for n in names if self.substitute != "alias" or normalised(n) != normalised(new)]
            if not normalised(new) or normalised(new) in map(normalised, gone):
                why = "the other answer is the same"
            elif mentions(row["context"], [new]):
                why = "the other answer is in the context"
            else:
                changed, _ = counterfactual(row["context"], row["answer"], new, row["aliases"])
                rest = changed.replace(new, " ") if self.substitute == "alias" else changed  # «City of Paris» for Paris
                if not mentions(rest, gone):
                    return changed, new, ""
                why = "the answer is still in the context"
        return "", "", why

    def _other(self, number: int, names: list[str], nearest: Callable[[int], np.ndarray] | None) -> str:
        """A context of another question that holds none of the names; empty where there is none."""
        row = self.rows[number]
        if nearest is not None:
            order = nearest(number)
        else:
            pool = self.articles.get(row["article"], []) if self.irrelevant == "same_article" else range(len(self.rows))
            order = generator("irrelevant", self.seed, row["id"]).permutation(pool)
        for place in order:
            other = self.rows[int(place)]
            if other["context"] != row["context"] and not mentions(other["context"], names, case=False):
                return str(other["context"])
        return ""


def counterfactual(
    context: str, answer: str, new_answer: str, aliases: Sequence[str] = (), case: bool = True
) -> tuple[str, int]:
    """The context with every mention of the answer or one of its aliases replaced, and how many there were.

    Only whole words count («US», not the one in «USA»); the longest name wins; all other text stays byte for byte.
    ``case=False`` finds mentions in any case.

    >>> counterfactual("The US, or USA; US soil.", "US", "Peru")
    ('The Peru, or USA; Peru soil.', 2)
    """
    return _pattern([answer, *aliases], case).subn(lambda _: new_answer, context)


def mentions(text: str, names: Sequence[str], case: bool = True) -> bool:
    """Whether one of the names stands in the text as a whole word.

    >>> mentions("The USA.", ["US"]), mentions("The US.", ["US"])
    (False, True)
    """
    return _pattern(names, case).search(text) is not None


def normalised(answer: str) -> str:
    """An answer as SQuAD compares it: lower case, without punctuation, articles and superfluous blanks.

    >>> normalised(" The Eiffel-Tower!")
    'eiffeltower'
    """
    plain = answer.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", plain).split())


def ask(
    model: Answerer, prompts: Sequence[str], *, max_tokens: int = 16, cache: bool | str | Path = False
) -> list[str]:
    """The likeliest answers, each up to the end of its first line; a tag of ``tag_source`` is left out.

    Raises ``InputError`` for a function that gives another number of answers than it got prompts.

    >>> ask(lambda prompts: [" Paris (from context)\\nQuestion:"], ["Capital of France?"])
    ['Paris']
    """
    if isinstance(model, Model):
        model = HFChat(model, strings="text", batch_size=64, cache=cache, progress=False)
    if isinstance(model, ChatModel):
        found = [one.text for one, *_ in model.generate(list(prompts), max_tokens=max_tokens)]
    else:
        found = [str(answer) for answer in model(list(prompts))]
    if len(found) != len(prompts):
        raise InputError(f"the model gave {len(found)} answers to {len(prompts)} prompts: one each is expected")
    lines = [text.strip().partition("\n")[0] for text in found]
    for tag in TAGS.values():
        lines = [line.removesuffix(tag) for line in lines]
    return [line.strip() for line in lines]


def _pattern(names: Sequence[str], case: bool) -> re.Pattern[str]:
    longest = sorted({name for name in names if name}, key=lambda name: (-len(name), name))
    any_of = "|".join(map(re.escape, longest)) or r"(?!)"
    return re.compile(rf"(?<!\w)(?:{any_of})(?!\w)", 0 if case else re.IGNORECASE)


def _checked(number: int, row: Mapping[str, Any]) -> dict[str, Any]:
    for column in ("question", "context", "answer"):
        if not isinstance(row.get(column), str) or not row[column].strip():
            raise InputError(
                f"questions, row {number}, column {column!r}: {row.get(column)!r} where a text is expected"
            )
    return {
        "id": str(row.get("id", number)),
        "question": row["question"].strip(),
        "context": row["context"],
        "answer": row["answer"].strip(),
        "aliases": [name for name in row.get("aliases") or [] if name.strip()],
        "type": str(row.get("type") or ("number" if any(c.isdigit() for c in row["answer"]) else "words")),
        "article": row.get("article") or "",
    }


def _bm25(rows: Sequence[Mapping[str, Any]], k1: float = 1.5, b: float = 0.75) -> Callable[[int], np.ndarray]:
    """For the number of a question, all contexts by their BM25 score (Robertson), the best first."""
    from sklearn.feature_extraction.text import CountVectorizer

    counter = CountVectorizer(token_pattern=r"\w+")
    counts = counter.fit_transform([row["context"] for row in rows]).astype(np.float64).tocsr()
    length = np.asarray(counts.sum(axis=1)).ravel()
    frequency = np.bincount(counts.indices, minlength=counts.shape[1])
    idf = np.log1p((len(rows) - frequency + 0.5) / (frequency + 0.5))
    places = np.repeat(np.arange(len(rows)), np.diff(counts.indptr))
    norm = k1 * (1 - b + b * length / max(length.mean(), 1e-9))
    counts.data = idf[counts.indices] * counts.data * (k1 + 1) / (counts.data + norm[places])
    queries = counter.transform([row["question"] for row in rows]).sign()
    return lambda number: np.argsort(-(counts @ queries[number].T).toarray().ravel(), kind="stable")
