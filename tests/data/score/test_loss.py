"""Losses: transformers' own numbers, whatever the batch, padding, shard and window; two columns from one adapter."""

import copy
import itertools
from pathlib import Path

import numpy as np
import peft
import pytest
import torch

from downriver.core.cost import metered
from downriver.core.errors import DownriverError, InputError
from downriver.data.documents import write_documents
from downriver.data.score import LossScorer, ScoreTable
from downriver.models import Model, small

TEXTS = [f"{'the river runs to the sea and back again ' * (i % 5)}number {i}." for i in range(24)]


def _random(model: Model, seed: int = 0) -> Model:
    """Weights far from those of a fresh model, so that nothing is near uniform."""
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(seed)
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.add_(torch.randn_like(weight) * 0.2)
    return model


@pytest.fixture(scope="module")
def lm() -> Model:
    return _random(small("causal-lm", "nano"))


def _theirs(model: Model, text: str) -> float:
    ids = torch.tensor([model.processor(text)["input_ids"]])
    with torch.no_grad():
        return float(model.backbone(input_ids=ids, labels=ids).loss)


def test_the_loss_is_that_of_transformers(lm: Model) -> None:
    short = [text[:100] for text in TEXTS]
    scorer = LossScorer(lm)
    got = scorer.score(short)
    assert np.allclose(got, [_theirs(lm, text) for text in short], rtol=0, atol=1e-5)
    tokens = [len(lm.processor(text)["input_ids"]) - 1 for text in short]
    assert np.allclose(LossScorer(lm, reduction="sum").score(short), got * tokens, rtol=1e-6)
    lm.train()
    assert np.allclose(scorer.score(short), got, atol=1e-6) and lm.training
    lm.eval()
    assert np.array_equal(LossScorer(lm.backbone, lm.processor).score(short), got)


def test_half_precision_is_near(lm: Model) -> None:
    half = LossScorer(lm, dtype=torch.bfloat16)
    assert np.allclose(half.score(TEXTS[:6]), LossScorer(lm).score(TEXTS[:6]), rtol=0.02)
    assert half.fingerprint != LossScorer(lm).fingerprint


def test_batches_padding_and_order_do_not_matter(lm: Model) -> None:
    whole = LossScorer(lm, batch_tokens=100_000).score(TEXTS)
    for tokens in (2, 150, 1000):
        assert np.allclose(LossScorer(lm, batch_tokens=tokens).score(TEXTS), whole, rtol=0, atol=1e-5)
    order = np.random.default_rng(0).permutation(len(TEXTS))
    assert np.allclose(LossScorer(lm).score([TEXTS[i] for i in order]), whole[order], rtol=0, atol=1e-5)


def test_shards_do_not_matter_and_bytes_repeat(tmp_path: Path, lm: Model) -> None:
    rows = [{"id": str(i), "text": text} for i, text in enumerate(TEXTS)]
    whole = LossScorer(lm).score(TEXTS)
    for size in (5, 24):
        write_documents(tmp_path / f"source{size}", rows, shard_rows=size)
        for run in "ab":
            table = ScoreTable(tmp_path / f"{run}{size}")
            added = table.add("loss", LossScorer(lm), tmp_path / f"source{size}")
            assert added.cost.flops > 0
            assert np.allclose(table.frame().collect()["loss"].to_numpy(), whole, rtol=0, atol=1e-5)
        first, second = (sorted((tmp_path / f"{run}{size}").rglob("*.parquet")) for run in "ab")
        assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]


def test_long_texts_are_read_in_windows(lm: Model) -> None:
    text, context = TEXTS[4], 40
    ids = lm.processor(text)["input_ids"]
    wanted, predicted = 0.0, 0
    for at in range(0, len(ids) - 1, context - 1):
        window = torch.tensor([ids[at : at + context]])
        with torch.no_grad():
            wanted += float(lm.backbone(input_ids=window, labels=window).loss) * (window.shape[1] - 1)
        predicted += window.shape[1] - 1
    assert predicted == len(ids) - 1  # every token but the first, once
    got = LossScorer(lm, context=context).score([text])[0]
    assert got == pytest.approx(wanted / predicted, abs=1e-5)
    assert LossScorer(lm, context=10_000).context == 128  # what the model can take


def _perturbed_lora(model: Model) -> Model:
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    tuned = copy.copy(model)
    tuned = Model(
        peft.get_peft_model(copy.deepcopy(model.backbone), config),
        kind="causal-lm",
        processor=model.processor,
        pooling="last",
        max_length=model.max_length,
    )
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            if "lora_B" in name:
                weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    return tuned


