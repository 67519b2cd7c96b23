"""Instruction tuning: which tokens are learnt, examples that do not see one another, and one run end to end."""

import dataclasses

import pytest
import torch
import transformers

from downriver.adapt.opt_iml import InstructionPacker, opt_iml, parts_of
from downriver.core.cost import metered
from downriver.core.errors import InputError
from downriver.data.mix.tasks import TaskMixture
from downriver.evaluate.generalization import score_task
from downriver.models import Model, byte_tokenizer, small, small_language_model, word_tokenizer
from downriver.tasks.generalization import InstructionTask, Template
from downriver.training.rows import TokenRows

TELLINGS = Template("after {x} comes", "{y}"), Template("{x} then", "{y}")


def pairs(n=30, name="next", templates=TELLINGS):
    examples = [{"x": f"w{i}", "y": f"w{i + 1}"} for i in range(n)]
    return InstructionTask(name, "c", "b", examples, templates)


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer(["after comes then", *(f"w{i}" for i in range(60))], context=64)


@pytest.fixture(scope="module")
def model(tokenizer):
    return small_language_model("causal-lm", tokenizer, width=32, layers=2, heads=2, context=64)


def loss_of(model, rows):
    batch = TokenRows("rows", {"train": rows}).collate(model)(list(rows))
    with torch.no_grad():
        return model(**batch)["loss"].item()


def test_only_the_target_and_the_end_are_learnt(tokenizer):
    packer = InstructionPacker(tokenizer, block=32)
    mixture = TaskMixture([pairs()], seed=1)
    rows = packer.pack(mixture, 3)
    for row in rows:
        assert len(row["input_ids"]) <= 32
        starts = [i for i, p in enumerate(row["position_ids"]) if p == 0]
        for start, stop in zip(starts, [*starts[1:], len(row["input_ids"])], strict=True):
            words = tokenizer.convert_ids_to_tokens(row["input_ids"][start:stop])
            learnt = [i >= 0 for i in row["labels"][start:stop]]
            assert words[0] == "<s>" and words[-1] == "</s>" and learnt == [False] * (len(words) - 2) + [True, True]
    full = InstructionPacker(tokenizer, block=32, loss="full").pack(mixture, 3)
    assert full["input_ids"][:] == rows["input_ids"][:]
    assert all((i < 0) == (p == 0) for row in full for i, p in zip(row["labels"], row["position_ids"], strict=True))


def test_the_loss_does_not_depend_on_source_labels_or_on_neighbours(model, tokenizer):
    mixture = TaskMixture([pairs()], seed=2)
    packer = InstructionPacker(tokenizer, block=48)
    packed = packer.pack(mixture, 1)
    batch = TokenRows("rows", {"train": packed}).collate(model)(list(packed))
    own = model(**{k: v.clone() for k, v in batch.items()})["logits"]
    starts = [i for i, p in enumerate(packed[0]["position_ids"]) if p == 0]
    assert len(starts) > 3
    for start, stop in zip(starts, [*starts[1:], own.shape[1]], strict=True):  # each example alone
        alone = model(input_ids=batch["input_ids"][:, start:stop])["logits"]
        assert (own[:, start:stop] - alone).abs().max() <= 1e-5
    full = InstructionPacker(tokenizer, block=48, loss="full").pack(mixture, 1)
    assert abs(loss_of(model, full) - loss_of(model, packed)) > 1e-3
    together = InstructionPacker(tokenizer, block=48, isolate=False).pack(mixture, 1)
    assert "position_ids" not in together.column_names
    assert abs(loss_of(model, together) - loss_of(model, packed)) > 1e-5


def test_the_seam_lies_where_it_lies_when_the_model_is_asked(asset):
    tokenizer = transformers.AutoTokenizer.from_pretrained(asset("all-MiniLM-L6-v2"))
    assert parts_of("2 + 2 = ", "4") == [("2 + 2 =", False), (" 4", True)] and parts_of("", "text") == [("text", True)]
    task = InstructionTask("t", "c", "b", [{"x": "river", "y": "side"}], (Template("{x}", "{y}"),))
    row = InstructionPacker(tokenizer, block=8).pack(TaskMixture([task]), 1)[0]
    learnt = [i for i in row["labels"] if i >= 0]
    assert tokenizer.convert_ids_to_tokens(learnt)[0] == "side"


def test_a_long_source_is_cut_from_the_left_and_a_target_never(tokenizer):
    long = InstructionTask(
        "l", "c", "b", [{"x": " ".join(["w1"] * 40 + ["w7"]), "y": "w2 w3"}], (Template("{x}", "{y}"),)
    )
    row = InstructionPacker(tokenizer, block=8).pack(TaskMixture([long]), 1)[0]
    assert tokenizer.convert_ids_to_tokens(row["input_ids"]) == ["<s>", "w1", "w1", "w1", "w7", "w2", "w3", "</s>"]
    wide = dataclasses.replace(long, examples=[{"x": "w1", "y": " ".join(["w2"] * 9)}])
    with pytest.raises(InputError, match="does not fit"):
        InstructionPacker(tokenizer, block=8).pack(TaskMixture([wide]), 1)


