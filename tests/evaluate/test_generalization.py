"""Answers are those of the model alone, levels are kept apart, and solved examples come from where they may."""

import pytest
import torch

from downriver.core.errors import InputError
from downriver.evaluate import generalization as module
from downriver.evaluate.generalization import by_level, evaluate_generalization, generate, score_task
from downriver.models import small, small_language_model, word_tokenizer
from downriver.tasks.generalization import InstructionBench, InstructionTask, Template


@pytest.fixture(scope="module")
def model():
    tokenizer = word_tokenizer(["is", *(f"w{i}" for i in range(40))], context=32)
    return small_language_model("causal-lm", tokenizer, width=32, layers=2, heads=2, context=32, seed=3)


def task(name, category, n=12, metric="exact_match"):
    examples = [{"x": f"w{i}", "y": f"w{i + 1}"} for i in range(n)]
    return InstructionTask(
        name, category, "b", examples, (Template("{x} is", "{y}"), Template("w0 {x}", "{y}")), metric
    )


def test_answers_do_not_depend_on_the_batch_and_are_the_likeliest_tokens(model):
    prompts = [" ".join(f"w{i}" for i in range(n, 2 * n + 1)) for n in (1, 9, 4, 2, 7)]
    together = generate(model, prompts, 4)
    assert together == generate(model, prompts, 4, batch_size=1) == generate(model, prompts, 4, batch_size=2)
    tokenizer = model.processor
    for prompt, answer in zip(prompts, together, strict=True):
        ids = tokenizer(prompt)["input_ids"][:-1]
        start = len(ids)
        for _ in range(4):
            with torch.no_grad():
                ids.append(model(input_ids=torch.tensor([ids]))["logits"][0, -1].argmax().item())
            if ids[-1] == tokenizer.eos_token_id:
                break
        assert tokenizer.decode(ids[start:], skip_special_tokens=True).strip() == answer


def test_a_long_prompt_loses_its_beginning(model):
    tail = " ".join(f"w{i % 40}" for i in range(27))
    assert generate(model, [f"w5 w6 {tail}"], 4) == generate(model, [f"w7 w8 w9 {tail}"], 4)


def test_levels_are_kept_apart(model):
    tasks = [task("a1", "a"), task("a2", "a", metric="rouge_l"), task("b1", "b"), task("b2", "b")]
    levels = InstructionBench(tasks).split(["a"], ["b2"], instance_frac=0.25)
    table = evaluate_generalization(model, levels, shots=(0, 2), limit=5)
    assert table.select("level", "task", "shots", "examples").rows() == [
        ("fully held-out", "a1", 0, 5),
        ("fully held-out", "a1", 2, 5),
        ("fully held-out", "a2", 0, 5),
        ("fully held-out", "a2", 2, 5),
        ("partially supervised", "b2", 0, 5),
        ("partially supervised", "b2", 2, 5),
        ("fully supervised", "b1", 0, 3),
        ("fully supervised", "b1", 2, 3),
    ]
    means = {(m.metric, m.task): m.value for m in by_level(table)}
    assert len(means) == 8 and means["rouge_l, 2 shots", "fully held-out"] == table["value"][3]
    assert ((table["value"] >= 0) & (table["value"] <= 1)).all()


def test_scores_are_those_of_the_answers_given(model):
    own = task("a", "a", 6)
    given, scores = score_task(model, own)
    prompts = [own.templates[i % 2].render(own.examples[i])[0] for i in range(6)]
    assert given == generate(model, prompts, 2)
    right = InstructionTask(
        "r", "a", "b", [{**e, "y": g or "nothing"} for e, g in zip(own.examples, given, strict=True)], own.templates
    )
    assert score_task(model, right, max_new_tokens=2)[1] == [1.0 if g else 0.0 for g in given]
    assert scores == [float(g == e["y"]) for g, e in zip(given, own.examples, strict=True)]


def test_solved_examples_are_others_of_the_task_or_from_training(model, monkeypatch):
    asked = []

    def spy(model, prompts, *settings):
        asked.extend(prompts)
        return real(model, prompts, *settings)

    real = module.generate
    monkeypatch.setattr(module, "generate", spy)
    own = task("a", "a", 6)
    score_task(model, own, shots=3)
    for prompt, example in zip(asked, own.examples, strict=True):
        *shown, last = prompt.split("\n\n")
        assert len(shown) == 3 and example["x"] in last.split()
        answers = {part.split()[-1] for part in shown}
        assert example["y"] not in answers and len(answers) == 3
    asked.clear()
    train = InstructionTask("a", "a", "b", [{"x": "w30", "y": "w31"}, {"x": "w32", "y": "w33"}], own.templates)
    score_task(model, own, shots=1, demonstrations=train)
    assert {prompt.split("\n\n")[0].split()[-1] for prompt in asked} == {"w31", "w33"}


def test_bad_input(model):
    with pytest.raises(InputError, match="task 'a' has 3 examples to show, not 5"):
        score_task(model, task("a", "a", 4), shots=5)
    with pytest.raises(InputError, match="shots is -1"):
        score_task(model, task("a", "a", 4), shots=-1)
    with pytest.raises(InputError, match="a causal-lm with a tokenizer is expected"):
        generate(small("masked-lm", "nano"), ["a"], 2)
    with pytest.raises(InputError, match="max_new_tokens is 31: from 1 to 30"):
        generate(model, ["a"], 31)
    levels = InstructionBench([task("a", "a")]).split()
    with pytest.raises(InputError, match="limit is 0"):
        evaluate_generalization(model, levels, limit=0)
