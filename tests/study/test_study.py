import random
import time
from collections import Counter

import numpy as np
import pytest
import torch

from downriver.core import Budget, Cost, InputError, Measurement, charge
from downriver.study import Arm, Study, above, better, shared, study

VOLATILE = ["seconds", "peak_memory"]


def run(study, folder, **options):
    return study.run(folder, **{"executor": "serial", "progress": False} | options)


def noisy(order=("a", "b", "c"), seeds=3, runs=None):
    """Arms whose values come from every global source of randomness, and from shared work that has its own."""

    @study("noisy", seeds=seeds)
    def noisy(seed, budget, scale):
        @shared
        def base():
            return torch.rand(1).item() + np.random.rand()  # noqa: NPY002

        def value(arm):
            if runs is not None:
                runs[arm, seed] += 1
            return {"x": torch.rand(1).item() + random.random() + np.random.rand(), "base": base()}  # noqa: NPY002

        for arm in order:
            yield Arm(arm, lambda arm=arm: value(arm))

    return noisy


def test_results_do_not_depend_on_what_ran_before(tmp_path):
    everything = run(noisy(), tmp_path / "1").rows()
    alone = run(noisy(order=("b",)), tmp_path / "2").rows()
    backwards = run(noisy(order=("c", "b", "a")), tmp_path / "3").rows()
    torch.manual_seed(99)
    random.seed(99)
    keys = ["arm", "seed", "metric"]
    expected = everything.select(*keys, "value").sort(keys)
    assert backwards.select(*keys, "value").sort(keys).equals(expected)
    assert alone.select(*keys, "value").sort(keys).equals(expected.filter(arm="b"))
    assert everything.filter(metric="x")["value"].n_unique() == 9
    assert everything.filter(metric="base")["value"].n_unique() == 3, "shared work is drawn once a seed"


def test_the_callers_randomness_is_left_alone(tmp_path):
    torch.manual_seed(5)
    random.seed(5)
    expected = torch.rand(1).item(), random.random()
    torch.manual_seed(5)
    random.seed(5)
    run(noisy(), tmp_path)
    assert (torch.rand(1).item(), random.random()) == expected


def test_the_same_question_is_never_run_twice(tmp_path):
    runs = Counter()
    first = run(noisy(seeds=2, runs=runs), tmp_path)
    more = run(noisy(runs=runs), tmp_path)
    again = run(noisy(order=("c", "a", "b"), runs=runs), tmp_path)
    assert set(runs.values()) == {1} and len(runs) == 9
    assert first.rows().height == 12 and more.rows().height == again.rows().height == 18
    fewer = run(noisy(runs=runs), tmp_path, seeds=1)
    assert fewer.rows()["seed"].unique().to_list() == [0] and sum(runs.values()) == 9


def test_fresh_asks_again(tmp_path):
    runs = Counter()
    before = run(noisy(runs=runs), tmp_path).rows()
    after = run(noisy(runs=runs), tmp_path, fresh=True).rows()
    assert set(runs.values()) == {2}
    assert after.drop(VOLATILE).equals(before.drop(VOLATILE))


def keyed(**settings):
    def body(seed, budget, scale):
        yield Arm("a", lambda: {"x": 1.0}, parameters=arm_parameters)

    arm_parameters = settings.pop("arm_parameters", {})
    declared = Study("keyed", body, **settings)
    return declared.key(declared.arms()[0], 0)


def test_a_key_depends_on_all_that_was_asked_and_on_nothing_else():
    different = [
        {},
        {"version": "2"},
        {"budget": Budget(10)},
        {"budget": Budget(10, "steps")},
        {"scale": "large"},
        {"parameters": {"data": "abc"}},
        {"parameters": {"data": "abd"}},
        {"arm_parameters": {"rank": 8}},
    ]
    assert len({keyed(**settings) for settings in different}) == len(different)
    assert keyed() == keyed(title="new", seeds=9, claims=(above("a", on="x", value=0),))


def test_the_source_of_the_function_is_part_of_the_question_and_its_decorator_is_not():
    @study("s", seeds=2)
    def one(seed, budget, scale):
        yield Arm("a", lambda: {"x": 1.0})

    def again():
        @study("s", seeds=9, title="another title")
        def one(seed, budget, scale):
            yield Arm("a", lambda: {"x": 1.0})

        return one

    @study("s", seeds=2)
    def changed(seed, budget, scale):
        yield Arm("a", lambda: {"x": 2.0})

    assert one.code == again().code != changed.code


