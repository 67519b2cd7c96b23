"""BAM: one mixture out of dense models of one ancestor, with all of their FFNs and all of their attentions inside.

Reach for it when models were trained further on different domains and may be served, and trained a little more, as one
model several times as large; what is to stay as large as one model is merged by ``average`` or ``ties``. Zhang et al.,
«BAM! Just Like That: Simple and Efficient Parameter Upcycling for Mixture of Experts» (August 2024). With
``attention="average"`` it is the baseline, Branch-Train-MiX (Sukhbaatar et al. 2024), and with ``ffn="copy"`` besides,
sparse upcycling (Komatsuzaki et al. 2022).

Train the result like any other model (``adapt.full``, ``training.fine_tune`` or transformers' Trainer): its loss in
training has the balance of the FFN routers in it. Departures: a sequential seed stays sequential unless told otherwise,
since only blocks that were trained parallel are exact as such; one chosen FFN per token (the paper's number could not
be checked) gets the gate 1, and passes the gradient of log p on to its router; GPT-NeoX is not among the families.
"""

import os
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import torch
import transformers
from torch import Tensor, nn
from tqdm import tqdm

from downriver.core.errors import InputError, unknown
from downriver.core.io import atomic_folder
from downriver.merge import card
from downriver.merge.average import Average
from downriver.merge.bam_routers import Router, routers
from downriver.merge.bam_tensors import Entry, check_alike, entries, mixture_config
from downriver.merge.engine import combine
from downriver.merge.method import Method
from downriver.merge.stores import Source, Store, open_store
from downriver.merge.vocabulary import tokenizer_of
from downriver.merge.writer import ShardWriter, Slot
from downriver.models.mixture import MixedAttention, MixtureConfig, MixtureForCausalLM
from downriver.models.model import Model, quiet

T = TypeVar("T")
FFN = Literal["experts", "copy"]
Others = Literal["mean", "seed"] | Method