def test_demonstrations_are_other_examples_of_the_task(tokenizer):
    mixture = TaskMixture([pairs(4)])
    packer = InstructionPacker(tokenizer, demos=(0, 5))
    shown = [packer.prompt(mixture, visit)[0].split("\n\n") for visit in range(200)]
    assert {len(parts) - 1 for parts in shown} == {0, 1, 2, 3}  # a task of four has three others
    for parts in shown:
        asked = parts[-1].split()[1 if parts[-1].startswith("after") else 0]
        assert all(asked not in part.split()[:-1] for part in parts[:-1])
        assert all(part.split()[-1].startswith("w") for part in parts[:-1])
    assert InstructionPacker(tokenizer, demos=2).prompt(mixture, 0)[0].count("\n\n") == 2
    assert len({packer.prompt(mixture, v)[0].split()[0] == "after" for v in range(50)}) == 2, "both templates are used"


def test_blocks_are_a_function_of_the_seeds(tokenizer):
    mixture = TaskMixture([pairs(), pairs(10, "other")], seed=5)
    one, two = (InstructionPacker(tokenizer, block=24).pack(mixture, n) for n in (6, 6))
    assert one["input_ids"][:] == two["input_ids"][:] and len(one) == 6
    other = InstructionPacker(tokenizer, block=24).pack(dataclasses.replace(mixture, seed=6), 6)
    assert other["input_ids"][:] != one["input_ids"][:]


def test_it_learns_what_it_is_told_and_leaves_the_model_alone(model, weights):
    before = weights(model)
    task = pairs(3)
    with metered() as meter:
        tuned = opt_iml(
            model, TaskMixture([task]), "70 steps", block=24, batch_size=2, learning_rate=2e-2, warmup=5, dropout=0.0
        )
    assert meter.cost.examples == 140
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert sum(score_task(tuned, task)[1]) == 3 > sum(score_task(model, task)[1])


def test_equal_runs_are_equal_bit_by_bit(model):
    budgets = "3 steps", "6 examples", "144 tokens", "3 steps"
    runs = [
        opt_iml(model, TaskMixture([pairs(5)]), b, block=24, batch_size=2, warmup=1, seed=i // 3)
        for i, b in enumerate(budgets)
    ]
    heads = [run.backbone.lm_head.weight for run in runs]
    assert torch.equal(heads[0], heads[1]) and torch.equal(heads[0], heads[2]) and not torch.equal(heads[0], heads[3])


def test_an_adapter_learns_and_the_base_does_not(model):
    tuned = opt_iml(model, TaskMixture([pairs(12)]), "4 steps", block=48, batch_size=2, warmup=1, lora=2, dropout=0.0)
    assert type(tuned.backbone).__name__ == "PeftModelForCausalLM"
    base = tuned.backbone.get_base_model().state_dict()
    for name, tensor in model.backbone.state_dict().items():
        key = name if name in base else name.replace(".weight", ".base_layer.weight")
        assert torch.equal(base[key], tensor), name
    again = opt_iml(tuned, TaskMixture([pairs(12)]), "2 steps", block=48, batch_size=2, warmup=1)
    assert not hasattr(again.backbone, "peft_config")


def test_dropout_is_there_while_training_and_gone_after(tokenizer):
    config = transformers.OPTConfig(
        vocab_size=len(tokenizer), hidden_size=16, ffn_dim=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, word_embed_proj_dim=16, dropout=0.25, pad_token_id=0,
    )  # fmt: skip
    opt = Model(transformers.OPTForCausalLM(config), kind="causal-lm", processor=tokenizer, max_length=64)
    settings = {"block": 32, "batch_size": 2, "warmup": 1, "learning_rate": 1e-2}
    runs = [opt_iml(opt, TaskMixture([pairs()]), "3 steps", dropout=p, **settings) for p in (0.0, 0.5, 0.5)]
    heads = [run.backbone.get_input_embeddings().weight for run in runs]
    assert not torch.equal(heads[0], heads[1]) and torch.equal(heads[1], heads[2])
    for run in runs:
        layer = run.backbone.model.decoder.layers[0]
        assert layer.dropout == 0.25 and not run.backbone.get_input_embeddings()._forward_hooks


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": "1e9 flops"}, "steps, examples or tokens are expected"),
        ({"budget": "1 example"}, "does not pay for one step of 16 blocks"),
        ({"budget": "10 steps"}, "warmup is 60 steps of 10"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"demos": (3, 1)}, r"demos is \(3, 1\)"),
        ({"loss": "half"}, "unknown loss 'half'"),
        ({"lora": 0, "budget": "2 steps", "warmup": 1}, "rank is 0"),
    ],
)
def test_bad_input(model, settings, message):
    with pytest.raises(InputError, match=message):
        opt_iml(model, TaskMixture([pairs()]), **({"budget": "100 steps", "block": 32} | settings))


def test_bad_models_and_examples(model):
    with pytest.raises(InputError, match="a causal-lm is expected"):
        opt_iml(small("masked-lm", "nano"), TaskMixture([pairs()]), "100 steps")
    with pytest.raises(InputError, match="comes without a tokenizer"):
        opt_iml(model.backbone, TaskMixture([pairs()]), "100 steps")
    broken = InstructionTask("b", "c", "b", [{"x": "1"}], (Template("{x}", "{y}"),))
    with pytest.raises(InputError, match=r"task 'b', example 0: unknown variable of template '\{y\}' 'y'"):
        opt_iml(model, TaskMixture([broken]), "100 steps", block=32)
    with pytest.raises(InputError, match="blocks is 0"):
        InstructionPacker(byte_tokenizer(8)).pack(TaskMixture([pairs()]), 0)