def test_a_function_without_source_is_told_apart_by_its_bytecode():
    def typed(text):
        names = {}
        exec(f"def f(seed, budget, scale):\n    yield Arm('a', lambda: {text})", {"Arm": Arm}, names)
        return Study("typed", names["f"]).code

    assert typed("{'x': 1.0}") == typed("{'x': 1.0}") != typed("{'x': 2.0}")


def test_a_failing_cell_is_recorded_and_the_others_go_on(tmp_path):
    broken = {"now": True}

    @study("partly", seeds=2, claims=[better("good", than="bad", on="x")])
    def partly(seed, budget, scale):
        def bad():
            if broken["now"] and seed == 1:
                raise ValueError("no luck\nat all")
            return {"x": 0.0}

        yield Arm("bad", bad)
        yield Arm("good", lambda: {"x": 1.0})

    result = run(partly, tmp_path)
    (failure,) = result.failures
    assert (failure.arm, failure.seed, failure.error) == ("bad", 1, "ValueError: no luck")
    assert "Traceback" in failure.traceback and "in bad" in failure.traceback
    assert result.rows().height == 3 and result.verdicts()[0].dropped == (1,)
    broken["now"] = False
    healed = run(partly, tmp_path)
    assert healed.failures == [] and healed.rows().height == 4


def test_shared_work_is_done_once_and_charged_to_every_user(tmp_path):
    calls = Counter()

    @study("charged", seeds=2)
    def charged(seed, budget, scale):
        @shared
        def ground():
            calls["ground", seed] += 1
            charge(examples=1000, parameters=7)
            time.sleep(0.05)
            return 1.0

        @shared
        def tuned(part):
            calls["tuned", part, seed] += 1
            charge(examples=100)
            return ground() + part

        def own():
            charge(examples=1)
            return {"x": tuned(0) + tuned(1) + ground()}

        yield Arm("both", own)
        yield Arm("one part", lambda: {"x": tuned(1)})
        yield Arm("ground", lambda: {"x": ground()})
        yield Arm("nothing", lambda: {"x": 0.0})

    rows = run(charged, tmp_path).rows().filter(seed=0)
    assert set(calls.values()) == {1} and len(calls) == 6
    assert dict(rows.select("arm", "examples").iter_rows()) == {
        "both": 1201,
        "one part": 1100,
        "ground": 1000,
        "nothing": 0,
    }
    seconds = dict(rows.select("arm", "seconds").iter_rows())
    assert all(0.05 <= seconds[arm] < 0.1 for arm in ("both", "one part", "ground")) and seconds["nothing"] < 0.05
    assert set(rows.filter(examples=0)["parameters"]) == {0} and set(rows.filter(arm="ground")["parameters"]) == {7}


def test_an_error_in_shared_work_fails_every_arm_that_needs_it(tmp_path):
    calls = Counter()

    @study("stuck", seeds=1)
    def stuck(seed, budget, scale):
        @shared
        def broken():
            calls["broken"] += 1
            raise RuntimeError("spilt")

        @shared
        def above_it():
            return broken()

        yield Arm("direct", lambda: {"x": broken()})
        yield Arm("through", lambda: {"x": above_it()})
        yield Arm("free", lambda: {"x": 1.0})

    result = run(stuck, tmp_path)
    assert [(f.arm, f.error) for f in result.failures] == [
        ("direct", "RuntimeError: spilt"),
        ("through", "RuntimeError: spilt"),
    ]
    assert result.rows()["arm"].to_list() == ["free"] and calls["broken"] == 1


def test_misuse_of_shared_work_is_explained(tmp_path):
    @study("early", seeds=1)
    def early(seed, budget, scale):
        @shared
        def data():
            return 1

        data()
        yield Arm("a", lambda: {"x": 1.0})

    with pytest.raises(InputError, match="'data' is called in the body of the study"):
        run(early, tmp_path)

    @study("twins", seeds=1)
    def twins(seed, budget, scale):
        def make(value):
            @shared
            def data():
                return value

            return data

        one, two = make(1.0), make(2.0)
        yield Arm("one", lambda: {"x": one()})
        yield Arm("two", lambda: {"x": two()})

    (failure,) = run(twins, tmp_path).failures
    assert failure.arm == "two" and "two pieces of shared work are named 'data'" in failure.error


def test_outside_a_study_shared_work_is_a_plain_call():
    assert shared(lambda x: x + 1)(2) == 3


