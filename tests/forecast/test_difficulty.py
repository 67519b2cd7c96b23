"""Pass rates from lm-eval's samples, from sampled answers and from option likelihoods."""

import json

import numpy as np
import pytest
import torch

from downriver.core.errors import InputError
from downriver.forecast import CODPredictor, difficulty_features, option_pass_rates, sampled_pass_rates
from downriver.models import small


def choice(doc: int, logs: list[float], target: str) -> dict:
    return {
        "doc_id": doc,
        "target": target,
        "arguments": {f"gen_args_{i}": {"arg_0": "Q", "arg_1": f" {chr(65 + i)}"} for i in range(len(logs))},
        "resps": [[[str(v), "False"]] for v in logs],
        "acc": 0.0,
    }


def generated(doc: int, answers: list[str], target: str, **metrics: float) -> dict:
    return {
        "doc_id": doc,
        "target": target,
        "arguments": {"gen_args_0": {"arg_0": "Q", "arg_1": {}}},
        "resps": [answers],
    } | metrics


@pytest.fixture
def write(tmp_path):
    def to(name: str, rows: list[dict]):
        path = tmp_path / f"samples_{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return to


def test_multiple_choice_is_the_probability_of_the_right_option(write):
    logs = [-3.0, -1.0, -2.5]
    p = np.exp(logs) / np.exp(logs).sum()
    file = write("quiz", [choice(10, logs, "1"), choice(2, logs, "C")])  # by number, by text
    found = difficulty_features([file])
    assert found.ids == ("2", "10")
    np.testing.assert_allclose(found.rates[:, 0], [p[2], p[1]])
    np.testing.assert_allclose(found.chance, 1 / 3)


def test_generated_answers_are_counted_or_read(write):
    many = generated(0, [" 42", "41", "42\n", "x"], "42")
    one = generated(1, ["42"], "7", exact_match=1.0)  # lm-eval's filter knew better
    found = difficulty_features([write("sums", [many, one])])
    assert found.rates[:, 0].tolist() == [0.5, 1.0] and np.isnan(found.chance).all()
    starts = difficulty_features([write("sums", [many])], check=lambda r, t: float(r.strip().startswith("4")))
    assert starts.rates[0, 0] == 0.75


def test_a_ladder_of_files_feeds_the_predictor(write):
    rng = np.random.default_rng(0)
    C = 4.0 ** np.arange(5)
    files = []
    for k, c in enumerate(C):
        p = 0.25 + 0.75 * np.exp(-2 * np.exp(0.05 * rng.standard_normal(40)) * c**-0.4)
        rows = [choice(i, [np.log(v), *[np.log((1 - v) / 3)] * 3], "0") for i, v in enumerate(p)]
        rng.shuffle(rows)
        files.append(write(f"model{k}", rows))
    found = difficulty_features(files)
    assert found.rates.shape == (40, 5) and (np.diff(found.rates.mean(axis=0)) > 0).all()
    with np.testing.suppress_warnings() as quiet:
        quiet.filter(RuntimeWarning)
        score = CODPredictor(chance=found.chance).fit(found.rates, C).predict(4.0**7).score
    assert score == pytest.approx(0.25 + 0.75 * np.exp(-2 * 4.0 ** (7 * -0.4)), abs=0.02)


def test_models_must_have_met_the_same_items(write):
    one, other = write("a", [choice(0, [0, 0], "0"), choice(1, [0, 0], "0")]), write("b", [choice(0, [0, 0], "0")])
    with pytest.raises(InputError, match=r"samples_b.*differ in 1 items, such as doc_id 1"):
        difficulty_features([one, other])


def test_bad_files_are_named_with_the_line(write, tmp_path):
    broken = tmp_path / "samples_x.jsonl"
    broken.write_text(json.dumps(choice(0, [0, 0], "0")) + '\n{"doc_id": 1}\n')
    with pytest.raises(InputError, match="line 2 is not a sample of lm-eval"):
        difficulty_features([broken])
    broken.write_text("{")
    with pytest.raises(InputError, match="line 1 is not JSON"):
        difficulty_features([broken])
    with pytest.raises(InputError, match="doc_id 0 is there twice"):
        difficulty_features([write("twice", [choice(0, [0, 0], "0")] * 2)])
    with pytest.raises(InputError, match="cannot be read"):
        difficulty_features([tmp_path / "none.jsonl"])
    with pytest.raises(InputError, match="is empty"):
        difficulty_features([write("empty", [])])
    with pytest.raises(InputError, match="at least one file"):
        difficulty_features([])
    with pytest.raises(InputError, match=r"pass rate of 3\.0"):
        difficulty_features([write("f", [generated(0, ["a"], "b", exact_match=3.0)])])


def test_bad_likelihoods_are_named():
    with pytest.raises(InputError, match="item 1: at least two"):
        option_pass_rates([[0.0, 1.0], [0.0]], [0, 0])
    with pytest.raises(InputError, match="item 0: right option 2 of 2"):
        option_pass_rates([[0.0, 1.0]], [2])
    with pytest.raises(InputError, match="1 items and 2 right options"):
        option_pass_rates([[0.0, 1.0]], [0, 1])


def test_sampled_pass_rates_are_the_models_own_probabilities():
    """One token is drawn: how often it is «a» is what the softmax says."""
    lm = small("causal-lm", "nano").eval()
    with torch.no_grad():
        lm.backbone.get_input_embeddings().weight.mul_(20)
    ids = lm.processor("ab", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        p = lm.backbone(ids).logits[0, -1].float().softmax(-1)
    likely = int(p[4:].argmax()) + 4
    target = lm.processor.decode([likely])
    settings = {"n_samples": 600, "max_new_tokens": 1, "batch_size": 250}
    (rate,) = sampled_pass_rates(lm, ["ab"], [target], check=lambda said, right: float(said == right), **settings)
    assert rate == pytest.approx(float(p[likely]), abs=4 * (0.25 / 600) ** 0.5)
    again = sampled_pass_rates(
        lm.backbone, ["ab"], [target], tokenizer=lm.processor, check=lambda s, r: s == r, **settings
    )
    assert again[0] == rate
    cold = sampled_pass_rates(lm, ["ab"], [target], check=lambda s, r: s == r, **settings | {"temperature": 1e-3})
    assert cold[0] == (1.0 if int(p.argmax()) == likely else 0.0)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"targets": []}, "1 prompts and 0 targets"),
        ({"n_samples": 0}, "n_samples 0"),
        ({"temperature": 0.0}, "temperature 0"),
        ({"check": lambda said, target: 2.0}, "from 0 to 1"),
        ({"model": small("text-encoder", "nano")}, "causal-lm is expected"),
    ],
)
def test_bad_sampling_is_named(change, word):
    settings = {
        "model": small("causal-lm", "nano"),
        "prompts": ["a"],
        "targets": ["b"],
        "n_samples": 1,
        "max_new_tokens": 1,
    }
    with pytest.raises(InputError, match=word):
        sampled_pass_rates(**settings | change)
