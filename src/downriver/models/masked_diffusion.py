"""A language model that fills in masks: Llama's blocks without the causal mask, trained on texts masked at any rate.

Reach for it to train a small diffusion language model; ``models.load`` reads LLaDA's public ones. Nie et al., "Large
Language Diffusion Models" (2025), as used in Liu et al., "LongLLaDA: Unlocking Long Context Capabilities in Diffusion
LLMs" (2025). Departures: the mask itself is never predicted in generation, and masks of the prompt stay as they are.
There is no cache: every step reads the prompt anew.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
import transformers
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LlamaConfig
from transformers.modeling_outputs import MaskedLMOutput
from transformers.models.llama.modeling_llama import LlamaModel, LlamaPreTrainedModel

from downriver.core.errors import InputError, unknown

Remasking = Literal["low_confidence", "entropy", "random"]
Estimator = Literal["mean", "elbo"]
EPSILON = 1e-3
IGNORED = -100
Batch = dict[str, Tensor]


@strict
class MaskedDiffusionConfig(LlamaConfig):
    """Llama's settings, and

    Parameters
    ----------
    mask_token_id
        The token that stands for what is hidden; by default the vocabulary's last.
    random_length
        The share of training batches that are cut to a random length (0.01, LLaDA's), so that short texts are known.

    ``rope_parameters={"rope_type": "default", "rope_theta": 500_000.0}`` are LLaDA-8B's positions.
    """

    model_type = "downriver_masked_diffusion"

    mask_token_id: int | None = None
    random_length: float = 0.01
    is_causal: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        self.mask_token_id = self.vocab_size - 1 if self.mask_token_id is None else self.mask_token_id
        if not 0 <= self.mask_token_id < self.vocab_size:
            raise InputError(f"mask_token_id is {self.mask_token_id}: one of {self.vocab_size} tokens is expected")
        if not 0 <= self.random_length <= 1:
            raise InputError(f"random_length is {self.random_length}: a share from 0 to 1 is expected")
        if self.is_causal:
            raise InputError("is_causal is set: a masked diffusion model attends both ways")
        super().__post_init__(**kwargs)


class MaskedDiffusionModel(LlamaModel):
    """The blocks without an output layer: states (batch, length, width) in which every token sees every other."""

    config_class = MaskedDiffusionConfig

    def __init__(self, config: MaskedDiffusionConfig) -> None:
        super().__init__(config)
        for layer in self.layers:
            cast(Any, layer).self_attn.is_causal = False


class MaskedDiffusionLM(LlamaPreTrainedModel):
    """The language model: logits at every position of the token that is, or was, there.

    It saves and loads as any model of transformers (``AutoModelForMaskedLM``), and ``extend_context`` lengthens what
    it reads.

    >>> config = MaskedDiffusionConfig(
    ...     vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    ... )
    >>> model = MaskedDiffusionLM(config).eval()
    >>> prompt = torch.tensor([[5, 6, 7]])
    >>> model.generate(prompt, gen_length=8, block_length=4, steps=4).shape
    torch.Size([1, 11])
    >>> 3 < model.nll([5, 6, 7], [8, 9]) < 5  # 50 tokens, nothing learnt
    True
    """

    config_class = MaskedDiffusionConfig
    config: MaskedDiffusionConfig
    accepts_loss_kwargs = False  # the loss is a mean already, whatever the Trainer accumulates
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: MaskedDiffusionConfig) -> None:
        super().__init__(config)
        self.model = MaskedDiffusionModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> MaskedLMOutput:
        """``logits`` (batch, length, vocabulary), of the last ``logits_to_keep`` positions if that is not 0.

        With ``labels`` instead the training loss alone: the tokens themselves, -100 where nothing is to be hidden (a
        prompt, padding). It hides tokens at random, so it differs from call to call; see ``loss``.
        """
        if labels is not None:
            if input_ids is None:
                raise InputError("labels were given without input_ids: the tokens to hide are expected")
            return MaskedLMOutput(loss=self.loss(input_ids, labels, attention_mask, position_ids))
        hidden = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=False,
            **kwargs,
        ).last_hidden_state
        return MaskedLMOutput(logits=self.lm_head(hidden[:, -logits_to_keep:]))

    def loss(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """LLaDA's training loss: tokens hidden at a random rate, the cross-entropy of these over the rate.

        Every row draws t uniformly; each of its L tokens is hidden with p = (1 - 10⁻³) t + 10⁻³; the loss is the mean
        over rows of Σ cross-entropy / (p L), in expectation a bound of the negative log-likelihood, in nats a token.
        In training, ``config.random_length`` of the batches whose every token counts are cut to a random length.

        Parameters
        ----------
        input_ids, attention_mask, position_ids
            (batch, length), as in ``forward``.
        labels
            The tokens to be learnt, -100 elsewhere: those are never hidden (fine-tuning on answers). By default all
            that the attention mask shows.
        generator
            For a draw of its own; on the model's device.
        """
        if labels is None:
            labels = input_ids if attention_mask is None else input_ids.masked_fill(attention_mask == 0, IGNORED)
        counted = labels != IGNORED
        draw: Any = {"generator": generator, "device": input_ids.device}
        if self.training and bool(counted.all()) and bool(torch.rand((), **draw) < self.config.random_length):
            length = int(torch.randint(1, input_ids.shape[1] + 1, (), **draw))
            input_ids, labels, counted = (part[:, :length] for part in (input_ids, labels, counted))
            attention_mask = None if attention_mask is None else attention_mask[:, :length]
            position_ids = None if position_ids is None else position_ids[:, :length]
        # p_mask = (1 − ε) t + ε
        rate = (1 - EPSILON) * torch.rand(len(input_ids), 1, **draw) + EPSILON
        hidden = (torch.rand(input_ids.shape, **draw) < rate) & counted
        noised = input_ids.masked_fill(hidden, cast(int, self.config.mask_token_id))
        states = self.model(noised, attention_mask, position_ids, use_cache=False).last_hidden_state
        nats = F.cross_entropy(self.lm_head(states[hidden]).float(), labels[hidden], reduction="none")
        lengths = counted.sum(1, keepdim=True).clamp(min=1)
        # Σ CE / p_mask / (B·L)
        return (nats / (rate * lengths).expand_as(hidden)[hidden]).sum() / len(input_ids)

    @torch.no_grad()
    def nll(
        self,
        prompt: Sequence[int] | Tensor,
        answer: Sequence[int] | Tensor,
        n_mc: int = 8,
        estimator: Estimator = "mean",
        *,
        batch_size: int = 8,
        seed: int = 0,
    ) -> float:
        """A Monte-Carlo estimate of what an answer takes after a prompt: nats a token, in the mean.

        Parameters
        ----------
        prompt, answer
            Token ids of one text; the prompt may be empty. Only tokens of the answer are hidden and scored.
        n_mc
            Draws (8, the paper's).
        estimator
            ``mean`` (the paper's): each draw hides k tokens, k uniform in 1..L, and takes their mean cross-entropy.
            ``elbo``: each draw hides every token with a probability p, uniform, and takes Σ cross-entropy / (p L), as
            in training. Both have the same expectation, a bound of the negative log-likelihood; ``elbo`` scatters
            more. With one token ``mean`` is exact. Neither compares with a causal model's likelihood as an equal.
        batch_size
            Draws at once.
        seed
            Of the draws; equal on every device.

        Raises ``InputError`` for an empty answer and another estimator.
        """
        if estimator not in get_args(Estimator):
            raise unknown("estimator", estimator, get_args(Estimator))
        before, wanted = (torch.as_tensor(part, dtype=torch.long).flatten() for part in (prompt, answer))
        length = len(wanted)
        if not length or n_mc < 1:
            raise InputError(f"an answer of {length} tokens, n_mc {n_mc}: at least one of each is expected")
        rng = torch.Generator().manual_seed(seed)
        hidden, weights = torch.zeros(n_mc, length, dtype=torch.bool), torch.zeros(n_mc, 1)
        for draw in range(n_mc):
            if estimator == "mean":
                k = int(torch.randint(1, length + 1, (), generator=rng))
                hidden[draw, torch.randperm(length, generator=rng)[:k]] = True
                weights[draw] = 1 / k
            else:
                rate = (1 - EPSILON) * torch.rand((), generator=rng) + EPSILON
                hidden[draw] = torch.rand(length, generator=rng) < rate
                weights[draw] = 1 / (rate * length)
        texts = torch.cat([before, wanted]).repeat(n_mc, 1)
        texts[:, len(before) :][hidden] = cast(int, self.config.mask_token_id)
        total = 0.0
        with _evaluating(self):
            for start in range(0, n_mc, batch_size):
                chosen = slice(start, start + batch_size)
                where = hidden[chosen].to(self.device)
                logits = self(input_ids=texts[chosen].to(self.device), logits_to_keep=length).logits[where].float()
                targets = wanted.to(self.device).expand(where.shape)[where]
                nats = F.cross_entropy(logits, targets, reduction="none")
                total += float((nats * weights[chosen].to(self.device).expand(where.shape)[where]).sum())
        return total / n_mc

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        gen_length: int = 32,
        *,
        block_length: int | None = None,
        steps: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        cfg_scale: float = 0.0,
        remasking: Remasking = "low_confidence",
        attention_mask: Tensor | None = None,
        seed: int = 0,
        progress: bool = False,
    ) -> Tensor:
        """Continue prompts by ``gen_length`` tokens: masks are appended and filled block by block, the surest first.

        Parameters
        ----------
        input_ids, attention_mask
            Prompts (batch, length), padded on the left where the mask is 0.
        gen_length, block_length, steps
            Tokens to write, tokens of a block (by default 32, or ``gen_length`` if that is less), and steps in all (by
            default one a token). The paper's runs on long contexts have 32 of each.
        temperature, top_p
            0 takes the likeliest token (default); else tokens are drawn by Gumbel's trick in double precision, from
            the likeliest ones that together have ``top_p``. Dream-7B was run with 0.2 and 0.95.
        cfg_scale
            s of classifier-free guidance: u + (s + 1) (c - u), where u are logits with the prompt hidden. 0: none.
        remasking
            What stays masked for later: ``low_confidence`` (LLaDA), high ``entropy`` (Dream) or ``random``.
        seed
            Of all draws.

        Returns prompts and answers, (batch, length + gen_length). The order in which a row is filled does not depend
        on the others, unless something is drawn.

        Raises ``InputError`` when blocks do not divide the length or the steps, when there are more steps than tokens,
        for parameters out of range, and for padding on the right.
        """
        length = min(32, gen_length) if block_length is None else block_length
        steps = gen_length if steps is None else steps
        _check(input_ids, attention_mask, gen_length, length, steps, temperature, top_p, cfg_scale, remasking)
        mask, prompt = cast(int, self.config.mask_token_id), input_ids.shape[1]
        answers = input_ids.new_full((len(input_ids), gen_length), mask)
        x = torch.cat([input_ids, answers], 1).to(self.device)
        places: Batch = {}
        if attention_mask is not None:
            seen = torch.cat([attention_mask, torch.ones_like(answers)], 1).to(self.device).long()
            places = {"attention_mask": seen, "position_ids": (seen.cumsum(1) - 1).clamp(min=0)}
        rng = torch.Generator(self.device).manual_seed(seed)
        blocks = gen_length // length
        with _evaluating(self), tqdm(total=steps, desc="steps", disable=not progress, delay=2) as bar:
            for start in range(0, gen_length, length):
                block = x[:, prompt + start : prompt + start + length]  # a view: filling it fills x
                masked = torch.ones_like(block, dtype=torch.bool)
                for count in _shares(length, steps // blocks):
                    logits = self._logits(x, prompt, gen_length - start, cfg_scale, places)[:, :length]
                    logits[..., mask] = -torch.inf
                    tokens, confidence = _drawn(logits, temperature, top_p, remasking, rng)
                    surest = confidence.masked_fill(~masked, -torch.inf).topk(count, dim=1).indices
                    block.scatter_(1, surest, tokens.gather(1, surest))
                    masked.scatter_(1, surest, False)
                    bar.update()
        return x

    def _logits(self, x: Tensor, prompt: int, keep: int, cfg_scale: float, places: Batch) -> Tensor:
        """Logits of the last ``keep`` tokens, guided away from what they are without the prompt."""
        if cfg_scale == 0:
            return self(input_ids=x, logits_to_keep=keep, **places).logits
        alone = x.clone()
        alone[:, :prompt] = cast(int, self.config.mask_token_id)
        both = {name: value.repeat(2, 1) for name, value in places.items()}
        c, u = self(input_ids=torch.cat([x, alone]), logits_to_keep=keep, **both).logits.chunk(2)
        # logits_u + (s + 1)(logits − logits_u)
        return u + (cfg_scale + 1) * (c - u)


def diffusion_objective(model: Any, batch: Batch, *, answers_only: bool = False) -> dict[str, Tensor]:
    """The training loss as ``fine_tune(..., objective=diffusion_objective)`` takes it, of a ``Model`` round the LM.

    All tokens of a text are learnt. Batches for a masked LM come with some of them hidden by BERT's rule; those are put
    back first, since the loss hides its own. With ``answers_only`` (``functools.partial``) the rows must be
    ``TokenRows`` with a column ``labels``, -100 for the tokens of a prompt: these are then always shown.
    """
    ids, labels = batch["input_ids"], batch.get("labels")
    if answers_only and labels is None:
        raise InputError("a batch without labels: answers_only expects rows with a column labels, -100 for prompts")
    if labels is not None and not answers_only:
        ids, labels = torch.where(labels == IGNORED, ids, labels), None
    if "position_ids" in batch:
        raise InputError(
            "position_ids in a batch: texts packed in a row would see one another, rows of one are expected"
        )
    return {"loss": model.backbone.loss(ids, labels, batch.get("attention_mask"))}


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _shares(tokens: int, steps: int) -> list[int]:
    """How many tokens each step fills: as equal as can be, the first ones one more."""
    return [tokens // steps + (step < tokens % steps) for step in range(steps)]


def _drawn(
    logits: Tensor, temperature: float, top_p: float, remasking: Remasking, rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    """A token for every position, and how sure it is, both (batch, length)."""
    tempered = logits.double() / temperature if temperature else logits.double()
    if top_p < 1:
        ranked, order = tempered.sort(descending=True)
        share = ranked.softmax(-1)
        tempered = tempered.masked_fill(
            torch.zeros_like(tempered, dtype=torch.bool).scatter(-1, order, share.cumsum(-1) - share >= top_p),
            -torch.inf,
        )
    noise = torch.zeros((), device=logits.device)
    if temperature:
        uniform = torch.rand(logits.shape, generator=rng, device=logits.device, dtype=torch.float64)
        noise = -(-uniform.clamp(min=torch.finfo(torch.float64).tiny).log()).log()
    tokens = (tempered + noise).argmax(-1)
    if remasking == "random":
        return tokens, torch.rand(tokens.shape, generator=rng, device=logits.device)
    if remasking == "entropy":
        return tokens, -torch.distributions.Categorical(logits=tempered).entropy()
    return tokens, logits.float().softmax(-1).gather(-1, tokens[..., None])[..., 0]


def _check(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    gen_length: int,
    block_length: int,
    steps: int,
    temperature: float,
    top_p: float,
    cfg_scale: float,
    remasking: str,
) -> None:
    if remasking not in get_args(Remasking):
        raise unknown("remasking", remasking, get_args(Remasking))
    if input_ids.dim() != 2:
        raise InputError(f"input_ids has the shape {tuple(input_ids.shape)}: (batch, length) is expected")
    if gen_length < 1 or block_length < 1 or gen_length % block_length:
        raise InputError(f"gen_length {gen_length}, block_length {block_length}: whole blocks are expected")
    blocks = gen_length // block_length
    if not blocks <= steps <= gen_length or steps % blocks:
        raise InputError(
            f"steps is {steps}: a multiple of the {blocks} blocks, at most the {gen_length} tokens, is expected"
        )
    if temperature < 0 or not 0 < top_p <= 1 or cfg_scale < 0:
        raise InputError(
            f"temperature {temperature}, top_p {top_p}, cfg_scale {cfg_scale}: 0 or more, a share, 0 or more expected"
        )
    if attention_mask is not None and bool((attention_mask.diff(dim=1) < 0).any()):
        raise InputError("attention_mask ends in zeros, or has some within: prompts padded on the left are expected")


transformers.AutoConfig.register(MaskedDiffusionConfig.model_type, MaskedDiffusionConfig, exist_ok=True)
transformers.AutoModel.register(MaskedDiffusionConfig, MaskedDiffusionModel, exist_ok=True)
transformers.AutoModelForMaskedLM.register(MaskedDiffusionConfig, MaskedDiffusionLM, exist_ok=True)
