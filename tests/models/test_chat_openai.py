"""``OpenAIChat`` over real HTTP on the loopback, against a small server that fails in all the ways servers do."""

import asyncio
import gc
import http.server
import json
import pickle
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import defaultdict
from email.utils import formatdate
from pathlib import Path

import pytest

from downriver.core import DownriverError, InputError
from downriver.models.chat import OpenAIChat, ServiceError, SpendingLimit, Tokens

pytest.importorskip("openai")

KEY = "sk-very-secret-0123456789"


class Server(http.server.ThreadingHTTPServer):
    """Speaks enough of the protocol; for each prompt it first goes through the faults laid down for it."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.faults = defaultdict(list)  # prompt -> faults, one a request; afterwards it answers
        self.always = None  # a fault for every request
        self.pause = 0.0  # seconds that an answer takes
        self.requests = []  # (path, body) of every request
        self.keys = set()
        self.times = defaultdict(list)
        self.busy = self.busiest = 0
        self.lock = threading.Lock()
        self.usage = True

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, client_address):
        pass  # a client that hung up is what some tests are about


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        prompt = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
        with server.lock:
            server.requests.append((self.path, body))
            server.keys.add(self.headers["authorization"])
            server.times[prompt].append(time.monotonic())
            server.busy += 1
            server.busiest = max(server.busiest, server.busy)
            fault = server.always or (server.faults[prompt].pop(0) if server.faults[prompt] else None)
        try:
            if fault is None:
                time.sleep(server.pause)
                self.answer(body, prompt)
            else:
                self.fail(fault, body, prompt)
        finally:
            with server.lock:
                server.busy -= 1

    def send(self, status, payload, headers=(), kind="application/json"):
        data = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
        self.send_response(status)
        for name, value in (("content-type", kind), ("content-length", str(len(data))), *headers):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def answer(self, body, prompt):
        text = f"{prompt} it is, seed {body.get('seed')}"
        logprobs = None
        if "messages" in body:
            if body.get("logprobs"):
                logprobs = {"content": [{"token": "x", "logprob": -0.25, "bytes": None, "top_logprobs": []}] * 2}
            choice = {"message": {"role": "assistant", "content": text}}
        else:
            if body.get("logprobs"):
                logprobs = {"token_logprobs": [-0.5], "tokens": ["x"], "text_offset": [0], "top_logprobs": None}
            choice = {"text": text}
        choice |= {"index": 0, "finish_reason": "stop", "logprobs": logprobs}
        usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15} if self.server.usage else None
        self.send(200, {"id": "1", "object": "x", "created": 0, "model": "m", "choices": [choice], "usage": usage})

    def fail(self, fault, body, prompt):
        status, headers = fault if isinstance(fault, tuple) else (fault, ())
        if fault == "hang":
            time.sleep(3)
        elif fault == "cut":
            self.close_connection = True
            self.connection.shutdown(2)
        elif fault == "cut in the middle":
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", "1000")
            self.end_headers()
            self.wfile.write(b'{"choices": [')
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(2)
        elif fault == "malformed":
            self.send(200, b'{"choices": [{"mess')
        elif fault == "no json":
            self.send(200, b"<html>busy</html>", kind="text/html")
        elif fault == "no choices":
            self.send(200, {"error": {"message": "overloaded"}})
        elif fault == "quota":
            self.send(429, {"error": {"message": "You are out of credit", "code": "insufficient_quota"}})
        elif fault == "renamed":
            if "max_tokens" in body:
                self.send(400, {"error": {"message": "Use 'max_completion_tokens' instead of 'max_tokens'."}})
            else:
                self.answer(body, prompt)
        else:
            key = (self.headers["authorization"] or "").removeprefix("Bearer ")
            self.send(status, {"error": {"message": f"no luck with {key}"}}, headers)


@pytest.fixture
def server():
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        yield running
        running.shutdown()


@pytest.fixture
def chat(server, monkeypatch):
    """Make a chat model for the server: quick to try again, closed at the end."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    made = []

    def make(**arguments):
        arguments = {"cache": False, "backoff": 0.01, "timeout": 20.0} | arguments
        made.append(OpenAIChat("m", server.url, **arguments))
        return made[-1]

    yield make
    for one in made:
        one.close()


