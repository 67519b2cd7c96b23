"""Code from words: pairs, prompts, recipes, outputs and losses."""

import copy
import json

import datasets
import peft
import pytest
import torch

from downriver.core.errors import InputError
from downriver.domains.codegen import (
    INITIAL,
    PROMPT,
    RECIPES,
    CodeTask,
    _unfenced,
    completion_loss,
    format_prompt,
    generate_code,
    lacking,
    prompts,
    returns,
    target_loss,
    tune,
)
from downriver.models import small
from downriver.models.quantised import quantised
from downriver.training.engine import clone

PAIRS = [{"intent": f"add {i}", "code": f"return x + {i}"} for i in range(12)]


@pytest.fixture(scope="module")
def task():
    return CodeTask("sums", {"train": PAIRS[:8], "validation": PAIRS[8:10], "test": PAIRS[10:]})


@pytest.fixture(scope="module")
def model():
    return small("causal-lm", "nano")


def test_pairs_of_the_standard_library():
    task = CodeTask.stdlib(0)
    assert all(len(task.splits[split]) > 100 for split in ("train", "validation", "test"))
    code = [row["code"] for rows in task.splits.values() for row in rows]
    assert len(set(code)) == len(code) and all(line.startswith("return") for line in code)
    assert CodeTask.stdlib(0).splits == task.splits != CodeTask.stdlib(1).splits


def test_what_counts_as_a_pair():
    source = """
class A:
    def isEmpty(self):
        return not self.items

    def long(self):
        "Two lines."
        x = 1
        return x

def single(): return 1

def broken(x):
    '''Give it back.

    Always.'''
    return x
"""
    assert list(returns(source)) == [
        {"intent": "broken: Give it back.", "code": "return x"},
        {"intent": "is empty", "code": "return not self.items"},
    ] or sorted(pair["intent"] for pair in returns(source)) == ["broken: Give it back.", "is empty"]
    assert list(returns("def (")) == []


def test_the_loss_is_on_code_and_end_alone(model, task):
    rows = task.token_rows(model)
    row = rows.rows("train")[0]
    start = len(model.processor(PROMPT.format(intent="add 0"), add_special_tokens=False)["input_ids"]) + 1
    assert all(label == -100 for label in row["labels"][:start])
    assert row["labels"][start:] == row["input_ids"][start:] and row["labels"][-1] == model.processor.eos_token_id
    batch = rows.collate(model)([row])
    found = completion_loss(model.eval(), batch)["loss"]
    assert float(found) == pytest.approx(float(model(**batch)["loss"]), rel=1e-5)
    asked = prompts([PAIRS[0]["intent"]])
    assert target_loss(model, asked, [PAIRS[0]["code"]]) == pytest.approx(float(found), rel=1e-5)
    several = target_loss(model, prompts([p["intent"] for p in PAIRS]), [p["code"] for p in PAIRS], batch_size=5)
    assert several == pytest.approx(
        target_loss(model, prompts([p["intent"] for p in PAIRS]), [p["code"] for p in PAIRS], batch_size=1), rel=1e-4
    )


@pytest.mark.parametrize("retrieve", [False, True])
def test_prompts_never_show_the_item_itself(retrieve):
    intents = [pair["intent"] for pair in PAIRS]
    for intent, prompt in zip(intents, prompts(intents, PAIRS, shots=3, retrieve=retrieve), strict=True):
        assert prompt.count("### Instruction") == 4 and prompt.endswith(PROMPT.format(intent=intent))
        assert prompt.count(f"\n{intent}\n") == 1
    assert prompts(intents, PAIRS, shots=2, seed=1) == prompts(intents, PAIRS, shots=2, seed=1)
    assert prompts(intents, PAIRS, shots=2, seed=1) != prompts(intents, PAIRS, shots=2, seed=2)
    near = prompts(["open the big file"], [*PAIRS, {"intent": "open the file", "code": "x"}], shots=1, retrieve=True)
    assert "open the file" in near[0]
    with pytest.raises(InputError, match="more than 3"):
        prompts(intents, PAIRS[:3], shots=3)


@pytest.mark.parametrize("method", list(RECIPES))
def test_recipes(model, task, method):
    if why := lacking(method):
        pytest.skip(why)
    before = {name: p.clone() for name, p in model.backbone.named_parameters()}
    tuned = tune(model, task, method, "4 steps", batch_size=4, validations=1)
    assert all(torch.equal(p, before[name]) for name, p in model.backbone.named_parameters())
    trained = sum(p.numel() for p in tuned.backbone.parameters() if p.requires_grad)
    width, layers, inner = 32, 2, model.backbone.config.intermediate_size
    expected = {
        "full": sum(p.numel() for p in model.backbone.parameters()),
        "lora": layers * 3 * 16 * 2 * width,
        "ia3": layers * (3 * width + inner),
        "prompt": 20 * width,
        "prefix": 10 * 2 * layers * width,
    }
    expected |= dict.fromkeys(("qlora4", "qlora8"), expected["lora"])
    assert trained == expected[method]
    asked = prompts([row["intent"] for row in task.splits["test"]])
    assert target_loss(tuned, asked, [row["code"] for row in task.splits["test"]]) > 0
    outputs = generate_code(tuned, asked, k=3, max_new_tokens=4, progress=False)
    assert [len(each) for each in outputs] == [3, 3]
    if method == "prompt":
        fresh = tune(model, task, method, "1 steps", batch_size=2, validations=0, learning_rate=1e-12)
        first = model.processor(INITIAL, add_special_tokens=False)["input_ids"][0]
        prompt = fresh.backbone.prompt_encoder["default"].embedding.weight
        assert torch.allclose(prompt[0], model.backbone.get_input_embeddings().weight[first], atol=1e-6)
    if method != "full":
        assert isinstance(tuned.backbone, peft.PeftModel)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_weights_under_qlora_are_in_few_bits_and_stay(model, task, bits):
    if why := lacking(f"qlora{bits}"):
        pytest.skip(why)
    tuned = tune(model, task, f"qlora{bits}", "4 steps", batch_size=4, validations=0, learning_rate=1e-2)
    layer = tuned.backbone.get_base_model().model.layers[0]
    expected = quantised(model, bits).backbone.model.layers[0]
    for name in ("self_attn.q_proj.base_layer", "mlp.up_proj"):
        weight, frozen = (
            each.get_submodule(path).weight
            for each, path in ((layer, name), (expected, name.removesuffix(".base_layer")))
        )
        assert weight.dtype == (torch.uint8 if bits == 4 else torch.int8) and torch.equal(weight, frozen)
    assert layer.self_attn.q_proj.lora_B["default"].weight.abs().max() > 0
    asked, code = (prompts([row["intent"] for row in PAIRS]), [row["code"] for row in PAIRS])
    tuned = tune(model, task, f"qlora{bits}", "60 steps", batch_size=4, validations=0, learning_rate=1e-2)
    assert target_loss(tuned, asked, code) < target_loss(model, asked, code) - 0.2