def bam(
    models: Sequence[Source],
    base: T,
    *,
    attention: MixedAttention = "experts",
    ffn: FFN = "experts",
    parallel: bool | Literal["keep"] = "keep",
    ffn_top_k: int = 1,
    attn_top_k: int | None = None,
    router_init: Router = "normal",
    router_std: float = 0.02,
    texts: Sequence[Sequence[str]] | None = None,
    others: Others = "mean",
    balance: float = 0.01,
    z_loss: float = 0.0,
    expert_names: Sequence[str] | None = None,
    seed: int = 0,
    out: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
) -> T:
    """Build h' = h + Σ_n g_n(x) · Attn_n(x) + Σ_top-k gate_n(x) · FFN_n(x), x = norm(h), from N dense models.

    Parameters
    ----------
    models
        The N experts, trained further from ``base``: ``Model`` objects, transformers modules, checkpoint folders, hub
        ids or (base, LoRA adapter folder), of the families Llama, Mistral, Qwen2, Qwen3 or Cohere. The paper's four are
        the base itself and three specialists: give the base among them where it is to be an expert.
    base
        The model that they come from. It gives configuration, tokenizer and the form of the result.
    attention
        ``experts``: N whole attentions, every token uses all of them, weighted (N times the cache). ``kv_shared``: N
        query and output projections on one set of keys and values (the dense model's cache). ``average``: one
        attention.
    ffn
        ``experts``, or ``copy``: N copies of the base's.
    parallel
        Attention and FFN side by side, or one after the other. ``keep``: as in the base (parallel for Cohere).
    ffn_top_k
        FFNs that a token uses: 1 by default; Branch-Train-MiX takes 2.
    attn_top_k
        Attentions that a token uses; default: all (soft), the paper's.
    router_init, router_std
        ``normal`` (default): random, with this standard deviation (0.02). ``zero``: all experts alike; where a token
        takes fewer FFNs than there are, some of them at will. ``prompts``: each expert's row is the mean of what the
        base shows a router on the expert's ``texts``, scaled to length 1. ``domain_centroids``: the same less the mean
        over the experts, so that routing goes by how domains differ; usable without training.
    texts
        Some texts for each expert, for the last two.
    others
        Embeddings, norms, output layer, and the attention that experts share: ``mean`` of the models (default),
        ``seed`` (the base's), or a merging method such as ``Ties(density=0.2)``.
    balance, z_loss
        Weights of the FFN routers' load balance (0.01) and z-loss (0) in the training loss.
    expert_names
        Kept in the configuration; by default the last part of where the models are from.
    seed
        Of random routers.
    out, overwrite
        The folder to be written when ``base`` is on disk. It is streamed: no model is held as a whole.

    Returns
    -------
    A ``Model`` for a ``Model``, a ``MixtureForCausalLM`` for a module, the path ``out`` for a folder or hub id.
    ``models.load`` loads what is written, and so does ``AutoModelForCausalLM`` once ``downriver.models.mixture`` is
    imported; ``models.export_mixture`` gives transformers' own Mixtral where there is one attention.

    Raises
    ------
    InputError
        No model; other tensors, shapes or settings than the base's (all are listed); another vocabulary; a family or
        part that a mixture does not have; parameters out of range. Nothing is written then.

    Example
    -------
    >>> from downriver.models import small
    >>> base = small("causal-lm", "nano")
    >>> mixture = bam([base, small("causal-lm", "nano", 1), small("causal-lm", "nano", 2)], base, ffn_top_k=2)
    >>> mixture.backbone.config.num_experts, mixture.backbone.model.layers[0].mlp.down.shape
    (3, torch.Size([3, 32, 128]))
    """
    _check(models, base, attention, ffn, ffn_top_k, attn_top_k, router_init, router_std, texts, others, out)
    given: Any = base
    stores, origin = [open_store(model) for model in models], open_store(given)
    configs = [_config(source, store) for source, store in zip([base, *models], [origin, *stores], strict=True)]
    trained_parallel = configs[0].model_type == "cohere"
    wanted = trained_parallel if parallel == "keep" else parallel
    config = mixture_config(
        configs[0],
        origin,
        num_experts=len(stores),
        attention=attention,
        ffn_top_k=ffn_top_k,
        attn_top_k=attn_top_k,
        parallel=wanted,
        router_aux_loss_coef=balance,
        router_z_loss_coef=z_loss,
        expert_names=_names(expert_names, stores),
        provenance=[{"model": s.label, "fingerprint": s.fingerprint()} for s in (origin, *stores)],
    )
    check_alike(origin, stores, configs)
    _check_vocabularies([base, *models], [origin, *stores])
    if wanted != trained_parallel:
        was, becomes = ("parallel", "sequential") if trained_parallel else ("sequential", "parallel")
        warnings.warn(
            f"{origin.label} was trained with {was} blocks: as {becomes} ones they compute something else from the "
            "start, so evaluate the mixture before you train it",
            stacklevel=2,
        )
    router = routers(config, given, router_init, router_std, texts, seed)
    dtype = origin.dtype("model.embed_tokens.weight")
    feed_forward = [origin] * len(stores) if ffn == "copy" else stores

    def plan(scratch: Path | None) -> list[Entry]:
        shared = _shared(models, given, origin, others, attention, scratch)
        return entries(config, configs[0], stores, shared=shared, ffn=feed_forward, router=router)

    if out is not None:
        with atomic_folder(out, overwrite) as part, tempfile.TemporaryDirectory(dir=part) as scratch:
            _write(plan(Path(scratch)), config, dtype, origin, part)
        return str(out) if isinstance(base, str) else Path(out)  # type: ignore[return-value]
    backbone = _filled(plan(None), config, dtype).train(given.training)
    if isinstance(given, Model):
        settings: Any = {"pooling": given.pooling, "source": given.source, "max_length": given.max_length}
        made: Any = Model(backbone, kind="causal-lm", processor=given.processor, **settings)
        return made.to(given.device)
    return backbone.to(given.device)


def _check(
    models: Sequence[Source],
    base: Any,
    attention: str,
    ffn: str,
    ffn_top_k: int,
    attn_top_k: int | None,
    router_init: str,
    router_std: float,
    texts: Sequence[Sequence[str]] | None,
    others: Others,
    out: Any,
) -> None:
    """Refuse what can be refused before any model is opened."""
    n = len(models)
    if n == 0:
        raise InputError("no models: one expert at least is expected")
    for name, value, known in (
        ("attention", attention, MixedAttention),
        ("ffn", ffn, FFN),
        ("router_init", router_init, Router),
    ):
        if value not in get_args(known):
            raise unknown(f"bam: {name}", value, get_args(known))
    if others not in ("mean", "seed") and not isinstance(others, Method):
        raise InputError(f"bam: others is {others!r}: mean, seed or a merging method such as Ties() is expected")
    if not 1 <= ffn_top_k <= n:
        raise InputError(f"bam: ffn_top_k is {ffn_top_k}: 1 to {n} is expected, there are {n} experts")
    if attn_top_k is not None and (attention == "average" or not 1 <= attn_top_k <= n):
        raise InputError(f"bam: attn_top_k is {attn_top_k}: None or 1 to {n}, and several attentions are expected")
    if not router_std > 0:
        raise InputError(f"bam: router_std is {router_std}: a positive number is expected")
    if (texts is not None) != (router_init in ("prompts", "domain_centroids")):
        raise InputError(
            f"bam: router_init={router_init!r} and texts: prompts and domain_centroids, no others, need texts"
        )
    if texts is not None and (len(texts) != n or not all(own and not isinstance(own, str) for own in texts)):
        raise InputError(f"bam: texts has {len(texts)} entries for {n} experts: a list of texts for each is expected")
    on_disk = isinstance(base, str | os.PathLike | tuple)
    if on_disk and out is None:
        raise InputError(f"the base {base} is on disk: name the folder to be written with out=, or load it first")
    if not on_disk and not isinstance(base, nn.Module):
        raise InputError(f"the base is a {type(base).__name__}: a Model, a transformers module or a folder is expected")
    if not on_disk and out is not None:
        raise InputError("out= is for a base on disk: save what is given back instead")
    if isinstance(base, Model) and base.kind != "causal-lm":
        raise InputError(f"the base {base.source} is a {base.kind} model: a causal-lm is expected")


