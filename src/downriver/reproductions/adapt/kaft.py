"""Paper 71: fine-tuned on contexts that agree with its memory a model learns neither to follow nor to ignore contexts.

The paper fine-tunes T5 and PaLM. Here a GPT-2 of two layers and width 64, one token a word, memorises the objects of
150 subjects in four relations, without ever seeing a context, and is tuned on the questions of 100 subjects: with
relevant contexts only (standard), with counterfactual ones too, and with all four slices (KAFT), for the same number of
steps. It is asked the questions of the other 50, whose objects it knows as well. A context states one fact and stands
before the question; an irrelevant one states a fact of another question.

Fixed beforehand on another seed (100), which the study never sees, one run each:

- the architecture. A Llama of the same size knew as many facts, but tuning with a rate of 1e-3 cost it half of those
  that it was not tuned on;
- memorising, long enough for 98 % of the facts, and the rate of tuning: 3e-3 left less of the memory than 1e-3;
- the contexts, drawn 24 times for every question. With one draw KAFT's controllability was 0.19, with these 0.56.

Seen there, too: with the context first robustness stayed at 0.1 or below for every architecture, rate and batch that
was tried (some ten runs), against 0.5 to 0.7 in the paper's summary; with the question first it was 0.3 to 0.7, for the
standard arm as well, and at most 8 % followed a counterfactual context. The usual order is kept.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import datasets
import transformers

from downriver.adapt.kaft import kaft
from downriver.core import Budget, InputError, Measurement, derive_seed, generator, seeded
from downriver.data.synth.context import ContextMixer, ContextPrompt
from downriver.evaluate.context_use import knowledge_conflict_eval
from downriver.models import Model, word_tokenizer
from downriver.reproductions.paper import Paper
from downriver.study import Arm, Study, above, better, shared, study

paper = Paper(
    number=71,
    slug="kaft",
    title="Large Language Models with Controllable Working Memory",
    date="2022-11",
    room="adapt",
    claim="Tuning with counterfactual and irrelevant contexts makes a model follow the former and ignore the latter.",
)

SUBJECTS, SEEN, RELATIONS, OBJECTS = 150, 100, 4, 40
PROMPT = ContextPrompt("{context} {question} :", "{question} :")
WEIGHTS = {"standard": (1, 0, 0, 0), "relevant + counterfactual": (1, 1, 0, 0), "KAFT": (1, 1, 1, 1)}
MEMORISE_RATE, MEMORISE_BATCH = 5e-3, 150
RATE, BATCH = 1e-3, 128
# subjects, steps that memorise, steps of tuning, draws of contexts
SCALES = {"small": (SUBJECTS, 1200, 300, 24), "tiny": (12, 60, 2, 2)}


@study(
    "kaft",
    title="Contexts that contradict what a small model has memorised",
    claims=[
        better("KAFT", than="standard", on="controllability", margin=0.1),
        better("KAFT", than="standard", on="robustness", margin=0.1),
        above("KAFT", on="robustness", value=0.4),
        better("KAFT", than="relevant + counterfactual", on="robustness", margin=0.1),
        better("KAFT", than="relevant + counterfactual", on="closed-book", margin=0.1),
    ],
    seeds=3,
)
def reproduction(seed: int, budget: Budget | None, scale: str) -> Iterator[Arm]:
    """One base model a seed, tuned three ways; a seed draws the facts and all that is random in training anew."""
    if scale not in SCALES:
        raise InputError(f"scale {scale!r} is not one of {', '.join(SCALES)}")
    subjects, memorise, tune, draws = SCALES[scale]
    questions = facts(seed, subjects)
    seen = subjects * SEEN // SUBJECTS * RELATIONS

    @shared
    def base() -> Model:
        return memorised(questions, memorise, seed)

    @shared
    def asked() -> datasets.Dataset:
        return mixer(base(), questions[seen:], seed).conflicts()

    def measure(model: Model) -> list[Measurement]:
        found = knowledge_conflict_eval(model, asked(), max_tokens=2)
        return [*found.measurements("facts"), Measurement("questions", found.n, task="facts", direction="none")]

    def tuned(way: str) -> list[Measurement]:
        drawn = [mixer(base(), questions[:seen], derive_seed(seed, i), WEIGHTS[way]).build() for i in range(draws)]
        rows = datasets.concatenate_datasets(drawn)
        return measure(kaft(base(), rows, f"{tune} steps", learning_rate=RATE, batch_size=BATCH, seed=seed))

    yield Arm("base", lambda: measure(base()))
    for way in WEIGHTS:
        yield Arm(way, lambda way=way: tuned(way))  # type: ignore[misc]


studies: tuple[Study, ...] = (reproduction,)


def facts(seed: int, subjects: int) -> list[dict[str, str]]:
    """Every subject's object in every relation, as a question and the context that answers it."""
    rng = generator("kaft facts", seed)
    found = []
    for s, r in itertools.product(range(subjects), range(RELATIONS)):
        answer = f"o{rng.integers(OBJECTS)}"
        question = f"s{s} r{r}"
        found.append({"id": question, "question": question, "context": f"{question} {answer} .", "answer": answer})
    return found


def mixer(model: Model, questions: list[dict[str, str]], seed: int, weights: Any = (1, 1, 1, 1)) -> ContextMixer:
    """The builder, with the model's answers taken without examples: it was taught one form of question."""
    made = ContextMixer(model, questions, prompt=PROMPT, max_tokens=2, seed=seed, weights=weights)
    made.closed_book_answers(shots=0)
    return made


def memorised(questions: list[dict[str, str]], steps: int, seed: int) -> Model:
    """A model of two layers that has learnt the answers to the bare questions by heart."""
    words = word_tokenizer([PROMPT.of(q["question"], q["context"]) for q in questions], context=32)
    with seeded("kaft base", seed):
        net: Any = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=len(words),
                n_positions=32,
                n_embd=64,
                n_layer=2,
                n_head=4,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                pad_token_id=words.pad_token_id,
                bos_token_id=words.bos_token_id,
                eos_token_id=words.eos_token_id,
            )
        )
    model = Model(net, kind="causal-lm", processor=words, pooling="last", max_length=32)
    rows = datasets.Dataset.from_list([{"input": PROMPT.of(q["question"]), "target": q["answer"]} for q in questions])
    return kaft(model, rows, f"{steps} steps", learning_rate=MEMORISE_RATE, batch_size=MEMORISE_BATCH, seed=seed)