def test_an_adapter_gives_prior_and_conditional(tmp_path: Path, lm: Model) -> None:
    tuned = _perturbed_lora(lm)
    scorer = LossScorer(tuned)
    assert scorer.columns == ("prior", "conditional")
    got = scorer.score(TEXTS)
    assert got.shape == (24, 2) and np.allclose(got[:, 0], LossScorer(lm).score(TEXTS), rtol=0, atol=1e-5)
    merged = copy.deepcopy(tuned.backbone).merge_and_unload()
    assert np.allclose(got[:, 1], LossScorer(merged, lm.processor).score(TEXTS), rtol=0, atol=1e-4)
    assert np.abs(got[:, 0] - got[:, 1]).min() > 1e-4
    only = LossScorer(tuned, prior=False)
    assert only.columns == ("loss",) and np.allclose(only.score(TEXTS), got[:, 1], atol=1e-6)
    table = ScoreTable(tmp_path)
    table.add("lm", scorer, [{"text": text, "id": str(i)} for i, text in enumerate(TEXTS)])
    assert table.columns == ["lm_prior", "lm_conditional"]
    table.comparable("lm_prior", "lm_conditional")


def test_masked_models_have_a_pseudo_loss() -> None:
    model = _random(small("masked-lm", "nano"))
    tokenizer = model.processor
    texts = ["the sea", "a river runs", "x"]
    wanted = []
    for text in texts:  # one token hidden at a time
        ids = tokenizer(text)["input_ids"]
        losses = []
        for place in range(1, len(ids) - 1):
            seen = torch.tensor([ids])
            seen[0, place] = tokenizer.mask_token_id
            with torch.no_grad():
                logits = model.backbone(input_ids=seen).logits[0, place]
            losses.append(-float(torch.log_softmax(logits, dim=0)[ids[place]]))
        wanted.append(np.mean(losses))
    exact = LossScorer(model, stride=None)
    assert np.allclose(exact.score(texts), wanted, rtol=0, atol=1e-5)
    assert np.allclose([exact.score([text])[0] for text in texts], wanted, rtol=0, atol=1e-5)
    every = LossScorer(model)
    long = [*TEXTS[:9], "x"]
    assert np.allclose(every.score(long), [every.score([text])[0] for text in long], rtol=0, atol=1e-5)
    assert every.fingerprint != exact.fingerprint
    windows, owner = every._windows(["ab " * 200])
    assert set(owner) == {0} and all(len(w) <= 128 and w[0] == 1 and w[-1] == 2 for w in windows)
    assert [i for w in windows for i in w[1:-1]] == tokenizer("ab " * 200)["input_ids"][1:-1]


def test_fingerprints_follow_what_the_numbers_depend_on(lm: Model) -> None:
    base = LossScorer(lm)
    assert base.fingerprint == LossScorer(copy.deepcopy(lm), batch_tokens=64).fingerprint
    other = _random(small("causal-lm", "nano"), 1)
    others = [LossScorer(other), LossScorer(lm, context=64), LossScorer(lm, reduction="sum")]
    assert len({s.fingerprint for s in (base, *others)}) == 4
    assert base.reads == others[0].reads and len({base.reads, others[1].reads, others[2].reads}) == 3


def test_flops_are_charged_in_proportion(lm: Model) -> None:
    scorer = LossScorer(lm, batch_tokens=128)
    with metered() as once:
        scorer.score(["a" * 126])
    with metered() as thrice:
        scorer.score(["a" * 126] * 3)
    assert once.cost.flops > 2 * 128 * 25_000 and thrice.cost.flops == pytest.approx(3 * once.cost.flops)


def test_short_and_empty_texts(lm: Model) -> None:
    tokenizer = copy.deepcopy(lm.processor)
    tokenizer.backend_tokenizer.post_processor = None
    scorer = LossScorer(lm.backbone, tokenizer)
    assert np.isnan(scorer.score(["a"])[0]) and np.isfinite(scorer.score(["a", "ab"])[1])
    with pytest.raises(InputError, match="scorer 'loss', document 'e': its text is empty"):
        scorer.score([{"text": "", "id": "e"}])


def test_what_does_not_belong_together_is_refused(lm: Model) -> None:
    larger = copy.deepcopy(lm.processor)
    larger.add_tokens(["<extra>"])
    with pytest.raises(InputError, match=r"the tokenizer has ids up to 260 and .* knows 260 tokens"):
        LossScorer(lm.backbone, larger)
    with pytest.raises(InputError, match="a text-encoder model: a causal-lm is expected"):
        LossScorer(small("text-encoder", "nano"))
    for bad in ({"context": 1}, {"batch_tokens": 0}, {"stride": 0}):
        with pytest.raises(InputError, match="at least 2, 2 and 1 are expected"):
            LossScorer(lm, **bad)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="reduction 'median'"):
        LossScorer(lm, reduction="median")  # type: ignore[arg-type]


def test_a_loss_that_is_no_number_names_the_document(lm: Model) -> None:
    broken = copy.deepcopy(lm)
    with torch.no_grad():
        next(itertools.islice(broken.parameters(), 1, None)).fill_(float("nan"))
    with pytest.raises(DownriverError, match=r"scorer 'loss', document 'd5': the loss of .* is .*nan.*: broken"):
        LossScorer(broken).score([{"text": "a river", "id": "d5"}])
