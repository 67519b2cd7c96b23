"""Skill localisation: the mask's limits, its start, the gradient by hand, patches, and what is refused."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from downriver.core.errors import InputError
from downriver.core.seeds import seeded
from downriver.merge import graft, localize_skill
from downriver.merge.skill_grafting import overlap, union
from downriver.nn.sparse_patch import SparseMask, SparsePatch


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


@pytest.fixture
def task():
    """A network, one fine-tuned on twelve inputs with a frozen output layer, and the batches."""
    torch.manual_seed(0)
    old = nn.Sequential(nn.Linear(10, 24), nn.Tanh(), nn.Linear(24, 3))
    x = torch.randn(48, 10)
    y = (x[:, :3] * 2).argmax(1)
    new = copy.deepcopy(old)
    optimiser = torch.optim.SGD(new[0].parameters(), lr=0.5)
    for _ in range(80):
        optimiser.zero_grad()
        loss(new, (x, y)).backward()
        optimiser.step()
    return old, new, [(x[i : i + 16], y[i : i + 16]) for i in range(0, 48, 16)]


def everywhere(model, value):
    return SparseMask.of({name: torch.full(p.shape, value) for name, p in model.named_parameters()})


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_the_whole_mask_is_the_finetuned_model_and_none_the_pretrained(task):
    old, new, _ = task
    assert same(graft(old, new, everywhere(old, True)), new)
    assert same(graft(old, new, everywhere(old, False)), old)


def test_the_start_is_what_moved_most(task):
    old, new, batches = task
    found = localize_skill(old, new, loss, batches, sparsity=0.1, steps=0)
    delta = torch.cat([(q - p).flatten().abs() for p, q in zip(old.parameters(), new.parameters(), strict=True)])
    k = int(0.1 * len(delta))
    chosen = torch.cat([found.mask.dense(name, p.shape).flatten() for name, p in old.named_parameters()])
    assert found.mask.count == k and torch.equal(chosen.nonzero()[:, 0], delta.topk(k).indices.sort().values)
    assert set(found.mask.indices) <= {"0.weight", "0.bias"} and found.mask.total == len(delta)
    assert found.sparsity == k / len(delta) and sum(found.by_module().values()) == k


def test_one_step_is_the_gradient_of_the_relaxed_mask(task):
    """With a small bias the first step is large enough to be seen in which entries switch."""
    old, new, batches = task
    bias, lr, seed = 0.5, 3.0, 4
    found = localize_skill(old, new, loss, batches, sparsity=0.1, steps=1, bias=bias, lr=lr, seed=seed)
    before, after = ({n: p.detach() for n, p in m.named_parameters()} for m in (old, new))
    start = localize_skill(old, new, loss, batches, sparsity=0.1, steps=0).mask
    gamma0 = {name: start.dense(name, p.shape).float() for name, p in before.items()}
    with seeded("localize_skill", seed):
        scores = {name: torch.rand(p.shape, requires_grad=True) for name, p in before.items()}
    gammas = {n: gamma0[n] + (1 - 2 * gamma0[n]) * torch.sigmoid(scores[n] - bias) for n in scores}
    mixed = {n: before[n] + gammas[n] * (after[n] - before[n]) for n in scores}
    whole = sum(F.cross_entropy(functional_call(old, mixed, (x,)), y) for x, y in batches) / len(batches)
    whole.backward()
    hard = {}
    for name, s in scores.items():
        moved = s.detach() - lr * s.grad
        switched = (gamma0[name] > 0) ^ (moved > bias)
        hard[name] = switched & (after[name] != before[name])
    entries = sum(int(mask.sum()) for mask in hard.values())
    assert found.history[1]["entries"] == entries
    assert abs(found.history[1]["loss"] - float(whole.detach())) < 1e-5


def test_a_learnt_region_beats_what_moved_most_and_is_a_patch(task, tmp_path):
    old, new, batches = task
    found = localize_skill(old, new, loss, batches, sparsity=0.05, steps=30)

    def total(model):
        return float(sum(loss(model, batch) for batch in batches).detach())

    learned = total(found.apply(old))
    moved = {n: q.detach() - p.detach() for (n, p), q in zip(old.named_parameters(), new.parameters(), strict=True)}
    movement = total(graft(old, new, SparseMask.top(moved, found.mask.count)))
    assert learned < movement < total(old)
    assert all(not (moved[n].flatten()[places] == 0).any() for n, places in found.mask.indices.items())
    patch = SparsePatch.load(found.patch.save(tmp_path / "skill.safetensors"))
    state = {name: p.detach() for name, p in old.named_parameters()}
    applied = patch.apply(state)
    assert all(torch.equal(applied[n], p) for n, p in found.apply(old).named_parameters())
    assert all(torch.equal(v, state[n]) for n, v in patch.revert(applied).items())
    again = localize_skill(old, new, loss, batches, sparsity=0.05, steps=30)
    assert all(torch.equal(again.mask.indices[n], found.mask.indices[n]) for n in found.mask.indices)


def test_regions_of_several_skills(task):
    old, new, batches = task
    first = localize_skill(old, new, loss, batches, sparsity=0.05, steps=0)
    second = localize_skill(old, new, loss, batches, sparsity=0.1, steps=0)
    found = overlap([first, second])
    assert found[0].tolist() == [1, 1] and found[1, 1] == 1 and abs(found[1, 0] - 0.5) < 0.05
    assert union([first, second]).count == second.mask.count
    other = localize_skill(old, new, loss, batches, base="gradient", sparsity=0.1, steps=0).mask
    assert other.count == second.mask.count and overlap([second, other])[0, 1] < 1


def test_what_is_refused(task):
    old, new, batches = task
    with pytest.raises(InputError, match=r"'2\.bias'"):
        localize_skill(old, nn.Sequential(nn.Linear(10, 24), nn.Tanh(), nn.Linear(24, 4)), loss, batches)
    with pytest.raises(InputError, match=r"frozen parameter '0\.weight' differs"):
        localize_skill(old, new, loss, batches, frozen=r"^0\.")
    with pytest.raises(InputError, match="there is no skill"):
        localize_skill(old, old, loss, batches)
    with pytest.raises(InputError, match="is no entry: at least"):
        localize_skill(old, new, loss, batches, sparsity=1e-9)
    with pytest.raises(InputError, match="data is empty"):
        localize_skill(old, new, loss, [])
    with pytest.raises(InputError, match="unknown base 'size'"):
        localize_skill(old, new, loss, batches, base="size")
