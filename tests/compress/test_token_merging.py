"""Token merging: the merge itself, models of several families, their FLOPs, folders, training, and what is refused."""

import copy
import json

import pytest
import torch
import transformers
from datasets import Dataset
from torch import nn

from downriver import adapt
from downriver.compress import TokenMerge, add_token_merging, restore_token_merging
from downriver.compress.token_merging import MergeMap, flops
from downriver.core import count_flops
from downriver.core.errors import InputError
from downriver.domains.code import SubtokenGrouper
from downriver.models import load, small
from downriver.models.token_merging import _relative_bias
from downriver.tasks.task import Task
from downriver.training.engine import fine_tune

SMALL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "vocab_size": 60,
    "pad_token_id": 0,
}
T5 = {"d_model": 16, "d_kv": 6, "d_ff": 24, "num_layers": 3, "num_heads": 2, "vocab_size": 60}
IDS = torch.tensor([[1, 5, 6, 7, 8, 9, 2], [1, 9, 4, 2, 0, 0, 0]])
MASK = (IDS != 0).long()
SINGLE = torch.arange(7).expand(2, 7).masked_fill(MASK == 0, -1)
GROUPS = torch.tensor([[0, 1, 1, 2, 2, 2, 3], [0, 1, 1, 2, -1, -1, -1]])


def made(name, **settings):
    """A model with random weights whose states differ clearly from token to token."""
    torch.manual_seed(3)
    if "T5" in name:
        head = "ForConditionalGeneration" if name.endswith("ForConditionalGeneration") else "EncoderModel"
        family = name.split("T5")[0] + "T5"
        config = getattr(transformers, f"{family}Config")(**T5, decoder_start_token_id=0, **settings)
        model = getattr(transformers, family + head)(config)
    elif name.startswith("DistilBert"):
        config = transformers.DistilBertConfig(dim=16, hidden_dim=24, n_layers=3, n_heads=2, vocab_size=60)
        model = getattr(transformers, name)(config)
    else:
        family = name.removesuffix("Model").removesuffix("ForSequenceClassification").removesuffix("ForMaskedLM")
        config = getattr(transformers, f"{family.removesuffix('ForCausalLM')}Config")(**SMALL, **settings)
        options = {"add_pooling_layer": False} if name in ("BertModel", "RobertaModel") else {}
        model = getattr(transformers, name)(config, **options)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.mul_(5)
    return model.eval()


def run(model, groups=None, ids=IDS, mask=MASK, **more):
    if groups is not None:
        more["group_ids"] = groups
    if hasattr(model, "decoder"):
        more["decoder_input_ids"] = ids[:, :4]
    return model(input_ids=ids, attention_mask=mask, **more)


def real(output, model):
    """The part of a first output that padding has no say in."""
    return output[0] if hasattr(model, "decoder") or output[0].ndim == 2 else output[0][MASK.bool()]


# The merge itself


def test_mean_is_the_mean_of_the_members():
    h = torch.randn(2, 7, 5)
    found = TokenMerge(5)(h, MergeMap(GROUPS))
    assert found.shape == (2, 4, 5)  # K is the number of groups of the longest
    for text, groups in enumerate(GROUPS):
        for group in range(4):
            members = h[text, groups == group]
            expected = members.mean(0) if len(members) else torch.zeros(5)
            assert torch.allclose(found[text, group], expected, atol=1e-6)
    counts = torch.zeros(2, 4).scatter_add(1, GROUPS.clamp(min=0), (GROUPS >= 0).float())
    sums = torch.zeros(2, 4, 5).scatter_add(
        1, GROUPS.clamp(min=0)[:, :, None].expand(-1, -1, 5), h * (GROUPS >= 0)[:, :, None]
    )
    assert torch.allclose(found, sums / counts.clamp(min=1)[:, :, None], atol=1e-6)


def test_learned_starts_as_the_mean_and_then_weighs():
    h = torch.randn(2, 7, 5)
    learned, mean = TokenMerge(5, mode="learned"), TokenMerge(5)
    assert torch.allclose(learned(h, MergeMap(GROUPS)), mean(h, MergeMap(GROUPS)), atol=1e-6)
    with torch.no_grad():
        learned.u.weight.copy_(torch.randn_like(learned.u.weight) * 30)
    found = learned(h, MergeMap(GROUPS))
    scores = learned.u(torch.tanh(learned.V(h)))[0, 3:6, 0]
    assert torch.allclose(found[0, 2], scores.softmax(0) @ h[0, 3:6], atol=1e-5)
    assert not torch.allclose(found, mean(h, MergeMap(GROUPS)), atol=1e-2)


