"""Code generation under a small budget: examples in the prompt, parameter-efficient tuning and full tuning compared.

Reach for it to choose how to adapt a model to your own pairs of intent and code. The protocol of Weyssow et al.,
"Exploring Parameter-Efficient Fine-Tuning Techniques for Code Generation with Large Language Models" (2023): each
method by its own recipe, ten outputs of a beam search an item, exact match among the first k. Outputs are kept, and
metrics computed from what was kept.
"""

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from downriver.core import Budget, InputError, Measurement, unknown
from downriver.core.io import atomic_write, fingerprint
from downriver.domains.codegen import RECIPES, CodeTask, generate_code, prompts, target_loss, tune
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
        ``full``, ``lora``, ``ia3``, ``prompt``, ``prefix``, each by its recipe.
    budget
        Of every tuning; five epochs by default.
    items
        So many rows of the test split; all by default.
    beams, max_new_tokens
        Width of the search and outputs an item (10), length of an output (64).
    outputs
        A folder for the outputs, a JSON-lines file a method and seed; one that is there is not generated again.
    claims, title, version
        As in ``study``.

    Measures ``target loss`` (nats a token), ``EM@k``, ``EM@k, trees`` (syntax trees compared), ``likeness``, and
    ``pass@1`` where the task has tests, each program in a sandbox.

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
            adapted = tune(base(), pairs(), method, spent, seed=seed) if method in RECIPES else base()
            return measure(adapted, pairs(), method, seed)

        for method in methods:
            yield Arm(method, functools.partial(measured, method))

    def measure(adapted: Model, pairs: CodeTask, method: str, seed: int) -> list[Measurement]:
        rows = list(pairs.splits["test"])[:items]
        intents, code = [row["intent"] for row in rows], [row["code"] for row in rows]
        shots = int(method[-1]) if method in IN_CONTEXT[1:] else 0
        asked = prompts(intents, pairs.splits["train"], shots=shots, retrieve=method.startswith("rag"), seed=seed)
        file = Path(outputs) / f"{name}-{method}-{seed}.jsonl" if outputs else None
        if file is not None and file.is_file():
            texts = [json.loads(line)["outputs"] for line in file.read_text("utf-8").splitlines()]
            if len(texts) != len(rows):
                raise InputError(
                    f"{file} has outputs of {len(texts)} items, {len(rows)} are expected: take another folder"
                )
        else:
            texts = generate_code(adapted, asked, k=beams, max_new_tokens=max_new_tokens, progress=False)
            if file is not None:
                file.parent.mkdir(parents=True, exist_ok=True)
                with atomic_write(file, "w") as lines:
                    for prompt, each in zip(asked, texts, strict=True):
                        lines.write(json.dumps({"prompt": prompt, "outputs": each}, ensure_ascii=False) + "\n")
        found = [Measurement("target loss", target_loss(adapted, asked, code), direction="lower")]
        ks = [k for k in KS if k <= beams]
        found += [Measurement(f"EM@{k}", value) for k, value in exact_match_at_k(texts, code, ks).items()]
        trees = exact_match_at_k(texts, code, ks, normalize="ast")
        found += [Measurement(f"EM@{k}, trees", value) for k, value in trees.items()]
        found.append(Measurement("likeness", likeness([each[0] for each in texts], code).mean))
        if pairs.has_tests:
            programs = [f"{text}\n{row['tests']}" for row, each in zip(rows, texts, strict=True) for text in each]
            passed = [outcome.passed for outcome in run_all(programs, progress=False)]
            counts = [sum(passed[i : i + beams]) for i in range(0, len(passed), beams)]
            found.append(Measurement("pass@1", sum(pass_at_k(beams, c, 1) for c in counts) / len(counts)))
        return found

    parameters = {"items": items, "beams": beams, "max_new_tokens": max_new_tokens, "task": fingerprint(name)}
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
