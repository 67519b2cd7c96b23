"""How well a model does tasks that are told in words, apart for each of three ways of generalising.

Reach for it after instruction tuning, with and without solved examples in the prompt: tuning may help the one and harm
the other (Iyer et al. 2022, «OPT-IML», arXiv:2212.12017: PIQA with 32 examples fell from 78.8 to 69.2 at 30B).
Answers are generated greedily and scored by the task's own metric. Departure: tasks with listed answers are not scored
by likelihood, so that an answer in the wrong form is wrong.
"""

from collections.abc import Sequence
from typing import Any

import polars as pl
import torch

from downriver.core.errors import InputError
from downriver.core.measurement import Measurement
from downriver.core.seeds import generator
from downriver.data.condition.encode import encode_all
from downriver.models.features import inference
from downriver.models.model import Model
from downriver.tasks.generalization import InstructionTask, Levels, Template


def evaluate_generalization(
    model: Model,
    levels: Levels,
    *,
    shots: Sequence[int] = (0, 5),
    limit: int | None = None,
    batch_size: int = 64,
    max_new_tokens: int | None = None,
    seed: int = 0,
) -> pl.DataFrame:
    """Score every task of every level: a row a task, a number of solved examples and a metric.

    Parameters
    ----------
    shots
        Solved examples in the prompt. Those of a fully supervised task are drawn from its training examples, those of a
        held-out task from its other examples.
    limit
        At most so many examples a task, drawn by ``seed``.
    max_new_tokens
        Answers are cut there; by default at the longest expected answer of the task, and an end.

    Columns: ``level``, ``task``, ``category``, ``benchmark``, ``shots``, ``metric``, ``value`` (mean over examples,
    each told by one of the task's templates in turn), ``examples``. ``by_level`` sums it up.

    >>> from downriver.models import small
    >>> from downriver.tasks import InstructionBench, InstructionTask, Template
    >>> task = InstructionTask("copy", "c", "b", [{"x": str(i)} for i in range(9)], (Template("{x}:", "{x}"),))
    >>> levels = InstructionBench([task]).split(instance_frac=0.3)
    >>> table = evaluate_generalization(small("causal-lm", "nano"), levels, shots=(0, 2))
    >>> table.select("level", "task", "shots", "metric", "examples").rows()
    [('fully supervised', 'copy', 0, 'exact_match', 3), ('fully supervised', 'copy', 2, 'exact_match', 3)]
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}: at least one example a task is expected")
    trained = {task.name: task for task in levels.train}
    rows = []
    for level, tasks in levels.items():
        for task in tasks:
            for shot in shots:
                pool = trained.get(task.name)
                scores = score_task(
                    model,
                    task,
                    shots=shot,
                    demonstrations=pool,
                    limit=limit,
                    batch_size=batch_size,
                    max_new_tokens=max_new_tokens,
                    seed=seed,
                )[1]
                value = sum(scores) / len(scores)
                rows.append((level, task.name, task.category, task.benchmark, shot, task.metric, value, len(scores)))
    words = dict.fromkeys(("level", "task", "category", "benchmark"), pl.String)
    schema = words | {"shots": pl.Int64, "metric": pl.String, "value": pl.Float64, "examples": pl.Int64}
    return pl.DataFrame(rows, schema, orient="row")


def by_level(table: pl.DataFrame) -> list[Measurement]:
    """The mean over tasks for every level, number of shots and metric: ``exact_match, 5 shots`` of task ``level``.

    >>> row = {"level": "fully held-out", "shots": 0, "metric": "exact_match"}
    >>> [m] = by_level(pl.DataFrame([row | {"value": 0.5}, row | {"value": 1.0}]))
    >>> m.metric, m.task, m.value
    ('exact_match, 0 shots', 'fully held-out', 0.75)
    """
    means = table.group_by("level", "shots", "metric", maintain_order=True).agg(pl.col("value").mean())
    return [
        Measurement(f"{metric}, {shots} shots", value, task=level, unit="share")
        for level, shots, metric, value in means.iter_rows()
    ]


def score_task(
    model: Model,
    task: InstructionTask,
    *,
    shots: int = 0,
    demonstrations: InstructionTask | None = None,
    limit: int | None = None,
    batch_size: int = 64,
    max_new_tokens: int | None = None,
    seed: int = 0,
) -> tuple[list[str], list[float]]:
    """The model's answers to a task's examples, and the score of each; ``demonstrations`` default to the task's own."""
    if shots < 0:
        raise InputError(f"shots is {shots}: at least 0 is expected")
    rng = generator("shots", task.name, shots, seed)
    chosen = list(range(len(task)))
    if limit is not None and limit < len(task):
        chosen = sorted(generator("limit", task.name, seed).choice(len(task), limit, replace=False).tolist())
    prompts, expected = [], []
    for place, number in enumerate(chosen):
        pool = [i for i in range(len(task)) if i != number] if demonstrations is None else range(len(demonstrations))
        if len(pool) < shots:
            raise InputError(f"task {task.name!r} has {len(pool)} examples to show, not {shots}")
        source = task if demonstrations is None else demonstrations
        demos = [source.examples[pool[int(i)]] for i in rng.choice(len(pool), shots, replace=False)] if shots else []
        template: Template = task.templates[place % len(task.templates)]
        prompt, target = template.render(task.examples[number], demos)
        prompts.append(prompt)
        expected.append(target)
    given = generate(model, prompts, max_new_tokens or _longest(model, expected) + 1, batch_size)
    return given, [task.score(answer, target) for answer, target in zip(given, expected, strict=True)]


def generate(model: Model, prompts: Sequence[str], max_new_tokens: int, batch_size: int = 64) -> list[str]:
    """Greedy answers of a causal language model; a prompt that is too long loses its beginning.

    Raises ``InputError`` for a model of another kind and where no room is left for the prompt.

    >>> from downriver.models import small
    >>> len(generate(small("causal-lm", "nano"), ["a river", "the sea"], 4))
    2
    """
    if model.kind != "causal-lm" or model.processor is None:
        raise InputError(f"{model.source or 'the model'} is a {model.kind}: a causal-lm with a tokenizer is expected")
    room = model.max_length - max_new_tokens
    if max_new_tokens < 1 or room < 2:
        raise InputError(f"max_new_tokens is {max_new_tokens}: from 1 to {model.max_length - 2} is expected")
    tokenizer, backbone = model.processor, model.backbone
    parts = [[(prompt.rstrip(" "), False)] for prompt in prompts]
    ids = [found.input_ids for found in encode_all(parts, tokenizer, end=False, max_length=room)]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # like lengths together: little padding
    answers = [""] * len(ids)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    with inference(model):
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            longest = max(len(ids[i]) for i in batch)
            padded = [[pad] * (longest - len(ids[i])) + ids[i] for i in batch]
            mask = [[0] * (longest - len(ids[i])) + [1] * len(ids[i]) for i in batch]
            module: Any = backbone
            out = module.generate(
                input_ids=torch.tensor(padded, device=model.device),
                attention_mask=torch.tensor(mask, device=model.device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,
                pad_token_id=pad,
                eos_token_id=tokenizer.eos_token_id,
            )
            texts = tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)
            for i, text in zip(batch, texts, strict=True):
                answers[i] = text.strip()
    return answers


def _longest(model: Model, texts: Sequence[str]) -> int:
    return max(
        len(ids) for ids in model.processor([f" {text}" for text in texts], add_special_tokens=False)["input_ids"]
    )