def test_max_and_first():
    h = torch.randn(2, 7, 5) - 3
    largest, first = (TokenMerge(5, mode=mode)(h, MergeMap(GROUPS)) for mode in ("max", "first"))
    assert torch.equal(largest[0, 2], h[0, 3:6].amax(0)) and torch.equal(first[0, 2], h[0, 3])
    assert (largest[1, 3] == 0).all() and (first[1, 3] == 0).all()


@pytest.mark.parametrize("mode", ["mean", "learned"])
def test_the_gradient_reaches_every_member(mode):
    h = torch.randn(2, 7, 5, requires_grad=True)
    part = TokenMerge(5, mode=mode)
    (part(h, MergeMap(GROUPS)) * torch.randn(2, 4, 5)).sum().backward()
    assert (h.grad.abs().sum(-1) > 0).equal(GROUPS >= 0)
    if mode == "learned":
        assert part.u.weight.grad.abs().sum() > 0  # with V at zero as well it would be none


@pytest.mark.parametrize("mode", ["mean", "learned", "max", "first"])
def test_unmerge_of_merge_is_the_identity_for_constant_groups(mode):
    merging = MergeMap(GROUPS)
    h = merging.unmerge(torch.randn(2, 4, 5))
    assert torch.allclose(merging.unmerge(TokenMerge(5, mode=mode)(h, merging)), h, atol=1e-6)


@pytest.mark.parametrize("mode", ["mean", "learned", "max", "first"])
def test_a_text_without_tokens_spoils_nothing(mode):
    h = torch.randn(2, 7, 5, requires_grad=True)
    groups = torch.stack([GROUPS[0], torch.full((7,), -1)])
    found = TokenMerge(5, mode=mode)(h, MergeMap(groups))
    found.sum().backward()
    assert (found[1] == 0).all() and h.grad.isfinite().all()
    with pytest.raises(InputError, match="not all -1"):
        MergeMap(groups[1:])


def test_a_group_sees_what_a_member_sees():
    seen = torch.rand(2, 7, 7) < 0.3
    found = MergeMap(GROUPS).pairs(seen)
    for text, groups in enumerate(GROUPS):
        for a in range(4):
            for b in range(4):
                assert found[text, a, b] == seen[text, groups == a][:, groups == b].any()


def test_positions_and_masks():
    left = MergeMap(torch.tensor([[-1, -1, 0, 0, 1, 2], [0, 1, 1, 1, 2, 3]]))
    assert left.mask.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert left.positions("first").tolist() == [[0, 2, 3, 0], [0, 1, 4, 5]]
    assert left.positions().tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize(
    "groups", [[[0, 2, 3]], [[1, 2, 3]], [[0, 1, 0]], [[0, -1, 0]], [[0, 1, -1, 2]], [[0, -2, -2]], [[0.0, 1.0]]]
)
def test_groups_that_are_not_consecutive(groups):
    with pytest.raises(InputError, match="group_ids"):
        MergeMap(torch.tensor(groups))


# In models

FAMILIES = ["BertModel", "RobertaModel", "XLMRobertaModel", "ElectraModel", "DistilBertModel", "LlamaModel"]
HEADS = ["T5EncoderModel", "T5ForConditionalGeneration", "MT5EncoderModel", "RobertaForSequenceClassification"]


@pytest.mark.parametrize("name", [*FAMILIES, *HEADS])
def test_groups_of_one_change_nothing(name):
    model = made(name)
    expected = run(model)
    for layer in (0, 2):
        for settings in ({"mode": "learned"}, {"position": "first"}):
            found = run(add_token_merging(model, layer=layer, **settings), SINGLE)
            assert type(found) is type(expected)
            assert torch.allclose(real(found, model), real(expected, model), atol=1e-6)


@pytest.mark.parametrize("name", [*FAMILIES, *HEADS])
def test_layers_above_see_the_groups_alone(name):
    model = made(name)
    found = run(add_token_merging(model, layer=1), GROUPS, output_hidden_states=True)
    states = found.get("encoder_hidden_states", found.get("hidden_states"))
    assert [s.shape[1] for s in states[:3]] == [7, 7, 4]
    assert found.merge_map.lengths.tolist() == [4, 3]
    assert not torch.allclose(real(found, model), real(run(model), model), atol=1e-3)


