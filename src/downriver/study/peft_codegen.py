"""Code generation under a small budget: examples in the prompt, parameter-efficient tuning and full tuning compared.

Reach for it to choose how to adapt a model to your own pairs of intent and code. The protocol of Weyssow et al.,
"Exploring Parameter-Efficient Fine-Tuning Techniques for Code Generation with Large Language Models" (2023): each
method by its own recipe, ten outputs of a beam search an item, exact match among the first k. Outputs are kept, and
metrics computed from what was kept: ``score_outputs`` does it again without a model.
"""

import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from downriver.core import Budget, InputError, Measurement, unknown
from downriver.core.io import atomic_write, fingerprint
from downriver.domains.codegen import (
    RECIPES,
    CodeTask,
    Style,
    generate_code,
    lacking,
    nats_a_token,
    prompts,
    target_nats,
    tune,
)
from downriver.evaluate.code_metrics import exact_match_at_k, likeness, pass_at_k
from downriver.evaluate.sandbox import run_all
from downriver.models.model import Model
from downriver.study.block import Arm, shared
from downriver.study.claims import Claim
from downriver.study.study import Study

SHOTS = 3
KS = (1, 2, 5, 10)
IN_CONTEXT = ("zero", *(f"icl{n}" for n in range(1, SHOTS + 1)), *(f"rag{n}" for n in range(1, SHOTS + 1)))
METHODS = (*IN_CONTEXT, *RECIPES)


def codegen_study(
    name: str,
    model: Callable[[int], Model],
    task: Callable[[int], CodeTask],
    methods: Sequence[str] = METHODS,
    *,
    budget: Budget | str | None = None,
    seeds: int = 3,
    items: int | None = None,
    beams: int = 10,
    max_new_tokens: int = 64,
    style: Style = "instruction",
    outputs: str | Path | None = None,
    claims: Sequence[Claim] = (),
    title: str = "",
    version: str = "1",
) -> Study:
    """A study whose arms are ways of making the model write code.

    Parameters
    ----------
    model, task
        Functions of the seed: the model to begin with, the pairs.
    methods
        ``zero``; ``icl1`` to ``icl3``, random examples in the prompt; ``rag1`` to ``rag3``, the most similar ones;
        ``full``, ``lora``, ``ia3``, ``prompt``, ``prefix``, ``qlora8``, ``qlora4``, each by its recipe. Where the
        machine lacks what QLoRA needs, its cells are skipped, and run once it is there.
    budget
        Of every tuning; five epochs by default.
    items
        So many rows of the test split; all by default.
    beams, max_new_tokens
        Width of the search and outputs an item (10), length of an output (64).
    style
        ``instruction``, or ``chat`` for models with a chat template.
    outputs
        A folder for the outputs, a JSON-lines file a method, seed and settings. What is there is scored and neither
        trained nor generated again; raise ``version`` when the model or the task has changed.
    claims, title, version
        As in ``study``.

    Measures what ``score_outputs`` does, and after tuning ``disk``, the bytes of the weights that were trained. A cell
    that is skipped measures ``skipped``, with the reason as its unit, and nothing (NaN) else.

    Raises ``InputError`` for unknown methods.
    """
    for method in methods:
        if method not in METHODS:
            raise unknown("method", method, METHODS)
    if beams < 1:
        raise InputError(f"beams is {beams}: at least 1 is expected")

    def body(seed: int, spent: Budget | None, scale: str) -> Iterator[Arm]:
        @shared
        def pairs() -> CodeTask:
            return task(seed)

        @shared
        def base() -> Model:
            return model(seed)

        def measured(method: str) -> list[Measurement]:
            rows = list(pairs().splits["test"])[:items]
            file = None if outputs is None else Path(outputs) / f"{name}-{method}-{seed}-{asked}.jsonl"
            if file is not None and file.is_file():
                kept = read_outputs(file)
                if [row["code"] for row in kept] != [row["code"] for row in rows]:
                    raise InputError(f"{file} has outputs for other items: take another folder or version")
                return score_outputs(kept)
            tuned = method in RECIPES
            adapted = tune(base(), pairs(), method, spent, style=style, seed=seed) if tuned else base()
            made = outputs_of(adapted, pairs(), rows, method, seed)
            if file is not None:
                file.parent.mkdir(parents=True, exist_ok=True)
                with atomic_write(file, "w") as lines:
                    lines.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in made)
            size = sum(p.nbytes for p in adapted.parameters() if p.requires_grad)
            disk = [Measurement("disk", size, unit="bytes", direction="lower")] if tuned else []
            return [*score_outputs(made), *disk]

        for method in methods:
            if reason := lacking(method):  # part of the question: without the reason the cell is run
                yield Arm(method, functools.partial(skipped, reason, beams), {"skipped": reason})
            else:
                yield Arm(method, functools.partial(measured, method))

    def outputs_of(
        adapted: Model, pairs: CodeTask, rows: Sequence[Mapping[str, str]], method: str, seed: int
    ) -> list[dict[str, Any]]:
        intents, code = [row["intent"] for row in rows], [row["code"] for row in rows]
        shots = int(method[-1]) if method in IN_CONTEXT[1:] else 0
        retrieve = method.startswith("rag")
        said = prompts(intents, pairs.splits["train"], shots=shots, retrieve=retrieve, style=style, seed=seed)
        texts = generate_code(adapted, said, k=beams, max_new_tokens=max_new_tokens, progress=False)
        losses = target_nats(adapted, said, code)
        return [
            {**row, "prompt": prompt, "outputs": each, "nats": nats, "tokens": tokens}
            for row, prompt, each, (nats, tokens) in zip(rows, said, texts, losses, strict=True)
        ]

    spent_on = "" if budget is None else str(Budget.parse(budget))
    asked = fingerprint(spent_on, beams, max_new_tokens, style, version)[:8]
    parameters: dict[str, Any] = {
        "items": items,
        "beams": beams,
        "max_new_tokens": max_new_tokens,
        "task": fingerprint(name),
    }
    if style != "instruction":
        parameters["style"] = style
    return Study(
        name=name,
        function=body,
        claims=tuple(claims),
        seeds=seeds,
        budget=Budget.parse(budget) if budget is not None else None,
        title=title,
        version=version,
        parameters=parameters,
    )


