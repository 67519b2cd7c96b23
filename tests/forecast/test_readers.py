"""Readers: what each layout becomes, what is noted, and what is refused by name."""

import json
import math

import numpy as np
import pytest

from downriver.core.errors import InputError
from downriver.forecast import RunTable
from downriver.forecast.readers.lm_eval import items

# lm-eval


def sample(doc: int, right: int, log_p: list[float], target: str | None = None, acc: float = 1.0) -> dict:
    """One line as lm-eval 0.4.13 writes it."""
    texts = [" yes", " no", " maybe"][: len(log_p)]
    return {
        "doc_id": doc,
        "target": str(right) if target is None else target,
        "arguments": {f"gen_args_{i}": {"arg_0": "Is it?", "arg_1": t} for i, t in enumerate(texts)},
        "resps": [[[str(v), "False"]] for v in log_p],
        "metrics": ["acc"],
        "acc": acc,
    }


def harness(folder, name, results, *, counted=None, samples=(), date="2026-01-01T00-00-00.000001", groups=None):
    place = folder / name.replace("/", "__")
    place.mkdir(parents=True, exist_ok=True)
    content = {"results": results, "group_subtasks": groups or {}, "model_name": name, "config": {}}
    if counted:
        content["config"]["model_num_parameters"] = counted
    (place / f"results_{date}.json").write_text(json.dumps(content))
    for task, rows in samples:
        (place / f"samples_{task}_{date}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder


def scores(acc: float, **more) -> dict:
    return {"quiz": {"alias": "quiz", "sample_len": 9, "acc,none": acc, "acc_stderr,none": 0.01} | more}


def test_lm_eval_folder_becomes_runs(tmp_path):
    harness(tmp_path, "me/small", scores(0.4), counted=1000)
    harness(tmp_path, "me/large", scores(0.5, **{"acc_norm,none": 0.6}) | {"wiki": {"bits_per_byte,none": 1.5}})
    sizes = {"small": (1000, 2e4, 3.5), "me/large": (8000, 1.6e5, 3.0)}
    runs = RunTable.from_lm_eval(tmp_path, sizes)
    assert list(runs.names) == ["me/large", "me/small"] and runs.loss.tolist() == [3.0, 3.5]
    assert runs.params.tolist() == [8000, 1000] and runs.tokens.tolist() == [1.6e5, 2e4]
    assert runs.metrics["error_quiz"].tolist() == pytest.approx([0.4, 0.6])  # acc_norm before acc
    assert runs.metrics["error"].tolist() == runs.metrics["error_quiz"].tolist()
    only = RunTable.from_lm_eval(tmp_path, sizes, metric="acc")
    assert only.metrics["error_quiz"].tolist() == pytest.approx([0.5, 0.6])


def test_lm_eval_loss_comes_from_a_perplexity_task(tmp_path):
    for name, bits in (("a", 1.5), ("b", 1.2)):
        harness(tmp_path, name, scores(0.5) | {"wiki": {"bits_per_byte,none": bits, "word_perplexity,none": 20.0}})
    sizes = {"a": (1e6, 2e7), "b": (2e6, 4e7)}
    assert RunTable.from_lm_eval(tmp_path, sizes).loss.tolist() == pytest.approx([1.5 * math.log(2), 1.2 * math.log(2)])
    by_word = RunTable.from_lm_eval(tmp_path, sizes | {"b": (3e6, 4e7)}, loss="wiki/word_perplexity")
    assert by_word.loss.tolist() == pytest.approx([math.log(20)] * 2)
    with pytest.raises(InputError, match=r"unknown loss of a 'wiki/bits_per_bit': did you mean 'wiki/bits_per_byte'"):
        RunTable.from_lm_eval(tmp_path, sizes, loss="wiki/bits_per_bit")


def test_lm_eval_samples_give_bits_of_the_right_answer(tmp_path):
    rows = [sample(0, 1, [-1.0, -2.0]), sample(10, 0, [-3.0, -2.0], acc=0.0), sample(2, 0, [-1.0, -9.0], "yes")]
    harness(tmp_path, "a", scores(0.5), samples=[("quiz", rows)])
    found = items(tmp_path / "a" / "samples_quiz_2026-01-01T00-00-00.000001.jsonl")
    assert found.task == "quiz" and found.ids == ("0", "2", "10") and found.score.tolist() == [1, 1, 0]
    # " no" has 3 bytes, " yes" 4
    np.testing.assert_allclose(found.bits, np.array([2 / 3, 1 / 4, 3 / 4]) / math.log(2))
    with pytest.warns(RuntimeWarning, match="no loss on text"):
        runs = RunTable.from_lm_eval(tmp_path, {"a": (1e6, 2e7)})
    assert runs.losses["bpb_quiz"] == pytest.approx(found.bits.mean()) and runs.loss == runs.losses["bpb_quiz"]
    runs.write(tmp_path / "runs.csv")
    assert RunTable.read(tmp_path / "runs.csv").losses.keys() == runs.losses.keys()


def test_lm_eval_later_results_count_and_a_group_counts_once(tmp_path):
    harness(tmp_path, "a", scores(0.1))
    later = {"mmlu": {"acc,none": 0.5}, "mmlu_law": {"acc,none": 0.3}} | scores(0.9)
    harness(tmp_path, "a", later, date="2026-02-01T00-00-00.000001", groups={"mmlu": ["mmlu_law"]})
    runs = RunTable.from_lm_eval(tmp_path, {"a": (1e6, 2e7, 3.0)})
    assert set(runs.metrics) == {"error", "error_mmlu", "error_quiz"}
    assert runs.metrics["error_quiz"] == pytest.approx(0.1) and runs.metrics["error"] == pytest.approx(0.3)


def test_lm_eval_says_what_it_leaves_out_and_mixed_sizes(tmp_path):
    harness(tmp_path, "a", scores(0.4), counted=1200)
    harness(tmp_path, "b", scores(0.5) | {"extra": {"acc,none": 0.2}}, counted=2400)
    sizes = tmp_path / "sizes.csv"
    sizes.write_text("model,params,tokens,loss\na,1000,1e4,3.5\nb,2400,2e4,3.0\n")
    with pytest.warns(RuntimeWarning):
        runs = RunTable.from_lm_eval(tmp_path, sizes)
    assert "leaves out what not every model was tested on: extra" in runs.notes[0]
    assert "two conventions: row 2 counts as the other column does, row 1 does not" in runs.notes[1]
    assert np.isnan(runs.metrics["error_extra"][0]) and runs.metrics["error"].tolist() == pytest.approx([0.6, 0.5])
    sizes.write_text("model,tokens,loss\na,1e4,3.5\nb,2e4,3.0\n")
    with pytest.warns(RuntimeWarning, match="leaves out"):
        assert RunTable.from_lm_eval(tmp_path, sizes).params.tolist() == [1200, 2400]  # lm-eval's own count


@pytest.mark.parametrize(
    ("results", "sizes", "message"),
    [
        (scores(0.5), {"b": (1e6, 2e7, 3.0)}, "unknown run in the table of sizes 'a'"),
        (scores(0.5), {"a": (1e6, 2e7)}, "no loss for its models"),
        (scores(0.5), {"a": (1e6, -1.0, 3.0)}, "tokens of a: entry 0 is -1.0"),
        (scores(0.5), {"a": (1e6,)}, "sizes of a: parameters and tokens"),
        (scores(55.0), {"a": (1e6, 2e7, 3.0)}, "its acc is 55.0, a fraction"),
        ({"quiz": {"brier,none": 0.3}}, {"a": (1e6, 2e7, 3.0)}, "no task with one of the metrics"),
        ({"quiz": 3}, {"a": (1e6, 2e7, 3.0)}, "'quiz' are not an object"),
        ([1], {"a": (1e6, 2e7, 3.0)}, "not a results file of lm-eval"),
    ],
)
def test_bad_lm_eval_folders_are_named(tmp_path, results, sizes, message):
    harness(tmp_path, "a", results)
    with pytest.raises(InputError, match=message):
        RunTable.from_lm_eval(tmp_path, sizes)


def test_bad_samples_are_named(tmp_path):
    with pytest.raises(InputError, match=r"holds no results\*\.json"):
        RunTable.from_lm_eval(tmp_path)
    path = tmp_path / "samples_quiz_2026-01-01T00-00-00.000001.jsonl"
    for text, message in (
        ("{", "line 1 is not JSON"),
        ("[1]", "line 1: an object"),
        ("", "is empty"),
        (json.dumps({"doc_id": 1, "acc": 1}), "line 1 is not a sample of lm-eval: KeyError"),
        (json.dumps(sample(0, 7, [-1.0, -2.0])), "IndexError"),
        (json.dumps(sample(0, 0, [-1.0, -2.0], "perhaps")), "'perhaps' is not in list"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            items(path)


# Weights & Biases

RUNS_EXPORT = """Name,State,num_params,train/num_input_tokens_seen,eval/loss
a,finished,1000000,20000000,3.5
b,crashed,2000000,40000000,3.4
c,finished,4000000,80000000,3.0
"""


def test_wandb_table_of_runs(tmp_path):
    path = tmp_path / "export.csv"
    path.write_text(RUNS_EXPORT)
    with pytest.warns(RuntimeWarning, match="1 of 3 runs did not finish"):
        runs = RunTable.from_wandb(path)
    assert list(runs.names) == ["a", "c"] and runs.params.tolist() == [1e6, 4e6] and runs.loss.tolist() == [3.5, 3.0]
    with pytest.warns(RuntimeWarning):
        sized = RunTable.from_wandb(path, {"a": (5e5, 1e7), "c": (2e6, 4e7)})
    assert sized.params.tolist() == [5e5, 2e6] and sized.tokens.tolist() == [1e7, 4e7]
    with pytest.raises(InputError, match="did you mean 'eval/loss'"):
        RunTable.from_wandb(path, loss="eval_loss")
    path.write_text(RUNS_EXPORT.replace("num_params", "width"))
    with pytest.raises(InputError, match="which column holds the params"):
        RunTable.from_wandb(path)
    path.write_text(RUNS_EXPORT.replace("3.0", ""))
    with pytest.raises(InputError, match="column 'eval/loss', run 'c': a number"):
        RunTable.from_wandb(path)
    path.write_text(RUNS_EXPORT.replace("finished", "failed"))
    with pytest.raises(InputError, match="none of its runs is finished"):
        RunTable.from_wandb(path)


def test_wandb_chart(tmp_path):
    path = tmp_path / "chart.csv"
    path.write_text(
        "Step,a - eval/loss,a - eval/loss__MIN,b - eval/loss,b - eval/loss__MIN\n"
        "1,4.0,4.0,3.9,3.9\n2,3.5,3.5,3.3,3.3\n3,,,3.1,3.1\n"
    )
    runs = RunTable.from_wandb(path, {"a": (1e6, 2e7), "b": (4e6, 8e7)})
    assert runs.loss.tolist() == [3.5, 3.1] and list(runs.names) == ["a", "b"]
    with pytest.raises(InputError, match="sizes of its runs are needed"):
        RunTable.from_wandb(path)
    with pytest.raises(InputError, match="unknown run in the table of sizes 'b'"):
        RunTable.from_wandb(path, {"a": (1e6, 2e7)})


# sizes that do not agree, in a tidy table


def test_mixed_conventions_are_noted_where_they_show(tmp_path):
    path = tmp_path / "runs.csv"
    path.write_text("params,params_no_embed,tokens,loss\n1e6,1e6,2e7,3.5\n3e6,2e6,4e7,3.2\n")
    with pytest.warns(RuntimeWarning, match="two conventions"):
        assert len(RunTable.read(path).notes) == 1
    path.write_text("params,params_no_embed,tokens,loss\n2e6,1e6,2e7,3.5\n3e6,2e6,4e7,3.2\n")
    assert not RunTable.read(path).notes
    path.write_text("params,tokens,loss\n1e6,2e7,3.5\n1.5e6,2e7,3.5\n")
    with pytest.warns(RuntimeWarning, match="rows 1 and 2 have the same tokens and loss and other params"):
        RunTable.read(path)


# public ladders


def test_olmo_ladder(shared_data):
    runs = RunTable.from_olmo_ladder(shared_data("olmo_ladder"))
    assert len(runs) == 27 and {"190M", "3B", "7B-4T", "13B-5T"} < set(runs.groups)
    assert next(iter(runs.losses)) == "c4_en" and {"bpb_mmlu_test", "soft_piqa_val"} < set(runs.losses)
    times_chinchilla = runs.multiplier / 20
    grid = np.array([0.5, 1, 2, 5, 10, 28.64, 18.94])  # the last two are the targets
    assert (np.abs(times_chinchilla[:, None] / grid - 1).min(axis=1) < 0.01).all()
    seven = runs.group("7B-4T")
    assert 1 - seven.metrics["error_hellaswag_val"][0] == pytest.approx(0.81348, abs=1e-5)
    parts = {"stem": 0.45991, "humanities": 0.43103, "social_sciences": 0.52421, "other": 0.57156}
    weights = (0.215, 0.335, 0.219, 0.231)
    mmlu = sum(w * v for w, v in zip(weights, parts.values(), strict=True))
    assert 1 - seven.metrics["error_mmlu_test"][0] == pytest.approx(mmlu, abs=1e-5)
    assert runs.losses["soft_hellaswag_val"].min() > 0


def test_olmo_ladder_that_is_not_one(tmp_path, shared_data):
    with pytest.raises(InputError, match=r"no run of the ladder such as 190M-1xC\.csv"):
        RunTable.from_olmo_ladder(tmp_path)
    (tmp_path / "190M-1xC.csv").write_text("throughput/total_tokens,x\n1e9,1\n")
    with pytest.raises(InputError, match="is not a run of the ladder"):
        RunTable.from_olmo_ladder(tmp_path)
    with pytest.raises(InputError, match="at least 1 checkpoint"):
        RunTable.from_olmo_ladder(shared_data("olmo_ladder"), last=0)


def test_observed_scores_of_public_models(shared_data):
    with pytest.warns(RuntimeWarning, match="25 of 148 models have no published size or tokens"):
        runs = RunTable.from_obs_scaling(shared_data("obs_scaling") / "base_llm_benchmark_eval.csv")
    assert len(runs) == 123 and len(runs.metrics) == 8 and not runs.losses
    llama = list(runs.names).index("meta-llama/Llama-2-7b-hf")
    assert runs.compute[llama] == pytest.approx(84e21)
    assert runs.metrics["error_MMLU"][llama] == pytest.approx(0.56204, abs=1e-5)
    with pytest.raises(InputError, match="no loss, only error_MMLU"):
        _ = runs.loss


def test_observed_scores_that_are_not_fractions(tmp_path):
    path = tmp_path / "scores.csv"
    path.write_text("Model,Model Family,Model Size (B),Pretraining Data Size (T),MMLU\na,A,7,2,55\n")
    with pytest.raises(InputError, match="column 'MMLU': scores between 0 and 1"):
        RunTable.from_obs_scaling(path)
    path.write_text("Model,Model Family,Model Size (B),Pretraining Data Size (T),MMLU\na,A,,2,0.5\n")
    with pytest.raises(InputError, match="no model has both"):
        RunTable.from_obs_scaling(path)
