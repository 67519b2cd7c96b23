"""Models of different vocabularies: rows find their tokens, there and back, and a union knows all of them."""

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from downriver.core.errors import InputError
from downriver.merge import (
    Average,
    TaskArithmetic,
    align_vocabularies,
    merge,
    open_store,
    read_mergekit,
)
from downriver.merge.plan import of_tokens, rows_of_tokens
from downriver.models import load, small_language_model, word_tokenizer

WORDS = ["red square", "a blue circle and a green line"]


def model(words, seed=0, tied=False):
    lm = small_language_model("causal-lm", word_tokenizer(words), width=8, heads=2, seed=seed)
    if not tied:
        lm.backbone.config.tie_word_embeddings = False
        lm.backbone.lm_head.weight = torch.nn.Parameter(lm.backbone.lm_head.weight.detach() + 1)
    return lm


def renumbered(lm, seed=0):
    """The same model with its words in another order: another tokenizer, and rows that follow it."""
    words = sorted({w for text in WORDS for w in text.split()})
    order = np.random.default_rng(seed).permutation(len(words))
    other = model([" ".join(words[i] for rank, i in enumerate(order, 1) for _ in range(rank))])  # numbered by frequency
    other.backbone.load_state_dict(lm.backbone.state_dict())
    old, new = lm.processor.get_vocab(), other.processor.get_vocab()
    assert old != new and old.keys() == new.keys()
    place = torch.tensor([old[token] for token, _ in sorted(new.items(), key=lambda item: item[1])])
    state = other.backbone.state_dict()
    for name in [name for name in state if of_tokens(name)]:
        state[name] = state[name][place].clone()
    other.backbone.load_state_dict(state)
    return other


def read(store, name="model.embed_tokens.weight"):
    shape = store.shape(name)
    return store.read(name, 0, shape[0] * shape[1]).view(shape)


def test_a_renumbered_model_is_the_model():
    lm = model(WORDS)
    other = renumbered(lm)
    aligned = align_vocabularies([other], lm)
    assert aligned.tokenizer is None
    for name, value in lm.backbone.state_dict().items():
        assert torch.equal(aligned.models[0].read(name, 0, value.numel()), value.flatten()), name
    assert not torch.equal(read(open_store(other)), read(open_store(lm)))


def test_there_and_back_again_and_in_pieces():
    lm, other = model(WORDS), renumbered(model(WORDS, seed=1), seed=3)
    there = align_vocabularies([other], lm).models[0]
    state = {name: there.read(name, 0, 10**9).view(there.shape(name)) for name in there.names()}
    moved = model(WORDS)
    moved.backbone.load_state_dict(state)
    back = align_vocabularies([moved], other).models[0]
    for name, value in other.backbone.state_dict().items():
        assert torch.equal(back.read(name, 0, value.numel()), value.flatten()), name
        whole = back.read(name, 0, value.numel())
        pieces = [back.read(name, i, min(i + 13, value.numel())) for i in range(0, value.numel(), 13)]
        assert torch.equal(torch.cat(pieces), whole), name


def test_what_a_model_lacks_is_the_bases_and_moves_nothing(tmp_path):
    base, other = model(WORDS), model(["a red circle"], seed=1)
    base.save(tmp_path / "base")
    other.save(tmp_path / "other")
    report = merge(
        [tmp_path / "other"], tmp_path / "base", TaskArithmetic(lam=1.0), tmp_path / "out", vocabulary="base"
    )
    merged = load(report.out)
    assert merged.processor.get_vocab() == base.processor.get_vocab()
    rows, before = (m.backbone.get_input_embeddings().weight for m in (merged, base))
    known, its = base.processor.get_vocab(), other.processor.get_vocab()
    for token, i in known.items():
        if token in its:
            torch.testing.assert_close(rows[i], other.backbone.get_input_embeddings().weight[its[token]])
        else:
            assert torch.equal(rows[i], before[i]), token
    with pytest.raises(InputError, match=r"has shape \(\d+, 8\)"):
        merge([tmp_path / "other"], tmp_path / "base", TaskArithmetic(), tmp_path / "plain")