@pytest.mark.parametrize("name", ["BertModel", "RobertaModel", "T5EncoderModel"])
def test_merging_after_the_embeddings_is_running_the_model_on_merged_embeddings(name):
    """Of BERT and RoBERTa the layers alone, of T5 the whole encoder: its relative bias is that of K positions."""
    model = made(name)
    found = run(add_token_merging(model, unmerge=False), GROUPS).last_hidden_state
    merging = MergeMap(GROUPS)
    if name == "T5EncoderModel":
        merged = TokenMerge(16)(model.shared(IDS), merging)
        expected = model(inputs_embeds=merged, attention_mask=merging.mask).last_hidden_state
    else:
        merged = TokenMerge(16)(model.embeddings(IDS), merging)
        mask = (1.0 - merging.mask[:, None, None].float()) * -1e9
        expected = model.encoder(merged, attention_mask=mask).last_hidden_state
    assert torch.allclose(found[merging.mask.bool()], expected[merging.mask.bool()], atol=1e-5)


@pytest.mark.parametrize("name", ["RobertaModel", "T5EncoderModel"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("additive", [False, True])
def test_a_mask_of_pairs_is_merged(name, attention, additive):
    """As GraphCodeBERT has it, whose nodes of data flow see the tokens they stand for alone."""
    model = made(name, attn_implementation=attention)
    additive = additive or attention == "eager"
    merging, both = MergeMap(GROUPS), (MASK[:, :, None] & MASK[:, None]).bool()
    seen = both & ((torch.rand(2, 7, 7, generator=torch.manual_seed(0)) < 0.5) | torch.eye(7, dtype=torch.bool))

    def prepared(pairs):
        return torch.where(pairs, 0.0, torch.finfo(torch.float).min)[:, None] if additive else pairs[:, None]

    single = run(add_token_merging(model, layer=1), SINGLE, mask=prepared(seen))
    assert torch.allclose(real(single, model), real(run(model, mask=prepared(seen)), model), atol=1e-5)
    whole = run(add_token_merging(model, layer=1), GROUPS, mask=prepared(both))
    assert torch.allclose(real(whole, model), real(run(add_token_merging(model, layer=1), GROUPS), model), atol=1e-5)
    found = run(add_token_merging(model, unmerge=False), GROUPS, mask=prepared(seen)).last_hidden_state
    if name == "T5EncoderModel":
        embedded = {"inputs_embeds": TokenMerge(16)(model.shared(IDS), merging)}
        expected = model(**embedded, attention_mask=prepared(merging.pairs(seen))).last_hidden_state
    else:
        embedded = TokenMerge(16)(model.embeddings(IDS), merging)
        expected = model.encoder(embedded, attention_mask=prepared(merging.pairs(seen))).last_hidden_state
    shown = merging.mask.bool()
    assert torch.allclose(found[shown], expected[shown], atol=1e-5)
    assert not torch.allclose(found[shown], run(add_token_merging(model, unmerge=False), GROUPS)[0][shown], atol=1e-3)


def test_the_relative_bias_is_that_of_as_many_positions():
    model = made("T5EncoderModel")
    attention = model.encoder.block[0].layer[0].SelfAttention
    merging = MergeMap(GROUPS)
    assert torch.equal(_relative_bias(model.encoder.block, merging.positions()), attention.compute_bias(4, 4))
    first = _relative_bias(model.encoder.block, merging.positions("first"))
    whole, places = attention.compute_bias(7, 7), [0, 1, 3, 6]
    assert torch.equal(first[0], whole[0][:, places][:, :, places])
    found = run(add_token_merging(model, layer=1, position="first"), GROUPS)[0]
    assert not torch.allclose(found, run(add_token_merging(model, layer=1), GROUPS)[0], atol=1e-4)


@pytest.mark.parametrize("name", ["RobertaModel", "T5EncoderModel", "T5ForConditionalGeneration", "LlamaModel"])
@pytest.mark.parametrize("position", ["reindex", "first"])
def test_the_order_of_a_batch_and_its_padding_change_nothing(name, position):
    model = add_token_merging(made(name).double(), layer=1, mode="learned", position=position)
    expected = real(run(model, GROUPS), model)
    order = torch.tensor([1, 0])
    swapped = run(model, GROUPS[order], IDS[order], MASK[order])[0][order]
    wider = [nn.functional.pad(x, (0, 5), value=fill) for x, fill in ((GROUPS, -1), (IDS, 0), (MASK, 0))]
    with_padding = run(model, *wider)[0]
    unmarked = run(model, GROUPS.clamp(min=0))[0]  # the mask says what is padding
    for found in (swapped, with_padding, unmarked):
        found = found if hasattr(model, "decoder") else found[:, :7]
        assert torch.allclose(real((found,), model), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("BertModel", {}),
        ("RobertaModel", {}),
        ("DistilBertModel", {}),
        ("T5EncoderModel", {}),
        ("T5EncoderModel", {"feed_forward_proj": "gated-gelu"}),
        ("LlamaModel", {"num_key_value_heads": 1}),
    ],
)
def test_the_formula_counts_what_torch_counts(name, settings):
    model = made(name, **settings)
    ids, groups = torch.arange(1, 41)[None], (torch.arange(40) * 3 // 4)[None]
    plain = count_flops(lambda: model(ids))
    assert flops(model, [40])[0] == pytest.approx(plain, rel=0.02)
    for layer in (0, 2):
        for mode in ("mean", "learned"):
            merged = add_token_merging(model, layer=layer, mode=mode)
            counted = count_flops(lambda merged=merged: merged(ids, group_ids=groups))
            assert flops(merged, [40], [30])[0] == pytest.approx(counted, rel=0.02)
    assert flops(model, [40], [30])[0] < plain * 0.8
    for wrong in ([50], [-1], [30, 30]):
        with pytest.raises(InputError, match="from 0 to what it has of tokens"):
            flops(model, [40], wrong)
    for other in (nn.Linear(2, 2), transformers.ViTConfig(), transformers.GPT2Config()):
        with pytest.raises(InputError, match="cannot merge tokens"):
            flops(other, [40])


def test_a_decoder_reads_the_merged_states_and_generates_from_them():
    model = add_token_merging(made("T5ForConditionalGeneration"))

    def encoded():  # afresh for every call, since beam search repeats its rows in place
        return model.get_encoder()(input_ids=IDS, attention_mask=MASK, group_ids=GROUPS)

    states = encoded()
    assert states.last_hidden_state.shape == (2, 4, 16)
    mask = states.merge_map.mask
    decoded = model(encoder_outputs=states, attention_mask=mask, decoder_input_ids=IDS[:, :4]).logits
    assert torch.allclose(decoded, run(model, GROUPS).logits, atol=1e-6)
    for beams in (1, 2):
        settings = {"max_new_tokens": 5, "num_beams": beams, "do_sample": False, "eos_token_id": 59}
        found = model.generate(encoder_outputs=encoded(), attention_mask=mask, **settings)
        again = model.generate(encoder_outputs=encoded(), attention_mask=mask, use_cache=False, **settings)
        assert found.equal(again) and found.shape == (2, 6)


def test_token_heads_see_every_token():
    model = made("RobertaForMaskedLM")
    labels = IDS.masked_fill(MASK == 0, -100)
    assert torch.allclose(run(add_token_merging(model), SINGLE, labels=labels).loss, run(model, labels=labels).loss)
    found = run(add_token_merging(model), GROUPS, labels=labels)
    assert found.logits.shape == (2, 7, 60) and torch.equal(found.logits[0, 1], found.logits[0, 2])
    as_tuple = run(add_token_merging(made("RobertaModel")), GROUPS, return_dict=False)
    assert isinstance(as_tuple, tuple) and as_tuple[0].shape == (2, 7, 16)


def test_gradient_checkpointing_gives_the_same_gradients():
    found = []
    for checkpointed in (False, True):
        model = add_token_merging(
            made("RobertaModel", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), layer=1, mode="learned"
        ).train()
        if checkpointed:
            model.gradient_checkpointing_enable()
        run(model, GROUPS)[0].square().sum().backward()
        found.append({name: w.grad for name, w in model.named_parameters() if w.grad is not None})
    assert found[0].keys() == found[1].keys() and "token_merge.u.weight" in found[0]
    assert all(torch.allclose(found[0][name], found[1][name], rtol=1e-4, atol=1e-4) for name in found[0])


def test_decoders_score_whole_texts_only():
    classifier = add_token_merging(made("LlamaForSequenceClassification"))
    assert run(classifier, GROUPS).logits.shape == (2, 2)
    with pytest.raises(InputError, match="predicts the next token"):
        run(add_token_merging(made("LlamaForCausalLM")), GROUPS)
    with pytest.raises(InputError, match="use_cache=False"):
        run(add_token_merging(made("LlamaModel")), GROUPS, use_cache=True)
    with pytest.raises(InputError, match=r"attention_mask of a LlamaModel: \(batch, T\)"):
        run(add_token_merging(made("LlamaModel")), GROUPS, mask=torch.zeros(2, 1, 7, 7))
    with pytest.raises(InputError, match="cannot generate"):
        add_token_merging(made("LlamaForCausalLM")).generate(IDS, attention_mask=MASK, max_new_tokens=2)


# Folders


@pytest.fixture(scope="module")
def task():
    rows = [(f"river_bank_{i % 7} = open_sea({i})" if i % 2 else f"def small_boat(x_{i}): pass") for i in range(32)]
    data = {"text": rows, "label": [i % 2 for i in range(32)]}
    splits = {"train": Dataset.from_dict(data), "test": Dataset.from_dict(data)}
    return Task("boats", "text-classification", splits, ("text",), "label", ("a", "b"), ("accuracy",))


@pytest.fixture(scope="module")
def merged(task):
    """A model that merges identifiers by a learned weighting, trained a little."""
    model = add_token_merging(small("text-encoder", "nano"), SubtokenGrouper(units="all"), layer=1, mode="learned")
    return fine_tune(model.with_head(task), task, "64 examples", learning_rate=1e-2, batch_size=8)


def test_training_moves_the_scorer_and_the_model_learns(merged, task):
    from downriver.evaluate import evaluate

    part = merged.backbone.token_merge
    assert part.u.weight.abs().sum() > 0 and part.layer == 1
    assert evaluate(merged, task)[0].value > 0.9
    batch = merged.collate(task)([task.rows("test")[0]])
    assert merged.features(**batch).shape == (1, 32)
    plain = small("text-encoder", "nano")
    assert not hasattr(plain.backbone, "token_merge") and "group_ids" not in plain.processor("ab")


def test_saved_and_loaded(merged, task, tmp_path):
    batch = merged.collate(task)(list(task.rows("test")))
    merged.save(tmp_path / "m")
    again = load(tmp_path / "m")
    assert torch.equal(again(**batch)["logits"], merged(**batch)["logits"])
    entry = json.loads((tmp_path / "m" / "config.json").read_text())["downriver_token_merging"]
    assert (entry["layer"], entry["mode"], entry["groups"]["units"]) == (1, "learned", "all")
    again.processor = SubtokenGrouper.of(again).tokenizer(again.processor)
    assert torch.equal(again.collate(task)(list(task.rows("test")))["group_ids"], batch["group_ids"])
    ids = {name: batch[name] for name in ("input_ids", "attention_mask")}
    plain = transformers.AutoModel.from_pretrained(tmp_path / "m", add_pooling_layer=False).eval()
    expected = small("text-encoder", "nano").backbone
    expected.load_state_dict({k: v for k, v in merged.backbone.state_dict().items() if "token_merge" not in k})
    assert torch.equal(plain(**ids)[0], expected.eval()(**ids)[0])  # transformers alone does not merge
    restore_token_merging(plain, tmp_path / "m")
    assert torch.equal(plain(**ids, group_ids=batch["group_ids"])[0], again.backbone(**batch_of(batch))[0])


def batch_of(batch):
    return {name: batch[name] for name in ("input_ids", "attention_mask", "group_ids")}


@pytest.mark.parametrize("name", ["T5EncoderModel", "T5ForConditionalGeneration", "RobertaForMaskedLM"])
def test_folders_of_other_families(name, tmp_path):
    model = add_token_merging(made(name), layer=1, mode="learned", position="first")
    nn.init.normal_(next(m for m in model.modules() if isinstance(m, TokenMerge)).u.weight)
    model.save_pretrained(tmp_path / "m")
    kind = "masked-lm" if name == "RobertaForMaskedLM" else "module"
    small("masked-lm", "nano").processor.save_pretrained(tmp_path / "m")
    again = load(tmp_path / "m", kind=kind).backbone
    assert torch.equal(run(again, GROUPS)[0], run(model, GROUPS)[0])
    weights = {k: v for k, v in model.state_dict().items() if not k.endswith("u.weight")}
    model.save_pretrained(tmp_path / "torn", state_dict=weights)
    torn = type(model).from_pretrained(tmp_path / "torn")
    with pytest.raises(InputError, match=r"token_merge\.u\.weight': \(1, 16\) expected, nothing found"):
        restore_token_merging(torn, tmp_path / "torn")


def test_an_adapter_keeps_the_merge_below_it(task, tmp_path):
    base = small("text-encoder", "nano")
    model = add_token_merging(base, SubtokenGrouper())
    assert model.source == base.source  # whose weights are the same but for the merge
    tuned = adapt.lora(model, task, "16 examples", rank=2, batch_size=8)
    tuned.save(tmp_path / "lora")
    batch = model.collate(task)(list(task.rows("test"))[:4])
    again = load(tmp_path / "lora")
    assert torch.allclose(again(**batch)["logits"], tuned(**batch)["logits"], atol=1e-6)
    with pytest.raises(InputError, match="merge them first"):
        add_token_merging(tuned)


def test_the_original_and_copies_are_independent(merged, task):
    batch = merged.collate(task)(list(task.rows("test"))[:4])
    twin = copy.deepcopy(merged.backbone)
    with torch.no_grad():
        twin.token_merge.u.weight.mul_(-20)
    assert not torch.equal(twin(**batch_of(batch))[0], merged.backbone(**batch_of(batch))[0])


def test_what_is_refused():
    model = made("RobertaModel")
    with pytest.raises(InputError, match="layer is 3: a RobertaModel has the layers 0 to 2"):
        add_token_merging(model, layer=3)
    with pytest.raises(InputError, match="unknown mode 'median'"):
        add_token_merging(model, mode="median")
    with pytest.raises(InputError, match="unknown position 'last'"):
        add_token_merging(model, position="last")
    with pytest.raises(InputError, match="family 'vit' cannot merge"):
        add_token_merging(small("vit", "nano"))
    with pytest.raises(InputError, match="merges tokens already"):
        add_token_merging(add_token_merging(model))
    with pytest.raises(InputError, match="the decoder reads the merged states"):
        add_token_merging(made("T5ForConditionalGeneration"), unmerge=True)
    with pytest.raises(InputError, match="set up as a decoder"):
        add_token_merging(made("BertModel", is_decoder=True))
    with pytest.raises(InputError, match="pooling 'mean' needs the tokens"):
        add_token_merging(small("text-encoder", "nano"), unmerge=False)
    with pytest.raises(InputError, match="comes without a tokenizer"):
        add_token_merging(model, SubtokenGrouper())
    with pytest.raises(InputError, match="needs group_ids beside input_ids"):
        run(add_token_merging(model))
    with pytest.raises(InputError, match=r"shapes \(2, 7\) and \(2, 5\)"):
        run(add_token_merging(model), GROUPS[:, :5])
    with pytest.raises(InputError, match=r"shape \(2, 5\) and the hidden states \(2, 7, 16\)"):
        add_token_merging(model)(IDS, group_ids=torch.zeros(2, 5, dtype=torch.long))
    with pytest.raises(InputError, match="text 1 are"):
        run(add_token_merging(model), torch.stack([SINGLE[0], SINGLE[0].flip(0)]))


@pytest.mark.assets
def test_a_real_checkpoint(asset, tmp_path):
    model = load(asset("all-MiniLM-L6-v2"))
    texts = ["def read_lines(self, buffer_size): pass", "max_connections_per_host = 8"]
    merged = add_token_merging(model, SubtokenGrouper())
    batch = merged.processor(texts, padding=True, return_tensors="pt")
    groups = batch.pop("group_ids")
    single = torch.arange(groups.shape[1]).expand_as(groups)
    expected, found = model.features(**batch), merged.features(**batch, group_ids=groups)
    assert torch.allclose(merged.features(**batch, group_ids=single), expected, atol=1e-6)
    near = torch.cosine_similarity(expected[:, None], found[None], dim=-1)
    assert near[0, 0] > near[0, 1] and near[1, 1] > near[1, 0]
    assert (groups.amax(1) + 1 < batch["attention_mask"].sum(1)).all()
    merged.save(tmp_path / "m")
    assert torch.equal(load(tmp_path / "m").features(**batch, group_ids=groups), found)
