"""Masked diffusion: both ways, the loss, the likelihood, the order of unmasking, files, refusals."""

import functools
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
import transformers
from datasets import Dataset

from downriver.core.errors import InputError
from downriver.models.masked_diffusion import (
    MaskedDiffusionConfig,
    MaskedDiffusionLM,
    MaskedDiffusionModel,
    diffusion_objective,
)
from downriver.models.model import Model
from downriver.models.rope import extend_context, ntk_scale
from downriver.models.tokenizers import byte_tokenizer
from downriver.training.engine import fine_tune
from downriver.training.rows import TokenRows

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
MASK = 39


def build(seed=0, kind=MaskedDiffusionLM, **more):
    torch.manual_seed(seed)
    settings = {**SIZES, "vocab_size": 40, "max_position_embeddings": 64, "initializer_range": 0.2} | more
    return kind(MaskedDiffusionConfig(**settings)).eval()


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture(scope="module")
def prompts():
    return torch.randint(0, MASK, (3, 6), generator=torch.Generator().manual_seed(1))


class Copying(MaskedDiffusionLM):
    """Says at every place what stands so many tokens before it."""

    back = 4

    def forward(self, input_ids=None, logits_to_keep=0, **kwargs):
        logits = 1e4 * F.one_hot(input_ids.roll(self.back, 1), self.config.vocab_size).float()
        return transformers.modeling_outputs.MaskedLMOutput(logits=logits[:, -logits_to_keep:])


def inputs_seen(model, run):
    """The tokens that each forward pass of ``run`` read, and what it gave back."""
    seen = []
    hook = model.register_forward_pre_hook(lambda _, __, kw: seen.append(kw["input_ids"].clone()), with_kwargs=True)
    try:
        return seen, run()
    finally:
        hook.remove()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_every_token_sees_every_other(attention):
    model = build(attn_implementation=attention)
    ids = torch.arange(8)[None]
    changed = ids.clone()
    changed[0, 5] = 20
    before, after = model(ids).logits, model(changed).logits
    assert (before[0, 4] != after[0, 4]).any() and (before[0, 0] != after[0, 0]).any()
    causal = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, vocab_size=40))
    causal.load_state_dict(model.state_dict())
    assert torch.equal(causal(ids).logits[0, :5], causal(changed).logits[0, :5])
    # with the mask of attention taken off, Llama gives the very same
    everything = torch.zeros(1, 1, 8, 8)
    assert torch.allclose(causal(ids, attention_mask=everything).logits, before, atol=1e-5)


def test_padding_is_not_seen(model, prompts):
    padded = F.pad(prompts, (2, 0), value=7)
    mask = F.pad(torch.ones_like(prompts), (2, 0))
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    found = model(padded, attention_mask=mask, position_ids=positions).logits[:, 2:]
    assert torch.allclose(found, model(prompts).logits, atol=1e-5)


