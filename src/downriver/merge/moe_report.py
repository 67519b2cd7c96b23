"""Who uses which expert of a mixture, and what a token costs: routing by domain, dead experts, FLOPs, cache.

Reach for it after ``bam`` and after training: routers that do not tell domains apart, or experts that nobody uses, show
here first.
"""

from dataclasses import dataclass
from functools import partial

import polars as pl

from downriver.core.cost import count_flops
from downriver.core.errors import InputError
from downriver.models.features import inference
from downriver.models.mixture import MixtureForCausalLM
from downriver.models.model import Model
from downriver.nn.moe import RoutingTally, routing_context
from downriver.tasks.task import Task

ALL = "all"
"""The name of the one domain of a task without groups."""


@dataclass(frozen=True, eq=False)
class MoEReport:
    """What ``moe_report`` found.

    ``routing``: one row a layer, part (``self_attn`` or ``mlp``), domain and expert, with its mean ``gate``, its share
    ``load`` of the choices, and the router's mean ``entropy`` in nats (log N: it tells nothing apart). ``dead``: layer,
    part and expert of those with less than a hundredth of all choices. ``flops`` of a forward pass per token, in texts
    as long as those read. ``cache``: bytes of keys and values per token.
    """

    routing: pl.DataFrame
    dead: list[tuple[int, str, str]]
    parameters: int
    active_parameters: int
    flops: float
    cache: int

    def by_domain(self) -> pl.DataFrame:
        """Mean gates over the layers: columns part, domain, expert, gate."""
        return self.routing.group_by("part", "domain", "expert", maintain_order=True).agg(pl.col("gate").mean())


def moe_report(model: Model, task: Task, *, split: str = "test", batch_size: int = 16) -> MoEReport:
    """Run a mixture over a split and say where its tokens went; padding does not count.

    Parameters
    ----------
    model
        A ``Model`` whose backbone is a mixture, as ``bam`` gives it.
    task
        Language modelling; its groups are the domains.

    Raises ``InputError`` for another model or task.

    >>> from datasets import Dataset
    >>> from downriver.merge import bam
    >>> from downriver.models import small
    >>> rows = Dataset.from_dict({"text": ["the river", "1 + 1"], "domain": ["prose", "sums"]})
    >>> task = Task("two", "language-modelling", {"test": rows}, ("text",), None, group="domain")
    >>> lm = small("causal-lm", "nano")
    >>> report = moe_report(bam([lm, lm], lm, expert_names=["a", "b"]), task)
    >>> report.routing.height, report.parameters > report.active_parameters
    (16, True)
    """
    backbone = model.backbone
    if not isinstance(backbone, MixtureForCausalLM):
        raise InputError(f"{model.source or 'the model'} is no mixture: what merge.bam gives is expected")
    if task.kind != "language-modelling":
        raise InputError(f"task {task.name!r} is {task.kind}: language modelling is expected")
    data = task.rows(split)
    groups = data[task.group][:] if task.group else [ALL] * len(data)
    domains = sorted(set(groups))
    config = backbone.config
    names = config.expert_names or [f"expert {n}" for n in range(config.num_experts)]
    tally, collate, flops, tokens = RoutingTally(domains), model.collate(task), 0.0, 0
    with inference(model):
        for start in range(0, len(data), batch_size):
            chosen = range(start, min(len(data), start + batch_size))
            batch = collate([data[row] for row in chosen])
            batch = {name: value.to(model.device) for name, value in batch.items() if name != "labels"}
            types = batch["input_ids"].new_tensor([domains.index(groups[row]) for row in chosen])
            with routing_context(types, batch["attention_mask"]) as routing:
                if start == 0:
                    flops, tokens = count_flops(partial(model, **batch)), batch["input_ids"].numel()
                else:
                    model(**batch)
            tally.add(routing)
    shares, loads, entropy = tally.shares(), tally.loads(), tally.entropy()
    places = [(int(name.split(".")[1]), name.rpartition(".")[2]) for name in tally.layers]
    routed = [
        {
            "layer": layer,
            "part": part,
            "domain": domain,
            "expert": expert,
            "gate": float(shares[i, g, n]),
            "load": float(loads[i, g, n]),
            "entropy": float(entropy[i, g]),
        }
        for i, (layer, part) in enumerate(places)
        for g, domain in enumerate(domains)
        for n, expert in enumerate(names)
    ]
    mlp = backbone.model.layers[0].mlp
    idle = (config.num_experts - config.ffn_top_k) * (mlp.gate_up[0].numel() + mlp.down[0].numel())
    total = sum(p.numel() for p in backbone.parameters())
    heads = backbone.model.layers[0].self_attn.key_heads
    cache = 2 * config.num_hidden_layers * heads * config.head_dim * backbone.dtype.itemsize
    dead = [(*places[tally.layers.index(name)], names[n]) for name, n in tally.dead()]
    return MoEReport(
        routing=pl.DataFrame(routed),
        dead=dead,
        parameters=total,
        active_parameters=total - config.num_hidden_layers * idle,
        flops=flops / tokens,
        cache=cache,
    )
