"""Paper 07: how many weights preference training moves in a small language model, and fine-tuning on other text.

The paper compares checkpoints of 10 models before and after PPO, GRPO, DPO and others. Here a Llama of four layers and
width 64 learns the sources of Python's standard library, byte by byte. From there it is trained for equally many steps,
by AdamW at the same rate, on English documentation (foreign text), on its own samples, and by DPO on pairs of its own
samples of which only the preferred one closes what it opens in brackets. Sparsity is the share of weights that moved by
at most 10⁻⁵, of the float32 weights and of both checkpoints cast to bfloat16. Then the entries that DPO changed in
bfloat16 are trained alone, and as many at random.
"""

import copy
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import datasets
import torch
from torch import Tensor

from downriver.adapt import train_subnetwork
from downriver.core import Budget, InputError, Measurement, generator
from downriver.data.synth.dpo import logprobs, prepared
from downriver.merge.rl_subnetwork import delta_stats, subnetwork
from downriver.models import Model, byte_tokenizer, small_language_model
from downriver.nn.sparse_patch import SparseMask
from downriver.reproductions.paper import Paper
from downriver.reproductions.python_sources import python_sources
from downriver.study import Arm, above, below, better, shared, study
from downriver.tasks.task import Task
from downriver.training.engine import fine_tune

paper = Paper(
    number=7,
    slug="rl_subnetwork",
    title="Reinforcement Learning Finetunes Small Subnetworks in Large Language Models",
    date="2025-05",
    room="merge",
    claim="Reinforcement learning moves a small part of the weights where supervised fine-tuning moves most of them, "
    "and that part trained alone gives the same model.",
)

# steps of pretraining, prompts to sample pairs from, steps of every fine-tuning
SCALES = {"small": (400, 1024, 100), "tiny": (20, 64, 4)}
RATE, BATCH, PROMPT, ANSWER = 5e-6, 16, 48, 48
CONTEXT = 256  # a byte that is no text is three when it is read again
OPEN, CLOSE = "([{", ")]}"


@study(
    "rl_subnetwork",
    title="Weights that preference training and fine-tuning leave where they were",
    claims=[
        better("DPO", than="foreign text", on="sparsity, float32"),
        better("DPO", than="foreign text", on="sparsity, bfloat16"),
        above("DPO", on="bfloat16 above float32", value=0.0),
        above("DPO, subnetwork", on="weights as in DPO", value=0.9),
        better("DPO, subnetwork", than="DPO, random weights", on="margin over DPO's"),
        below("DPO, subnetwork", on="loss away from DPO's", value=0.02),
    ],
    seeds=5,
)
def reproduction(seed: int, budget: Budget | None, scale: str) -> Iterator[Arm]:
    """A seed draws the files, the model, the samples and the order of everything."""
    if scale not in SCALES:
        raise InputError(f"scale {scale!r} is not one of {', '.join(SCALES)}")
    before, prompts, steps = SCALES[scale]
    same: Any = {"learning_rate": RATE, "schedule": "constant", "warmup": 0.0, "seed": seed}

    @shared
    def sources() -> Task:
        return python_sources("rl_subnetwork", seed, texts=before * BATCH, characters=PROMPT + ANSWER)

    @shared
    def base() -> Model:
        model = small_language_model(
            "causal-lm", byte_tokenizer(CONTEXT), width=64, layers=4, context=CONTEXT, seed=seed
        )
        settings: Any = {"learning_rate": 2e-3, "batch_size": BATCH, "schedule": "cosine", "seed": seed}
        return fine_tune(model, sources(), f"{before} steps", **settings)

    @shared
    def samples() -> list[tuple[str, list[str]]]:
        texts = sources().rows("train")["text"]
        return sampled(base(), [text[:PROMPT] for text in texts[:prompts]], each=4, seed=seed)

    @shared
    def pairs() -> list[tuple[str, str, str]]:
        found = []
        for prompt, answers in samples():
            good = [a for a in answers if balanced(a)]
            bad = [a for a in answers if not balanced(a)]
            found += [(prompt, good[0], bad[0])] if good and bad else []
        return found

    @shared
    def trained(name: str) -> Model:
        if name == "foreign text":
            return fine_tune(base(), foreign(steps * BATCH, seed), f"{steps} steps", batch_size=BATCH, **same)
        if name == "own samples":
            texts = [prompt + answer for prompt, answers in samples() for answer in answers[:1]]
            return fine_tune(base(), language(texts), f"{steps} steps", batch_size=BATCH, **same)
        rows, settings = prepared(base(), pairs(), seed=seed)
        settings |= {"batch_size": 2 * BATCH, **same}
        if name == "DPO":
            return fine_tune(base(), rows, f"{steps} steps", **settings)
        mask = changed()
        if name == "DPO, random weights":
            mask = scattered(base(), mask.count, seed)
        return train_subnetwork(base(), rows, f"{steps} steps", mask=mask, **settings)

    @shared
    def changed() -> SparseMask:
        return subnetwork(state(base(), torch.bfloat16), state(trained("DPO"), torch.bfloat16))

    def measured(name: str) -> list[Measurement]:
        model = trained(name)
        full, half = (
            delta_stats(state(base(), dtype), state(model, dtype), rank="exact")
            for dtype in (torch.float32, torch.bfloat16)
        )
        found = [
            Measurement("sparsity, float32", full.share()),
            Measurement("sparsity, bfloat16", half.share()),
            Measurement("bfloat16 above float32", half.share() - full.share()),
            Measurement("unchanged, bfloat16", half.share("unchanged")),
            Measurement("rank, bfloat16", half.rank or 0.0),
            Measurement("margin over DPO's", margin(model) / margin(trained("DPO"))),
        ]
        if name in ("DPO, subnetwork", "DPO, random weights"):
            apart = delta_stats(state(trained("DPO"), torch.float32), state(model, torch.float32))
            losses = [loss(which) for which in (model, trained("DPO"))]
            found.append(Measurement("weights as in DPO", apart.share()))
            found.append(Measurement("loss away from DPO's", abs(losses[0] / losses[1] - 1), direction="lower"))
        return found

    def margin(model: Model) -> float:
        """How much more than before the model prefers the preferred of each pair, nats a pair."""
        good, bad = ([(prompt, texts[i]) for prompt, *texts in pairs()] for i in (0, 1))
        first, second = (logprobs(m, good) - logprobs(m, bad) for m in (model, base()))
        return float((first - second).mean())

    def loss(model: Model) -> float:
        return -float(logprobs(model, [("", text) for text in sources().rows("validation")["text"]]).mean())

    for name in ("foreign text", "own samples", "DPO", "DPO, subnetwork", "DPO, random weights"):
        yield Arm(name, functools.partial(measured, name))