@pytest.mark.parametrize(("length", "block", "steps"), [(8, 8, 8), (8, 4, 4), (12, 4, 9), (7, 7, 3), (6, 6, 1)])
@pytest.mark.parametrize("remasking", ["low_confidence", "entropy", "random"])
def test_unmasking_fills_all_masks_in_so_many_steps_and_leaves_the_prompt(
    model, prompts, length, block, steps, remasking
):
    settings = {"block_length": block, "steps": steps, "remasking": remasking}
    seen, out = inputs_seen(model, lambda: model.generate(prompts, length, **settings))
    assert len(seen) == steps and out.shape == (3, 6 + length)
    assert torch.equal(out[:, :6], prompts) and not (out == MASK).any()
    left = torch.stack([(x[:, 6:] == MASK).sum(1) for x in [*seen, out]])
    assert (left[0] == length).all() and (left[-1] == 0).all()
    per_block = [block // (steps * block // length) + (i < block % (steps * block // length)) for i in range(steps)]
    if length == block:  # the remainder goes to the first steps
        assert (left[:-1] - left[1:]).tolist() == [[n] * 3 for n in per_block]
    for x, y in itertools.pairwise([*seen, out]):
        assert torch.equal(x[x != MASK], y[x != MASK])  # what is written stays
    for number, x in enumerate(seen):  # block by block
        done = number // (steps * block // length) * block
        assert not (x[:, 6 : 6 + done] == MASK).any() and (x[:, 6 + done + block :] == MASK).all()


def test_one_token_a_step_and_the_surest_one(model, prompts):
    seen, out = inputs_seen(model, lambda: model.generate(prompts, 5))
    for x, y in itertools.pairwise([*seen, out]):
        logits = model(input_ids=x).logits
        logits[..., MASK] = -torch.inf
        best, token = logits.softmax(-1).max(-1)
        place = best.masked_fill(x != MASK, -1).argmax(1)
        assert ((x != y).sum(1) == 1).all()
        rows = torch.arange(3)
        assert (y[rows, place] == token[rows, place]).all()


def test_the_order_does_not_depend_on_the_batch(model, prompts):
    together, _ = inputs_seen(model, lambda: model.generate(prompts, 8, block_length=4))
    for row, prompt in enumerate(prompts):
        alone, _ = inputs_seen(model, lambda p=prompt[None]: model.generate(p, 8, block_length=4))
        assert torch.equal(torch.cat(alone), torch.stack(together)[:, row])


def test_prompts_of_different_lengths(model, prompts):
    short = prompts[1:2, 2:]
    batch = torch.cat([prompts[:1], F.pad(short, (2, 0), value=9)])
    mask = torch.tensor([[1] * 6, [0] * 2 + [1] * 4])
    out = model.generate(batch, 6, attention_mask=mask)
    assert torch.equal(out[0], model.generate(prompts[:1], 6)[0])
    assert torch.equal(out[1, 2:], model.generate(short, 6)[0])


def test_a_mask_in_the_prompt_stays(model):
    prompt = torch.tensor([[1, MASK, 3]])
    out = model.generate(prompt, 4)
    assert torch.equal(out[:, :3], prompt) and not (out[:, 3:] == MASK).any()


def test_drawing(model, prompts):
    def drawn(seed, **more):
        return model.generate(prompts, 8, temperature=1.0, seed=seed, **more)

    assert torch.equal(drawn(1), drawn(1)) and not torch.equal(drawn(1), drawn(2))
    assert torch.equal(drawn(1, top_p=1e-9), drawn(2, top_p=1e-9))  # only the likeliest is left
    assert torch.equal(drawn(1, top_p=1e-9), model.generate(prompts, 8))
    # the frequencies of a single drawn token are those of the softmax
    prompt = prompts[:1].expand(4000, -1)
    tokens = model.generate(prompt, 1, temperature=2.0)[:, -1]
    masked = torch.cat([prompts[:1], torch.tensor([[MASK]])], 1)
    logits = model(masked).logits[0, -1]
    logits[MASK] = -torch.inf
    expected = (logits / 2).softmax(-1)
    found = torch.bincount(tokens, minlength=40) / 4000
    assert (found - expected).abs().max() < 0.03


def test_guidance(model, prompts):
    masked = torch.cat([prompts, torch.full((3, 1), MASK)], 1)
    alone = torch.full_like(masked, MASK)
    c, u = model(masked).logits[:, -1], model(alone).logits[:, -1]
    guided = u + 3.5 * (c - u)
    guided[:, MASK] = -torch.inf
    assert torch.equal(model.generate(prompts, 1, cfg_scale=2.5)[:, -1], guided.argmax(-1))
    assert not torch.equal(model.generate(prompts, 8, cfg_scale=5.0), model.generate(prompts, 8))


@pytest.mark.parametrize("estimator", ["mean", "elbo"])
def test_a_model_that_copies_needs_nothing(estimator):
    copying = build(kind=Copying)
    assert copying.nll([3, 1, 4, 2], [3, 1, 4, 2], 16, estimator) == 0
    assert copying.nll([3, 1, 4, 2], [3, 1, 5, 2], 16, estimator) > 100
    assert torch.equal(copying.generate(torch.tensor([[3, 1, 4, 2]]), 4)[0], torch.tensor([3, 1, 4, 2] * 2))


def test_both_estimators_approach_the_bound(model):
    """All subsets of three tokens, k uniform: (1/3) Σ_k mean over subsets of size k of their mean cross-entropy."""
    prompt, answer = [5, 6], [7, 8, 9]
    bound = 0.0
    for k in (1, 2, 3):
        subsets = list(itertools.combinations(range(3), k))
        for subset in subsets:
            ids = torch.tensor([[*prompt, *(MASK if i in subset else t for i, t in enumerate(answer))]])
            nats = F.cross_entropy(model(ids).logits[0, 2:], torch.tensor(answer), reduction="none")
            bound += nats[list(subset)].mean().item() / len(subsets) / 3
    assert model.nll(prompt, answer, 1000, batch_size=500) == pytest.approx(bound, rel=0.05)
    assert model.nll(prompt, answer, 3000, "elbo", batch_size=1000) == pytest.approx(bound, rel=0.1)
    masked = torch.tensor([[*prompt, MASK]])
    one = F.cross_entropy(model(masked).logits[:, -1], torch.tensor([7]))
    assert model.nll(prompt, [7], 1) == pytest.approx(float(one.detach()))  # exact where there is nothing to draw
    assert model.nll(prompt, answer, 16, batch_size=16) == pytest.approx(model.nll(prompt, answer, 16, batch_size=3))
    assert model.nll([], answer, 4) > 0


def test_only_the_answer_is_hidden_in_the_likelihood(model):
    seen, _ = inputs_seen(model, lambda: model.nll([5, MASK, 6], [7, 8, 9, 10], 64, batch_size=64))
    [ids] = seen
    assert torch.equal(ids[:, :3], torch.tensor([5, MASK, 6]).expand(64, -1))
    hidden = ids[:, 3:] == MASK
    assert torch.equal(ids[:, 3:][~hidden], torch.tensor([7, 8, 9, 10]).expand(64, -1)[~hidden])
    assert set(hidden.sum(1).tolist()) == {1, 2, 3, 4}


def test_the_loss_by_hand(model):
    ids = torch.randint(0, MASK, (4, 10), generator=torch.Generator().manual_seed(3))
    labels = ids.clone()
    labels[0, :6] = -100  # a prompt
    found = model.loss(ids, labels, generator=torch.Generator().manual_seed(5))
    draw = torch.Generator().manual_seed(5)
    p = (1 - 1e-3) * torch.rand(4, 1, generator=draw) + 1e-3
    hidden = (torch.rand(4, 10, generator=draw) < p) & (labels != -100)
    assert not hidden[0, :6].any() and hidden.any()
    logits = model(ids.masked_fill(hidden, MASK)).logits
    nats = F.cross_entropy(logits.transpose(1, 2), ids, reduction="none")
    rows = (nats * hidden / p).sum(1) / torch.tensor([4, 10, 10, 10])
    assert torch.allclose(found, rows.mean(), rtol=1e-5)
    padded = torch.ones_like(ids)
    padded[1, 7:] = 0
    assert torch.equal(
        model.loss(ids, attention_mask=padded, generator=torch.Generator().manual_seed(5)),
        model.loss(ids, ids.masked_fill(padded == 0, -100), padded, generator=torch.Generator().manual_seed(5)),
    )


def test_the_loss_bounds_what_a_uniform_model_needs():
    """Equal logits: every hidden token takes log 40, and the draws' weights have the mean 1."""
    model = build(initializer_range=0.0)
    losses = [model.loss(torch.zeros(64, 16, dtype=torch.long)).item() for _ in range(40)]
    assert sum(losses) / 40 == pytest.approx(math.log(40), rel=0.03)


def test_a_share_of_training_batches_is_cut():
    model = build(random_length=1.0).train()
    lengths = []
    model.model.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    ids = torch.zeros(2, 12, dtype=torch.long)
    for _ in range(60):
        model.loss(ids)
    assert set(lengths) == set(range(1, 13))
    labels = ids.clone()
    labels[:, :5] = -100
    lengths.clear()
    model.loss(ids, labels)  # prompts are not cut off from their answers
    model.eval().loss(ids)
    assert lengths == [12, 12]


def test_the_objective_undoes_berts_masks(prompts):
    """Its loss is that of the whole texts, whatever the batch hid of them; of the answers alone where that is asked."""
    tokenizer = byte_tokenizer(32)
    net = build(vocab_size=len(tokenizer), mask_token_id=tokenizer.mask_token_id)
    model = Model(net, kind="masked-lm", processor=tokenizer, pooling="mean", max_length=32)
    rows = [tokenizer(text)["input_ids"] for text in ("down the river", "by the sea")]
    task = TokenRows("texts", {"train": Dataset.from_dict({"input_ids": rows})})
    ids = torch.tensor([rows[0], [*rows[1], *[0] * (len(rows[0]) - len(rows[1]))]])
    shown = (torch.arange(ids.shape[1]) < torch.tensor([[len(row)] for row in rows])).long()

    def found(run):
        torch.manual_seed(7)
        return float(run())

    for split in (task.splits["train"], Dataset.from_dict({"input_ids": rows, "labels": rows})):
        batch = TokenRows("texts", {"train": split}).collate(model)(list(split))
        assert found(lambda batch=batch: diffusion_objective(model, batch)["loss"]) == found(
            lambda: net.loss(ids, attention_mask=shown)
        )
    hidden = task.collate(model)(list(task.splits["train"]))
    assert not torch.equal(hidden["input_ids"], ids)  # BERT's rule was at work
    labels = [[-100] * 5 + row[5:] for row in rows]
    answers = TokenRows("answers", {"train": Dataset.from_dict({"input_ids": rows, "labels": labels})})
    batch = answers.collate(model)(list(answers.splits["train"]))
    only = functools.partial(diffusion_objective, answers_only=True)
    wanted = ids.masked_fill(shown == 0, -100)
    wanted[:, :5] = -100
    assert found(lambda: only(model, batch)["loss"]) == found(lambda: net.loss(ids, wanted, shown))
    with pytest.raises(InputError, match="a batch without labels"):
        only(model, {"input_ids": ids})
    with pytest.raises(InputError, match="texts packed in a row"):
        diffusion_objective(model, {"input_ids": ids, "position_ids": ids})


def test_it_learns_in_fine_tune_and_in_transformers_trainer(tmp_path):
    tokenizer = byte_tokenizer(32)
    rows = [tokenizer(12 * letter)["input_ids"] for letter in "abcdefgh"]
    task = TokenRows("letters", {"train": Dataset.from_dict({"input_ids": rows})})
    words = {"vocab_size": len(tokenizer), "mask_token_id": tokenizer.mask_token_id, "pad_token_id": 0}
    net = build(**words, initializer_range=0.02)
    model = Model(net, kind="masked-lm", processor=tokenizer, pooling="mean", max_length=32)
    tuned = fine_tune(model, task, "100 steps", learning_rate=5e-3, batch_size=8, objective=diffusion_objective)
    before, after = (m.backbone.nll(rows[0][:5], rows[0][5:], 64) for m in (model, tuned))
    assert after < 2 < 5 < before
    said = tuned.backbone.generate(torch.tensor(rows)[:, :7], 5)
    assert (said == torch.tensor(rows)[:, :12]).float().mean() > 0.9
    args = transformers.TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=4, report_to="none", use_cpu=True, disable_tqdm=True
    )
    data = [{"input_ids": torch.tensor(row), "labels": torch.tensor(row)} for row in rows]
    weights = net.lm_head.weight.clone()
    result = transformers.Trainer(model=net, args=args, train_dataset=data).train()
    assert math.isfinite(result.training_loss) and not torch.equal(net.lm_head.weight, weights)


