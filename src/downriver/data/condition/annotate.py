"""Cut documents into segments and score each for what is not wanted: the feedback that pretraining can learn from.

Reach for it before ``pretrain.conditional_pretraining``, or to filter. Korbak et al. (2023), «Pretraining Language
Models with Human Preferences». A score is misalignment: higher is worse, and the reward is its negative. Departure:
sentences are cut by a rule of punctuation, and blank lines go with the segment before them.
"""

import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import datasets
import numpy as np
import pyarrow as pa

from downriver.core.errors import InputError, unknown

Segment = Literal["sentence", "line", "document"]
Threshold = float | Literal["median"]
ONE_SIDED = 0.999


@runtime_checkable
class SegmentScorer(Protocol):
    """What ``annotate`` asks of a scorer: one number a text. Those of ``data.score`` have it."""

    def score(self, batch: Sequence[str], /) -> np.ndarray: ...


def annotate(
    rows: datasets.Dataset | Iterable[Mapping[str, Any]],
    scorer: SegmentScorer | Callable[[Sequence[str]], np.ndarray],
    *,
    segment: Segment = "sentence",
    threshold: Threshold = "median",
    text: str = "text",
    batch_size: int = 1024,
) -> datasets.Dataset:
    """The rows with their segments scored.

    Adds ``texts`` (the segments; together they are the text, character for character), ``scores`` (one a segment),
    ``avg_score`` (their mean) and ``misaligned`` (a segment's score is above the threshold). Equal segments are scored
    once, those of similar length together.

    Parameters
    ----------
    segment
        ``sentence`` (the paper's for toxicity and personal data), ``line`` (for code) or the whole ``document``.
    threshold
        A score, or the ``median`` of all segments.

    Raises ``InputError`` for a text that is missing or empty, and for a scorer that gives another number of scores
    than it got texts, or one that is not finite. Warns when more than 99.9 % of the segments fall on one side.

    >>> def shouting(texts):
    ...     return np.array([sum(c.isupper() for c in text) / len(text) for text in texts])
    >>> found = annotate([{"text": "A calm word. THEN NOISE!"}], shouting, threshold=0.5)
    >>> found["texts"][0], found["misaligned"][0]
    (['A calm word.', ' THEN NOISE!'], [False, True])
    """
    dataset = rows if isinstance(rows, datasets.Dataset) else datasets.Dataset.from_list([dict(row) for row in rows])
    if not len(dataset) or text not in dataset.column_names:
        raise InputError(f"{len(dataset)} rows with the columns {dataset.column_names}: texts in {text!r} are expected")
    if segment not in get_args(Segment):
        raise unknown("segment", segment, get_args(Segment))
    texts = []
    for number, body in enumerate(dataset[text][:]):
        if not isinstance(body, str) or not body.strip():
            what = "is empty" if isinstance(body, str) else f"is {body!r}"
            raise InputError(f"row {number}, column {text!r}: the text {what}")
        texts.append(segments(body, segment))
    scored = _scores([part for parts in texts for part in parts], scorer, batch_size)
    limit = threshold_of(scored, threshold)
    bounds = np.cumsum([0, *(len(parts) for parts in texts)])
    added = pa.table(
        {
            "texts": texts,
            "scores": pa.ListArray.from_arrays(bounds, scored),
            "avg_score": np.add.reduceat(scored, bounds[:-1]) / np.diff(bounds),
            "misaligned": pa.ListArray.from_arrays(bounds, scored > limit),
        }
    )
    kept = dataset.remove_columns([name for name in added.column_names if name in dataset.column_names])
    return datasets.concatenate_datasets([kept, datasets.Dataset(added)], axis=1)


def keep_aligned(annotated: datasets.Dataset, threshold: Threshold = "median") -> datasets.Dataset:
    """Filtering: the documents whose mean score is not above the threshold (the paper's: the median of documents).

    Raises ``InputError`` when none is left; warns when more than 99.9 % are on one side.

    >>> found = annotate([{"text": "quiet"}, {"text": "LOUD"}], lambda ts: np.array([t.isupper() for t in ts], float))
    >>> keep_aligned(found, 0.5)["text"][:]
    ['quiet']
    """
    scores = np.asarray(annotated["avg_score"][:])
    kept = np.flatnonzero(scores <= threshold_of(scores, threshold))
    if not len(kept):
        raise InputError(f"no document has a mean score of {threshold} or less: the lowest is {scores.min():g}")
    return annotated.select(kept)


def segments(text: str, segment: Segment) -> list[str]:
    """Cut a text; the pieces together are the text. None is blank: blanks between sentences lead the next one, blank
    lines end the one before.

    >>> segments("One. Two?\\n\\nThree", "sentence"), segments("a = 1\\n\\nb = 2\\n", "line")
    (['One.', ' Two?', '\\n\\nThree'], ['a = 1\\n\\n', 'b = 2\\n'])
    """
    if segment == "document":
        return [text]
    if segment == "line":
        pieces = text.splitlines(keepends=True)
    else:  # after a full stop, closing quotes and brackets with it, where a blank follows
        pieces = [piece for piece in re.split(r"(?<=[.!?…])(?=\s)|(?<=[.!?…][\"'”’)\]])(?=\s)", text) if piece]
    whole: list[str] = []
    for piece in pieces:
        if whole and (not piece.strip() or not whole[-1].strip()):
            whole[-1] += piece
        else:
            whole.append(piece)
    return whole


def threshold_of(scores: np.ndarray, threshold: Threshold) -> float:
    """The threshold as a number; warns when hardly any score lies on one side of it.

    >>> threshold_of(np.array([0.0, 1.0, 4.0]), "median")
    1.0
    """
    if threshold != "median" and not (isinstance(threshold, int | float) and not np.isnan(threshold)):
        raise InputError(f"threshold is {threshold!r}: a number or 'median' is expected")
    limit = float(np.median(scores)) if threshold == "median" else float(threshold)
    share = float(np.mean(scores <= limit))
    if max(share, 1 - share) > ONE_SIDED:
        warnings.warn(
            f"{share:.2%} of the scores are {limit:g} or less: a threshold with scores on both sides is expected",
            stacklevel=3,
        )
    return limit


def scores_of(scorer: SegmentScorer | Callable[[Sequence[str]], np.ndarray], texts: Sequence[str]) -> np.ndarray:
    """The scores of texts, (n,), checked: as many as texts, all finite."""
    call: Any = getattr(scorer, "score", scorer)
    scores = np.asarray(call(list(texts)), dtype=np.float64)
    if scores.shape != (len(texts),):
        raise InputError(
            f"the scorer gives scores of shape {scores.shape} for {len(texts)} texts: one each is expected"
        )
    if not np.isfinite(scores).all():
        place = int(np.flatnonzero(~np.isfinite(scores))[0])
        raise InputError(f"the scorer gives {scores[place]} for the text {texts[place][:60]!r}: a number is expected")
    return scores


def _scores(
    texts: Sequence[str], scorer: SegmentScorer | Callable[[Sequence[str]], np.ndarray], batch_size: int
) -> np.ndarray:
    distinct = sorted(set(texts), key=lambda text: (len(text), text))
    found: dict[str, float] = {}
    for first in range(0, len(distinct), batch_size):
        batch = distinct[first : first + batch_size]
        found.update(zip(batch, scores_of(scorer, batch).tolist(), strict=True))
    return np.array([found[text] for text in texts])
