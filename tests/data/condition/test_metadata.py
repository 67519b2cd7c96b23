"""Sources are found, shown, hidden from the loss, and chosen on validation."""

import datasets
import pytest
import torch

from downriver.core.errors import InputError
from downriver.data.condition import (
    MetadataFormatter,
    Packer,
    condition,
    generate,
    host,
    sweep_metadata,
    text_loss,
)
from downriver.models import small, small_language_model, word_tokenizer
from downriver.models.tokenizers import bpe_tokenizer, byte_tokenizer
from downriver.tasks.task import Task

PAGES = [
    {"text": "the tide comes and goes", "url": "https://EN.wikipedia.org/wiki/Tide"},
    {"text": "a recipe for bread", "url": "http://www.bbc.co.uk:80/food?x=1"},
]


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://en.wikipedia.org/wiki/River", "en.wikipedia.org"),
        ("HTTP://EN.Wikipedia.ORG/", "en.wikipedia.org"),
        ("http://example.org:8080/a", "example.org"),
        ("example.org:8080", "example.org"),
        ("https://user:pass@example.org/a@b", "example.org"),
        ("example.org/wiki", "example.org"),
        ("example.org?q=1", "example.org"),
        ("//cdn.example.org/x", "cdn.example.org"),
        ("https://example.org.", "example.org"),
        ("https://xn--mnchen-3ya.de/x", "münchen.de"),
        ("https://MÜNCHEN.de/x", "münchen.de"),
        ("http://[2001:db8::1]:80/", "2001:db8::1"),
        ("http://10.0.0.1:99/", "10.0.0.1"),
        ("http://xn--\udcff.de", "xn--\udcff.de"),
        ("sci.space", "sci.space"),
        ("https:///nothing", None),
        ("", None),
    ],
)
def test_hosts(url, expected):
    assert host(url) == expected


@pytest.mark.parametrize(
    ("view", "shown"),
    [
        ("host", ["en.wikipedia.org", "www.bbc.co.uk"]),
        ("domain", ["wikipedia.org", "bbc.co.uk"]),
        ("suffix", ["org", "co.uk"]),
        ("full", [page["url"] for page in PAGES]),
        (lambda url: "web", ["web", "web"]),
    ],
)
def test_views(view, shown):
    if view in ("domain", "suffix"):
        pytest.importorskip("tldextract")
    formatter = MetadataFormatter(view=view)
    assert [formatter.meta(page) for page in PAGES] == shown
    assert formatter.prefix(PAGES[0]) == f"URL: {shown[0]}\n\n"


def test_a_random_identity_stays_the_same_and_says_nothing():
    formatter = MetadataFormatter(view="uuid")
    first, second = (formatter.meta(page) for page in PAGES)
    assert first != second and first == formatter.meta({"url": "en.wikipedia.org"}) and "wiki" not in first


def test_rare_sources_are_unknown():
    pages = [{"url": url} for url in ("a.org", "a.org", "b.org")]
    formatter = MetadataFormatter(min_count=2)
    with pytest.raises(InputError, match=r"min_count is 2: fit\(documents\) must count"):
        formatter.meta(pages[0])
    assert [formatter.fit(pages).meta(page) for page in pages] == ["a.org", "a.org", "unknown"]


def test_missing_sources():
    lost = {"id": "d7", "text": "no source", "url": None}
    nested = {"text": "datatrove's layout", "metadata": {"url": "https://a.org/x"}}
    assert MetadataFormatter().meta(nested) == "a.org"
    for document in (lost, {"id": "d7", "text": "x"}, {"id": "d7", "url": "file:///x"}):
        with pytest.raises(InputError, match="document d7, metadata field 'url'"):
            MetadataFormatter().meta(document)
        assert MetadataFormatter(missing="unknown").prefix(document) == "URL: unknown\n\n"
        assert MetadataFormatter(missing="drop").prefix(document) is None
    rows = condition([PAGES[0], lost, PAGES[1]], MetadataFormatter(missing="drop"), byte_tokenizer(64))
    assert rows["doc_id"][:] == [0, 2]
    with pytest.raises(InputError, match="no document is left"):
        condition([lost], MetadataFormatter(missing="drop"), byte_tokenizer(64))
    with pytest.raises(InputError, match="document 1, metadata field 'url': no such entry"):
        condition([PAGES[0], {"text": "x"}], MetadataFormatter(), byte_tokenizer(64))


def test_without_its_prefix_a_row_is_the_plain_row():
    tokenizer = bpe_tokenizer([page["text"] for page in PAGES] * 9, 300)
    plain, shown = (condition(PAGES, formatter, tokenizer) for formatter in (None, MetadataFormatter()))
    learnt = condition(PAGES, MetadataFormatter(), tokenizer, mask_metadata=False)
    for page, alone, row, open_ in zip(PAGES, plain, shown, learnt, strict=True):
        prefix = tokenizer(MetadataFormatter().prefix(page), add_special_tokens=False)["input_ids"]
        assert row["input_ids"] == open_["input_ids"] == [tokenizer.bos_token_id, *prefix, *alone["input_ids"][1:]]
        assert row["labels"] == [-100] * (1 + len(prefix)) + alone["input_ids"][1:]
        assert open_["labels"] == [-100, *row["input_ids"][1:]] and alone["labels"] == [-100, *alone["input_ids"][1:]]
        assert tokenizer.decode(alone["input_ids"], skip_special_tokens=True) == page["text"]


