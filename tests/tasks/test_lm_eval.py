"""A task of the harness, written here with local rows, gives the measurements that the model's losses imply."""

import json

import pytest
import torch

from downriver import models, tasks
from downriver.core import InputError

pytest.importorskip("lm_eval")

YAML = """
task: opposites_here
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - metric: acc
metadata:
  version: 3
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    words = ["small", "large", "cold", "warm", "old", "new"]
    rows = [
        {"question": f"Item {i}: the opposite is", "choices": [words[i % 6], words[(i + 3) % 6]], "answer": i % 2}
        for i in range(12)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "opposites_here.yaml").write_text(YAML.format(file=tmp_path / "rows.jsonl"))
    return tmp_path, rows


def by_hand(model, row) -> int:
    scores = []
    for choice in row["choices"]:
        ids = model.processor(f"{row['question']} {choice}", return_tensors="pt")["input_ids"]
        start = len(model.processor(row["question"])["input_ids"])
        with torch.no_grad():
            logs = model(input_ids=ids)["logits"][0].log_softmax(dim=-1)
        scores.append(sum(logs[t - 1, ids[0, t]].item() for t in range(start, ids.shape[1])))
    return int(scores[1] > scores[0])


def test_a_task_of_ones_own_gives_measurements(folder):
    path, rows = folder
    model = models.small("causal-lm", "nano")
    before = torch.random.get_rng_state()
    found = {m.metric: m for m in tasks.lm_eval(model, "opposites_here", include_path=path)}
    expected = sum(by_hand(model, row) == row["answer"] for row in rows) / len(rows)
    assert found["acc"].value == pytest.approx(expected)
    assert found["acc_stderr"].value == pytest.approx((expected * (1 - expected) / (len(rows) - 1)) ** 0.5)
    assert (found["acc"].direction, found["acc_stderr"].direction) == ("higher", "none")
    assert found["acc"].task == "opposites_here"
    assert found["acc"].versions["task"] == "3"
    assert found["acc"].versions["lm_eval"].startswith("0.4")
    assert found["acc"].cost.parameters == sum(p.numel() for p in model.parameters())
    assert torch.equal(before, torch.random.get_rng_state())


def test_no_task_is_refused():
    with pytest.raises(InputError, match="at least one task"):
        tasks.lm_eval(models.small("causal-lm", "nano"), [])


@pytest.mark.slow
def test_an_unknown_task_is_refused_with_the_nearest(folder):
    with pytest.raises(InputError, match="unknown lm-eval task 'oposites_here': did you mean 'opposites_here'"):
        tasks.lm_eval(models.small("causal-lm", "nano"), ["oposites_here"], include_path=folder[0])
