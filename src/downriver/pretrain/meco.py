"""Pretrain on documents behind the name of their source, then cool down on other documents without it.

Reach for it when documents come with a URL, a site, a forum, and the model is to be used with and without naming one.
Gao et al. (2025), «Metadata Conditioning Accelerates Language Model Pre-training» (MeCo). Departures: the cosine falls
to nothing instead of a tenth of the peak, and the batch is small by default. What the authors' packing does at the end
of a block is not public: here a document goes on in the next block, by default without its source.
"""

import math
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import datasets
import numpy as np

from downriver.core import Budget, InputError, generator
from downriver.data.condition.metadata import TEMPLATE, MetadataFormatter, Missing, View, condition
from downriver.data.condition.pack import Packer, Strategy, isolated, isolates
from downriver.data.documents import content_hash
from downriver.models.model import Model
from downriver.tasks.task import Task
from downriver.training import TokenRows, fine_tune
from downriver.training.engine import Precision, Schedule


class MeCoSchedule:
    """The ``order`` of a run in two phases: blocks with metadata for (1 - cooldown) of the steps, then plain ones.

    ``rows`` are the blocks of both, to be given to ``fine_tune`` with the schedule as ``order``. One run, so one
    optimiser and one learning-rate schedule: only the data change, at step ``switch`` = ⌊(1 - cooldown) · total_steps⌋.
    Within a phase every block is visited once in a random order, then once more in another.

    ``cooldown=0`` stays with metadata; the nearer to 1, the nearer to plain training. Raises ``InputError`` for a
    cooldown outside [0, 1), a phase without blocks, or blocks with different columns.

    >>> blocks = [datasets.Dataset.from_dict({"input_ids": [[i]] * 3}) for i in (7, 8)]
    >>> schedule = MeCoSchedule(10, cooldown=0.2, conditioned=blocks[0], plain=blocks[1], batch_size=1)
    >>> schedule.switch, [schedule.rows[schedule(visit)]["input_ids"][0] for visit in range(10)]
    (8, [7, 7, 7, 7, 7, 7, 7, 7, 8, 8])
    """

    def __init__(
        self,
        total_steps: int,
        *,
        conditioned: datasets.Dataset,
        plain: datasets.Dataset,
        cooldown: float = 0.1,
        batch_size: int,
        seed: int = 0,
    ) -> None:
        if not 0 <= cooldown < 1:
            raise InputError(f"cooldown is {cooldown}: a share of the steps, from 0 to below 1, is expected")
        if total_steps < 1 or batch_size < 1:
            raise InputError(f"total_steps {total_steps}, batch_size {batch_size}: at least 1 each is expected")
        self.switch = math.floor((1 - cooldown) * total_steps + 1e-9)
        for phase, blocks, needed in [
            ("conditioned", conditioned, self.switch > 0),
            ("plain", plain, self.switch < total_steps),
        ]:
            if needed and not len(blocks):
                raise InputError(f"there are no {phase} blocks for their part of {total_steps} steps")
        if set(conditioned.column_names) != set(plain.column_names):
            raise InputError(
                f"conditioned blocks have the columns {conditioned.column_names}, plain ones {plain.column_names}: "
                "the same are expected"
            )
        self.rows = datasets.concatenate_datasets([conditioned, plain.select_columns(conditioned.column_names)])
        self._sizes = (len(conditioned), len(plain))
        self._turn, self._seed = self.switch * batch_size, seed
        self._cached: tuple[tuple[int, int], np.ndarray] | None = None

    def __call__(self, visit: int) -> int:
        """The row of visit number ``visit``."""
        phase = int(visit >= self._turn)
        epoch, place = divmod(visit - phase * self._turn, self._sizes[phase])
        if self._cached is None or self._cached[0] != (phase, epoch):
            order = generator("meco", self._seed, phase, epoch).permutation(self._sizes[phase])
            self._cached = (phase, epoch), order
        return int(self._cached[1][place]) + phase * self._sizes[0]


