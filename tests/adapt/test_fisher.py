"""The Fisher subspace: against gradients taken one by one, dense eigenvectors, its approximations, files, bad input."""

import pytest
import torch
import transformers
from datasets import Dataset
from torch import nn

from downriver.adapt.fisher import Directions, FisherSubspace
from downriver.core.errors import InputError
from downriver.models import load, small
from downriver.models.model import Model
from downriver.tasks.task import Task
from downriver.training import TokenRows

TARGETS = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]


@pytest.fixture(scope="module")
def model():
    return small("causal-lm", "nano")


@pytest.fixture(scope="module")
def rows():
    ids = [[1, 7, 8, 9, 2], [1, 17, 2], [1, 30, 31, 32, 33, 2], [1, 40, 41, 2]]
    labels = [[-100, 7, 8, 9, 2], [-100, 17, 2], [-100, -100, 31, 32, 33, 2], [-100, -100, 41, 2]]
    return TokenRows("refusals", {"train": Dataset.from_dict({"input_ids": ids, "labels": labels})})


def one_by_one(model, rows, name):
    """The gradient of every row's summed log-likelihood with respect to one weight."""
    found = []
    weight = model.backbone.get_submodule(name).weight
    for row in rows.rows("train"):
        logits = model.backbone(torch.tensor([row["input_ids"]])).logits[0, :-1]
        loss = nn.functional.cross_entropy(logits, torch.tensor(row["labels"][1:]), ignore_index=-100, reduction="sum")
        found.append(torch.autograd.grad(loss, weight)[0])
    return torch.stack(found)


def projector(directions):
    u = torch.stack([directions.combine(e) for e in torch.eye(len(directions.eigenvalues))]).flatten(1)
    return u, u.T @ u


@pytest.mark.parametrize("name", TARGETS)
def test_exact_equals_the_dense_matrix(model, rows, name):
    g = one_by_one(model, rows, name).flatten(1).double()
    _, singular, vectors = torch.linalg.svd(g, full_matrices=False)  # of F = gᵀg/N
    values = singular.square() / len(g)
    for batch_size in (1, 2, 4):  # padding and batches change nothing
        found = FisherSubspace.estimate(model, rows, rank=3, targets=TARGETS, batch_size=batch_size)[name]
        assert torch.allclose(found.eigenvalues.double(), values[:3], rtol=1e-4)
        u, p = projector(found)
        assert torch.allclose(u @ u.T, torch.eye(3), atol=1e-4)
        expected = vectors[:3].T
        assert torch.allclose(p.double(), expected @ expected.T, atol=1e-3)
    small_groups = FisherSubspace.estimate(model, rows, rank=3, targets=TARGETS, max_bytes=1)[name]
    assert torch.allclose(small_groups.eigenvalues, found.eigenvalues, rtol=1e-4)


def test_the_diagonal(model, rows):
    [name, _] = TARGETS
    squares = one_by_one(model, rows, name).square().mean(0).flatten()
    found = FisherSubspace.estimate(model, rows, rank=10, method="diag", targets=TARGETS)[name]
    assert torch.allclose(found.eigenvalues, squares.sort(descending=True).values[:10], rtol=1e-4)
    assert set(found.entries.tolist()) == set(squares.topk(10).indices.tolist())
    delta = torch.randn(32, 32)
    assert torch.equal(found.coefficients(delta), delta.flatten()[found.entries])
    assert found.combine(found.coefficients(delta)).count_nonzero() == 10


def test_kfac_is_exact_where_the_fisher_is_a_product():
    """One token a sample, every input with every output gradient: F = A ⊗ B."""
    torch.manual_seed(0)
    x, delta = torch.randn(6, 4), torch.randn(5, 3)
    from downriver.adapt.fisher import _Exact, _Kfac

    layer = nn.Linear(4, 3)
    exact, kfac = _Exact(layer), _Kfac(layer)
    for measure in (exact, kfac):
        measure.add(x.repeat_interleave(5, 0)[:, None], delta.repeat(6, 1)[:, None])
    a, b = exact.directions(5, 30), kfac.directions(5, 30)
    assert torch.allclose(a.eigenvalues, b.eigenvalues, rtol=1e-4)
    assert torch.allclose(projector(a)[1], projector(b)[1], atol=1e-3)
    turned = _Kfac(transformers.pytorch_utils.Conv1D(3, 4))
    turned.add(x.repeat_interleave(5, 0)[:, None], delta.repeat(6, 1)[:, None])
    assert turned.directions(5, 30).shape == (4, 3) and b.shape == (3, 4)


