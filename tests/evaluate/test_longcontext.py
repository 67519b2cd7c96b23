"""Needles and perplexity curves: what is asked of a model, what comes out for known readers, both kinds, refusals."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from downriver.core.errors import InputError
from downriver.evaluate import CausalReader, DiffusionReader, Needle, PerplexityCurve, draw_curves, needle_grid
from downriver.evaluate import longcontext as module
from downriver.evaluate.longcontext import ppl_curve
from downriver.evaluate.readers import reader
from downriver.models import MaskedDiffusionConfig, MaskedDiffusionLM, byte_tokenizer, small
from downriver.models.model import Model

HAY = "".join(f"{n} boats went down the river. " for n in range(60))
NEEDLES = [Needle("The code of gate 1 is XYZ.", "The code of gate 1 is", "xyz"), Needle("Is it Q?", "It is", "Q?")]
TEXT = "and so the water runs, " * 20


class Near:
    """Sees the last ``window`` tokens only, and repeats the needle it finds there."""

    def __init__(self, window):
        self.tokenizer, self.window, self.prompts = byte_tokenizer(2048), window, []

    def generate(self, prompts, tokens):
        self.prompts += prompts
        answers = []
        for prompt in prompts:
            seen = self.tokenizer.decode(prompt[-self.window :])
            found = [needle.answer.upper() for needle in NEEDLES if needle.text in seen]
            answers.append([*self.tokenizer(" ".join(found), add_special_tokens=False)["input_ids"], 2, 70, 71])
        return answers

    def score(self, ids, spans):
        """A token takes as many nats as there are 100 tokens before it."""
        return np.array([np.mean([place / 100 for place in range(*span)]) for span in spans])


def diffusion(seed=0):
    tokenizer = byte_tokenizer(512)
    torch.manual_seed(seed)
    config = MaskedDiffusionConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        mask_token_id=tokenizer.mask_token_id, pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    return Model(MaskedDiffusionLM(config), kind="masked-lm", processor=tokenizer, pooling="mean", max_length=512)


def test_local_perception_is_seen_as_such():
    """A model that sees its last 150 tokens finds the needles that lie within them, and no others."""
    lengths, depths = [120, 200, 400], [0.0, 0.25, 0.5, 0.75, 1.0]
    grid = needle_grid(Near(150), lengths, depths, HAY, needles=NEEDLES, repeats=4)
    fixed = [1 + len(f"\n{n.text}\n") + 2 + len(n.question) for n in NEEDLES]  # with <s> and two line ends
    expected = np.zeros((5, 3))
    for d, depth in enumerate(depths):
        for n, length in enumerate(lengths):
            for own in fixed:
                begin = 1 + int((length - own) * depth) + 1
                expected[d, n] += (begin >= length - 150) / 2
    assert np.array_equal(grid.matrix, expected)
    assert (grid.matrix[:, 0] == 1).all() and grid.matrix[0, 2] == 0 and grid.matrix[4, 2] == 1
    assert grid.mean(400, (0.75, 1.0)) == expected[3:, 2].mean() and grid.mean() == grid.matrix.mean()
    assert grid.mean(depths=(0, 0)) == expected[0].mean()
    cell = grid.cases.filter(length=400, depth=1.0)
    assert cell["answer"].to_list() == ["xyz", "Q?", "xyz", "Q?"]
    assert cell["output"].to_list() == ["XYZ", "Q?", "XYZ", "Q?"]  # up to the end of text
    rows = {m.task: m.value for m in grid.measurements()}
    assert rows["400 tokens, depth 0%"] == 0 and rows["120 tokens, depth 50%"] == 1 and len(rows) == 15


def test_prompts_have_their_length_and_the_needle_its_depth():
    near = Near(10**6)
    lengths, depths = [100, 173, 500], [0.0, 0.3, 1.0]
    template = "Read:\n{context}\nAsk: {question}?"
    settings = {"needles": NEEDLES[:1], "repeats": 3, "template": template, "batch_size": 2}
    grid = needle_grid(near, lengths, depths, HAY, **settings)
    assert (grid.matrix == 1).all()
    cells = [(length, depth) for length in lengths for depth in depths for _ in range(3)]
    bare = []
    for prompt, (length, depth) in zip(near.prompts, cells, strict=True):
        assert len(prompt) == length
        text = near.tokenizer.decode(prompt, skip_special_tokens=True)
        assert text.startswith("Read:\n") and text.endswith("\nAsk: The code of gate 1 is?")
        context = text.removeprefix("Read:\n").removesuffix("\nAsk: The code of gate 1 is?")
        before, after = context.split(f"\n{NEEDLES[0].text}\n")
        assert len(before) == int(depth * (len(before) + len(after)))
        assert before + after in HAY + "\n"
        bare.append(before + after)
    assert bare[0] == bare[3] == bare[6]  # a repetition has the same haystack at every depth
    assert len({bare[0], bare[1], bare[2]}) == 3
    again = Near(10**6)
    needle_grid(again, lengths, depths, HAY, **settings)
    assert again.prompts == near.prompts
    needle_grid(other := Near(10**6), lengths, depths, HAY, **settings, seed=1)
    assert other.prompts != near.prompts


def test_documents_come_in_another_order():
    near = Near(10**6)
    documents = [f"document {n} " * 8 for n in range(9)]
    needle_grid(near, [600], [1.0], documents, needles=NEEDLES[:1], repeats=3)
    texts = [near.tokenizer.decode(p, skip_special_tokens=True) for p in near.prompts]
    assert len({text[:40] for text in texts}) == 3
    assert all(sum(f"document {n} " in text for n in range(9)) >= 5 for text in texts)


def test_a_chat_template_begins_itself():
    near = Near(10**6)
    template = "<s>{context} {question}</s>"
    needle_grid(near, [80], [0.5], HAY, needles=NEEDLES[:1], repeats=1, template=template)
    assert near.prompts[0].count(1) == 1 and near.prompts[0][-1] == 2
    needle_grid(near, [80], [0.5], HAY, needles=NEEDLES[:1], repeats=1, start_token=False)
    assert near.prompts[1][0] > 3


def test_a_score_and_needles_of_ones_own():
    drawn = []

    def draw(rng):
        drawn.append(Needle(str(rng.integers(100)), "?", "nothing"))
        return drawn[-1]

    grid = needle_grid(Near(9), [50], [0.5], HAY, needles=draw, repeats=3, score=lambda output, needle: 0.25)
    assert grid.matrix.tolist() == [[0.25]] and len(drawn) == 3


def test_heat_map_and_table(tmp_path):
    grid = needle_grid(Near(150), [120, 400], [0.0, 1.0], HAY, needles=NEEDLES, repeats=2)
    assert grid.table().splitlines() == ["depth     120     400", "   0%    100%      0%", " 100%    100%    100%"]
    grid.figure(tmp_path / "grid.png", trained=128, title="near")
    grid.figure(tmp_path / "grid.svg")
    assert (tmp_path / "grid.png").read_bytes()[:4] == b"\x89PNG"
    assert b"<svg" in (tmp_path / "grid.svg").read_bytes()
    with pytest.raises(InputError, match=r"length 130, depths \(0.0, 1.0\): some of \(120, 400\)"):
        grid.mean(130)


@pytest.mark.parametrize("kind", ["causal", "diffusion"])
def test_both_kinds_of_model_run(kind):
    model = small("causal-lm", "nano") if kind == "causal" else diffusion()
    model.train()
    grid = needle_grid(model, [96, 128], [0.0, 1.0], HAY, repeats=3, new_tokens=5, batch_size=2)
    one_by_one = needle_grid(model.backbone, [96, 128], [0.0, 1.0], HAY, model.processor, repeats=3, new_tokens=5)
    assert grid.cases.drop("score").equals(one_by_one.cases.drop("score"))
    assert grid.matrix.shape == (2, 2) and model.training and len(grid.cases) == 12
    outputs = [model.processor(text, add_special_tokens=False)["input_ids"] for text in grid.cases["output"]]
    assert all(len(ids) <= 15 for ids in outputs)  # five tokens, at most three bytes each


def test_a_causal_readers_answers_and_scores_are_the_models():
    model = small("causal-lm", "nano").eval()
    ids = model.processor(TEXT, add_special_tokens=False, truncation=False)["input_ids"]
    asked = CausalReader(model.backbone, model.processor, piece=17)
    spans = [(1, 2), (8, 16), (30, 99)]
    found = asked.score(ids, spans)
    row = torch.tensor([ids[:99]])
    nats = F.cross_entropy(model.backbone(row).logits[0, :-1], row[0, 1:], reduction="none")
    assert np.allclose(found, [nats[a - 1 : b - 1].mean().item() for a, b in spans], atol=1e-5)
    expected = list(ids[:9])
    for _ in range(4):
        expected.append(int(model.backbone(torch.tensor([expected])).logits[0, -1].argmax()))
    assert asked.generate([ids[:9], ids[:9]], 4) == [expected[9:]] * 2
    with pytest.raises(InputError, match="a span begins with the text"):
        asked.score(ids, [(0, 4)])


def test_a_diffusion_readers_answers_and_scores_are_the_models():
    model = diffusion()
    net, ids = model.backbone.eval(), model.processor(TEXT, add_special_tokens=False)["input_ids"]
    asked = DiffusionReader(net, model.processor, block_length=8, n_mc=3, seed=5)
    assert asked.score(ids, [(0, 4), (8, 16)]).tolist() == [
        net.nll([], ids[:4], 3, seed=5),
        net.nll(ids[:8], ids[8:16], 3, seed=13),
    ]
    whole = net.generate(torch.tensor([ids[:9]]), 16, block_length=8)[0, 9:].tolist()
    assert asked.generate([ids[:9]], 16) == [whole]
    assert asked.generate([ids[:9]], 11) == [whole[:11]]  # a part of the last block
    quick = DiffusionReader(net, model.processor, block_length=8, steps_per_block=2)
    assert quick.generate([ids[:9]], 8) == [net.generate(torch.tensor([ids[:9]]), 8, steps=2)[0, 9:].tolist()]
    assert isinstance(reader(model), DiffusionReader) and reader(asked) is asked


def test_the_curve_is_the_running_geometric_mean():
    curve = ppl_curve(Near(1), TEXT, chunk=50, max_length=320)
    assert curve.context.tolist() == [50, 100, 150, 200, 250]  # whole chunks, the first left out
    expected = np.array([(start + 24.5) / 100 for start in curve.context])
    assert np.allclose(curve.nats, expected) and np.allclose(curve.local, np.exp(expected))
    assert np.allclose(curve.perplexity[-1], np.exp(expected.mean()))
    assert np.allclose(curve.perplexity[1], math.sqrt(curve.local[0] * curve.local[1]))
    assert ppl_curve(Near(1), TEXT, chunk=50, every=2).context.tolist() == [50, 150, 250, 350]
    assert np.isinf(PerplexityCurve(np.array([1]), np.array([1e4])).perplexity).all()


@pytest.mark.parametrize("kind", ["causal", "diffusion"])
def test_curves_of_models(kind, tmp_path):
    model = small("causal-lm", "nano") if kind == "causal" else diffusion()
    curve = ppl_curve(model, [TEXT, TEXT[4:]], chunk=16, max_length=96)
    alone = [ppl_curve(model, text, chunk=16, max_length=96).nats for text in (TEXT, TEXT[4:])]
    assert np.allclose(curve.nats, np.mean(alone, axis=0)) and len(curve.nats) == 5
    assert (curve.perplexity > 100).all()  # nothing learnt, 260 tokens
    draw_curves({kind: curve}, tmp_path / "curve.png", trained=64)
    assert (tmp_path / "curve.png").read_bytes()[:4] == b"\x89PNG"


def test_what_is_refused():
    def never(*_):
        raise AssertionError("the model was asked")

    near = Near(1)
    near.generate = near.score = never
    good = {"lengths": [120], "depths": [0.5], "haystack": HAY, "needles": NEEDLES}
    for settings, message in [
        ({"lengths": []}, r"lengths \(\), depths"),
        ({"depths": [50]}, "shares from 0 to 1"),
        ({"repeats": 0}, "repeats is 0"),
        ({"template": "{question} {context}"}, "the places {context} and, after it, {question}"),
        ({"lengths": [120, 20]}, "length 20: template, needle and question alone take 52 tokens"),
        ({"lengths": [120, 9999]}, r"the haystack has \d+ tokens: \d+ are needed for a length of 9999"),
    ]:
        with pytest.raises(InputError, match=message):
            needle_grid(near, **good | settings)
    for settings, message in [
        ({"chunk": 0}, "chunk 0, every 1"),
        ({"texts": []}, "no texts"),
        ({"texts": [TEXT, "short"]}, "text 2 has 5 tokens: at least 128"),
        ({"max_length": 5000}, "text 1 has 460 tokens: at least 5000"),
    ]:
        with pytest.raises(InputError, match=message):
            ppl_curve(near, **{"texts": TEXT} | settings)
    with pytest.raises(InputError, match="a str was given: a language model or a Reader"):
        reader("gpt2")
    with pytest.raises(InputError, match="comes without a tokenizer"):
        reader(diffusion().backbone)
    with pytest.raises(InputError, match="is a text-encoder model"):
        reader(small("text-encoder", "nano"))


def test_needles_are_drawn_and_found_in_any_case():
    rng = np.random.default_rng(1)
    one, other = module.gate_code(rng), module.gate_code(rng)
    assert one != other and one.text == f"{one.question} {one.answer}."
    assert module.contains(f"it is {one.answer}", one) == 1 and module.contains("it is not", one) == 0