@pytest.mark.parametrize("tied", [False, True])
def test_a_union_knows_every_token(tmp_path, tied):
    sources = {"base": (["red square"], 0), "a": (["red circle"], 1), "b": (["circle and line"], 2)}
    models = {name: model(words, seed, tied) for name, (words, seed) in sources.items()}
    for name, lm in models.items():
        lm.save(tmp_path / name)
    folders = [tmp_path / "a", tmp_path / "b"]
    report = merge(folders, tmp_path / "base", Average(), tmp_path / "out", vocabulary="union")
    merged = load(report.out)
    vocabulary = merged.processor.get_vocab()
    assert {"red", "square", "circle", "and", "line"} <= vocabulary.keys()
    assert merged.backbone.config.vocab_size == len(vocabulary) == len(merged.processor)
    rows = {name: lm.backbone.get_input_embeddings().weight for name, lm in models.items()}
    ids = {name: lm.processor.get_vocab() for name, lm in models.items()}
    found = merged.backbone.get_input_embeddings().weight
    assert found.shape[0] == len(vocabulary)

    def row(name, token):
        return rows[name][ids[name][token]]

    square = row("base", "square")  # only the base has it: the others take its row
    torch.testing.assert_close(found[vocabulary["square"]], square)
    torch.testing.assert_close(found[vocabulary["red"]], (row("a", "red") + row("base", "red")) / 2)
    torch.testing.assert_close(found[vocabulary["circle"]], (row("a", "circle") + row("b", "circle")) / 2)
    torch.testing.assert_close(found[vocabulary["line"]], row("b", "line"))  # a takes b's
    assert torch.isfinite(merged.backbone(**merged.processor("red circle", return_tensors="pt")).logits).all()
    assert merged.processor("red square")["input_ids"] == models["base"].processor("red square")["input_ids"]
    head = merged.backbone.get_output_embeddings().weight
    assert (head is found) == tied and head.shape == found.shape


def test_special_tokens_are_added_as_such():
    base, other = model(["red square"]), model(["red square"], seed=1)
    other.processor.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    other.backbone.resize_token_embeddings(len(other.processor), mean_resizing=False)
    union = align_vocabularies([other], base, "union")
    assert union.tokenizer.convert_tokens_to_ids("<|turn|>") == len(base.processor)
    assert union.tokenizer.tokenize("red<|turn|>square") == ["red", "<|turn|>", "square"]
    assert torch.equal(read(union.models[0]), read(open_store(other)))
    assert torch.equal(read(union.base)[-1], read(open_store(other))[-1])
    assert "<|turn|>" not in base.processor.get_vocab()  # the base's own is left alone


def test_equal_vocabularies_are_left_as_they_are():
    base, other = model(WORDS), model(WORDS, seed=1)
    for to in ("base", "union"):
        aligned = align_vocabularies([other], base, to)
        assert aligned.tokenizer is None and read(aligned.models[0]).data_ptr() == read(open_store(other)).data_ptr()
    padded = model(WORDS)
    padded.backbone.resize_token_embeddings(32, mean_resizing=False)
    larger = align_vocabularies([renumbered(base)], padded)  # rows beyond the tokens are the base's
    assert larger.models[0].shape("model.embed_tokens.weight") == (32, 8)
    assert torch.equal(read(larger.models[0])[len(base.processor) :], read(open_store(padded))[len(base.processor) :])


def test_positions_are_no_tokens():
    config = transformers.BertConfig(
        vocab_size=32,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    bert = transformers.BertForMaskedLM(config)
    names = [name for name in bert.state_dict() if of_tokens(name) and bert.state_dict()[name].shape[0] == 32]
    assert sorted(names) == [
        "bert.embeddings.word_embeddings.weight",
        "cls.predictions.bias",
        "cls.predictions.decoder.bias",
        "cls.predictions.decoder.weight",
    ]
    assert rows_of_tokens(open_store(bert)) == 32


def test_yaml(tmp_path):
    base, other = model(["red square"]), model(["red circle"], seed=1)
    base.save(tmp_path / "base")
    other.save(tmp_path / "other")
    models = [{"model": str(tmp_path / name)} for name in ("base", "other")]
    config = read_mergekit({"merge_method": "linear", "models": models, "tokenizer_source": "union"})
    out = config.merge(tmp_path / "out").out
    state = load_file(out / "model.safetensors")
    assert state["model.embed_tokens.weight"].shape[0] == len(base.processor) + 1
    with pytest.raises(InputError, match=r"tokenizer_source 'unoin'.*union"):
        read_mergekit({"merge_method": "linear", "models": models, "tokenizer_source": "unoin"})


def test_bad_input(tmp_path):
    base, other = model(["red square"]), model(["red circle and line"], seed=1)
    with pytest.raises(InputError, match="vocabulary 'both'"):
        align_vocabularies([other], base, "both")
    with pytest.raises(InputError, match="has no tokenizer"):
        align_vocabularies([other], base.backbone.state_dict())
    with pytest.raises(InputError, match=r"9 rows of tokens, the base .* 7: it has no tokenizer"):
        align_vocabularies([other.backbone], base)
    with pytest.raises(InputError, match="needs a base on disk"):
        merge([other], base, Average(), tmp_path / "out", vocabulary="union")
    assert not (tmp_path / "out").exists()
    mixed = merge([other], base, Average(), tmp_path / "out", vocabulary="base")
    assert len(load(mixed.out).processor) == len(base.processor)
