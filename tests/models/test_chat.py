"""What holds for every chat model, whatever answers: checks, samples, the cache, the ledger, capabilities."""

import json
import multiprocessing
import subprocess
import sys
from pathlib import Path

import pytest

from downriver.core import DownriverError, InputError
from downriver.models.chat import Completion, Ledger, ScriptedChat, SpendingLimit, Tokens
from downriver.models.chat.cache import AnswerCache
from downriver.models.chat.protocol import cut_at_stop


def echo(messages):
    return f"{messages[-1]['content']} it is"


def texts(answers):
    return [[answer.text for answer in row] for row in answers]


def files(folder):
    return [path for path in Path(folder).rglob("*") if path.is_file()]


class TestPrompts:
    def test_strings_and_messages_are_one(self):
        chat = ScriptedChat(echo)
        dialogue = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "rain"}]
        assert texts(chat.generate(["rain", dialogue], max_tokens=9)) == [["rain it is"], ["rain it is"]]
        assert chat.asked == [[{"role": "user", "content": "rain"}], dialogue]

    @pytest.mark.parametrize(
        ("prompts", "says"),
        [
            ("rain", "list of prompts"),
            ([{"role": "user", "content": "rain"}], "prompt 0"),
            (["rain", []], "prompt 1"),
            ([3], "prompt 0"),
            ([[{"role": "user"}]], "prompt 0.*'content'"),
            ([[{"role": "user", "content": None}]], "prompt 0.*None"),
            ([[{"role": "user", "content": "a", "name": "b"}]], "prompt 0.*'name'"),
            (["\ud800"], "prompt 0.*surrogate"),
        ],
    )
    def test_malformed_prompts_are_refused_before_anything_is_asked(self, prompts, says):
        chat = ScriptedChat(echo)
        with pytest.raises(InputError, match=says):
            chat.generate(prompts, max_tokens=9)
        assert chat.asked == []

    @pytest.mark.parametrize(
        "bad",
        [
            {"max_tokens": 0},
            {"max_tokens": 1.5},
            {"max_tokens": 9, "n": 0},
            {"max_tokens": 9, "temperature": -1},
            {"max_tokens": 9, "temperature": float("nan")},
            {"max_tokens": 9, "temperature": "hot"},
            {"max_tokens": 9, "temperature": 1.0, "top_p": 0},
            {"max_tokens": 9, "temperature": 1.0, "top_p": 1.5},
            {"max_tokens": 9, "seed": -1},
            {"max_tokens": 9, "seed": 0.5},
            {"max_tokens": 9, "stop": [""]},
        ],
    )
    def test_bad_parameters_are_named(self, bad):
        with pytest.raises(InputError, match=list(bad)[-1]):
            ScriptedChat(echo).generate(["rain"], **bad)

    def test_no_prompts_no_answers(self):
        assert ScriptedChat(echo).generate([], max_tokens=9) == []


class TestSamples:
    def test_greedy_samples_are_asked_once(self):
        chat = ScriptedChat(echo)
        assert texts(chat.generate(["a", "b", "a"], max_tokens=9, n=2)) == [
            ["a it is"] * 2,
            ["b it is"] * 2,
            ["a it is"] * 2,
        ]
        assert chat.ledger.requests == 2

    def test_seeded_samples_of_equal_prompts_are_equal(self):
        chat = ScriptedChat({"a": ["x", "y", "z"]})
        assert texts(chat.generate(["a", "a"], max_tokens=9, temperature=1.0, seed=0, n=3)) == [["x", "y", "z"]] * 2
        assert chat.ledger.requests == 3

    def test_unseeded_samples_are_all_asked(self):
        chat = ScriptedChat({"a": ["x", "y", "z"]})
        assert texts(chat.generate(["a", "a"], max_tokens=9, temperature=1.0, n=2)) == [["x", "y"]] * 2
        assert chat.ledger.requests == 4


class TestScript:
    def test_stop_and_length(self):
        chat = ScriptedChat({"count": "one two. three four"})
        [[stopped], [cut], [whole]] = [
            chat.generate(["count"], max_tokens=m, stop=s)[0] for m, s in ((9, "."), (1, None), (9, ()))
        ]
        assert (stopped.text, stopped.finish_reason, stopped.tokens) == ("one two", "stop", Tokens(1, 2))
        assert (cut.text, cut.finish_reason, cut.tokens.completion) == ("one", "length", 1)
        assert (whole.text, whole.finish_reason) == ("one two. three four", "stop")

    def test_an_unscripted_prompt_is_named(self):
        with pytest.raises(InputError, match="snow"):
            ScriptedChat({"rain": "wet"}).generate(["snow"], max_tokens=9)

    def test_the_earliest_stop_string_counts(self):
        assert cut_at_stop("a;b.c", [".", ";"]) == ("a", True)
        assert cut_at_stop("abc", ["d"]) == ("abc", False)


