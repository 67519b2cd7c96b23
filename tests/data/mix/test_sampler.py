"""The sampler: shares kept to within one, every row before any again, phases, resumption, workers, bad input."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from downriver.core import InputError
from downriver.data.mix.sampler import LONGEST, MixtureSampler, MixtureStream

SIZES = {"web": 700, "code": 90, "wiki": 31}
SHARES = {"web": 0.7, "code": 0.28, "wiki": 0.02}


def sources(sampler: MixtureSampler, visits: int) -> np.ndarray:
    return np.array([sampler.source(visit)[0] for visit in range(visits)])


def test_shares_are_kept_to_within_one_at_every_period_and_spread_inside():
    sampler = MixtureSampler(SIZES, SHARES, seed=3)
    found = sources(sampler, 10 * 1024)
    for end in range(1024, len(found) + 1, 1024):
        counts = np.bincount(found[:end], minlength=3)
        assert np.abs(counts - np.array(list(SHARES.values())) * end).max() < 1
        assert sampler.counts(end) == dict(zip(SIZES, counts.tolist(), strict=True))
    running = np.cumsum(found[:, None] == np.arange(3), axis=0)
    ideal = np.arange(1, len(found) + 1)[:, None] * np.array(list(SHARES.values()))
    assert np.abs(running - ideal).max() < 3  # never further than the number of sources


def test_counts_agree_with_the_visits_anywhere():
    sampler = MixtureSampler(SIZES, SHARES, phases=[(700, {"web": 0, "code": 1, "wiki": 1})])
    found = sources(sampler, 2000)
    for visits in (0, 1, 699, 700, 701, 1500, 2000):
        assert list(sampler.counts(visits).values()) == np.bincount(found[:visits], minlength=3).tolist()


def test_every_row_comes_once_before_any_comes_again():
    sampler = MixtureSampler(SIZES, {"web": 1, "code": 1, "wiki": 1})
    rows = [sampler.row(visit) for visit in range(300)]
    wiki = [row for row in rows if row >= 790]
    assert sorted(wiki[:31]) == sorted(wiki[31:62]) == list(range(790, 821))
    assert wiki[:31] != wiki[31:62]
    code = [row for row in rows if 700 <= row < 790]
    assert len(set(code[:90])) == 90


def test_a_visit_depends_on_its_number_and_the_seed_alone():
    forwards, backwards = (MixtureSampler(SIZES, SHARES, seed=1) for _ in range(2))
    there = [forwards.row(visit) for visit in range(5000)]
    back = [backwards.row(visit) for visit in reversed(range(5000))]
    assert there == back[::-1]
    assert MixtureSampler(SIZES, SHARES, seed=1).row(10**9) == MixtureSampler(SIZES, SHARES, seed=1).row(10**9)
    assert there != [MixtureSampler(SIZES, SHARES, seed=2).row(visit) for visit in range(5000)]


def test_a_period_of_the_batch_size_gives_exact_batches():
    sampler = MixtureSampler({"a": 50, "b": 50, "c": 50}, {"a": 10, "b": 5, "c": 1}, period=16)
    for batch in sources(sampler, 16 * 40).reshape(40, 16):
        assert np.bincount(batch, minlength=3).tolist() == [10, 5, 1]


def test_phases_switch_at_their_visit_and_go_on_with_unseen_rows():
    weights = {"conditioned": 1, "plain": 0}
    sampler = MixtureSampler(
        {"conditioned": 900, "plain": 200}, weights, phases=[(900, {"conditioned": 0, "plain": 1})]
    )
    found = sources(sampler, 1000)
    assert (found[:900] == 0).all() and (found[900:] == 1).all()
    assert sampler.epochs(1000) == {"conditioned": 1.0, "plain": 0.5}
    again = MixtureSampler({"a": 1000, "b": 1000}, {"a": 1, "b": 1}, phases=[(600, {"a": 3, "b": 1})])
    rows = [again.row(visit) for visit in range(1000)]
    assert len(set(rows)) == 1000  # no row twice across the border


def test_weights_of_tokens_give_fewer_of_the_longer_rows():
    lengths = {"web": 100, "code": 400, "wiki": 50}
    sampler = MixtureSampler(SIZES, {"web": 1, "code": 1, "wiki": 1}, lengths=lengths)
    counts = sampler.counts(20 * 1024)
    tokens = np.array([counts[name] * lengths[name] for name in SIZES])
    np.testing.assert_allclose(tokens / tokens.sum(), 1 / 3, atol=0.002)


def test_a_small_share_gets_a_longer_period():
    sampler = MixtureSampler({"a": 10, "b": 10}, {"a": 1 - 1e-5, "b": 1e-5})
    assert sampler.counts(300_000)["b"] == 3


def stream(visits: int | None = None) -> MixtureStream:
    sampler = MixtureSampler({"a": 20, "b": 5}, {"a": 3, "b": 1}, seed=5)
    return MixtureStream({"a": [f"a{i}" for i in range(20)], "b": [f"b{i}" for i in range(5)]}, sampler, visits)


def test_a_stream_continues_where_its_state_was_taken():
    whole = list(stream(200))
    first, rest = stream(200), stream(200)
    rows = iter(first)
    begun = [next(rows) for _ in range(77)]
    rest.load_state_dict(first.state_dict())
    assert begun + list(rest) == whole and len(whole) == 200
    assert list(first.__class__(first.sources, first.sampler, 200)) == whole


def test_workers_share_the_visits():
    alone = sorted(stream(120))
    shared = [row for batch in DataLoader(stream(120), batch_size=7, num_workers=2) for row in batch]
    assert sorted(shared) == alone


def test_processes_share_the_visits():
    sampler, sources = stream().sampler, stream().sources
    parts = [MixtureStream(sources, sampler, 121, part=(rank, 3)) for rank in range(3)]
    whole, rows = list(stream(121)), [list(part) for part in parts]
    assert [len(some) for some in rows] == [41, 40, 40]
    assert rows == [whole[rank::3] for rank in range(3)]
    loaded = [row for part in parts for batch in DataLoader(part, batch_size=8, num_workers=2) for row in batch]
    assert sorted(loaded) == sorted(whole)
    with pytest.raises(InputError, match=r"part is \(3, 3\)"):
        MixtureStream(sources, sampler, part=(3, 3))


def test_a_trainer_takes_the_stream_and_resumes_exactly(tmp_path):
    """Interrupted after four of eight steps and continued from its checkpoint, transformers' Trainer ends the same."""
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    seen: list[list[int]] = []

    def collate(rows):
        seen.append([row[0] for row in rows])
        ids = torch.tensor(rows)
        return {"input_ids": ids, "labels": ids}

    def train(folder, steps, resume=None):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
        )
        settings = TrainingArguments(
            str(folder), max_steps=steps, per_device_train_batch_size=4, save_steps=4, report_to=[], use_cpu=True,
            disable_tqdm=True, logging_strategy="no", lr_scheduler_type="constant", dataloader_num_workers=0,
        )  # fmt: skip
        sources = {"a": [[i, 1, 2] for i in range(20)], "b": [[20 + i, 3, 4] for i in range(5)]}
        data = MixtureStream(sources, MixtureSampler({"a": 20, "b": 5}, {"a": 3, "b": 1}, period=4, seed=2))
        trainer = Trainer(LlamaForCausalLM(config), settings, train_dataset=data, data_collator=collate)
        trainer.train(resume_from_checkpoint=resume)
        return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])

    whole = train(tmp_path / "whole", 8)
    assert all(sum(row >= 20 for row in batch) == 1 for batch in seen)
    train(tmp_path / "cut", 4)
    resumed = train(tmp_path / "cut", 8, str(tmp_path / "cut" / "checkpoint-4"))
    assert torch.equal(whole, resumed)


