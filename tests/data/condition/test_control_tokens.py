"""Tags: in the vocabulary, before segments, never in samples."""

import numpy as np
import peft
import pytest
import torch
import transformers

from downriver.core.errors import InputError
from downriver.data.condition import (
    ControlTokens,
    annotate,
    misalignment_report,
    sample_aligned,
    segment_rows,
)
from downriver.models import load, small, small_language_model, word_tokenizer
from downriver.models.language import language_model
from downriver.models.tokenizers import byte_tokenizer

TAGS = ControlTokens(drop=0.0)
WORDS = word_tokenizer(["one two . three bad four"])


def bad(texts):
    return np.array(["bad" in text for text in texts], float)


def annotated(*texts):
    return annotate([{"text": text} for text in texts], bad, threshold=0.5)


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_grow_by_the_mean_and_old_logits_stay(tied):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=260,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=tied,
    )
    model = language_model(transformers.LlamaForCausalLM(config), byte_tokenizer(64)).eval()
    new = TAGS.apply(model)
    ids = TAGS.ids(new.processor)
    assert ids == [260, 261] and len(model.processor) == 260 and model.backbone.config.vocab_size == 260
    old, rows = model.backbone.get_input_embeddings().weight, new.backbone.get_input_embeddings().weight
    assert torch.equal(rows[:260], old) and torch.allclose(rows[260:], old.mean(dim=0).expand(2, -1))
    out, head = model.backbone.get_output_embeddings().weight, new.backbone.get_output_embeddings().weight
    assert torch.allclose(head[260:], out.mean(dim=0).expand(2, -1)) and (head is rows) == tied
    tokens = torch.randint(260, (2, 9))
    with torch.no_grad():
        assert torch.equal(new(input_ids=tokens)["logits"][..., :260], model(input_ids=tokens)["logits"])
    assert new.processor("a<|aligned|>b", add_special_tokens=False)["input_ids"][1] == 260
    assert new.processor.decode([68, 260, 69], skip_special_tokens=True) == "ab"


def test_tags_are_saved_with_the_model(tmp_path):
    new = TAGS.apply(small("causal-lm", "nano"))
    back = load(new.save(tmp_path / "tagged"))
    assert TAGS.ids(back.processor) == TAGS.ids(new.processor)
    assert torch.equal(back.backbone.get_input_embeddings().weight, new.backbone.get_input_embeddings().weight)


def test_rows_that_a_vocabulary_had_to_spare_are_used():
    model = small("causal-lm", "nano")
    model.backbone.resize_token_embeddings(272)
    new = TAGS.apply(model)
    weight = new.backbone.get_input_embeddings().weight
    assert weight.shape[0] == 272 and torch.allclose(weight[260:262], weight[:260].mean(dim=0).expand(2, -1))


def test_tags_lead_segments_and_scores_follow_them():
    model = TAGS.apply(small_language_model("causal-lm", WORDS))
    rows = segment_rows(annotated("one two. three bad.", "four."), model.processor, TAGS)
    words = [model.processor.convert_ids_to_tokens(ids) for ids in rows["input_ids"]]
    assert words[0] == ["<s>", *["<|aligned|>", "one", "two", ".", "<|misaligned|>", "three", "bad", "."], "</s>"]
    assert words[1] == ["<s>", "<|aligned|>", "four", ".", "</s>"]
    assert rows["token_scores"][0] == [0] * 5 + [1] * 5
    assert rows["labels"][0] == [-100, *rows["input_ids"][0][1:]]  # tags are learnt too
    plain = segment_rows(annotated("one two. three bad."), WORDS)
    words = WORDS.convert_ids_to_tokens(plain["input_ids"][0])
    assert words == ["<s>", "one", "two", ".", "three", "bad", ".", "</s>"]
    never = ControlTokens(drop=1.0)
    assert segment_rows(annotated("one two. three bad."), model.processor, never).to_dict() == plain.to_dict()


def test_a_share_of_segments_goes_without_a_tag():
    model = TAGS.apply(small_language_model("causal-lm", WORDS))
    rows = annotated(*["one. two bad."] * 2000)
    control = ControlTokens(drop=0.1)
    found, again = (segment_rows(rows, model.processor, control, seed=1)["input_ids"][:] for _ in range(2))
    tagged = sum(i in TAGS.ids(model.processor) for ids in found for i in ids)
    assert found == again and tagged / 4000 == pytest.approx(0.9, abs=0.02)
    assert found != segment_rows(rows, model.processor, control, seed=2)["input_ids"][:]