class TestCapabilities:
    def test_lacking_loglikelihood_fails_early_and_by_name(self):
        chat = ScriptedChat(echo, model="parrot")
        with pytest.raises(InputError, match=r"parrot.*loglikelihood.*HFChat"):
            chat.require("loglikelihood")
        with pytest.raises(InputError, match="parrot"):
            chat.loglikelihood([("a", "b")])

    def test_unknown_capability(self):
        with pytest.raises(InputError, match="did you mean 'loglikelihood'"):
            ScriptedChat(echo).require("log_likelihood")

    def test_scripted_loglikelihood_is_cached_too(self, tmp_path):
        asked = []

        def score(prompt, continuation):
            asked.append((prompt, continuation))
            return -float(len(continuation))

        with ScriptedChat(echo, log_likelihood=score, cache=tmp_path) as chat:
            pairs = [("a", "bb"), ("a", "c"), ("a", "bb")]
            assert [x.total for x in chat.loglikelihood(pairs)] == [-2.0, -1.0, -2.0]
            assert chat.loglikelihood(pairs) == chat.loglikelihood(pairs)
        assert asked == [("a", "bb"), ("a", "c")]

    @pytest.mark.parametrize("pair", ["ab", ("a",), ("a", ""), ("a", 3)])
    def test_malformed_pairs(self, pair):
        with pytest.raises(InputError, match="pair 0"):
            ScriptedChat(echo, log_likelihood=lambda p, c: 0.0).loglikelihood([pair])


class TestCache:
    def ask(self, folder, prompts=("a", "b"), model="scripted", strings="user", **parameters):
        chat = ScriptedChat(echo, cache=folder, model=model, strings=strings)
        answers = chat.generate(list(prompts), **{"max_tokens": 9} | parameters)
        return answers, chat.ledger

    def test_a_second_run_asks_nothing_and_says_the_same(self, tmp_path):
        first, _ = self.ask(tmp_path)
        second, ledger = self.ask(tmp_path)
        assert second == first and isinstance(second[0][0].tokens, Tokens)
        assert (ledger.requests, ledger.cached, ledger.prompt_tokens) == (0, 2, 0)

    @pytest.mark.parametrize(
        "other",
        [
            {"model": "other"},
            {"max_tokens": 8},
            {"stop": "."},
            {"temperature": 0.5, "seed": 0},
            {"strings": "text"},
            {"prompts": [[{"role": "system", "content": "a"}], [{"role": "system", "content": "b"}]]},
        ],
    )
    def test_whatever_decides_an_answer_is_in_the_key(self, tmp_path, other):
        self.ask(tmp_path)
        _, ledger = self.ask(tmp_path, **other)
        assert (ledger.requests, ledger.cached) == (2, 0)

    def test_seeds_are_in_the_key_of_drawn_answers_only(self, tmp_path):
        self.ask(tmp_path, temperature=1.0, seed=0)
        assert self.ask(tmp_path, temperature=1.0, seed=0)[1].requests == 0
        assert self.ask(tmp_path, temperature=1.0, seed=1)[1].requests == 2
        self.ask(tmp_path, seed=0)
        assert self.ask(tmp_path, seed=1)[1].requests == 0

    def test_drawn_answers_without_a_seed_are_not_kept(self, tmp_path):
        self.ask(tmp_path, temperature=1.0)
        assert files(tmp_path) == []

    def test_more_samples_pay_for_the_new_ones_only(self, tmp_path):
        self.ask(tmp_path, prompts=["a"], temperature=1.0, seed=3, n=2)
        _, ledger = self.ask(tmp_path, prompts=["a"], temperature=1.0, seed=3, n=5)
        assert (ledger.requests, ledger.cached) == (3, 2)

    @pytest.mark.parametrize("damage", [b"", b'{"text": "a', b"[]", b'{"text": 3}', b"\xff\xfe"])
    def test_a_damaged_file_is_asked_again_and_replaced(self, tmp_path, damage):
        first, _ = self.ask(tmp_path, prompts=["a"])
        [file] = files(tmp_path)
        file.write_bytes(damage)
        again, ledger = self.ask(tmp_path, prompts=["a"])
        assert again == first and ledger.requests == 1
        assert self.ask(tmp_path, prompts=["a"])[1].requests == 0

    def test_infinite_logprobs_survive(self, tmp_path):
        cache = AnswerCache(tmp_path)
        answer = Completion("a", "stop", Tokens(1, 2), (-0.5, float("-inf")))
        cache.put("0" * 64, answer)
        assert cache.get("0" * 64, Completion) == answer

    def test_the_default_folder_is_the_users_cache(self, tmp_path, monkeypatch):
        monkeypatch.setenv("DOWNRIVER_CACHE", str(tmp_path))
        self.ask(True)
        assert len(files(tmp_path / "chat")) == 2

    def test_processes_share_a_folder(self, tmp_path):
        with multiprocessing.get_context("spawn").Pool(2) as pool:
            runs = pool.map(ask_in_a_process, [str(tmp_path)] * 4)
        assert all(run == runs[0] for run in runs)
        assert len(files(tmp_path)) == 50
        assert self.ask(tmp_path, prompts=[str(i) for i in range(50)])[1].requests == 0


