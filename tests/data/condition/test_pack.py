"""Blocks hold every token once, documents stay apart, and there is always something to learn."""

from itertools import chain

import datasets
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from downriver.core.errors import InputError
from downriver.data.condition import Packer, cu_seqlens, document_mask, isolated, isolates
from downriver.models import small
from downriver.models.language import language_model
from downriver.models.tokenizers import byte_tokenizer
from downriver.training import TokenRows, fine_tune

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=30)


def documents(lengths, prefix=0):
    rng = np.random.default_rng(0)
    rows = []
    for number, length in enumerate(lengths):
        ids = rng.integers(3, 90, length).tolist()
        labels = [-100] * min(prefix, length - 1) + ids[min(prefix, length - 1) :]
        rows.append({"input_ids": ids, "labels": labels, "document": [number] * length, "place": list(range(length))})
    return rows


@settings(max_examples=25, deadline=None)
@given(LENGTHS, st.integers(2, 32), st.sampled_from(["complete", "bfd"]), st.booleans())
def test_every_token_is_in_one_block_and_in_its_place(lengths, block, strategy, isolate):
    rows = documents(lengths)
    packed = Packer(block, strategy, isolate=isolate).pack(rows)
    assert max(map(len, packed["input_ids"])) <= block
    assert packed.column_names.count("position_ids") == isolate
    found = {}
    for row in packed:
        for at, (ids, document, place) in enumerate(zip(row["input_ids"], row["document"], row["place"], strict=True)):
            assert (document, place) not in found
            found[document, place] = ids
            if isolate and at:
                same = row["document"][at - 1] == document and row["place"][at - 1] == place - 1
                assert row["position_ids"][at] == (row["position_ids"][at - 1] + 1 if same else 0)
    assert found == {(n, p): ids for n, row in enumerate(rows) for p, ids in enumerate(row["input_ids"])}
    if strategy == "complete":
        assert [len(ids) for ids in packed["input_ids"][:-1]] == [block] * (len(packed) - 1)
        assert [*chain(*packed["input_ids"])] == [*chain(*(row["input_ids"] for row in rows))]


@settings(max_examples=25, deadline=None)
@given(LENGTHS, st.integers(2, 32))
def test_truncated_blocks_begin_with_a_document(lengths, block):
    packed = Packer(block, "truncate").pack(documents(lengths))
    assert all(row["place"][0] == 0 and len(row["place"]) <= block for row in packed)
    assert {n for row in packed for n in row["document"]} == set(range(len(lengths)))
    assert [len(row["place"]) for row in packed][:-1] == [block] * (len(packed) - 1)


@settings(max_examples=25, deadline=None)
@given(LENGTHS, st.integers(5, 32), st.sampled_from(["complete", "bfd"]))
def test_a_repeated_prefix_leads_every_piece(lengths, block, strategy):
    rows = documents(lengths, prefix=4)
    packed = Packer(block, strategy, repeat_prefix=True).pack(rows)
    learnt = []
    for row in packed:
        for at, position in enumerate(row["position_ids"]):
            if position == 0:
                assert row["place"][at] == 0
        learnt += [(n, p) for n, p, i in zip(row["document"], row["place"], row["labels"], strict=True) if i != -100]
    first = {n: min(4, length - 1) for n, length in enumerate(lengths)}
    expected = {(n, p) for n, length in enumerate(lengths) for p in range(max(first[n], 1), length)}
    assert expected <= set(learnt) and len(learnt) == len(set(learnt))


