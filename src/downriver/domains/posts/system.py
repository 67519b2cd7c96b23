"""One encoder, several tasks on posts: quality, closing, outdated answers, names of software; fitted, saved, asked.

Reach for ``PostSystem`` after ``sobert``, or with any other encoder. Mukherjee and Hellendoorn 2023, arXiv:2306.03268:
every task fine-tunes all weights of the encoder, from the same start. Rates and epochs are those of BERT's paper (the
paper's are not published).
"""

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from datasets import Dataset
from torch import nn

from downriver import models
from downriver.core import Budget, InputError, atomic_folder, seeded, unknown
from downriver.domains.posts.entities import central, encode_words, windows
from downriver.models.features import inference
from downriver.models.model import Model
from downriver.training import TokenRows, fine_tune

SYSTEM = "posts.json"
BATCH = 32


@dataclass(frozen=True)
class PostTask:
    """What is asked of a post: its ``labels``, the ``fields`` it reads, and whether every word gets a label."""

    name: str
    labels: tuple[str, ...]
    fields: tuple[str, ...]
    token: bool


class PostSystem:
    """An encoder and the tasks it was fitted to.

    Args:
        encoder: a masked LM or text encoder; the system never changes it.

    >>> from downriver.models import small
    >>> system = PostSystem(small("text-encoder", "nano")).add_task("quality", ("good", "bad"))
    >>> rows = [{"title": "aa", "body": "a", "label": "good"}, {"title": "zz", "body": "z", "label": "bad"}] * 8
    >>> _ = system.fit("quality", rows, "64 examples", learning_rate=1e-2)
    >>> system.predict({"title": "aaa", "body": "a"})["quality"]
    'good'
    """

    def __init__(self, encoder: Model) -> None:
        if encoder.kind not in ("masked-lm", "text-encoder"):
            raise InputError(f"{encoder.source or 'the model'} is a {encoder.kind} model: an encoder is expected")
        self.encoder = encoder
        self.tasks: dict[str, PostTask] = {}
        self.fitted: dict[str, Model] = {}

    def add_task(
        self, name: str, labels: Sequence[str], *, fields: Sequence[str] = ("title", "body"), token: bool = False
    ) -> Self:
        """Say what a task reads and answers.

        With ``token`` rows have ``words`` and ``tags`` (each one of ``labels``, such as ``B-Class``); otherwise the
        fields' texts follow one another with a line break between them, and a row has a ``label``.
        """
        if name in self.tasks:
            raise InputError(f"task {name!r} is there already")
        if len(set(labels)) < max(2, len(labels)):
            raise InputError(f"task {name!r}: two different labels at least are expected, not {list(labels)}")
        self.tasks[name] = PostTask(name, tuple(labels), ("words",) if token else tuple(fields), token)
        return self

    def fit(
        self,
        name: str,
        rows: Sequence[Mapping[str, Any]],
        budget: Budget | str,
        *,
        learning_rate: float = 3e-5,
        batch_size: int = 16,
        seed: int = 0,
        checkpoints: str | Path | None = None,
    ) -> Self:
        """Fine-tune a copy of the encoder with a fresh head to a task.

        Long texts lose their middle (``head_tail``), long lists of words are cut into overlapping windows. Raises
        ``InputError`` naming the row for a field that is missing and a label the task does not have.
        """
        task = self._task(name)
        kind: Any = self.encoder.kind
        backbone = copy.deepcopy(self.encoder.backbone)
        with seeded("post system", name, seed):
            width = self.encoder.features(**self._encoded(["x"])).shape[-1]
            head = nn.Linear(width, len(task.labels))
            nn.init.normal_(head.weight, std=0.02)
            nn.init.zeros_(head.bias)
        model = Model(
            backbone,
            kind=kind,
            head=head,
            processor=self.encoder.processor,
            pooling="tokens" if task.token else self.encoder.pooling,
            source=self.encoder.source,
            max_length=self.encoder.max_length,
            labels=task.labels,
        )
        examples = self._tagged(task, rows) if task.token else self._labelled(task, rows)
        self.fitted[name] = fine_tune(
            model,
            TokenRows(name, {"train": Dataset.from_dict(examples)}, pad=self.encoder.processor.pad_token_id),
            budget,
            learning_rate=learning_rate,
            batch_size=batch_size,
            weight_decay=0.01,
            seed=seed,
            checkpoints=checkpoints,
            in_place=True,
        )
        return self

    def predict(self, post: Mapping[str, Any], tasks: Sequence[str] | None = None) -> dict[str, Any]:
        """The answer of every fitted task whose fields the post has, or of the ``tasks`` named: a label, or a tag a
        word."""
        asked = tasks or [name for name in self.fitted if all(f in post for f in self.tasks[name].fields)]
        return {name: self.predict_many(name, [post])[0] for name in asked}

    def predict_many(self, name: str, rows: Sequence[Mapping[str, Any]]) -> list[Any]:
        """The labels of many rows, or the tags of their words."""
        task, model = self._task(name), self.fitted.get(name)
        if model is None:
            raise InputError(f"task {name!r} is not fitted yet")
        if not task.token:
            texts = [self._text(task, row, i) for i, row in enumerate(rows)]
            logits = np.concatenate(
                [self._logits(model, self._encoded(texts[i : i + BATCH])) for i in range(0, len(texts), BATCH)]
            )
            return [task.labels[k] for k in logits.argmax(axis=1)]
        return [self._tags(task, model, row["words"]) for row in rows]

    def save(self, folder: str | Path) -> Path:
        """Write encoder, tasks and fitted models into a new folder, whole or not at all."""
        with atomic_folder(folder) as scratch:
            self.encoder.save(scratch / "encoder")
            for name, model in self.fitted.items():
                model.save(scratch / f"task-{name}")
            described = [asdict(task) for task in self.tasks.values()]
            (scratch / SYSTEM).write_text(json.dumps(described, indent=1, ensure_ascii=False), encoding="utf-8")
        return Path(folder)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """A system that ``save`` wrote."""
        folder = Path(folder)
        if not (folder / SYSTEM).is_file():
            raise InputError(f"{folder} has no {SYSTEM}: a folder written by PostSystem.save is expected")
        system = cls(models.load(folder / "encoder"))
        for found in json.loads((folder / SYSTEM).read_text(encoding="utf-8")):
            task = PostTask(**found)
            task = replace(task, labels=tuple(task.labels), fields=tuple(task.fields))
            system.tasks[task.name] = task
            if (folder / f"task-{task.name}").is_dir():
                system.fitted[task.name] = models.load(folder / f"task-{task.name}")
        return system

    def _task(self, name: str) -> PostTask:
        if name not in self.tasks:
            raise unknown("task", name, self.tasks)
        return self.tasks[name]

    def _text(self, task: PostTask, row: Mapping[str, Any], number: int) -> str:
        for field in task.fields:
            if not isinstance(row.get(field), str):
                raise InputError(f"task {task.name!r}, row {number}: the field {field!r} is missing or no text")
        return head_tail("\n".join(row[f] for f in task.fields), self.encoder.processor, self.encoder.max_length)

    def _encoded(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        limit = self.encoder.max_length
        batch = self.encoder.processor(
            list(texts), padding=True, truncation=True, max_length=limit, padding_side="right", return_tensors="pt"
        )
        return {name: tensor.to(self.encoder.device) for name, tensor in batch.items()}

    def _logits(self, model: Model, batch: dict[str, torch.Tensor]) -> np.ndarray:
        with inference(model):
            return model(**batch)["logits"].float().cpu().numpy()

    def _labelled(self, task: PostTask, rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {"input_ids": [], "labels": []}
        for number, row in enumerate(rows):
            text = self._text(task, row, number)
            if row.get("label") not in task.labels:
                raise InputError(
                    f"task {task.name!r}, row {number}: label {row.get('label')!r} is none of {task.labels}"
                )
            encoded = self.encoder.processor(text, truncation=True, max_length=self.encoder.max_length)
            found["input_ids"].append(encoded["input_ids"])
            found["labels"].append(task.labels.index(row["label"]))
        return found

    def _tagged(self, task: PostTask, rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {"input_ids": [], "labels": []}
        for number, row in enumerate(rows):
            if len(row["words"]) != len(row["tags"]) or not row["words"]:
                raise InputError(
                    f"task {task.name!r}, row {number}: {len(row['words'])} words and {len(row['tags'])} tags"
                )
            if strange := set(row["tags"]) - set(task.labels):
                raise InputError(f"task {task.name!r}, row {number}: tag {min(strange)!r} is none of {task.labels}")
            labels = [task.labels.index(tag) for tag in row["tags"]]
            ids, marks, _ = encode_words(row["words"], self.encoder.processor, labels)
            for start, end, _, _ in self._windows(len(ids)):
                found["input_ids"].append(ids[start:end])
                found["labels"].append(marks[start:end])
        return found

    def _tags(self, task: PostTask, model: Model, words: Sequence[str]) -> list[str]:
        if not words:
            return []
        ids, _, place = encode_words(words, self.encoder.processor)
        parts = self._windows(len(ids))
        scores = [
            self._logits(model, {"input_ids": torch.tensor([ids[a:b]], device=model.device)})[0] for a, b, _, _ in parts
        ]
        best = central(scores, parts).argmax(axis=1)
        tags = ["O" if "O" in task.labels else task.labels[0]] * len(words)
        for token in reversed(range(len(ids))):  # a word's first token speaks for it
            if place[token] >= 0:
                tags[place[token]] = task.labels[best[token]]
        return tags

    def _windows(self, length: int) -> list[tuple[int, int, int, int]]:
        size = self.encoder.max_length
        return windows(length, size, max(1, size // 2))


def head_tail(text: str, tokenizer: Any, limit: int) -> str:
    """The text, or where it has more than ``limit`` tokens its beginning and its end, a line break between them.

    Cutting on the right alone would lose the code that ends a post.

    >>> from downriver.models import byte_tokenizer
    >>> head_tail("abcdefghij", byte_tokenizer(99), 8)
    'abc\\nij'
    """
    found = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False, verbose=False)["offset_mapping"]
    room = limit - len(tokenizer("")["input_ids"])
    if len(found) <= room:
        return text
    room -= len(tokenizer("\n", add_special_tokens=False)["input_ids"])
    if room < 2:
        raise InputError(f"a limit of {limit} tokens leaves no room for a text")
    head = room - room // 2
    return text[: found[head - 1][1]] + "\n" + text[found[-(room // 2)][0] :]
