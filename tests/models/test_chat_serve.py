"""``OpenAIChat`` against a real ``transformers serve`` process, and against ``HFChat`` on the same weights."""

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

from downriver.core import InputError
from downriver.models import load, small
from downriver.models.chat import HFChat, OpenAIChat

pytest.importorskip("openai")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


@contextlib.contextmanager
def serving(folder, tmp_path):
    """The address of a server of its own process; ended at the end, its last words shown if it never came up."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "hub").mkdir()
    where = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub"), "OMP_NUM_THREADS": "1"}
    with (tmp_path / "log").open("w") as log:
        command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder), *where]
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 240
        while True:
            with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"transformers serve did not come up: {(tmp_path / 'log').read_text()[-2000:]}")
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(30)


def save(model, folder):
    """For this server a temperature only counts where the folder's own settings say that it samples."""
    model.backbone.generation_config.do_sample = True
    model.save(folder)
    return str(folder)


class Server:
    """What both kinds of weights must do; the classes below bring the weights."""

    folder: str
    url: str
    questions = ("What is the capital of France?", "Name a colour.", "Say hello.", "Count to five.")

    def chat(self, **arguments):
        return OpenAIChat(self.folder, self.url, **{"cache": False, "timeout": 280.0, "retries": 0} | arguments)

    def test_greedy_answers_are_those_of_the_weights_in_process(self, tmp_path):
        dialogue = [{"role": "system", "content": "You are brief."}, {"role": "user", "content": "What is a river?"}]
        prompts = [*self.questions, dialogue]
        here = HFChat(self.folder).generate(prompts, max_tokens=12)
        with self.chat(cache=tmp_path) as there:
            answers = there.generate(prompts, max_tokens=12)
            assert there.ledger.requests == len(prompts)
            assert there.generate(prompts, max_tokens=12) == answers
            assert there.ledger.requests == there.ledger.cached == len(prompts)
        for [mine], [theirs] in zip(here, answers, strict=True):
            assert (theirs.text, theirs.finish_reason, theirs.tokens) == (mine.text, mine.finish_reason, mine.tokens)

    def test_a_text_is_continued_as_in_process(self):
        [[mine]] = HFChat(self.folder, strings="text").generate(["A river runs"], max_tokens=8)
        with self.chat(strings="text") as there:
            [[theirs]] = there.generate(["A river runs"], max_tokens=8)
        # this server also puts the tokenizer's closing token behind a text, where it has one
        if theirs.tokens.prompt == mine.tokens.prompt:
            assert (theirs.text, theirs.tokens) == (mine.text, mine.tokens)
        else:
            assert theirs.tokens.prompt == mine.tokens.prompt + 1

    def test_the_stop_string_is_cut_off(self):
        [[whole]] = HFChat(self.folder).generate(self.questions[:1], max_tokens=12)
        stop = whole.text[len(whole.text) // 2]
        with self.chat() as there:
            [[answer]] = there.generate(self.questions[:1], max_tokens=12, stop=stop)
        assert answer.text == whole.text[: whole.text.index(stop)] and answer.finish_reason == "stop"

    def test_seeds_repeat_and_differ(self):
        with self.chat(concurrency=1) as there:  # this server's seed is that of its whole process
            ask = {"max_tokens": 8, "temperature": 1.5, "n": 2}
            first = there.generate(self.questions[1:2], seed=1, **ask)
            assert there.generate(self.questions[1:2], seed=1, **ask) == first
            assert there.generate(self.questions[1:2], seed=2, **ask) != first
        assert first[0][0].text != first[0][1].text

    def test_a_wrong_name_is_refused_in_the_servers_words(self):
        with (
            OpenAIChat("another-model", self.url, cache=False) as there,
            pytest.raises(InputError, match="another-model"),
        ):
            there.generate(self.questions[:1], max_tokens=4)


class TestSmallModel(Server):
    @pytest.fixture(autouse=True, scope="class")
    def server(self, request, tmp_path_factory):
        model = small("causal-lm", "nano")
        model.processor.chat_template = TEMPLATE
        folder = tmp_path_factory.mktemp("serve")
        request.cls.folder = save(model, folder / "model")
        with serving(request.cls.folder, folder) as request.cls.url:
            yield


@pytest.mark.slow
@pytest.mark.assets
class TestSmolLM2(Server):
    @pytest.fixture(autouse=True, scope="class")
    def server(self, request, asset, tmp_path_factory):
        asset("SmolLM2-135M-Instruct")
        folder = tmp_path_factory.mktemp("serve")
        request.cls.folder = save(load("SmolLM2-135M-Instruct"), folder / "model")
        with serving(request.cls.folder, folder) as request.cls.url:
            yield

    def test_it_knows_the_capital_of_france(self):
        with self.chat() as there:
            [[answer]] = there.generate(self.questions[:1], max_tokens=12)
        assert "Paris" in answer.text

    def test_the_right_answer_is_likelier(self):
        right, wrong = HFChat(self.folder).loglikelihood(
            [(self.questions[0], f"The capital of France is {c}.") for c in ("Paris", "Oslo")]
        )
        assert right.total > wrong.total and right.greedy and not wrong.greedy