def ask(chat, *prompts, **parameters):
    return [row[0].text for row in chat.generate(list(prompts), **{"max_tokens": 20} | parameters)]


def files(folder):
    return [path for path in Path(folder).rglob("*") if path.is_file()]


class TestRequests:
    def test_what_is_sent_and_what_comes_back(self, server, chat):
        [[answer]] = chat().generate([[{"role": "user", "content": "rain"}]], max_tokens=7, stop=", seed")
        assert (answer.text, answer.finish_reason, answer.tokens) == ("rain it is", "stop", Tokens(10, 5))
        assert answer.logprobs is None
        [(path, body)] = server.requests
        assert path == "/v1/chat/completions"
        assert body == {
            "model": "m",
            "messages": [{"role": "user", "content": "rain"}],
            "max_tokens": 7,
            "temperature": 0.0,
            "stop": [", seed"],
        }

    def test_answers_come_in_the_order_of_the_prompts(self, server, chat):
        prompts = [str(i) for i in range(40)]
        assert ask(chat(), *prompts) == [f"{p} it is, seed None" for p in prompts]

    def test_each_sample_has_a_seed_of_its_own(self, server, chat):
        [first] = chat().generate(["rain"], max_tokens=9, temperature=1.0, seed=7, n=3)
        seeds = [body["seed"] for _, body in server.requests]
        assert sorted(a.text for a in first) == sorted(f"rain it is, seed {s}" for s in seeds)
        assert len(set(seeds)) == 3 and 7 in seeds and all(0 <= s < 2**31 for s in seeds)
        assert chat().generate(["snow", "rain"], max_tokens=9, temperature=1.0, seed=7, n=3)[1] == first

    def test_texts_go_to_the_completions_route(self, server, chat):
        [[answer]] = chat(strings="text", logprobs=True).generate(["rain"], max_tokens=7)
        [(path, body)] = server.requests
        assert path == "/v1/completions" and body["prompt"] == "rain" and body["max_tokens"] == 7
        assert answer.text == "rain it is, seed None" and answer.logprobs == (-0.5,)

    def test_logprobs_are_a_capability_on_request(self, server, chat):
        with pytest.raises(InputError, match="logprobs"):
            chat().require("logprobs")
        asking = chat(logprobs=True)
        asking.require("logprobs")
        assert asking.generate(["rain"], max_tokens=7)[0][0].logprobs == (-0.25, -0.25)

    def test_extra_fields_are_sent_and_are_part_of_the_key(self, server, chat, tmp_path):
        ask(chat(extra_body={"top_p": 0.9}, cache=tmp_path), "rain")
        ask(chat(extra_body={"top_p": 0.8}, cache=tmp_path), "rain")
        assert [body["top_p"] for _, body in server.requests] == [0.9, 0.8]

    def test_the_newer_name_of_max_tokens_is_found_out_once(self, server, chat):
        server.always = "renamed"
        one = chat(concurrency=1)
        assert ask(one, "rain", "snow") == ["rain it is, seed None", "snow it is, seed None"]
        assert ["max_completion_tokens" in body for _, body in server.requests] == [False, True, True]

    def test_a_server_without_usage_is_counted_by_an_upper_bound(self, server, chat):
        server.usage = False
        one = chat(tokenizer=str.split)
        [[answer]] = one.generate(["a b c"], max_tokens=9)
        assert answer.tokens.completion == len(answer.text.split()) and answer.tokens.prompt >= 3

    def test_count_tokens(self, chat):
        assert chat().count_tokens("né à") == 6
        assert chat(tokenizer=str.split).count_tokens([{"role": "user", "content": "born at"}] * 2) == 4