def test_metadata_is_read_and_not_learnt():
    model = small("causal-lm", "nano")
    row = condition([PAGES[0]], MetadataFormatter(), model.processor)[0]
    batch = {name: torch.tensor([row[name]]) for name in ("input_ids", "labels")}
    prefix = row["labels"].count(-100)
    logits = model(input_ids=batch["input_ids"])["logits"].detach().requires_grad_()
    model._loss(logits, batch["labels"]).backward()
    at = logits.grad.abs().sum(dim=(0, 2))
    assert (at[: prefix - 1] == 0).all() and (at[prefix - 1 : -1] > 0).all()
    loss = model(**batch)["loss"]
    other = batch["input_ids"].clone()
    other[0, 6] += 1  # another host
    assert model(input_ids=other, labels=batch["labels"])["loss"] != loss


def test_a_source_longer_than_a_block():
    rows = condition([PAGES[0]], MetadataFormatter(), byte_tokenizer(64))
    with pytest.raises(InputError, match="row 0: 24 tokens stand before the first that is learnt, which fills a block"):
        Packer(16).pack(rows)
    assert Packer(32).pack(rows).column_names == ["input_ids", "labels", "position_ids"]


def test_losses_are_of_the_texts_alone():
    model = small("causal-lm", "nano")
    found = text_loss(model, PAGES, MetadataFormatter(), tokens=9, batch_size=1)
    assert found == pytest.approx(text_loss(model, PAGES, MetadataFormatter(), tokens=9, batch_size=2), abs=1e-5)
    rows = condition(PAGES, MetadataFormatter(), model.processor)
    losses = []
    for row in rows:
        first = row["labels"].count(-100)
        ids, labels = (torch.tensor([row[name][: first + 9]]) for name in ("input_ids", "labels"))
        losses.append(model(input_ids=ids, labels=labels)["loss"].item())
    assert found == pytest.approx(sum(losses) / 2, abs=1e-5)
    with pytest.raises(InputError, match="the model reads 128"):
        text_loss(model, PAGES, MetadataFormatter(), tokens=120)
    with pytest.raises(InputError, match="a masked-lm: a causal-lm is expected"):
        text_loss(small("masked-lm", "nano"), PAGES)


def test_sources_are_chosen_on_validation():
    rows = datasets.Dataset.from_list(PAGES)
    task = Task("pages", "language-modelling", {"validation": rows, "test": rows}, ("text",), None)
    model = small("causal-lm", "nano")
    found = sweep_metadata(model, task, ["a.org", "b.org"])
    assert list(found) == [None, "a.org", "b.org"] and len(set(found.values())) == 3
    longest = len("URL: a.org\n\n")
    assert found[None] == pytest.approx(text_loss(model, PAGES, tokens=128 - longest - 1))
    lengths = sweep_metadata(model, task, ["a.org"], score=lambda model, task, prefix: len(prefix))
    assert lengths == {None: 0, "a.org": longest}
    with pytest.raises(InputError, match="choose the source on a validation split"):
        sweep_metadata(model, task, ["a.org"], split="test")
    with pytest.raises(InputError, match="candidates is empty"):
        sweep_metadata(model, task, [])


def test_generation_behind_a_source():
    words = word_tokenizer(["url a b . org x y"])
    model = small_language_model("causal-lm", words, width=16, heads=2)
    with torch.no_grad():  # a model that repeats what it read first
        for parameter in model.parameters():
            parameter.zero_()
        model.backbone.model.embed_tokens.weight.copy_(torch.eye(len(words), 16))
        model.backbone.model.norm.weight.fill_(1)
    assert generate(model, "x y", max_new_tokens=3, temperature=0) == ["y y y"]
    plain = small("causal-lm", "nano")
    texts = ["the river", "a"]
    told = generate(plain, texts, metadata="a.org", max_new_tokens=8, seed=1)
    assert told == generate(plain, texts, metadata="a.org", max_new_tokens=8, seed=1)
    assert told != generate(plain, texts, metadata="b.org", max_new_tokens=8, seed=1)
    assert generate(plain, texts, temperature=0, max_new_tokens=6) == [
        generate(plain, text, temperature=0, max_new_tokens=6)[0]
        for text in texts  # padding changes nothing
    ]
    for bad, message in [
        ({"max_new_tokens": 200}, "leaves no room for 200 new ones in the 128"),
        ({"temperature": -1}, "temperature -1"),
    ]:
        with pytest.raises(InputError, match=message):
            generate(plain, texts, **bad)
    with pytest.raises(InputError, match="a causal-lm is expected"):
        generate(small("masked-lm", "nano"), texts)


def test_bad_settings():
    for settings, message in [
        ({"template": "URL: "}, "it must hold {meta}"),
        ({"view": "hosts"}, "unknown view of metadata 'hosts': did you mean 'host'"),
        ({"missing": "skip"}, "unknown rule for missing metadata 'skip'"),
        ({"min_count": -1}, "min_count is -1"),
    ]:
        with pytest.raises(InputError, match=message):
            MetadataFormatter(**settings)
    for text, what in [(None, "is None"), ("  ", "is empty")]:
        with pytest.raises(InputError, match=f"row 1, column 'text': the text {what}"):
            condition([PAGES[0], {"text": text, "url": "a.org"}], None, byte_tokenizer(64))