@pytest.fixture
def talking(model):
    found = clone(model)
    found.processor = copy.deepcopy(model.processor)
    found.processor.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return found


def test_chats_by_the_template_with_loss_on_the_answer_alone(talking, task):
    messages = format_prompt("sub", [{"intent": "add", "code": "x"}], "chat")
    assert messages == [
        {"role": "user", "content": "add"},
        {"role": "assistant", "content": "x"},
        {"role": "user", "content": "sub"},
    ]
    row = task.token_rows(talking, style="chat").rows("train")[0]
    prompt = talking.processor("<user>add 0<assistant>", add_special_tokens=False)["input_ids"]
    answer = talking.processor("return x + 0", add_special_tokens=False)["input_ids"]
    assert row["input_ids"] == [*prompt, *answer, talking.processor.eos_token_id]
    assert row["labels"] == [-100] * len(prompt) + row["input_ids"][len(prompt) :]
    asked = prompts(["add 1", "add 2"], PAIRS, shots=1, style="chat")
    assert [turn["role"] for turn in asked[0]] == ["user", "assistant", "user"]
    written = ["".join(f"<{turn['role']}>{turn['content']}" for turn in each) + "<assistant>" for each in asked]
    start = talking.processor.bos_token
    talking.processor.chat_template = start + talking.processor.chat_template  # as a text is begun
    assert target_loss(talking, asked, ["a", "b"]) == pytest.approx(target_loss(talking, written, ["a", "b"]))
    assert generate_code(talking, asked, k=2, max_new_tokens=4) == generate_code(
        talking, written, k=2, max_new_tokens=4
    )


def test_the_code_of_an_answer():
    assert _unfenced("Here:\n```python\ndef f():\n    return 1\n```\nDone.") == "def f():\n    return 1"
    assert _unfenced("```\ncut off") == "cut off"
    assert _unfenced("\nreturn 1\n###\n") == "return 1\n###"


def test_bad_styles(model, task):
    with pytest.raises(InputError, match="style"):
        format_prompt("x", style="poem")
    with pytest.raises(InputError, match="no chat template"):
        tune(model, task, "lora", style="chat")
    with pytest.raises(InputError, match="no chat template"):
        generate_code(model, prompts(["x"], style="chat"), k=1)


def test_only_causal_language_models(task):
    with pytest.raises(InputError, match="kind text-encoder: a causal-lm"):
        tune(small("text-encoder", "nano"), task, "lora")


def test_outputs_of_a_batch_are_those_of_single_prompts(model):
    asked = ["short", "a much longer prompt than the other one"]
    together = generate_code(model, asked, k=2, max_new_tokens=5, progress=False)
    alone = [generate_code(model, [prompt], k=2, max_new_tokens=5, progress=False)[0] for prompt in asked]
    assert together == alone and all("###" not in text for each in together for text in each)


def test_columns_of_datasets(task):
    table = {
        s: datasets.Dataset.from_list([{"q": r["intent"], "a": r["code"]} for r in rows])
        for s, rows in task.splits.items()
    }
    assert CodeTask.from_datasets(task.name, table, intent="q", code="a") == task
    with pytest.raises(InputError, match="'train': no column code"):
        CodeTask.from_datasets(task.name, table, intent="q")


def test_prompts_without_room_are_refused(model):
    with pytest.raises(InputError, match="take fewer examples"):
        generate_code(model, ["x" * 200], k=1, max_new_tokens=4)


def test_files_and_bad_input(tmp_path, model, task):
    for split, rows in task.splits.items():
        (tmp_path / f"{split}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    assert CodeTask.from_jsonl(tmp_path).splits == task.splits
    (tmp_path / "test.jsonl").write_text('{"intent": "a"')
    with pytest.raises(InputError, match=r"test\.jsonl, line 1"):
        CodeTask.from_jsonl(tmp_path)
    (tmp_path / "test.jsonl").write_text('{"intent": "a"}')
    with pytest.raises(InputError, match="row 0: no code"):
        CodeTask.from_jsonl(tmp_path)
    (tmp_path / "test.jsonl").unlink()
    with pytest.raises(InputError, match="is missing"):
        CodeTask.from_jsonl(tmp_path)
    with pytest.raises(InputError, match="method"):
        tune(model, task, "lore")