class TestWhereItRuns:
    def test_inside_a_running_event_loop(self, server, chat):
        async def notebook_cell():
            return ask(chat(), "rain", "snow")

        assert asyncio.run(notebook_cell()) == ["rain it is, seed None", "snow it is, seed None"]

    def test_from_several_threads_within_one_bound(self, server, chat):
        server.pause = 0.03
        one = chat(concurrency=3)
        answers = {}
        threads = [
            threading.Thread(target=lambda t=t: answers.update({t: ask(one, *(f"{t}{i}" for i in range(8)))}))
            for t in "abc"
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert answers == {t: [f"{t}{i} it is, seed None" for i in range(8)] for t in "abc"}
        assert server.busiest == 3
        assert one.ledger.requests == 24 and one.ledger.in_flight == 0

    @pytest.mark.parametrize("bound", [1, 4])
    def test_concurrency_is_bounded_and_used(self, server, chat, bound):
        server.pause = 0.03
        ask(chat(concurrency=bound), *map(str, range(16)))
        assert server.busiest == bound

    def test_forgotten_it_leaves_no_thread_behind(self, server):
        before = set(threading.enumerate())
        for _ in range(3):
            ask(OpenAIChat("m", server.url, cache=False), "rain")
        gc.collect()
        for thread in set(threading.enumerate()) - before:
            thread.join(10)
            assert thread.name != "downriver-chat" or not thread.is_alive()

    def test_closed_and_used_again_and_pickled(self, server, chat):
        with chat() as one:
            ask(one, "rain")
            threads = threading.active_count()
        assert threading.active_count() < threads
        assert ask(one, "snow") == ["snow it is, seed None"]
        packed = pickle.dumps(one)
        assert KEY.encode() not in packed
        with pickle.loads(packed) as copy:
            assert ask(copy, "hail") == ["hail it is, seed None"]


class TestFaults:
    @pytest.mark.parametrize(
        "fault", [429, 500, 503, 408, "cut", "cut in the middle", "malformed", "no json", "no choices"]
    )
    def test_transient_faults_are_tried_again(self, server, chat, fault):
        server.faults["rain"] = [fault, fault]
        one = chat()
        assert ask(one, "rain", "snow") == ["rain it is, seed None", "snow it is, seed None"]
        assert len(server.requests) == 4
        assert (one.ledger.requests, one.ledger.retries) == (2, 2)

    def test_a_hanging_request_is_given_up_and_tried_again(self, server, chat):
        server.faults["rain"] = ["hang"]
        one = chat(timeout=1.0)
        assert ask(one, "rain") == ["rain it is, seed None"]
        assert one.ledger.retries == 1

    @pytest.mark.parametrize("header", ["0.6", "date"])
    def test_retry_after_is_honoured(self, server, chat, header):
        wait, value = (0.6, header) if header != "date" else (1.0, formatdate(time.time() + 3, usegmt=True))
        server.faults["rain"] = [(429, [("Retry-After", value)])]
        ask(chat(), "rain")
        first, second = server.times["rain"]
        assert second - first >= wait

    def test_a_wait_of_an_hour_is_reported_not_sat_out(self, server, chat):
        server.faults["rain"] = [(429, [("Retry-After", "3600")])]
        with pytest.raises(ServiceError, match="come back in 3600 s"):
            ask(chat(), "rain")

    @pytest.mark.parametrize(
        ("fault", "says"),
        [(500, "status 500: no luck"), ("cut", "connection failed"), ("malformed", "not a completion")],
    )
    def test_a_lasting_fault_ends_after_the_retries(self, server, chat, fault, says):
        server.always = fault
        with pytest.raises(ServiceError, match=f"no answer in 3 attempts.*{says}"):
            ask(chat(retries=2), "rain")
        assert len(server.requests) == 3

    def test_a_lasting_silence_says_how_long_it_waited(self, server, chat):
        server.always = "hang"
        with pytest.raises(ServiceError, match=r"no answer within 0\.2 s"):
            ask(chat(retries=0, timeout=0.2), "rain")

    def test_a_port_that_nobody_listens_on(self, chat):
        silent = Server()
        silent.server_close()
        with OpenAIChat("m", silent.url, cache=False, retries=1, backoff=0.01, price=(1.0, 1.0)) as one:
            with pytest.raises(ServiceError, match="connection failed"):
                ask(one, "rain")
            assert one.ledger.unconfirmed == 0.0

    @pytest.mark.parametrize(
        ("status", "more"), [(400, ""), (401, r"key is read from \$OPENAI_API_KEY"), (404, ""), (422, "")]
    )
    def test_a_refusal_is_reported_at_once_with_the_servers_words(self, server, chat, status, more):
        server.always = status
        with pytest.raises(InputError, match=rf"OpenAIChat\('m' at .*status {status}: no luck.*{more}"):
            ask(chat(), "rain")
        assert len(server.requests) == 1

    def test_an_empty_account_is_not_waited_for(self, server, chat):
        server.always = "quota"
        with pytest.raises(InputError, match="out of credit"):
            ask(chat(), "rain")
        assert len(server.requests) == 1

    @pytest.fixture
    def interruptible(self):
        before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job is deaf to it
        yield
        signal.signal(signal.SIGINT, before)

    @pytest.mark.usefixtures("interruptible")
    def test_an_interrupted_call_keeps_what_was_answered_and_holds_nothing(self, server, chat, tmp_path):
        one = chat(cache=tmp_path, concurrency=2, price=(1.0, 1.0), spending_limit=1.0)
        server.faults["2"], server.faults["3"] = ["hang"], ["hang"]
        ctrl_c = threading.Timer(1.0, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT))
        ctrl_c.start()
        with pytest.raises(KeyboardInterrupt):
            ask(one, *map(str, range(9)))
        server.faults.clear()
        sent = len(server.requests)
        assert ask(one, *map(str, range(9))) == [f"{i} it is, seed None" for i in range(9)]
        assert len(server.requests) - sent == 9 - one.ledger.cached and one.ledger.cached >= 2
        assert one.ledger.in_flight == 0 and one.ledger.unconfirmed > 0

    def test_after_a_refusal_no_further_request_is_started(self, server, chat):
        server.faults["0"] = [401]
        server.pause = 0.3
        with pytest.raises(InputError, match="401"):
            ask(chat(concurrency=4), *map(str, range(50)))
        assert len(server.requests) < 12


