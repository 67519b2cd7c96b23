"""``HFChat``: answers and log-likelihoods of models that run in the test, against direct computations with them."""

import copy
import random

import peft
import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as token_models
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from downriver.core import InputError
from downriver.models import load, small
from downriver.models.chat import HFChat, huggingface

WORDS = [f"w{i}" for i in range(20)]
CHAIN = {f"w{i}": f"w{(7 * i + 3) % 20}" for i in range(20)}  # what follows what, but w19 ends the text
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant' }}{% endif %}"
)


def word_tokenizer(template=None):
    words = ["<pad>", "<s>", "</s>", "user", "assistant", "system", *WORDS]
    tokenizer = Tokenizer(token_models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", chat_template=template
    )


def merging_tokenizer():
    """A byte-level BPE with merges, so that tokens can straddle the end of a prompt."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("a", "b"), ("ab", "c"), ("Ġ", "ab"), (".", "Ċ")]
    tokens = [*alphabet, *("".join(merge) for merge in merges), "<s>"]
    tokenizer = Tokenizer(token_models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


def llama(vocabulary, seed=0, **settings):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
        **settings,
    )
    return LlamaForCausalLM(config).eval()


def gpt2(vocabulary):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=vocabulary, n_embd=32, n_layer=2, n_head=2, n_positions=128, initializer_range=0.3)
    return GPT2LMHeadModel(config).eval()


@pytest.fixture(scope="module")
def walker():
    """A model that has learned to walk the chain of words; with it the likeliest token is clear."""
    tokenizer = word_tokenizer(TEMPLATE)
    module = llama(len(tokenizer), bos_token_id=1, eos_token_id=2, pad_token_id=0)
    draw = random.Random(0)
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)
    for _ in range(150):
        rows = []
        for _ in range(16):
            walk = [draw.choice(WORDS)]
            while len(walk) < 12:
                walk.append("</s>" if walk[-1] in ("w19", "</s>") else CHAIN[walk[-1]])
            words = ["user", *walk[:1], "assistant", *walk[1:]] if draw.random() < 0.5 else walk
            rows.append(tokenizer.convert_tokens_to_ids(words[:12]))
        ids = torch.tensor(rows)
        loss = module(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return module.eval(), tokenizer


@pytest.fixture
def noisy():
    """A random model: every token has a chance."""
    tokenizer = word_tokenizer()
    return llama(len(tokenizer), seed=1, bos_token_id=1, eos_token_id=2, pad_token_id=0), tokenizer


def walk(word, steps):
    words = [word]
    while len(words) <= steps and words[-1] != "w19":
        words.append(CHAIN[words[-1]])
    return " ".join(words[1:])


def teacher_forced(module, ids, begin):
    """The log-probabilities of ids[begin:], by one plain forward pass over a single row."""
    with torch.no_grad():
        logits = module(input_ids=torch.tensor([ids])).logits[0].double()
    logprobs = logits.log_softmax(-1)
    return [float(logprobs[i - 1, ids[i]]) for i in range(begin, len(ids))]


def greedy_steps(module, ids, count):
    """Greedy decoding without cache, padding or batch."""
    new = []
    for _ in range(count):
        with torch.no_grad():
            new.append(int(module(input_ids=torch.tensor([ids + new])).logits[0, -1].argmax()))
    return new


class TestGreedy:
    def test_it_equals_decoding_one_token_at_a_time(self, noisy):
        module, tokenizer = noisy
        prompts = ["w1", "w2 w3 w4 w5 w6", "w7 w8"]
        for answer, prompt in zip(HFChat(noisy).generate(prompts, max_tokens=12), prompts, strict=True):
            ids = greedy_steps(module, tokenizer(prompt)["input_ids"], 12)
            end = ids.index(2) + 1 if 2 in ids else 12
            assert answer[0].text == tokenizer.decode(ids[:end], skip_special_tokens=True)
            assert answer[0].tokens == (len(prompt.split()), end)
            assert answer[0].finish_reason == ("stop" if 2 in ids else "length")

    def test_a_learned_walk_ends_where_it_should(self, walker):
        chat = HFChat(walker, strings="text")
        answers = chat.generate(WORDS, max_tokens=6)
        assert [row[0].text for row in answers] == [walk(word, 6) for word in WORDS]
        reasons = {row[0].finish_reason for row in answers}
        assert reasons == {"stop", "length"}
        for row in answers:
            written = len(row[0].text.split())
            assert row[0].tokens.completion == written + (row[0].finish_reason == "stop")  # the end counts as a token

    def test_the_batch_does_not_matter(self, walker):
        prompts = [" ".join([word, CHAIN[word], CHAIN[CHAIN[word]]][: 1 + i % 3]) for i, word in enumerate(WORDS[:19])]
        single = [HFChat(walker, strings="text").generate([prompt], max_tokens=6)[0][0] for prompt in prompts]
        for batch_size in (3, 64):
            whole = HFChat(walker, strings="text", batch_size=batch_size).generate(prompts, max_tokens=6)
            assert [(a.text, a.finish_reason, a.tokens) for [a] in whole] == [
                (a.text, a.finish_reason, a.tokens) for a in single
            ]

    def test_absolute_positions_are_not_moved_by_padding(self):
        tokenizer = word_tokenizer()
        chat = HFChat((gpt2(len(tokenizer)), tokenizer))
        prompts = ["w1", "w2 w3 w4 w5 w6 w7 w8 w9"]
        assert [chat.generate([p], max_tokens=9)[0][0].text for p in prompts] == [
            a.text for [a] in chat.generate(prompts, max_tokens=9)
        ]

    def test_the_models_own_generation_settings_are_not_used(self, noisy):
        module, _ = noisy
        chat = HFChat(noisy)
        plain = chat.generate(["w1 w2"], max_tokens=12)
        drawn = chat.generate(["w1 w2"], max_tokens=12, temperature=1.0, seed=0)
        settings = module.generation_config
        settings.repetition_penalty, settings.no_repeat_ngram_size, settings.min_length = 9.0, 1, 12
        settings.do_sample, settings.top_k, settings.top_p, settings.temperature = True, 1, 0.1, 0.1
        settings.num_beams = 3
        assert chat.generate(["w1 w2"], max_tokens=12) == plain
        assert chat.generate(["w1 w2"], max_tokens=12, temperature=1.0, seed=0) == drawn


class TestStop:
    def test_text_ends_before_the_stop_string_and_other_rows_go_on(self, walker):
        chat = HFChat(walker, strings="text")
        word = "w1"
        path = walk(word, 8).split()
        [[stopped], [other]] = chat.generate([word, "w2"], max_tokens=8, stop=[f" {path[2]}", "never"])
        assert stopped.text == " ".join(path[:2]) and stopped.finish_reason == "stop"
        assert stopped.tokens.completion == 3 == len(stopped.logprobs)
        assert other.text.startswith(walk("w2", 2))

    def test_a_stop_string_in_the_prompt_does_not_stop(self, walker):
        chat = HFChat(walker, strings="text")
        assert chat.generate(["w1 w10"], max_tokens=3, stop="w1 w10")[0][0].text == walk("w10", 3)

    def test_a_stop_string_across_tokens(self, walker):
        chat = HFChat(walker, strings="text")
        path = walk("w1", 8).split()
        [[answer]] = chat.generate(["w1"], max_tokens=8, stop=f"{path[1][1:]} {path[2][:1]}")
        assert answer.text == f"{path[0]} {path[1][0]}"


class TestSampling:
    def test_frequencies_follow_the_softmax(self, noisy):
        module, tokenizer = noisy
        n, temperature = 4000, 2.0
        [answers] = HFChat(noisy, batch_size=1000).generate(["w3"], max_tokens=1, temperature=temperature, seed=0, n=n)
        counts = torch.zeros(len(tokenizer))
        for answer in answers:
            counts[tokenizer.convert_tokens_to_ids(answer.text) if answer.text else 2] += 1
        with torch.no_grad():
            expected = (
                module(input_ids=torch.tensor([tokenizer("w3")["input_ids"]])).logits[0, -1] / temperature
            ).softmax(-1)
        words = slice(3, None)  # special tokens all decode to nothing
        expected, counts = expected[words] * n, counts[words]
        common = expected > 5
        chi_square = float(((counts - expected)[common] ** 2 / expected[common]).sum())
        assert int(common.sum()) > 8
        assert chi_square < 60  # at most 23 degrees of freedom: chance 4e-5

    def test_an_answer_does_not_depend_on_its_company(self, walker):
        def ask(prompts, batch_size=16, n=3, seed=5):
            chat = HFChat(walker, strings="text", batch_size=batch_size)
            return chat.generate(prompts, max_tokens=6, temperature=1.5, seed=seed, n=n)

        def plain(rows):
            return [[(a.text, a.finish_reason, a.tokens) for a in row] for row in rows]

        prompts = ["w1", "w2 w17", "w3", "w4 w11 w0"]
        whole = plain(ask(prompts))
        assert plain(ask(prompts, batch_size=1)) == whole
        assert plain(ask(prompts[::-1])) == whole[::-1]
        assert plain(ask(prompts[1:2])) == whole[1:2]
        assert [row[:3] for row in plain(ask(prompts, n=5))] == whole
        assert plain(ask(prompts, seed=6)) != whole
        assert len({text for row in whole for text, _, _ in row}) > 4

    def test_without_a_seed_draws_differ_and_follow_pythons_generator(self, noisy):
        chat = HFChat(noisy)
        random.seed(3)
        first = chat.generate(["w1"] * 4, max_tokens=8, temperature=1.0)
        assert len({row[0].text for row in first}) > 1
        assert chat.generate(["w1"] * 4, max_tokens=8, temperature=1.0) != first
        random.seed(3)
        assert chat.generate(["w1"] * 4, max_tokens=8, temperature=1.0) == first

    def test_seeded_draws_leave_every_generator_alone(self, noisy):
        states = torch.random.get_rng_state(), random.getstate()
        HFChat(noisy).generate(["w1"], max_tokens=4, temperature=1.0, seed=0)
        assert torch.equal(states[0], torch.random.get_rng_state()) and states[1] == random.getstate()

    def test_top_p_draws_from_the_nucleus_only(self, noisy):
        n, top_p = 4000, 0.9
        module, tokenizer = noisy
        with torch.no_grad():
            likely = module(input_ids=torch.tensor([tokenizer("w3")["input_ids"]])).logits[0, -1].double().softmax(-1)
        order = likely.argsort(descending=True)
        size = int((likely[order].cumsum(0) < top_p).sum()) + 1
        nucleus = {tokenizer.decode([i]) for i in order[:size].tolist()}
        chat = HFChat(noisy, batch_size=1000)
        [answers] = chat.generate(["w3"], max_tokens=1, temperature=1.0, top_p=top_p, seed=0, n=n)
        seen = {answer.text for answer in answers} - {""}
        assert size > 3 and seen <= nucleus and len(seen) >= size - 2  # a special token decodes to nothing

    @pytest.mark.parametrize("temperature", [0.0, 0.7, 2.0])
    def test_logprobs_are_the_models_own(self, walker, temperature):
        module, tokenizer = walker
        chat = HFChat(walker, strings="text")
        for answer in chat.generate(["w1", "w5 w18"], max_tokens=6, temperature=temperature, seed=1):
            assert len(answer[0].logprobs) == answer[0].tokens.completion
        prompts = ["w1", "w5 w18"]
        for prompt, [answer] in zip(
            prompts, chat.generate(prompts, max_tokens=6, temperature=temperature, seed=1), strict=True
        ):
            if "stop" in answer.finish_reason:
                continue
            before = tokenizer(prompt)["input_ids"]
            ids = before + tokenizer(answer.text)["input_ids"]
            assert list(answer.logprobs) == pytest.approx(teacher_forced(module, ids, len(before)), abs=1e-4)


class TestLogLikelihood:
    @pytest.mark.parametrize("build", [llama, gpt2])
    @pytest.mark.parametrize("batch_size", [1, 4, 16])
    def test_it_equals_a_teacher_forced_pass(self, build, batch_size):
        tokenizer = word_tokenizer()
        module = build(len(tokenizer))
        draw = random.Random(0)
        pairs = [
            (
                " ".join(draw.choices(WORDS, k=draw.randint(1, 20))),
                " " + " ".join(draw.choices(WORDS, k=draw.randint(1, 9))),
            )
            for _ in range(11)
        ]
        chat = HFChat((module, tokenizer), batch_size=batch_size)
        for (prompt, continuation), score in zip(pairs, chat.loglikelihood(pairs), strict=True):
            before, after = (tokenizer(text)["input_ids"] for text in (prompt, continuation))
            expected = teacher_forced(module, before + after, len(before))
            assert score.total == pytest.approx(sum(expected), abs=1e-5 * max(1, len(after)))
            assert list(score.logprobs) == pytest.approx(expected, abs=1e-5)
            assert score.tokens == len(after)
            assert score.greedy == (greedy_steps(module, before, len(after)) == after)

    def test_probabilities_of_all_single_tokens_add_up_to_one(self, noisy):
        tokens = noisy[1].convert_ids_to_tokens(range(len(noisy[1])))
        scores = HFChat(noisy).loglikelihood([("w1 w2", f" {token}") for token in tokens])
        assert sum(torch.tensor([s.total for s in scores]).exp()) == pytest.approx(1.0, abs=1e-5)
        assert sum(s.greedy for s in scores) == 1

    @pytest.mark.parametrize(
        ("prompt", "continuation", "tokens"),
        [
            ("x", "ab", ["ab"]),  # the boundary lies between tokens
            ("xa", "b", ["ab"]),  # one token straddles it
            ("x ", "ab", ["Ġab"]),  # a space at the prompt's end goes with the word
            ("xab", "cab", ["abc", "ab"]),
            ("x.", "\n", [".Ċ"]),
            ("é", "é", ["Ã", "©"]),  # two tokens, one character
        ],
    )
    def test_the_boundary_is_found_in_the_joint_encoding(self, prompt, continuation, tokens):
        tokenizer = merging_tokenizer()
        module = llama(len(tokenizer))
        ids = tokenizer(prompt + continuation)["input_ids"]
        assert tokenizer.convert_ids_to_tokens(ids)[-len(tokens) :] == tokens
        ids = ids if len(ids) > len(tokens) else [tokenizer.bos_token_id, *ids]
        [score] = HFChat((module, tokenizer)).loglikelihood([(prompt, continuation)])
        assert score.tokens == len(tokens)
        assert score.total == pytest.approx(sum(teacher_forced(module, ids, len(ids) - len(tokens))), abs=1e-4)

    def test_an_empty_prompt_begins_with_the_first_token(self, noisy):
        module, tokenizer = noisy
        [score] = HFChat(noisy).loglikelihood([("", "w1 w2")])
        assert score.total == pytest.approx(
            sum(teacher_forced(module, [1, *tokenizer("w1 w2")["input_ids"]], 1)), abs=1e-5
        )

    def test_parts_add_up_to_the_whole(self):
        chat = HFChat(small("causal-lm", "nano"))
        first, second, both = chat.loglikelihood(
            [("a river", " runs"), ("a river runs", " down"), ("a river", " runs down")]
        )
        assert first.total + second.total == pytest.approx(both.total, abs=1e-4)
        assert first.tokens + second.tokens == both.tokens == 10  # bytes, without the end that the tokenizer adds

    def test_generated_text_is_greedy(self, walker):
        chat = HFChat(walker, strings="text")
        [[answer]] = chat.generate(["w1"], max_tokens=5)
        right, wrong = chat.loglikelihood([("w1", f" {answer.text}"), ("w1", " w1")])
        assert right.greedy and not wrong.greedy
        assert right.total == pytest.approx(sum(answer.logprobs), abs=1e-4)

    def test_little_memory_for_logits_changes_nothing(self, noisy, monkeypatch):
        pairs = [("w1", " w2 w3"), ("w4 w5", " w6"), ("w7", " w8 w9 w10 w11")]
        whole = HFChat(noisy).loglikelihood(pairs)
        monkeypatch.setattr(huggingface, "LOGITS_AT_ONCE", 50)
        split = HFChat(noisy).loglikelihood(pairs)
        assert [s.total for s in split] == pytest.approx([s.total for s in whole], abs=1e-5)


class TestDialogues:
    def test_messages_go_through_the_template(self, walker):
        chat = HFChat(walker)
        messages = [{"role": "user", "content": "w1"}]
        assert chat.strings == "user"
        assert chat.count_tokens(messages) == chat.count_tokens("w1") == 3
        [[one], [other]] = chat.generate([messages, "w1"], max_tokens=4)
        [[raw]] = HFChat(walker, strings="text").generate(["user w1 assistant"], max_tokens=4)
        assert one == other == raw and one.text == walk("w1", 4)
        assert one.tokens.prompt == 3
        [scored] = chat.loglikelihood([(messages, f" {one.text}")])
        assert scored.greedy

    def test_no_template_no_messages(self, noisy):
        chat = HFChat(noisy)
        assert chat.strings == "text"
        with pytest.raises(InputError, match="no chat template"):
            chat.generate([[{"role": "user", "content": "w1"}]], max_tokens=4)

    def test_an_end_that_the_tokenizer_adds_is_not_part_of_a_prompt(self):
        model = small("causal-lm", "nano")
        assert model.processor("ab")["input_ids"][-1] == model.processor.eos_token_id
        chat = HFChat(model)
        assert chat.count_tokens("ab") == 3 and chat.count_tokens("") == 1
        ids = [model.processor.bos_token_id, *model.processor("ab", add_special_tokens=False)["input_ids"]]
        [[answer]] = chat.generate(["ab"], max_tokens=3)
        expected = greedy_steps(model.backbone, ids, 3)
        assert answer.text == model.processor.decode(expected, skip_special_tokens=True)


class TestCache:
    def test_the_same_weights_answer_from_disk_and_trained_ones_do_not(self, noisy, tmp_path):
        module, _ = noisy
        chat = HFChat(noisy, cache=tmp_path)
        first = chat.generate(["w1"], max_tokens=4), chat.loglikelihood([("w1", " w2")])
        assert (chat.generate(["w1"], max_tokens=4), chat.loglikelihood([("w1", " w2")])) == first
        assert (chat.ledger.requests, chat.ledger.cached) == (2, 2)
        module.lm_head.weight.data[5] += 3.0  # in place, behind autograd's back
        chat.generate(["w1"], max_tokens=4)
        assert chat.ledger.requests == 3

    def test_adapters_and_settings_are_part_of_who_answers(self, noisy, tmp_path):
        module, tokenizer = noisy
        adapted = peft.get_peft_model(module, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
        chat = HFChat((adapted, tokenizer), cache=tmp_path)

        def asked():
            before = chat.ledger.requests
            chat.loglikelihood([("w1", " w2")])
            return chat.ledger.requests - before

        assert [asked(), asked()] == [1, 0]
        with adapted.disable_adapter():
            assert asked() == 1
        assert asked() == 0
        module.config.rms_norm_eps = 0.1
        assert asked() == 1

    def test_the_ledger_counts_tokens_and_time(self, walker):
        chat = HFChat(walker, strings="text")
        [[a], [b]] = chat.generate(["w1", "w2 w17"], max_tokens=4)
        assert chat.ledger.prompt_tokens == 3
        assert chat.ledger.completion_tokens == a.tokens.completion + b.tokens.completion
        assert chat.ledger.seconds > 0 and chat.ledger.cost == 0


class TestModels:
    def test_name_folder_and_model_are_one(self, tmp_path):
        model = small("causal-lm", "nano")
        model.save(tmp_path / "saved")
        answers = [
            HFChat(m).generate(["a river"], max_tokens=6)[0][0].text
            for m in (model, (model.backbone, model.processor), tmp_path / "saved", "small:causal-lm:nano:0")
        ]
        assert len(set(answers)) == 1

    def test_an_adapter_answers_as_its_merged_weights(self, walker, tmp_path):
        module, tokenizer = copy.deepcopy(walker[0]), walker[1]
        adapted = peft.get_peft_model(module, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
        pairs = [("w1", " w2"), ("w1 w3 w4", " w5 w6")]
        with_adapter = HFChat((adapted, tokenizer), strings="text").loglikelihood(pairs)
        merged = HFChat((adapted.merge_and_unload(), tokenizer), strings="text").loglikelihood(pairs)
        assert [s.total for s in with_adapter] == pytest.approx([s.total for s in merged], abs=1e-4)
        assert merged != HFChat(walker, strings="text").loglikelihood(pairs)

    def test_model_and_tokenizer_are_left_as_they_were(self, noisy):
        module, tokenizer = noisy
        module.train()
        tokenizer.pad_token = None
        side = tokenizer.padding_side
        before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        chat = HFChat(noisy)
        chat.generate(["w1", "w2 w3"], max_tokens=4)
        chat.loglikelihood([("w1", " w2")])
        assert module.training and tokenizer.pad_token is None and tokenizer.padding_side == side
        assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())

    @pytest.mark.parametrize(
        ("model", "says"),
        [
            (lambda: small("text-encoder", "nano"), "kind 'text-encoder'"),
            (lambda: load("small:causal-lm:nano:0").backbone, "pair of a causal LM and its tokenizer"),
            (lambda: (torch.nn.Linear(2, 2), word_tokenizer()), "Linear.*causal language model"),
            (lambda: (small("causal-lm", "nano").backbone, None), "causal language model and its tokenizer"),
        ],
    )
    def test_what_is_not_a_causal_lm_is_refused(self, model, says):
        with pytest.raises(InputError, match=says):
            HFChat(model())

    def test_too_long_a_prompt_is_refused_not_cut(self, noisy):
        chat = HFChat(noisy)
        long = " ".join(["w1"] * 120)
        assert chat.generate([long], max_tokens=8)
        with pytest.raises(InputError, match=r"takes 128 tokens.*has 120 and 9 more"):
            chat.generate(["w2", long], max_tokens=9)
        with pytest.raises(InputError, match="has 129"):
            chat.loglikelihood([(long, " w1" * 9)])

    def test_bad_batch_size(self, noisy):
        with pytest.raises(InputError, match="batch_size"):
            HFChat(noisy, batch_size=0)