def _config(source: Any, store: Store) -> Any:
    """The transformers configuration of a model in memory or on disk."""
    module = source.backbone if isinstance(source, Model) else source
    if (config := getattr(module, "config", None)) is not None:
        return config
    if store.folder is None:
        raise InputError(f"{store.label} has no configuration: a Model, a transformers module or a folder is expected")
    try:
        return transformers.AutoConfig.from_pretrained(store.folder)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{store.label}: its configuration cannot be read ({error})") from None


def _names(given: Sequence[str] | None, stores: Sequence[Store]) -> list[str]:
    if given is not None:
        if len(given) != len(stores):
            raise InputError(f"bam: {len(given)} expert_names for {len(stores)} models: one a model is expected")
        return list(given)
    last = [Path(store.label).name for store in stores]
    return last if len(set(last)) == len(last) else [f"expert {i}" for i in range(len(last))]


def _check_vocabularies(sources: Sequence[Any], stores: Sequence[Store]) -> None:
    """Where tokenizers are known, they must give equal numbers to equal tokens."""

    found = [tokenizer_of(source, store) for source, store in zip(sources, stores, strict=True)]
    mine, *theirs = [None if tokenizer is None else tokenizer.get_vocab() for tokenizer in found]
    for store, its in zip(stores[1:], theirs, strict=True):
        if mine is not None and its is not None and its != mine:
            odd = ", ".join(repr(token) for token, _ in sorted(mine.items() ^ its.items())[:3])
            raise InputError(
                f"{store.label} has another vocabulary than the base {stores[0].label} (at {odd}): "
                "swap it first, as models.vocabulary.swap_vocabulary does"
            )


def _shared(
    models: Sequence[Source], base: Any, origin: Store, others: Others, attention: MixedAttention, folder: Path | None
) -> Store:
    """What experts share, merged in memory or into a folder; other tensors are left at the base's."""
    if others == "seed":
        return origin
    apart = {"experts": r"\.(mlp|self_attn)\.", "kv_shared": r"\.(mlp\.|self_attn\.[qo]_)", "average": r"\.mlp\."}
    method = Average() if isinstance(others, str) else others
    place = None if folder is None else folder / "shared"
    return open_store(combine(models, base, method, exclude=apart[attention], out=place))


def _filled(plan: Sequence[Entry], config: MixtureConfig, dtype: torch.dtype) -> MixtureForCausalLM:
    """The mixture in memory."""
    state: dict[str, Tensor] = {}
    for entry in tqdm(plan, desc="mixture", delay=2):
        state[entry.name] = torch.empty(entry.shape, dtype=dtype)
        for start, values in entry.blocks():
            state[entry.name].view(-1)[start : start + values.numel()] = values
    with quiet():
        return MixtureForCausalLM.from_pretrained(None, config=config, state_dict=state, dtype=dtype)


def _write(plan: Sequence[Entry], config: MixtureConfig, dtype: torch.dtype, origin: Store, folder: Path) -> None:
    """The mixture as a checkpoint folder, piece by piece."""
    card.copy_files(None, origin, folder, None)
    config.dtype = dtype
    config.save_pretrained(folder)
    with ShardWriter(folder, [Slot(entry.name, entry.shape, dtype) for entry in plan]) as writer:
        for entry in tqdm(plan, desc="mixture", delay=2):
            for start, values in entry.blocks():
                writer.write(entry.name, start, values)