def test_the_state_survives_a_trainers_checkpoint(tmp_path):
    first = stream()
    rows = iter(first)
    for _ in range(33):
        next(rows)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = stream()
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    later = iter(second)
    assert [next(rows) for _ in range(40)] == [next(later) for _ in range(40)]


@pytest.mark.parametrize(
    ("weights", "settings", "said"),
    [
        ({"web": 1, "cod": 1}, {}, "source in weights 'cod'"),
        ({"web": 1, "code": 1}, {}, "nothing of source 'wiki'"),
        ({"web": -1, "code": 1, "wiki": 1}, {}, "numbers of at least 0"),
        ({"web": 0, "code": 0, "wiki": 0}, {}, "one of them above"),
        ({"web": 1, "code": 0, "wiki": 0.1 / LONGEST}, {}, "'wiki' has a share"),
        (SHARES, {"period": 16}, "period is 16: 50 visits at least"),
        (SHARES, {"phases": [(5, SHARES), (5, SHARES)]}, "rising numbers"),
        (SHARES, {"lengths": {"web": 1, "code": 0, "wiki": 2}}, "positive numbers of tokens"),
    ],
)
def test_bad_settings_are_named(weights, settings, said):
    with pytest.raises(InputError, match=said):
        MixtureSampler(SIZES, weights, **settings)


def test_bad_sources_are_named():
    with pytest.raises(InputError, match=r"'b' has a share of 0\.5 and no rows"):
        MixtureSampler({"a": 1, "b": 0}, {"a": 1, "b": 1})
    with pytest.raises(InputError, match="no sources"):
        MixtureSampler({}, {})
    with pytest.raises(InputError, match="has 1 rows and the sampler knows 2"):
        MixtureStream({"a": ["x"]}, MixtureSampler({"a": 2}, {"a": 1}))
    with pytest.raises(InputError, match="visit -1"):
        MixtureSampler({"a": 2}, {"a": 1}).row(-1)