@pytest.mark.parametrize("method", ["exact", "kfac", "diag"])
def test_a_share_of_the_trace_and_files(model, rows, tmp_path, method):
    few = FisherSubspace.estimate(model, rows, rank=0.5, method=method, targets=TARGETS)
    more = FisherSubspace.estimate(model, rows, rank=0.99, method=method, targets=TARGETS)
    assert all(len(few[name].eigenvalues) <= len(more[name].eigenvalues) for name in TARGETS)
    assert any(len(few[name].eigenvalues) < len(more[name].eigenvalues) for name in TARGETS)
    more.save(tmp_path / "f.safetensors")
    again = FisherSubspace.load(tmp_path / "f.safetensors")
    delta = torch.randn(32, 32, generator=torch.Generator().manual_seed(0))
    for name in list(more)[:1]:
        assert torch.equal(again[name].coefficients(delta), more[name].coefficients(delta))
        assert torch.equal(again[name].eigenvalues, more[name].eigenvalues) and again[name].shape == (32, 32)


def test_the_order_of_samples_and_the_model_do_not_change(model, rows):
    before = [p.requires_grad for p in model.parameters()]
    first = FisherSubspace.estimate(model, rows, rank=2, targets=TARGETS, seed=0)
    second = FisherSubspace.estimate(model, rows, rank=2, targets=TARGETS, seed=5)
    for name in TARGETS:
        assert torch.allclose(first[name].eigenvalues, second[name].eigenvalues, rtol=1e-4)
    assert before == [p.requires_grad for p in model.parameters()]
    assert all(p.grad is None for p in model.parameters())


def test_classification_and_transposed_layers():
    table = Dataset.from_dict({"text": ["good", "bad", "fine"], "label": [1, 0, 1]})
    task = Task("mood", "text-classification", {"train": table}, ("text",), "label")
    found = FisherSubspace.estimate(small("text-encoder", "nano").with_head(task), task, rank=2)
    assert len(found) == 12 and all(len(found[name].eigenvalues) == 2 for name in found)
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=64, bos_token_id=1, eos_token_id=2)
    gpt = Model(transformers.GPT2LMHeadModel(config), kind="causal-lm", pooling="last", source="gpt", max_length=8)
    rows = TokenRows("rows", {"train": Dataset.from_dict({"input_ids": [[1, 5, 6], [1, 7, 8]]})})
    found = FisherSubspace.estimate(gpt, rows, rank=2)
    assert found["transformer.h.0.attn.c_attn"].shape == (16, 48)  # as it is stored


def test_bad_input(model, rows, tmp_path):
    for rank in (0, -1, 1.5):
        with pytest.raises(InputError, match="rank"):
            FisherSubspace.estimate(model, rows, rank=rank)
    with pytest.raises(InputError, match="method"):
        FisherSubspace.estimate(model, rows, method="full")
    with pytest.raises(InputError, match="'model\\.norm' is no linear layer"):
        FisherSubspace.estimate(model, rows, targets=["model.norm"])
    with pytest.raises(InputError, match="is empty"):
        FisherSubspace.estimate(model, rows, samples=0)
    with pytest.raises(InputError, match="is no file"):
        FisherSubspace.load(tmp_path / "nothing")
    model.save(tmp_path / "model")
    with pytest.raises(InputError, match="holds no Fisher subspace"):
        FisherSubspace.load(tmp_path / "model" / "model.safetensors")
    with pytest.raises(InputError, match="without matrices"):
        FisherSubspace({})
    assert load(tmp_path / "model").kind == "causal-lm"


def test_directions_project():
    u = torch.linalg.qr(torch.randn(12, 3, generator=torch.Generator().manual_seed(1)))[0].T.reshape(3, 3, 4)
    directions = Directions((3, 4), torch.tensor([3.0, 2.0, 1.0]), dense=u)
    delta = torch.randn(3, 4, generator=torch.Generator().manual_seed(2))
    part = directions.combine(directions.coefficients(delta))
    assert torch.allclose(directions.combine(directions.coefficients(part)), part, atol=1e-6)
    assert abs(float((part * (delta - part)).sum())) < 1e-5
