"""Perplexity: exact against transformers' own loss, whatever the batch and the padding; the texts of the surrogate."""

import json
import math

import numpy as np
import pytest
import torch

from downriver.core.errors import InputError
from downriver.evaluate import SurrogatePerplexity, perplexity
from downriver.evaluate.perplexity import PACKAGED, packaged_texts, sentences
from downriver.models import Model, small

TEXTS = ["a river runs to the sea", "no", "the mill stands by the water and turns", "rain"]


@pytest.fixture(scope="module")
def lm() -> Model:
    model = small("causal-lm", "nano", seed=3)
    with torch.no_grad():  # sharper than a fresh model, so that texts differ
        model.backbone.lm_head.weight.mul_(5)
    return model


def alone(model: Model, text: str, start: bool = False) -> tuple[float, int]:
    """exp of the loss that transformers gives for one unpadded text."""
    ids = model.processor(text, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([[model.processor.bos_token_id, *ids] if start else ids])
    with torch.no_grad():
        return math.exp(model.backbone(input_ids=ids, labels=ids).loss.item()), ids.shape[1] - 1


@pytest.mark.parametrize("start", [False, True])
def test_every_text_agrees_with_the_loss_of_transformers(lm, start):
    found = perplexity(lm, TEXTS, start_token=start)
    expected = [alone(lm, text, start) for text in TEXTS]
    assert found.per_text == pytest.approx([p for p, _ in expected], rel=1e-5)
    assert found.n_tokens.tolist() == [n for _, n in expected]
    assert found.score == pytest.approx(np.mean([p for p, _ in expected]), rel=1e-5)


def test_exp_of_mean_weighs_tokens(lm):
    mean_of_exp, exp_of_mean = (perplexity(lm, TEXTS, reduction=r) for r in ("mean_of_exp", "exp_of_mean"))
    nats = np.log(mean_of_exp.per_text) * mean_of_exp.n_tokens
    assert exp_of_mean.score == pytest.approx(np.exp(nats.sum() / mean_of_exp.n_tokens.sum()), rel=1e-9)
    assert exp_of_mean.score != pytest.approx(mean_of_exp.score, rel=0.01)  # the two differ by design


@pytest.mark.parametrize("batch_size", [1, 2, 64])
@pytest.mark.parametrize("side", ["left", "right"])
def test_batches_padding_and_order_change_nothing(lm, batch_size, side):
    reference = perplexity(lm, TEXTS)
    lm.processor.padding_side = side
    found = perplexity(lm, TEXTS[::-1], batch_size=batch_size)
    lm.processor.padding_side = "right"
    assert found.per_text[::-1] == pytest.approx(reference.per_text, rel=1e-5)
    assert found.score == pytest.approx(reference.score, rel=1e-6)


def test_equal_logits_give_the_size_of_the_vocabulary(lm):
    flat = small("causal-lm", "nano")
    with torch.no_grad():
        flat.backbone.lm_head.weight.zero_()
    assert perplexity(flat, TEXTS).per_text == pytest.approx(260, rel=1e-6)


def test_a_plain_transformers_model_with_its_tokenizer(lm):
    lm.backbone.train()
    found = perplexity(lm.backbone, TEXTS, lm.processor)
    assert lm.backbone.training  # the mode is left as it was
    lm.backbone.eval()
    assert found.per_text == pytest.approx(perplexity(lm, TEXTS).per_text, rel=1e-9)


def test_a_tokenizer_without_padding_token(lm):
    expected, pad = perplexity(lm, TEXTS).score, lm.processor.pad_token
    lm.processor.pad_token = None
    assert perplexity(lm, TEXTS).score == pytest.approx(expected, rel=1e-9)
    lm.processor.pad_token = pad


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_broken_logits_are_infinite_and_counted(broken):
    model = small("causal-lm", "nano")
    row = model.processor("z", add_special_tokens=False)["input_ids"][0]
    with torch.no_grad():
        model.backbone.lm_head.weight[row] = broken
    found = perplexity(model, ["abab", "ab"])
    assert math.isinf(found.score) and found.infinite == 2 and float(found) == found.score


def test_only_the_broken_text_is_infinite(lm):
    class Half(torch.nn.Module):
        """Gives no probability to the letter z."""

        def __init__(self) -> None:
            super().__init__()
            self.inner, self.config = lm.backbone, lm.backbone.config

        def forward(self, input_ids, attention_mask):
            out = self.inner(input_ids=input_ids, attention_mask=attention_mask)
            out.logits[..., lm.processor.convert_tokens_to_ids("z")] = -torch.inf
            return out

    for reduction in ("mean_of_exp", "exp_of_mean"):
        found = perplexity(Half(), ["abc", "azc", "cab"], lm.processor, reduction=reduction)
        assert np.isinf(found.per_text).tolist() == [False, True, False]
        assert math.isinf(found.score) and found.infinite == 1


def test_bfloat16_logits_are_taken_in_float32(lm):
    half = small("causal-lm", "nano", seed=3).to(torch.bfloat16)
    with torch.no_grad():
        ids = torch.tensor([half.processor(TEXTS[0], add_special_tokens=False)["input_ids"]])
        logits = half.backbone(input_ids=ids).logits[0, :-1].float()
    expected = torch.nn.functional.cross_entropy(logits, ids[0, 1:]).exp().item()
    assert perplexity(half, TEXTS[:1]).score == pytest.approx(expected, rel=1e-6)


def test_long_texts_are_cut(lm):
    cut = perplexity(lm, ["abcdefgh"], max_length=4)
    assert cut.n_tokens.tolist() == [3]
    assert cut.score == pytest.approx(perplexity(lm, ["abcd"]).score, rel=1e-6)
    assert perplexity(lm, ["x" * 500]).n_tokens.tolist() == [lm.max_length - 1]


@pytest.mark.parametrize(
    ("texts", "settings", "words"),
    [
        ([], {}, "no texts"),
        ("a text", {}, "no texts"),
        (["fine", ""], {}, "text 2 .* too short"),
        (["fine", "x"], {}, "two tokens"),
        (["fine", None], {}, "text 2 is None"),
        (["fine"], {"batch_size": 0}, "batch_size is 0"),
        (["fine"], {"max_length": 1}, "max_length is 1"),
        (["fine"], {"reduction": "mean"}, "unknown reduction"),
    ],
)
def test_bad_input(lm, texts, settings, words):
    with pytest.raises(InputError, match=words):
        perplexity(lm, texts, **settings)


def test_models_that_are_no_language_models(lm):
    with pytest.raises(InputError, match="text-encoder model: a causal-lm is expected"):
        perplexity(small("text-encoder", "nano"), TEXTS)
    with pytest.raises(InputError, match="without a tokenizer"):
        perplexity(lm.backbone, TEXTS)
    with pytest.raises(InputError, match="no language model"):
        perplexity(torch.nn.Linear(2, 2), TEXTS, lm.processor)


def test_a_start_token_that_is_not_there(lm):
    bos, lm.processor.bos_token = lm.processor.bos_token, None
    with pytest.raises(InputError, match="no beginning-of-text token"):
        perplexity(lm, TEXTS, start_token=True)
    lm.processor.bos_token = bos


def test_texts_of_a_file(lm, tmp_path):
    (tmp_path / "me.json").write_text(json.dumps([{"Corpus": "C4", "Text": text} for text in TEXTS]))
    (tmp_path / "list.json").write_text(json.dumps(TEXTS))
    (tmp_path / "lines.txt").write_text("\n".join(TEXTS) + "\n\n")
    expected = SurrogatePerplexity(TEXTS)(lm).score
    for name in ("me.json", "list.json", "lines.txt"):
        assert SurrogatePerplexity(tmp_path / name)(lm).score == expected
    (tmp_path / "bad.json").write_text('{"Text": 1}')
    for name, words in (("bad.json", "bad.json holds no texts"), ("none.json", "no file"), ("x.csv", "no file")):
        with pytest.raises(InputError, match=words):
            SurrogatePerplexity(tmp_path / name)(lm)
    with pytest.raises(InputError, match="did you mean 'packaged_50'"):
        SurrogatePerplexity("packaged50")(lm)


def test_sentences_without_markup():
    kept = "The river that we follow is long and slow, and so are we when it rains."
    assert sentences(
        f"Rivers\n======\n\n{kept} Is it? A ``word`` of code in a sentence of some length is not kept.\n"
    ) == [kept]


def test_packaged_texts(asset, lm):
    for name in ("python-doc", "fortunes"):
        asset(name)
    fifty = packaged_texts(50)
    assert len(set(fifty)) == 50 and all(60 <= len(text) <= 200 for text in fifty)
    assert packaged_texts(60)[:50] == fifty
    assert SurrogatePerplexity().loaded == fifty and set(PACKAGED.values()) == {50, 1000, 10_000}
    assert len(packaged_texts(10_000)) == 10_000
    with pytest.raises(InputError, match="packaged texts: from 1 to"):
        packaged_texts(10**6)