def ask_in_a_process(folder):
    return texts(ScriptedChat(echo, cache=folder).generate([str(i) for i in range(50)], max_tokens=9))


class TestSpending:
    price = (1e6, 2e6)  # one for a prompt token, two for a completion token

    def test_the_ledger_adds_up(self):
        chat = ScriptedChat({"a b": "c", "d": "e f"}, price=self.price)
        chat.generate(["a b", "d"], max_tokens=5)
        ledger = chat.ledger
        assert (ledger.requests, ledger.prompt_tokens, ledger.completion_tokens) == (2, 3, 3)
        assert ledger.cost == 9.0 and ledger.seconds > 0 and ledger.in_flight == 0
        assert "2 requests" in str(ledger) and "cost 9.0000" in str(ledger)

    def test_the_limit_stops_before_the_request_that_could_cross_it(self, tmp_path):
        def chat(limit):
            return ScriptedChat(echo, price=self.price, spending_limit=limit, cache=tmp_path)

        # each question costs 1 + 2 * 3 and could cost 1 + 2 * 5
        poor = chat(20.0)
        with pytest.raises(SpendingLimit, match=r"limit 20.*14 is spent.*11"):
            poor.generate(["a", "b", "c"], max_tokens=5)
        assert len(poor.asked) == 2 and poor.ledger.cost == 14.0
        assert issubclass(SpendingLimit, DownriverError)
        resumed = chat(11.0)
        assert texts(resumed.generate(["a", "b", "c"], max_tokens=5)) == [["a it is"], ["b it is"], ["c it is"]]
        assert (resumed.ledger.requests, resumed.ledger.cached, resumed.ledger.cost) == (1, 2, 7.0)

    def test_a_limit_of_nothing_still_reads_the_cache(self, tmp_path):
        ScriptedChat(echo, cache=tmp_path).generate(["a"], max_tokens=5)
        chat = ScriptedChat(echo, price=self.price, spending_limit=0.0, cache=tmp_path)
        assert texts(chat.generate(["a"], max_tokens=5)) == [["a it is"]]

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            ({"spending_limit": 1.0}, "needs price"),
            ({"price": (1.0,)}, "two numbers"),
            ({"price": (1.0, -1.0)}, "price"),
            ({"price": (1.0, 1.0), "spending_limit": -1.0}, "spending_limit -1"),
        ],
    )
    def test_impossible_prices(self, arguments, says):
        with pytest.raises(InputError, match=says):
            Ledger(**arguments)

    def test_lost_answers_count_against_the_limit_but_not_as_cost(self):
        ledger = Ledger(self.price, 10.0)
        ledger.reserve(6.0)
        assert not ledger.fits(5.0)
        ledger.abandon(6.0, billed=True)
        assert ledger.cost == 0.0 and not ledger.fits(5.0) and ledger.fits(4.0)
        ledger.reserve(4.0)
        ledger.abandon(4.0, billed=False)
        assert ledger.fits(4.0)


def test_progress_is_shown_for_long_lists_on_a_terminal_only(monkeypatch, capsys):
    prompts = [str(i) for i in range(30)]
    ScriptedChat(echo, progress=True, model="parrot").generate(prompts, max_tokens=5)
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("FORCE_COLOR", "1")
    ScriptedChat(echo, progress=True, model="parrot").generate(prompts[:5], max_tokens=5)
    assert capsys.readouterr().err == ""
    ScriptedChat(echo, progress=True, model="parrot").generate(prompts, max_tokens=5)
    assert "parrot" in capsys.readouterr().err


def test_scripted_and_openai_chat_load_no_torch():
    code = "import downriver.models.chat as c, sys, json; c.ScriptedChat; c.OpenAIChat; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_cached_answer_is_readable_json(tmp_path):
    ScriptedChat({"a": "b"}, cache=tmp_path).generate(["a"], max_tokens=5)
    [file] = files(tmp_path)
    assert json.loads(file.read_text()) == {
        "text": "b",
        "finish_reason": "stop",
        "tokens": [1, 1],
        "logprobs": None,
    }