def test_measurements_are_completed(tmp_path):
    own = Cost(examples=3, parameters=2)

    @study("rows", seeds=1)
    def rows(seed, budget, scale):
        def run():
            charge(examples=10, parameters=5)
            return [
                Measurement("accuracy", 0.5, task="t", unit="share"),
                Measurement("loss", 2.0, direction="lower", cost=Cost(parameters=9)),
                Measurement("early", 1.0, cost=own),
            ]

        yield Arm("list", run)
        yield Arm("mapping", lambda: {"x": 1, "loss": 0.5}, directions={"loss": "lower"})

    found = run(rows, tmp_path).rows()
    assert set(found["study"]) == {"rows"} and found["arm"].to_list() == ["list"] * 3 + ["mapping"] * 2
    assert found["direction"].to_list() == ["higher", "lower", "higher", "higher", "lower"]
    assert found["examples"].to_list() == [10, 10, 3, 0, 0]
    assert found["parameters"].to_list() == [5, 9, 2, 0, 0]


def test_what_an_arm_gives_back_is_checked(tmp_path):
    @study("odd", seeds=1)
    def odd(seed, budget, scale):
        yield Arm("nothing", lambda: [])
        yield Arm("words", lambda: ["accuracy"])
        yield Arm("text", lambda: {"x": "many"})

    errors = [f.error for f in run(odd, tmp_path).failures]
    assert "arm 'nothing' gave back nothing" in errors[0] and "arm 'words' gave back 'accuracy'" in errors[1]
    assert "value 'many' is not a number" in errors[2]


def test_arms_made_in_a_loop_are_told_apart(tmp_path):
    @study("loop", seeds=1)
    def loop(seed, budget, scale):
        for number in range(3):
            yield Arm(str(number), lambda: {"x": number})  # noqa: B023

    assert run(loop, tmp_path).rows()["value"].to_list() == [0, 1, 2]


def test_budget_and_scale_reach_the_function(tmp_path):
    @study("told", seeds=1, budget="2k examples", scale="tiny")
    def told(seed, budget, scale):
        yield Arm(scale, lambda: {"x": budget.amount})

    rows = run(told, tmp_path).rows()
    assert rows["arm"].item() == "tiny" and rows["value"].item() == 2000


def test_mistakes_in_a_declaration_are_found_before_anything_runs(tmp_path):
    def body(seed, budget, scale):
        yield Arm("a", lambda: pytest.fail("it ran"))

    with pytest.raises(InputError, match="did you mean 'a'"):
        run(Study("s", body, claims=(better("a", than="aa", on="x"),)), tmp_path)
    with pytest.raises(InputError, match="study name 'a/b'"):
        Study("a/b", body)
    with pytest.raises(InputError, match="seeds is 0"):
        Study("s", body, seeds=0)
    with pytest.raises(InputError, match="seeds is 0"):
        run(Study("s", body), tmp_path, seeds=0)
    with pytest.raises(InputError, match="unknown executor 'procesess': did you mean 'processes'"):
        run(Study("s", body), tmp_path, executor="procesess")
    with pytest.raises(InputError, match="workers is 0"):
        run(Study("s", body), tmp_path, workers=0)
    with pytest.raises(InputError, match="memory of one process"):
        run(Study("s", body), "memory://x", executor="processes")
    with pytest.raises(InputError, match="budget 'much'"):
        study("s", budget="much")(body)
    with pytest.raises(InputError, match="an Arm is expected"):
        run(Study("s", lambda seed, budget, scale: ["a"]), tmp_path)
    with pytest.raises(InputError, match="two arms named 'a'"):
        run(Study("s", lambda seed, budget, scale: [Arm("a", dict), Arm("a", dict)]), tmp_path)
    with pytest.raises(InputError, match="cannot fingerprint"):
        run(Study("s", lambda seed, budget, scale: [Arm("a", dict, parameters={"x": {1}})]), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_ledger_in_an_object_store(tmp_path):
    runs = Counter()
    place = f"memory://{tmp_path.name}"
    first = run(noisy(runs=runs), place)
    again = run(noisy(runs=runs), place)
    assert set(runs.values()) == {1} and again.rows().equals(first.rows())
    assert first.rows().drop(VOLATILE).equals(run(noisy(), tmp_path).rows().drop(VOLATILE))
    assert again.ledger.query("select count(distinct cell) as n from measurements")["n"].item() == 9


def test_two_versions_of_a_study_live_in_one_folder(tmp_path):
    def declare(value):
        return Study(
            "s", lambda seed, budget, scale: [Arm("a", lambda: {"x": value})], parameters={"v": value}, seeds=1
        )

    one, two = run(declare(1.0), tmp_path), run(declare(2.0), tmp_path)
    assert one.rows()["value"].to_list() == [1.0] and two.rows()["value"].to_list() == [2.0]
    assert one.ledger.rows("s").height == 2
    assert declare(1.0).result(tmp_path).rows().height == 1