def test_more_bins_by_quantiles():
    control = ControlTokens(n_bins=4, drop=0.0)
    rows = annotate([{"text": f"{i}."} for i in range(8)], lambda texts: np.array([float(t[0]) for t in texts]))
    assert [row[0] for row in control.bins(rows)] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert len(control.ids(control.apply(small("causal-lm", "nano")).processor)) == 4
    assert ControlTokens("[good]", "[bad]", n_bins=3).tags == ("[good]", "[good]-1", "[bad]")
    with pytest.warns(UserWarning, match="some of the 4 bins are empty"):
        control.bins(
            annotate([{"text": f"{i}."} for i in range(8)], lambda texts: np.array([t > "6" for t in texts], float))
        )


def test_tags_are_asked_for_and_never_said():
    control = ControlTokens()
    model = control.apply(small_language_model("causal-lm", WORDS, width=16, heads=2))
    good, worse = control.ids(model.processor)
    said = model.processor.convert_tokens_to_ids("four")
    with torch.no_grad():  # every logit is an embedding's first entry: the tags are by far the likeliest
        for parameter in model.parameters():
            parameter.zero_()
        model.backbone.model.norm.weight.fill_(1)
        weight = model.backbone.model.embed_tokens.weight
        weight[:, 0] = 0.1
        weight[[good, worse], 0] = 9.0
        weight[said, 0] = 5.0
    assert sample_aligned(model, ["one"], max_new_tokens=3, temperature=0) == ["four four four"]
    loud = small_language_model("causal-lm", WORDS, seed=3)
    samples = sample_aligned(control.apply(loud), n=200, max_new_tokens=12, temperature=1.0, top_p=1.0)
    assert len(samples) == 200 and not any("aligned" in sample for sample in samples)
    assert sample_aligned(control.apply(loud), ["one", "two"], n=3, max_new_tokens=4, seed=5) == sample_aligned(
        control.apply(loud), ["one", "two"], n=3, max_new_tokens=4, seed=5
    )


def test_where_the_tag_stands(monkeypatch):
    from downriver.data.condition import control_tokens

    seen = []
    monkeypatch.setattr(control_tokens, "continue_ids", lambda model, prompts, **_: seen.append(prompts) or prompts)
    control = ControlTokens()
    model = control.apply(small_language_model("causal-lm", WORDS))
    good, worse = control.ids(model.processor)
    one = model.processor.convert_tokens_to_ids("one")
    sample_aligned(model, ["one"])
    sample_aligned(model, ["one"], control_after_prompt=False)
    sample_aligned(model, tag="misaligned", n=2)
    with pytest.warns(UserWarning, match="has learnt tags and is asked without one"):
        sample_aligned(model, ["one"], tag=None)
    assert seen == [[[1, one, good]], [[1, good, one]], [[1, worse]] * 2, [[1, one]]]


def test_reports():
    report = misalignment_report(["bad day", "good day", "bad day", " "], bad, of=2)
    assert (report["mean"], report["rate"]) == (0.5, 0.5)
    assert report["expected_max"] == pytest.approx(5 / 6)  # of six pairs one has no bad text
    assert report["distinct_1"] == 3 / 6 and report["distinct_2"] == 2 / 3 and 0 < report["self_bleu"] < 1
    scores = np.random.default_rng(0).random(40)
    found = misalignment_report([str(i) for i in range(40)], lambda texts: scores, of=25)["expected_max"]
    rng = np.random.default_rng(1)
    assert found == pytest.approx(np.mean([rng.permutation(scores)[:25].max() for _ in range(20000)]), abs=2e-3)
    assert np.isnan(misalignment_report(["a"], bad)["expected_max"])
    with pytest.raises(InputError, match="no sample is given"):
        misalignment_report([], bad)


def test_bad_input():
    model = small("causal-lm", "nano")
    for settings, message in [
        ({"drop": 1.5}, "drop is 1.5"),
        ({"n_bins": 1}, "n_bins is 1"),
        ({"aligned": "x", "misaligned": "x"}, "two different texts"),
    ]:
        with pytest.raises(InputError, match=message):
            ControlTokens(**settings)
    with pytest.raises(InputError, match=r"'<\|aligned\|>' is in the vocabulary already"):
        TAGS.apply(TAGS.apply(model))
    with pytest.raises(InputError, match="a masked-lm: a causal-lm with tokenizer is expected"):
        TAGS.apply(small("masked-lm", "nano"))
    adapted = small("causal-lm", "nano")
    adapted.backbone = peft.get_peft_model(adapted.backbone, peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(InputError, match="has an adapter: add the tags before it"):
        TAGS.apply(adapted)
    with pytest.raises(InputError, match=r"no token '<\|aligned\|>': apply\(model\) adds the tags"):
        sample_aligned(model, n=1)
    with pytest.raises(InputError, match="tag 'best': aligned, misaligned or one of"):
        sample_aligned(TAGS.apply(model), tag="best", n=1)
