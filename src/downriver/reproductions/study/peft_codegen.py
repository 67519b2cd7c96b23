"""Paper 85: a small model learns to write one-line functions, by examples in the prompt and by tuning.

The paper tunes CodeLlama and others on CoNaLa. Here a Llama of four layers and width 128, with a vocabulary of 1000
byte pairs, learns the sources of Python's standard library; then it gets functions of one ``return``, name and first
sentence of the docstring to that line, split by module, for 150 steps a method. The lines may be part of the sources:
what is new is the form. Exact match is reported; at this size the claims are about the loss of the line.
"""

import functools
from typing import Any

from downriver.domains.codegen import CodeTask
from downriver.models import Model, bpe_tokenizer, small_language_model
from downriver.reproductions.paper import Paper
from downriver.reproductions.python_sources import python_sources
from downriver.study import Study, better
from downriver.study.peft_codegen import codegen_study
from downriver.tasks.task import Task
from downriver.training.engine import fine_tune

paper = Paper(
    number=85,
    slug="peft_codegen",
    title="Exploring Parameter-Efficient Fine-Tuning Techniques for Code Generation with Large Language Models",
    date="2023-08",
    room="study",
    claim="Under a small budget, parameter-efficient tuning, LoRA above all, writes better code than examples in the "
    "prompt do.",
)

METHODS = ("zero", "icl1", "icl3", "rag3", "lora", "ia3", "prompt", "full")
# steps before, steps of tuning, items, beams, width
STEPS, TUNING, ITEMS, BEAMS, WIDTH, BATCH = 500, 150, 100, 10, 128, 16


def sources(seed: int, steps: int) -> Task:
    """What the model learns before."""
    return python_sources("peft_codegen", seed, texts=steps * BATCH, characters=300)


@functools.lru_cache(maxsize=1)
def language_model(seed: int, steps: int = STEPS, width: int = WIDTH) -> Model:
    """Trained on the sources of the standard library."""
    task = sources(seed, steps)
    tokenizer = bpe_tokenizer(task.rows("train")["text"], 1000, context=384)
    model = small_language_model("causal-lm", tokenizer, width=width, layers=4, context=384, seed=seed)
    settings: Any = {"learning_rate": 1e-3, "batch_size": BATCH, "schedule": "cosine", "seed": seed}
    return fine_tune(model, task, f"{steps} steps", **settings)


def functions(seed: int) -> CodeTask:
    """One-line functions; intent and line have 80 characters each at most."""
    return CodeTask.stdlib(seed, characters=80)


reproduction: Study = codegen_study(
    "peft_codegen",
    language_model,
    functions,
    METHODS,
    budget=f"{TUNING} steps",
    seeds=3,
    items=ITEMS,
    beams=BEAMS,
    max_new_tokens=32,
    claims=[
        better("lora", than="icl1", on="target loss"),
        better("lora", than="icl3", on="target loss"),
        better("lora", than="prompt", on="target loss"),
        better("lora", than="full", on="target loss"),
    ],
    title="One-line functions of the standard library from their names and first sentences",
)

studies = (reproduction,)