class TestCacheAndResume:
    def test_a_hit_sends_nothing(self, server, chat, tmp_path):
        first = ask(chat(cache=tmp_path), "rain", "snow")
        sent = len(server.requests)
        again = chat(cache=tmp_path)
        assert ask(again, "rain", "snow") == first
        assert len(server.requests) == sent and again.ledger.cached == 2

    def test_equal_prompts_of_a_call_are_sent_once(self, server, chat):
        assert ask(chat(), "rain", "rain", "rain") == ["rain it is, seed None"] * 3
        assert len(server.requests) == 1

    def test_another_endpoint_is_another_key(self, server, chat, tmp_path):
        ask(chat(cache=tmp_path), "rain")
        with Server() as other:
            threading.Thread(target=other.serve_forever, daemon=True).start()
            with OpenAIChat("m", other.url, cache=tmp_path) as one:
                ask(one, "rain")
            assert len(other.requests) == 1
            other.shutdown()

    def test_a_failed_run_resumes_and_pays_nothing_twice(self, server, chat, tmp_path):
        prompts = [str(i) for i in range(30)]
        server.faults["17"] = [401]
        with pytest.raises(InputError):
            ask(chat(cache=tmp_path, concurrency=4), *prompts)
        kept = len(files(tmp_path))
        answered = [
            body["messages"][0]["content"] for _, body in server.requests if body["messages"][0]["content"] != "17"
        ]
        assert 10 <= kept == len(answered) < 29
        server.requests.clear()
        resumed = chat(cache=tmp_path, concurrency=4)
        assert ask(resumed, *prompts) == [f"{p} it is, seed None" for p in prompts]
        assert len(server.requests) == 30 - kept
        assert not {body["messages"][0]["content"] for _, body in server.requests} & set(answered)
        assert (resumed.ledger.requests, resumed.ledger.cached) == (30 - kept, kept)