@pytest.mark.parametrize("tied", [False, True])
def test_saved_and_loaded(tied, prompts, tmp_path):
    model = build(tie_word_embeddings=tied)
    extend_context(model, 256)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path).eval()
    assert isinstance(again, MaskedDiffusionLM) and again.config.mask_token_id == MASK
    assert torch.equal(again(prompts).logits, model(prompts).logits)
    assert torch.equal(again.generate(prompts, 8), model.generate(prompts, 8))
    assert again.config.rope_parameters["rope_theta"] == 10_000 * ntk_scale(10_000, 16, 64, 256)
    trunk = transformers.AutoModel.from_pretrained(tmp_path).eval()
    assert isinstance(trunk, MaskedDiffusionModel)
    hidden = trunk(prompts).last_hidden_state
    assert torch.equal(model.lm_head(hidden), model(prompts).logits)


def test_what_is_refused(model, prompts):
    for settings, message in [
        ({"block_length": 3}, "gen_length 8, block_length 3: whole blocks"),
        ({"block_length": 4, "steps": 5}, "steps is 5: a multiple of the 2 blocks"),
        ({"steps": 9}, "at most the 8 tokens"),
        ({"remasking": "low_confidense"}, "did you mean 'low_confidence'"),
        ({"temperature": -1.0}, "temperature -1.0"),
        ({"top_p": 0.0}, "top_p 0.0"),
        ({"attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0]] * 3)}, "padded on the left"),
    ]:
        with pytest.raises(InputError, match=message):
            model.generate(prompts, 8, **settings)
    with pytest.raises(InputError, match=r"shape \(6,\): \(batch, length\)"):
        model.generate(prompts[0], 8)
    with pytest.raises(InputError, match="unknown estimator 'median'"):
        model.nll([1], [2], estimator="median")
    with pytest.raises(InputError, match="an answer of 0 tokens"):
        model.nll([1], [])
    with pytest.raises(InputError, match="labels were given without input_ids"):
        model(inputs_embeds=torch.zeros(1, 2, 32), labels=prompts)
    with pytest.raises(InputError, match="mask_token_id is 50: one of 40 tokens"):
        MaskedDiffusionConfig(**SIZES, vocab_size=40, mask_token_id=50)
    with pytest.raises(InputError, match=r"random_length is 2\.0: a share"):
        MaskedDiffusionConfig(**SIZES, random_length=2.0)
    with pytest.raises(InputError, match="attends both ways"):
        MaskedDiffusionConfig(**SIZES, is_causal=True)
