"""How near a pretraining text is to a task's text, before anything is trained: language shares and an n-gram model.

Reach for it beside ``alignment_verdict``, which needs fine-tuned checkpoints: these two need only samples of text. They
rank candidate pretraining sets; how much a set is worth only the law of its checkpoints says.

Isik et al. 2024, «Scaling Laws for Downstream Task Performance of Large Language Models», arXiv:2402.04177, speaks of
alignment for translation as the share of the two languages, the source language counting more (0.7 and 0.3, as we
recall it: the paper's code is not public). The n-gram view is ours, for tasks in one language.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

from downriver.core.errors import InputError


def language_shares(
    texts: Sequence[str],
    languages: Sequence[str] | Callable[[str], str],
    size: Callable[[str], float] = lambda text: len(text.split()),
) -> dict[str, float]:
    """The share of each language in a sample of texts, by ``size`` (default: words between spaces; take the tokens of
    your tokenizer where one of the languages does not put spaces). ``languages`` names each text's, or tells it.

    >>> language_shares(["a b c", "d"], ["en", "de"])
    {'de': 0.25, 'en': 0.75}
    """
    names = [languages(text) for text in texts] if callable(languages) else list(languages)
    if len(names) != len(texts) or not texts:
        raise InputError(f"{len(texts)} texts and {len(names)} languages: at least one text, and as many, are expected")
    amounts = dict.fromkeys(names, 0.0)
    for text, name in zip(texts, names, strict=True):
        amounts[name] += size(text)
    if not (total := sum(amounts.values())) > 0:
        raise InputError("texts: not one of them has a word")
    return {name: amounts[name] / total for name in sorted(amounts)}


def translation_alignment(
    shares: Mapping[str, float], source: str, target: str, weights: tuple[float, float] = (0.7, 0.3)
) -> float:
    """``0.7 P_source + 0.3 P_target``, from 0 to 0.7 (only the source language): how much of a pretraining mixture is
    in the two languages of a translation task.

    >>> round(translation_alignment({"en": 0.5, "de": 0.5}, "en", "de"), 3)
    0.5
    >>> translation_alignment({"en": 1.0}, "fr", "de")
    0.0
    """
    if not shares or min(shares.values()) < 0 or not math.isclose(sum(shares.values()), 1.0, abs_tol=1e-6):
        raise InputError(f"shares {dict(shares)}: shares of languages that sum to 1 are expected")
    if min(weights) < 0:
        raise InputError(f"weights {weights}: two numbers from 0 on are expected")
    return weights[0] * shares.get(source, 0.0) + weights[1] * shares.get(target, 0.0)


def ngram_cross_entropy(pretraining: Iterable[str], task: Iterable[str], order: int = 5) -> float:
    """Cross-entropy, in nats a character, of the pretraining sample under an n-gram model of the task's text.

    Lower is nearer. The model is of characters, ``order`` at a time, orders interpolated after Witten and Bell 1991
    down to equal chances over all characters of either side, so that nothing has probability 0. Compare samples of
    one length in characters, of several pretraining sets, against one task. Memory and time grow with the texts:
    samples of a megabyte do. Raises ``InputError`` for an order below 1 and for a side without text.

    >>> task = ["the cat sat on the mat"] * 3
    >>> near, far = ngram_cross_entropy(["the mat sat"], task), ngram_cross_entropy(["zwölf boxkämpfer"], task)
    >>> near < 1 < far
    True
    """
    if order < 1:
        raise InputError(f"order {order}: at least 1 character is expected")
    seen, told = ["\n" + text for text in pretraining if text], ["\n" + text for text in task if text]
    if not seen or not told:
        raise InputError(f"{'task' if seen else 'pretraining'} holds no text")
    after: dict[str, Counter[str]] = {}  # context → how often each character follows it
    for text in told:
        for i in range(1, len(text)):
            for k in range(min(order, i + 1)):
                after.setdefault(text[i - k : i], Counter())[text[i]] += 1
    totals = {context: sum(counts.values()) for context, counts in after.items()}
    base = 1 / len(set().union(*seen, *told))
    loss, n = 0.0, 0
    for text in seen:
        for i in range(1, len(text)):
            p = base
            for k in range(min(order, i + 1)):
                counts = after.get(text[i - k : i])
                if counts is None:
                    break
                # p_k = (c + t p_{k-1}) / (n + t), where t characters were seen to follow the context
                p = (counts[text[i]] + len(counts) * p) / (totals[text[i - k : i]] + len(counts))
            loss -= math.log(p)
            n += 1
    return loss / n