def read_outputs(file: str | Path) -> list[dict[str, Any]]:
    """What a cell of ``codegen_study`` has kept, item by item: intent, ``code``, tests where there are any, prompt,
    ``outputs`` (best first), and the ``nats`` and ``tokens`` of the code.

    Raises ``InputError`` naming file, line and what is missing.
    """
    try:
        lines = Path(file).read_text("utf-8").splitlines()
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}") from None
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            lacks = [field for field in ("code", "outputs", "nats", "tokens") if field not in row]
        except (json.JSONDecodeError, TypeError) as error:
            raise InputError(f"{file}, line {number}: {error}") from None
        if lacks or not row["outputs"]:
            raise InputError(f"{file}, line {number}: {', '.join(lacks) or 'outputs'} missing")
        rows.append(row)
    if not rows:
        raise InputError(f"{file} is empty: a line an item is expected")
    return rows


def score_outputs(rows: Sequence[Mapping[str, Any]]) -> list[Measurement]:
    """The metrics of kept outputs: ``target loss`` (nats a token), ``EM@k``, ``EM@k, trees`` (syntax trees compared),
    ``likeness`` of the first output, and ``pass@k`` where every item has tests, each program in a sandbox.

    >>> row = {"code": "x = 1", "outputs": ["x = 2", "x=1"], "nats": 3.0, "tokens": 2}
    >>> {score.metric: score.value for score in score_outputs([row])}["EM@2, trees"]
    1.0
    """
    code, texts = [row["code"] for row in rows], [row["outputs"] for row in rows]
    ks = [k for k in KS if k <= min(map(len, texts))]
    loss = nats_a_token([(row["nats"], row["tokens"]) for row in rows])
    found = [Measurement("target loss", loss, unit="nats", direction="lower")]
    found += [Measurement(f"EM@{k}", value) for k, value in exact_match_at_k(texts, code, ks).items()]
    trees = exact_match_at_k(texts, code, ks, normalize="ast")
    found += [Measurement(f"EM@{k}, trees", value) for k, value in trees.items()]
    found.append(Measurement("likeness", likeness([each[0] for each in texts], code).mean))
    if all(row.get("tests") for row in rows):
        programs = [f"{text}\n{row['tests']}" for row in rows for text in row["outputs"]]
        passed = iter(run_all(programs, progress=False))
        counts = [(len(each), sum(next(passed).passed for _ in each)) for each in texts]
        found += [Measurement(f"pass@{k}", sum(pass_at_k(n, c, k) for n, c in counts) / len(counts)) for k in ks]
    return found


def skipped(reason: str, beams: int) -> list[Measurement]:
    """A cell that this machine cannot run: claims on it have no figure."""
    names = ["likeness", *(f"EM@{k}{form}" for k in KS if k <= beams for form in ("", ", trees"))]
    return [
        Measurement("skipped", 1, unit=reason, direction="none"),
        Measurement("target loss", math.nan, unit="nats", direction="lower"),
        *(Measurement(name, math.nan) for name in names),
    ]