class TestSpending:
    price = (1.0, 10.0)

    def worst(self, chat, tokens):
        """Of a one-letter prompt."""
        return chat.ledger.price_of(64 + 16 + 1, tokens)

    def test_the_limit_holds_with_requests_side_by_side(self, server, chat):
        server.pause = 0.02
        cost = (10 * 1.0 + 5 * 10.0) / 1e6
        probe = chat(price=self.price)
        limit = 10 * cost + self.worst(probe, 20)
        one = chat(price=self.price, spending_limit=limit, concurrency=8)
        with pytest.raises(SpendingLimit, match="could cost"):
            ask(one, *"abcdefghijklmnopqrstuvwxyz")
        # it went on as long as one more request fitted for certain, and not further
        assert len(server.requests) == one.ledger.requests == 11
        assert one.ledger.cost == pytest.approx(11 * cost)
        assert one.ledger.cost <= limit and one.ledger.in_flight == 0

    def test_reservations_keep_requests_from_running_side_by_side(self, server, chat):
        server.pause = 0.05
        probe = chat(price=self.price)
        one = chat(price=self.price, spending_limit=2.5 * self.worst(probe, 20), concurrency=8)
        ask(one, "a", "b", "c", "d")
        assert server.busiest == 2

    def test_a_request_too_dear_by_itself_is_never_sent(self, server, chat):
        one = chat(price=self.price, spending_limit=1e-6)
        with pytest.raises(SpendingLimit):
            ask(one, "a")
        assert server.requests == []

    def test_lost_answers_count_against_the_limit(self, server, chat):
        server.always = "cut in the middle"
        probe = chat(price=self.price)
        one = chat(price=self.price, spending_limit=3.5 * self.worst(probe, 20), retries=10)
        with pytest.raises(SpendingLimit):
            ask(one, "a")
        assert len(server.requests) == 3
        assert one.ledger.unconfirmed == pytest.approx(3 * self.worst(probe, 20)) and one.ledger.cost == 0

    def test_refused_requests_cost_nothing(self, server, chat):
        server.faults["a"] = [429, 500]
        one = chat(price=self.price, spending_limit=1.0)
        ask(one, "a")
        assert one.ledger.unconfirmed == 0 and one.ledger.cost == pytest.approx(60e-6)


class TestKey:
    def test_it_is_sent_and_appears_nowhere_else(self, server, chat, tmp_path, caplog):
        caplog.set_level("DEBUG")
        one = chat(cache=tmp_path, retries=1)
        ask(one, "rain")
        assert server.keys == {f"Bearer {KEY}"}
        server.always = 401
        try:
            ask(one, "snow")
        except DownriverError as error:
            trace = "".join(traceback.format_exception(error))
        assert "[key]" in trace
        everything = trace + repr(one) + repr(vars(one)) + caplog.text + str(one.ledger)
        everything += "".join(path.read_text() for path in files(tmp_path))
        assert KEY not in everything

    def test_the_official_endpoint_needs_one(self, monkeypatch):
        monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
        monkeypatch.delenv("MY_KEY", raising=False)
        with pytest.raises(InputError, match="MY_KEY"):
            OpenAIChat("m", api_key_env="MY_KEY")

    def test_an_endpoint_of_ones_own_may_do_without(self, server, monkeypatch):
        monkeypatch.delenv("OPENAI_API_KEY", raising=False)
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        with OpenAIChat("m", cache=False) as one:
            assert ask(one, "rain") == ["rain it is, seed None"]
        assert server.keys == {"Bearer none"}

    def test_a_password_in_the_address_is_not_shown(self):
        shown = repr(OpenAIChat("m", "http://me:hush@localhost:9/v1?token=hush"))
        assert shown == "OpenAIChat('m' at http://localhost:9/v1)"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"base_url": "localhost:8000"}, "http://"),
        ({"concurrency": 0}, "concurrency"),
        ({"timeout": 0}, "timeout"),
        ({"retries": -1}, "retries"),
        ({"strings": "raw"}, "strings"),
        ({"spending_limit": 1.0}, "price"),
    ],
)
def test_impossible_settings(arguments, says):
    with pytest.raises(InputError, match=says):
        OpenAIChat("m", **{"base_url": "http://localhost:9/v1"} | arguments)


def test_without_the_client_the_extra_is_named(tmp_path):
    code = (
        "import sys; sys.modules['openai'] = None\n"
        "from downriver.models.chat import OpenAIChat\n"
        "OpenAIChat('m', 'http://localhost:9/v1')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "pip install 'downriver[serve]'" in done.stderr