def state(model: Model, dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights as a checkpoint of this type keeps them."""
    return {name: p.detach().to(dtype) for name, p in model.backbone.named_parameters()}


def balanced(text: str) -> bool:
    """Whether everything that is opened is closed, in order, and there is something.

    >>> balanced("f(x[1])"), balanced("f(x"), balanced("f)("), balanced("f")
    (True, False, False, False)
    """
    waiting = []
    for character in text:
        if character in OPEN:
            waiting.append(CLOSE[OPEN.index(character)])
        elif character in CLOSE and (not waiting or waiting.pop() != character):
            return False
    return not waiting and any(character in OPEN for character in text)


@torch.no_grad()
def sampled(model: Model, prompts: Sequence[str], each: int, seed: int) -> list[tuple[str, list[str]]]:
    """Of every prompt some continuations, drawn from the model itself."""
    module: Any = copy.deepcopy(model.backbone).eval()
    tokenizer: Any = model.processor
    found = []
    torch.manual_seed(int(generator("rl_subnetwork samples", seed).integers(2**31)))
    for start in range(0, len(prompts), 128):
        part = list(prompts[start : start + 128])
        ids = tokenizer(part, add_special_tokens=False)["input_ids"]
        width = min(map(len, ids))
        batch = torch.tensor([[tokenizer.bos_token_id, *row[:width]] for row in ids])
        out = module.generate(
            batch,
            attention_mask=torch.ones_like(batch),
            do_sample=True,
            top_k=0,
            max_new_tokens=ANSWER,
            num_return_sequences=each,
            pad_token_id=tokenizer.pad_token_id,
        )
        texts = tokenizer.batch_decode(out[:, batch.shape[1] :], skip_special_tokens=True)
        heads = tokenizer.batch_decode(batch[:, 1:], skip_special_tokens=True)
        found += [(head, texts[i * each : (i + 1) * each]) for i, head in enumerate(heads)]
    return found


def foreign(count: int, seed: int) -> Task:
    """Passages of the interpreter's own documentation in English."""
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics))
    size = PROMPT + ANSWER
    starts = generator("rl_subnetwork foreign", seed).integers(len(text) - size, size=count)
    return language([text[start : start + size] for start in starts.tolist()])


def language(texts: Sequence[str]) -> Task:
    """A task of language modelling."""
    rows = datasets.Dataset.from_dict({"text": list(texts)})
    return Task("texts", "language-modelling", {"train": rows}, ("text",), None)


def scattered(model: Model, count: int, seed: int) -> SparseMask:
    """So many weights of the model at random."""
    sizes = {name: p.numel() for name, p in model.backbone.named_parameters()}
    total = sum(sizes.values())
    chosen = torch.zeros(total, dtype=torch.bool)
    chosen[torch.from_numpy(generator("rl_subnetwork random", seed).permutation(total)[:count])] = True
    parts = zip(sizes, chosen.split(list(sizes.values())), strict=True)
    return SparseMask({name: part.nonzero()[:, 0] for name, part in parts if part.any()}, total)


studies = (reproduction,)
