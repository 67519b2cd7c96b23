"""The hierarchical transformer: nothing leaks, batches and caches change nothing, and a pretrained backbone stays."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
import transformers

from downriver.core.cost import count_flops
from downriver.core.errors import InputError
from downriver.models import small
from downriver.models.hat import (
    HATConfig,
    HATForCausalLM,
    HATForSequenceClassification,
    HATTokenizer,
    flops_per_byte,
)
from downriver.models.hat_layers import words_of
from downriver.models.hat_tokenizer import END, PAD, WORD
from downriver.models.model import Model
from downriver.models.word_split import WordSplitter
from downriver.training import TokenRows, fine_tune

BYTES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
WORDS = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXTS = ["The river runs, slowly.", "né", "how_are_you  now? [x]\n\tYes", b"a\xff b"]
BOTH = pytest.mark.parametrize("connector", ["prefix", "cross"])


def config(connector="prefix", **more):
    # wide weights: a leak or a wrong mask shows far above rounding
    parts = {"encoder": BYTES, "backbone": WORDS, "decoder": BYTES}
    return HATConfig(**parts, connector=connector, initializer_range=0.3, **more)


def hat(connector="prefix", seed=0, **more):
    torch.manual_seed(seed)
    return HATForCausalLM(config(connector, **more)).eval()


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@BOTH
def test_causality(connector):
    """Another byte j of word i: what is predicted up to that byte stays, and what comes after it changes."""
    model, batch = hat(connector), HATTokenizer()("one two three four five")
    before = logits(model, batch)
    for i, j in itertools.product(range(5), (1, 2, 3)):
        ids = batch["byte_ids"].clone()
        ids[0, i, j] = ord("z")
        after = logits(model, dict(batch) | {"byte_ids": ids})
        assert torch.equal(after[0, :i], before[0, :i])
        assert torch.equal(after[0, i, :j], before[0, i, :j])
        assert (after[0, i, j] - before[0, i, j]).abs().max() > 1e-3
        if i < 4:  # the next word's first byte is predicted from the changed word
            assert (after[0, i + 1, 0] - before[0, i + 1, 0]).abs().max() > 1e-4


def test_the_encoder_reads_one_word_in_both_directions():
    model, tokenizer = hat(), HATTokenizer()

    def vectors(text):
        names = ("input_ids", "attention_mask", "position_ids", "labels")
        with torch.no_grad():
            return model.model.word_vectors(words_of(**dict(tokenizer(text)), **dict.fromkeys(names)))[0]

    close(vectors("one two three")[1], vectors("six two seventeen elephants")[1])
    assert (vectors("one two")[1] - vectors("one twx")[1]).abs().max() > 1e-2
    # the state at the first byte, not only that at [W], knows the last byte
    states = [model.model.encoder.run(model.model.embed(torch.tensor([[WORD, *word]]))) for word in (b"two", b"twx")]
    assert (states[0] - states[1])[0, :3].abs().amax(-1).min() > 1e-3


@BOTH
def test_the_loss_of_a_batch_is_that_of_its_words_one_by_one(connector):
    model, tokenizer = hat(connector), HATTokenizer()
    batch = tokenizer(TEXTS, labels=True)
    with torch.no_grad():
        loss = model(**batch).loss
    total, terms = 0.0, 0
    for text in TEXTS:
        words = tokenizer.words(text)
        own = logits(model, tokenizer(text))[0]
        for row, word in zip(own, words, strict=True):
            total += F.cross_entropy(row[: len(word)], torch.tensor([*word[1:], WORD]), reduction="sum").item()
            terms += len(word)
    assert loss.item() == pytest.approx(total / terms, rel=1e-5)
    scores = model.score(TEXTS)
    assert sum(sum(score.bits) for score in scores) == pytest.approx(total / math.log(2), rel=1e-5)
    assert b"".join(scores[3].words) == TEXTS[3] and model.score(TEXTS[3]).bits == pytest.approx(
        scores[3].bits, rel=1e-4
    )
    assert scores[0].bits_per_byte == pytest.approx(sum(scores[0].bits) / len(TEXTS[0]))
    assert scores[0].words_per_byte == 4 / len(TEXTS[0])


@BOTH
def test_the_probabilities_of_all_strings_sum_to_one(connector):
    """Over two bytes and [W]: every string of four symbols once, with words of any length, even of none."""
    model, alphabet = hat(connector), (ord("a"), ord("b"), WORD)
    strings = torch.tensor(list(itertools.product(alphabet, repeat=4)))
    streams = F.pad(strings, (1, 0), value=WORD)
    own = logits(model, {"input_ids": streams})[:, :-1, list(alphabet)].log_softmax(-1)
    place = torch.tensor([alphabet.index(symbol) for symbol in strings.flatten().tolist()]).view(strings.shape)
    p = own.gather(-1, place[..., None]).sum((1, 2)).exp()
    assert p.sum().item() == pytest.approx(1, abs=1e-5)
    assert p.max() > 3 * p.min()  # not merely uniform


@BOTH
def test_padding_changes_nothing(connector):
    model, tokenizer = hat(connector), HATTokenizer()
    batch = tokenizer(TEXTS)
    together = logits(model, batch)
    wider = {
        "byte_ids": F.pad(batch["byte_ids"], (0, 5, 0, 3), value=PAD),
        "word_mask": F.pad(batch["word_mask"], (0, 3)),
        "byte_mask": F.pad(batch["byte_mask"], (0, 5, 0, 3)),
    }
    close(logits(model, wider)[:, : together.shape[1], : together.shape[2]], together)
    close(logits(model, {"byte_ids": wider["byte_ids"]}), logits(model, wider))
    for row, text in enumerate(TEXTS):
        alone = logits(model, tokenizer(text))[0]
        mask = tokenizer(text)["byte_mask"][0]
        close(alone[mask], together[row, : mask.shape[0], : mask.shape[1]][mask])


@BOTH
def test_several_documents_in_a_row_do_not_see_one_another(connector):
    model, tokenizer = hat(connector), HATTokenizer()
    settings = {"labels": True, "end": True}
    with torch.no_grad():
        apart = model(**tokenizer(TEXTS, **settings), return_logits=True)
        packed = model(**tokenizer(TEXTS, packed=True, **settings), return_logits=True)
    assert tokenizer(TEXTS, packed=True)["byte_ids"].shape[0] == 1
    close(packed.loss, apart.loss)
    masks = tokenizer(TEXTS, **settings)["byte_mask"], tokenizer(TEXTS, packed=True, **settings)["byte_mask"]
    close(packed.logits[masks[1]], apart.logits[masks[0]])


@BOTH
def test_streams_are_rows(connector):
    model, tokenizer = hat(connector), HATTokenizer()
    rows = tokenizer(TEXTS, labels=True)
    streams = [torch.tensor(tokenizer.stream(text)) for text in TEXTS]
    ids = torch.nn.utils.rnn.pad_sequence(streams, batch_first=True, padding_value=PAD)
    labels = ids.masked_fill(ids == PAD, -100)
    with torch.no_grad():
        one = model(**rows, return_logits=True)
        two = model(input_ids=ids, attention_mask=(ids != PAD).long(), labels=labels, return_logits=True)
    close(one.loss, two.loss)
    close(one.logits[rows["byte_mask"]], two.logits[ids != PAD])


def test_labels_choose_what_is_learnt():
    model, batch = hat(), HATTokenizer()("ab cd", labels=True)
    labels = batch["labels"].clone()
    labels[0, 0] = -100
    labels[0, 1, 2:] = -100  # of " cd" the space and the end count
    own = logits(model, {"byte_ids": batch["byte_ids"]})[0, 1]
    expected = F.cross_entropy(own[[0, 3]], torch.tensor([ord(" "), WORD]))
    close(model(**dict(batch) | {"labels": labels}).loss, expected)
    end = HATTokenizer()("ab", end=True, labels=True)
    own = logits(model, {"byte_ids": end["byte_ids"]})[0]
    terms = own.flatten(0, 1)[[0, 1, 2, 3]]  # nothing is predicted after the end
    close(model(**end).loss, F.cross_entropy(terms, torch.tensor([ord("a"), ord("b"), WORD, END])))
    close(model(**end, num_items_in_batch=8).loss, F.cross_entropy(terms, torch.tensor([97, 98, WORD, END])) / 2)


def naive(model, text, count, limit=64):
    """Greedy, by a full forward pass for every byte."""
    tokenizer = HATTokenizer(max_bytes=limit)
    words = tokenizer.words(text) if text else [[WORD]]
    written = b""
    while len(written) < count:
        flat = torch.tensor([[symbol for word in words for symbol in word]])
        following = logits(model, {"input_ids": flat})[0, -1]
        following[PAD] = -torch.inf
        following[WORD if len(words[-1]) == 1 else END] = -torch.inf
        if len(words[-1]) > limit:
            following[:WORD] = -torch.inf
        symbol = following.argmax().item()
        if symbol == END:
            break
        if symbol == WORD:
            words.append([WORD])
        else:
            words[-1].append(symbol)
            written += bytes([symbol])
    return written


@BOTH
@pytest.mark.parametrize("seed", [0, 1])
def test_caches_change_nothing(connector, seed):
    model = hat(connector, seed)
    with torch.no_grad():  # [W] and the end come often enough that words of many lengths are spelt
        model.lm_head.weight[WORD] *= 3
        model.lm_head.weight[END] *= 2
    prompts = ["The river runs", "", "né", "how_are_you  now? [x]\n\tYes", "a"]
    limit = 6
    tokenizer = HATTokenizer(max_bytes=limit)
    found = model.generate(prompts, 24, tokenizer=tokenizer, progress=False)
    assert found == [naive(model, prompt, 24, limit) for prompt in prompts]
    assert model.generate(prompts[0], 24, tokenizer=tokenizer) == found[0]


def test_drawing_bytes():
    model = hat()
    drawn = [model.generate("The", 30, temperature=1.0, seed=seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[END] = 1
        model.decoder.norm.weight.fill_(1)
    assert all(len(part) <= 30 for part in model.generate(["The", "a b"], 30, temperature=1.0))


@BOTH
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_saved_and_loaded(connector, attention, tmp_path):
    model, batch = hat(connector), HATTokenizer()(TEXTS)
    model.save_pretrained(tmp_path)
    HATTokenizer("whitespace", 32).save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=attention).eval()
    assert isinstance(again, HATForCausalLM) and again.config.connector == connector
    close(logits(again, batch), logits(model, batch))
    assert again.state_dict().keys() == model.state_dict().keys()
    splitter = HATTokenizer.from_pretrained(tmp_path).splitter
    assert (splitter.rule, splitter.max_bytes) == ("whitespace", 32)
    classifier = HATForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    close(classifier.model.backbone.norm.weight, model.model.backbone.norm.weight)
    close(classifier.model.encoder.layers[0].mlp.up_proj.weight, model.model.encoder.layers[0].mlp.up_proj.weight)


@BOTH
def test_a_pretrained_backbone_is_kept(connector, tmp_path):
    llama = small("causal-lm", "nano")
    llama.backbone.save_pretrained(tmp_path)
    reference = llama.backbone.model.state_dict()
    for source in (llama, llama.backbone, llama.backbone.model, tmp_path):
        model = HATForCausalLM.from_pretrained_backbone(source, encoder=BYTES, decoder=BYTES, connector=connector)
        kept = model.model.backbone.state_dict()
        assert kept.keys() == reference.keys() - {"embed_tokens.weight"}
        assert all(torch.equal(kept[name], reference[name]) for name in kept)
    x = torch.randn(2, 5, 32)
    close(model.model.backbone.run(x), llama.backbone.model(inputs_embeds=x).last_hidden_state)
    half = HATForCausalLM.from_pretrained_backbone(llama.backbone.to(torch.bfloat16), config(connector))
    assert half.dtype == torch.bfloat16 and half.config.encoder.hidden_size == 16
    assert logits(half, HATTokenizer()("a b")).isfinite().all()
    classifier = HATForSequenceClassification.from_pretrained_backbone(llama, encoder=BYTES, decoder=BYTES)
    assert classifier(**HATTokenizer()(["a", "b c"])).logits.shape == (2, 2)


@BOTH
def test_operations_as_counted(connector):
    model = hat(connector)
    tokenizer = HATTokenizer(splitter=WordSplitter(lambda text: [text[i : i + 3] for i in range(0, len(text), 3)]))
    text = "abc" * 7  # words of one length: no padding, which is not counted
    batch = tokenizer(text)
    counted = count_flops(lambda: logits(model, batch))
    assert flops_per_byte(model.config, text, tokenizer=tokenizer) * 21 == pytest.approx(counted, rel=1e-6)


@BOTH
def test_it_learns(connector):
    model, tokenizer = hat(connector, seed=3), HATTokenizer()
    model.train()
    batch = tokenizer(["the river runs to the sea"] * 2, end=True, labels=True)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(60):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert loss.item() < 0.05
    model.eval()
    assert model.generate(["the riv", ""], 60) == [b"er runs to the sea", b"the river runs to the sea"]
    assert model.score("the river runs to the sea").bits_per_byte < 0.1


def test_it_is_a_language_model_for_the_trainer():
    """As streams of symbols it trains, and is measured, as any other language model."""
    from datasets import Dataset

    tokenizer = HATTokenizer()
    rows = Dataset.from_dict({"input_ids": [tokenizer.stream(f"the river number {i}", end=True) for i in range(8)]})
    model = Model(hat(), kind="causal-lm", processor=None, pooling="last", max_length=64)
    tuned = fine_tune(
        model, TokenRows("rivers", {"train": rows}, pad=PAD), "40 steps", batch_size=4, learning_rate=1e-2
    )
    before, after = (lm.backbone.score("the river number 3").bits_per_byte for lm in (model, tuned))
    assert after < before / 2


def test_classification():
    torch.manual_seed(0)
    model = HATForSequenceClassification(config(num_labels=2))
    texts, labels = ["good river", "bad sea", "good", "a very bad one"], torch.tensor([1, 0, 1, 0])
    batch = HATTokenizer()(texts)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(30):
        out = model(**batch, labels=labels)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
    model.eval()
    together = model(**batch).logits
    assert torch.equal(together.argmax(1), labels)
    close(together[0], model(**HATTokenizer()(texts[0])).logits[0])
    one = HATForSequenceClassification(config(num_labels=1)).eval()
    out = one(**batch, labels=torch.ones(4))
    close(out.loss, (out.logits[:, 0] - 1).square().mean())


def test_the_tokenizer():
    tokenizer = HATTokenizer()
    batch = tokenizer(["Hello, world!", b"\xff"], end=True)
    assert tokenizer.batch_decode(batch["byte_ids"]) == ["Hello, world!", "\ufffd"]
    assert tokenizer("a b c d", max_words=2)["byte_ids"].shape == (1, 2, 3)
    assert tokenizer.words("a b", end=True, max_words=2) == [[WORD, 97], [WORD, 32, 98]]  # cut: not the end
    with pytest.raises(InputError, match="a text is empty"):
        tokenizer(["a", ""])
    with pytest.raises(InputError, match="no texts"):
        tokenizer([])
    with pytest.raises(InputError, match="3 is not a text"):
        tokenizer([3])
    with pytest.raises(InputError, match="cannot be saved"):
        HATTokenizer(splitter=WordSplitter(list)).save_pretrained("nowhere")
    with pytest.raises(InputError, match=r"has no hat_tokenizer.json"):
        HATTokenizer.from_pretrained("nowhere")


def test_what_is_refused():
    model, batch = hat(), HATTokenizer()(["ab c", "d"])
    ids = batch["byte_ids"]
    for wrong, message in [
        ({}, "either byte_ids or input_ids"),
        ({"byte_ids": ids[0]}, r"byte_ids \(B, M, C\)"),
        ({"byte_ids": ids.flip(1)}, "padding is expected at the right"),
        ({"byte_ids": ids.roll(1, 2)}, r"does not begin with \[W\]"),
        ({"byte_ids": ids.masked_fill(ids == 98, WORD)}, "one word after its"),
        ({"byte_ids": ids + 300}, "from 0 to 257"),
        ({"input_ids": torch.tensor([[WORD, PAD, 97]])}, "padding before its end"),
        ({"input_ids": torch.tensor([[97, WORD]])}, r"does not begin with \[W\]"),
    ]:
        with pytest.raises(InputError, match=message):
            model(**wrong)
    with pytest.raises(InputError, match="max_bytes 0"):
        model.generate("a", 0)
    with pytest.raises(InputError, match="unknown connector 'prefx': did you mean 'prefix'"):
        HATConfig(connector="prefx")
    with pytest.raises(InputError, match="the widths 8 and 16"):
        HATConfig(encoder=BYTES | {"hidden_size": 8}, decoder=BYTES, connector="cross")
    with pytest.raises(InputError, match="encoder is a int"):
        HATConfig(encoder=3)
    with pytest.raises(InputError, match="a Llama is expected"):
        HATForCausalLM.from_pretrained_backbone(small("masked-lm", "nano"))