def test_best_fit_leaves_less_room_than_order_does():
    lengths = np.random.default_rng(1).integers(3, 60, 400)
    blocks = len(Packer(64, "bfd").pack(documents(lengths)))
    bound = -(-int(lengths.sum()) // 64)
    assert bound <= blocks <= 1.04 * bound
    assert Packer(10, "bfd").pack(documents([4, 7, 6, 3]))["document"] == [[0] * 4 + [2] * 6, [1] * 7 + [3] * 3]


def test_nothing_is_learnt_of_a_first_token_unless_everything_is_in_sight():
    rows = [{"input_ids": [5, 6]}, {"input_ids": [7, 8]}]
    assert Packer(4).pack(rows)["labels"] == [[-100, 6, -100, 8]]
    assert Packer(4, isolate=False).pack(rows)["labels"] == [[5, 6, 7, 8]]


def test_a_block_without_labels_gets_its_last_ten_back():
    row = {"input_ids": list(range(10, 34)), "labels": [-100] * 24}
    [labels] = Packer(32).pack([row])["labels"]
    assert labels == [-100] * 14 + list(range(24, 34))
    assert Packer(4).pack([{"input_ids": [7, 8, 9], "labels": [-100] * 3}])["labels"] == [[-100, 8, 9]]
    learnt = {"input_ids": [4, 5], "labels": [-100, 5]}
    assert Packer(32).pack([row, learnt])["labels"] == [[-100] * 25 + [5]]  # something is: nothing is given back


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_packed_document_gets_the_logits_it_gets_alone(family, attention):
    if family == "llama":
        config = transformers.LlamaConfig(
            vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
        )
    else:
        config = transformers.GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    torch.manual_seed(0)
    net = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    model = language_model(net, byte_tokenizer(64))
    rows = documents([5, 1, 7, 3, 9])
    packed = Packer(32, "bfd").pack(rows)
    assert len(packed) == 1 and isolates(model)
    tokens = packed.select_columns(["input_ids", "labels", "position_ids"])
    batch = TokenRows("packed", {"train": tokens}).collate(model)(list(tokens))
    with torch.no_grad():
        together = model(**batch)["logits"][0]
        alone = torch.cat([net(input_ids=torch.tensor([row["input_ids"]])).logits[0] for row in rows])
        leaking = net(input_ids=batch["input_ids"]).logits[0]
    order = torch.tensor(np.argsort(packed["document"][0], kind="stable"))
    assert (together[order] - alone).abs().max() < 1e-4
    assert (leaking[order] - alone)[5:].abs().max() > 1e-2  # without isolation it is another number


def test_models_that_take_no_documents_from_positions():
    torch.manual_seed(0)
    opt = transformers.OPTForCausalLM(
        transformers.OPTConfig(
            vocab_size=97,
            hidden_size=32,
            ffn_dim=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            word_embed_proj_dim=32,
            dropout=0.0,
        )
    )
    model = language_model(opt, byte_tokenizer(64))
    assert not isolates(model) and not isolates(small("masked-lm", "nano"))
    rows = documents([5, 7, 3])
    packed = Packer(16).pack(rows).select_columns(["input_ids", "labels", "position_ids"])
    batch = {name: torch.tensor(packed[name]) for name in packed.column_names}
    model.eval()
    with torch.no_grad():
        together = isolated(model, batch)
        alone = torch.cat([opt(input_ids=torch.tensor([row["input_ids"]])).logits[0] for row in rows])
    assert (together["logits"][0] - alone).abs().max() < 1e-4 and together["loss"].isfinite()
    before = model.backbone.lm_head.weight.clone()
    rows = TokenRows("packed", {"train": packed})
    tuned = fine_tune(model, rows, "2 steps", batch_size=1, learning_rate=1e-2, objective=isolated)
    assert not torch.equal(tuned.backbone.lm_head.weight, before)
    bloom = transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4))
    with pytest.raises(InputError, match="cannot be kept apart in a BloomForCausalLM: use isolate=False"):
        isolates(language_model(bloom, byte_tokenizer(64)))
    with pytest.raises(InputError, match="a Mlp is no language model"):
        isolates(small("mlp", "nano"))


def test_neighbours_and_labels_of_a_prefix_change_nothing():
    model = small("causal-lm", "nano")
    rows = documents([9, 12], prefix=3)
    packed = Packer(32).pack(rows).select_columns(["input_ids", "labels", "position_ids"])
    batch = {name: torch.tensor(packed[name]) for name in packed.column_names}
    batch["labels"][0, :9] = -100  # the loss of the second document
    with torch.no_grad():
        loss = model(**batch)["loss"]
        other = model(
            **(batch | {"input_ids": torch.cat([batch["input_ids"][:, :9] + 1, batch["input_ids"][:, 9:]], 1)})
        )
    assert abs(loss - other["loss"]) < 1e-5


def test_boundaries_for_kernels_of_variable_lengths():
    packed = Packer(16).pack(documents([5, 7, 3, 20]))
    batch = TokenRows("packed", {"train": packed.select_columns(["input_ids", "position_ids"])})
    batch = batch.collate(small("causal-lm", "nano"))(list(packed.select_columns(["input_ids", "position_ids"])))
    bounds, longest = cu_seqlens(batch["position_ids"])
    assert bounds.tolist()[:6] == [0, 5, 12, 15, 16, 32] and longest == 16 and bounds.dtype == torch.int32
    mask = document_mask(batch["position_ids"], causal=False)
    assert ((mask == 0).sum(dim=(1, 2, 3)).tolist())[0] == 25 + 49 + 9 + 1


def test_bad_input():
    for settings_, message in [
        ({"block": 1}, "block is 1: at least two"),
        ({"block": 8, "strategy": "wrapped"}, "unknown packing strategy 'wrapped'"),
    ]:
        with pytest.raises(InputError, match=message):
            Packer(**settings_)
    with pytest.raises(InputError, match="rows with input_ids are expected"):
        Packer(8).pack([{"text": "a"}])
    with pytest.raises(InputError, match="0 rows"):
        Packer(8).pack([])
    with pytest.raises(InputError, match="row 1: no token"):
        Packer(8).pack([{"input_ids": [1]}, {"input_ids": []}])
    with pytest.raises(InputError, match="row 1: column 'labels' has 1 values and input_ids 2"):
        Packer(8).pack([{"input_ids": [1, 2], "labels": [1, 2]}, {"input_ids": [1, 2], "labels": [1]}])
    with pytest.raises(
        InputError, match="row 0: 8 tokens stand before the first that is learnt, which fills a block of 8"
    ):
        Packer(8).pack([{"input_ids": list(range(9)), "labels": [-100] * 8 + [8]}])
    kept = datasets.Dataset.from_list([{"input_ids": [1, 2], "id": "a"}])
    assert Packer(8).pack(kept).column_names == ["input_ids", "labels", "position_ids"]
