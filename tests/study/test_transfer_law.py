"""The grid of pretraining sets and amounts: planted scores come back as a table, resumably, and are advised upon."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn

from downriver.core import Budget, InputError
from downriver.models import Model, small
from downriver.study.transfer_law import TransferLawStudy
from downriver.tasks import Task

GRID = [1e3, 5e3, 2.5e4, 1e5]


class Planted(nn.Module):
    """Says the right class of the rows whose first feature is below its skill."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("skill", torch.tensor(0.2))
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, inputs: Tensor) -> Tensor:
        right = torch.where(inputs[:, 0] < self.skill, inputs[:, 1], 1 - inputs[:, 1])
        return torch.stack([1 - right, right], dim=1) * 4 + 0 * self.weight


def rows(n: int) -> Dataset:
    return Dataset.from_dict(
        {"x": np.linspace(0, 1, n).tolist(), "y": [0.0, 1.0] * (n // 2), "label": [0, 1] * (n // 2)}
    )


TASK = Task("planted", "tabular-classification", {"train": rows(40), "test": rows(1000)}, ("x", "y"), "label")
TEXT = Task("text", "language-modelling", {"train": Dataset.from_dict({"text": ["ab"]})}, ("text",), None)
OTHER = Task("other", "language-modelling", {"train": Dataset.from_dict({"text": ["xy"]})}, ("text",), None)
CALLS: list[tuple[str, float, int]] = []


def skilled(d_p: float, name: str) -> float:
    return (-1 + 0.16 * np.log(d_p)) ** 1.5 * 0.7 if name == "text" else 0.5 - 0.02 * np.log(d_p)


def pretrain(model: Model, data: Task, budget: Budget, seed: int) -> Model:
    CALLS.append((data.name, budget.amount, seed))
    model.backbone.skill.fill_(skilled(budget.amount, data.name) + 0.002 * seed)  # type: ignore[operator]
    return model


def finetune(model: Model, task: Task, seed: int) -> Model:
    model = copy.deepcopy(model)
    model.backbone.skill += 0.001 * (len(task.rows("train")) < 40)  # type: ignore[operator]
    return model


def grid(**changed) -> TransferLawStudy:
    settings = {
        "pretrain_sets": {"aligned": TEXT, "other": OTHER},
        "d_p_grid": GRID,
        "finetune_set": TASK,
        "d_f_grid": [40],
        "model_factory": lambda seed: Model(Planted(), kind="module", pooling="none"),
        "seeds": 2,
        "pretrain": pretrain,
        "finetune": finetune,
    }
    return TransferLawStudy(**(settings | changed))


def test_planted_scores_come_back_and_the_aligned_set_is_advised(tmp_path: Path) -> None:
    CALLS.clear()
    found = grid().run(tmp_path, executor="serial", progress=False)
    runs = found.runs
    assert len(runs) == 2 * 4 * 2 and set(runs.groups) == {"aligned", "other"}
    assert len(CALLS) == len(set(CALLS)) == 2 * 4 * 2
    wanted = [
        skilled(d, {"aligned": "text", "other": "other"}[g]) + 0.002 * name.endswith("1")
        for d, g, name in zip(runs.tokens, runs.groups, runs.names, strict=True)
    ]
    np.testing.assert_allclose(runs.metrics["accuracy"], wanted, atol=2e-3)
    assert found.reference == pytest.approx({40.0: 0.2}, abs=2e-3)
    first, last = found.advisor().recommend(3e5, 40)
    assert first.pretraining == "aligned" and first.verdict.aligned and not last.verdict.aligned
    assert first.score == pytest.approx(skilled(3e5, "text"), abs=0.02)


def test_a_second_run_computes_nothing_and_other_data_is_another_question(tmp_path: Path) -> None:
    small = {"d_p_grid": GRID[:1], "d_f_grid": [8, 40], "pretrain_sets": {"aligned": TEXT}, "seeds": 1}
    CALLS.clear()
    first = grid(**small).run(tmp_path, executor="serial", progress=False)
    assert len(CALLS) == 1 and len(first.runs) == 2  # one pretraining serves both amounts of fine-tuning
    CALLS.clear()
    again = grid(**small).run(tmp_path, executor="serial", progress=False)
    assert not CALLS and np.array_equal(again.runs.tokens, first.runs.tokens)
    keys = {
        grid(**changed).study.cells()[0].key
        for changed in ({}, {"pretrain_sets": {"aligned": OTHER}}, {"score": "loss"}, {"finetune": None})
    }
    assert len(keys) == 4


def test_with_real_training_the_table_is_whole(tmp_path: Path, letters: Task) -> None:
    text = Task(
        "letters", "language-modelling", {"train": letters.rows("train").select_columns(["text"])}, ("text",), None
    )
    study = TransferLawStudy(
        {"letters": text}, [800, 1600], letters, [16], lambda seed: small("causal-lm", "nano", seed=seed), seeds=1
    )
    found = study.run(tmp_path, executor="serial", progress=False)
    assert found.runs.tokens.tolist() == [800, 1600] and found.runs.metrics["finetune_rows"].tolist() == [16, 16]
    assert (found.runs.loss > 0).all() and len(set(found.runs.loss)) == 2 and set(found.reference) == {16.0}
    tokens = found.result.rows().filter(arm="letters, 1600 tokens, 16 rows")["tokens"][0]
    assert tokens > 1300  # what was pretrained is charged to the arm


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({"d_p_grid": [10, 5]}, "d_p_grid"),
        ({"d_f_grid": []}, "d_f_grid"),
        ({"d_f_grid": [41]}, "41 rows are asked of a train split of 40"),
        ({"pretrain_sets": {}}, "at least one set"),
    ],
)
def test_bad_input(changed: dict, word: str) -> None:
    with pytest.raises(InputError, match=word):
        grid(**changed)


def test_a_failed_run_is_named(tmp_path: Path) -> None:
    def broken(model: Model, task: Task, seed: int) -> Model:
        raise InputError("the planted failure")

    with pytest.raises(InputError, match="the planted failure"):
        grid(finetune=broken, d_p_grid=[1e3], d_f_grid=[8]).run(tmp_path, executor="serial", progress=False)
