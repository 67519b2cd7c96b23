import pytest
import torch
from datasets import Dataset

from downriver.core.errors import InputError
from downriver.merge import average, diagonal_fisher, fisher, open_store
from downriver.models import small
from downriver.tasks.task import Task


def state(seed: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {"w": torch.randn(9, 7, generator=g), "b": torch.randn(5, generator=g)}


A, B = state(0), state(1)
F, G = ({name: value.square() for name, value in state(seed).items()} for seed in (2, 3))


def test_it_is_the_weighted_mean_entry_by_entry():
    found = fisher([A, B], A, fishers=[F, G], weights=[2.0, 1.0])
    for name in A:
        f, g = 2 * F[name].double().clamp_min(1e-6), G[name].double().clamp_min(1e-6)
        torch.testing.assert_close(found[name], ((f * A[name] + g * B[name]) / (f + g)).float())
    same = fisher([A, B], A, fishers=[F, F])
    zero = {name: torch.zeros_like(value) for name, value in F.items()}
    for name, value in average([A, B], A).items():
        torch.testing.assert_close(same[name], value)
        torch.testing.assert_close(fisher([A, B], A, fishers=[zero, zero])[name], value)


def mood() -> Task:
    rows = Dataset.from_dict({"text": ["good", "bad", "fine", "poor", "so"], "label": [1, 0, 1, 0, 1]})
    return Task("mood", "text-classification", {"train": rows}, ("text",), "label")


def test_the_diagonal_is_the_mean_square_of_single_gradients(tmp_path):
    task = mood()
    model = small("text-encoder", "nano").with_head(task)
    before = {name: p.clone() for name, p in model.named_parameters()}
    found = diagonal_fisher(model, task, examples=5)
    expected = torch.zeros_like(model.head.weight)
    collate = model.collate(task)
    for row in task.rows("train"):
        model.zero_grad()
        model.eval()(**collate([row]))["loss"].backward()
        expected += model.head.weight.grad.square() / 5
    torch.testing.assert_close(found["downriver_head.weight"], expected.detach(), rtol=1e-4, atol=1e-8)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    model.save(tmp_path / "model")
    assert set(found) <= set(open_store(tmp_path / "model").names())
    merged = fisher([model, model], model, fishers=[found, found], include="downriver_head")
    torch.testing.assert_close(merged.head.weight, model.head.weight)


def test_what_is_refused():
    with pytest.raises(InputError, match="fishers has 1 entries for 2 models"):
        fisher([A, B], A, fishers=[F])
    with pytest.raises(InputError, match="floor is 0"):
        fisher([A, B], A, fishers=[F, G], floor=0)
    with pytest.raises(InputError, match="weights are"):
        fisher([A, B], A, fishers=[F, G], weights=[1.0, -1.0])
    with pytest.raises(InputError, match="lacks 'w'"):
        fisher([A, B], A, fishers=[F, {"b": G["b"]}])
