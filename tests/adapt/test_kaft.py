"""Tuning on contexts: only the answer is learnt, the model given stays, an adapter is one."""

import pytest
import torch
from datasets import Dataset

from downriver.adapt import kaft
from downriver.core.errors import InputError
from downriver.data.synth.context import ContextMixer, ContextPrompt
from downriver.evaluate import knowledge_conflict_eval
from downriver.models import small, small_language_model, word_tokenizer

NAMES = [f"n{i}" for i in range(8)]
LANDS = [f"l{i}" for i in range(8)]
PROMPT = ContextPrompt("{context} {question} :", "{question} :")
QUESTIONS = [
    {"id": land, "question": land, "context": f"{land} {name} .", "answer": name}
    for land, name in zip(LANDS, NAMES, strict=True)
]


def lm():
    words = word_tokenizer([" ".join([*NAMES, *LANDS, ": ."])], context=16)
    return small_language_model("causal-lm", words, width=32, layers=1, heads=2, context=16, seed=0)


def test_it_learns_its_rows_and_leaves_the_model_given_as_it_was():
    model = lm()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    mixer = ContextMixer(lambda ps: [NAMES[LANDS.index(p.split()[-2])] for p in ps], QUESTIONS, prompt=PROMPT)
    tuned = kaft(model, mixer.build(), "200 steps", learning_rate=1e-2, batch_size=32)
    found = knowledge_conflict_eval(tuned, mixer.conflicts(), max_tokens=2)
    assert min(found.controllability, found.robustness, found.relevant, found.closed_book) > 0.7
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_low_rank_adapter_and_a_model_of_transformers():
    base = lm()
    rows = Dataset.from_list([{"input": "l0 :", "target": "n0"}] * 4)
    tuned = kaft(base.backbone, rows, "2 steps", tokenizer=base.processor, lora=2, learning_rate=1e-2, batch_size=2)
    learnt = [name for name, _ in tuned.backbone.named_parameters() if "lora_" in name]
    assert learnt and hasattr(tuned.backbone, "merge_and_unload")
    again = kaft(tuned, rows, "2 steps", batch_size=2)  # the adapter is merged first
    assert not hasattr(again.backbone, "merge_and_unload")


def test_what_cannot_be_trained_on():
    with pytest.raises(InputError, match="rows lack the column 'target'"):
        kaft(lm(), Dataset.from_list([{"input": "x"}]), "2 steps")
    with pytest.raises(InputError, match="a causal-lm is expected"):
        kaft(small("masked-lm", "nano"), Dataset.from_list([{"input": "x", "target": "y"}]), "2 steps")
    with pytest.raises(InputError, match="example 0: no token of what is to be learnt"):
        kaft(lm(), Dataset.from_list([{"input": "x", "target": " "}]), "2 steps")