def meco(
    model: Model,
    task: Task,
    budget: Budget | str,
    *,
    field: str | None = None,
    view: View = "host",
    template: str = TEMPLATE,
    min_count: int = 0,
    missing: Missing = "fail",
    mask_metadata: bool = True,
    cooldown: float = 0.1,
    block: int | None = None,
    strategy: Strategy = "complete",
    repeat_metadata: bool = False,
    learning_rate: float = 3e-3,
    batch_size: int = 16,
    weight_decay: float = 0.033,
    warmup: float = 0.05,
    schedule: Schedule = "cosine",
    betas: tuple[float, float] = (0.9, 0.95),
    seed: int = 0,
    checkpoints: str | Path | None = None,
    precision: Precision = "auto",
) -> Model:
    """Train a copy of the model on the task's train split in MeCo's two phases.

    The documents are shared out by ``seed``: a share ``cooldown`` of them is kept for the second phase.

    Parameters
    ----------
    budget
        In steps, examples (blocks) or tokens: the phases switch at a step that is known beforehand.
    field
        The column with the source; default: the task's ``group``.
    view, template, min_count, missing
        Of the ``MetadataFormatter``. ``view="full"`` takes the source as it is, where it is no URL.
    mask_metadata
        Take no loss on the metadata (MeCo's way).
    block, strategy, repeat_metadata
        Of the ``Packer``; a block is by default as long as the model reads (MeCo: 8192). Documents are kept apart
        within a block.
    learning_rate, weight_decay, warmup, schedule, betas
        MeCo's for a model of 1.6 B parameters with 512 blocks a batch.

    Warns when documents of the two phases have the same text. Raises ``InputError`` for a task that is no language
    modelling, a source that is missing, a budget in other units, and as ``Packer`` and ``fine_tune`` do.

    >>> from downriver.models import small
    >>> pages = {"text": ["the tide", "the moon", "a star", "a sea"], "site": ["a.org", "b.org", "b.org", "a.org"]}
    >>> rows = datasets.Dataset.from_dict(pages)
    >>> task = Task("pages", "language-modelling", {"train": rows}, ("text",), None, group="site")
    >>> meco(small("causal-lm", "nano"), task, "4 steps", batch_size=1, cooldown=0.25).kind
    'causal-lm'
    """
    if task.kind != "language-modelling":
        raise InputError(f"task {task.name!r} is {task.kind}: language-modelling is expected")
    if not 0 <= cooldown < 1:
        raise InputError(f"cooldown is {cooldown}: a share of the steps, from 0 to below 1, is expected")
    field = field or task.group
    documents, text = task.rows("train"), task.inputs[0]
    if field is None or field not in documents.column_names:
        raise InputError(f"task {task.name!r} has no column {field!r}: field names the column of the source")
    packer = Packer(min(block or model.max_length, model.max_length), strategy, repeat_prefix=repeat_metadata)
    first, second = shared_out(documents, cooldown, seed)
    formatter = MetadataFormatter(field, view, template, min_count=min_count, missing=missing).fit(first)
    warn_of_overlap(first[text][:], second[text][:])
    conditioned = packer.pack(condition(first, formatter, model.processor, text=text, mask_metadata=mask_metadata))
    plain = packer.pack(condition(second, None, model.processor, text=text)) if len(second) else conditioned.select([])
    steps = _steps(Budget.parse(budget), batch_size, packer.block)
    order = MeCoSchedule(
        steps, conditioned=conditioned, plain=plain, cooldown=cooldown, batch_size=batch_size, seed=seed
    )
    return fine_tune(
        model,
        TokenRows(task.name, {"train": order.rows}, model.processor.pad_token_id or 0),
        Budget(steps, "steps"),
        learning_rate=learning_rate,
        batch_size=batch_size,
        weight_decay=weight_decay,
        warmup=warmup,
        schedule=schedule,
        betas=betas,
        seed=seed,
        checkpoints=checkpoints,
        precision=precision,
        order=order,
        objective=None if isolates(model) else isolated,
    )


def shared_out(documents: datasets.Dataset, cooldown: float, seed: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Different documents for the two phases, a share ``cooldown`` of them (at least one, if any) for the second.

    >>> parts = shared_out(datasets.Dataset.from_dict({"text": list("abcdefghij")}), 0.2, seed=0)
    >>> [len(part) for part in parts], sorted(parts[0]["text"][:] + parts[1]["text"][:]) == list("abcdefghij")
    ([8, 2], True)
    """
    n = len(documents)
    later = math.ceil(cooldown * n - 1e-9)
    if later == n:
        raise InputError(f"{n} documents are too few for two phases of different ones with a cooldown of {cooldown}")
    order = generator("meco documents", seed).permutation(n)
    return documents.select(order[later:]), documents.select(order[:later])


def warn_of_overlap(conditioned: Iterable[str], plain: Sequence[str]) -> None:
    """Warn when texts of the cooldown were seen before: it is to be on different documents."""
    seen = {content_hash(text) for text in conditioned}
    if again := sum(content_hash(text) in seen for text in plain):
        warnings.warn(
            f"{again} of {len(plain)} texts of the cooldown are among those with metadata: different ones are expected",
            stacklevel=3,
        )


def _steps(budget: Budget, batch_size: int, block: int) -> int:
    if budget.unit not in ("steps", "examples", "tokens"):
        raise InputError(
            f"a budget of {budget}: steps, examples or tokens are expected, so that the step of the switch is known"
        )
    return int(budget.steps(batch_size, tokens_per_step=batch_size * block) or 1)
