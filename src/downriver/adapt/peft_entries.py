"""The facts behind ``peft_catalogue``: one entry a method, with what it trains and how many parameters that takes.

Reach for ``catalogue()`` and ``method(name)``; this table is for adding an entry. Counts are those of the installed
peft's layers, whose settings an entry names.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Family = Literal["selective", "additive", "prompt", "reparameterisation", "hybrid"]
Targets = Literal["linear", "norm", "embedding", "layers", "model"]
TEXT = ("causal-lm", "masked-lm", "text-encoder")
ALL = (*TEXT, "vision-encoder")
ANY = (*ALL, "module")
LM = ("causal-lm",)
R8 = {"r": 8, "lora_alpha": 16}


@dataclass(frozen=True)
class Layer:
    """A linear layer to be adapted: its name, inputs and outputs, and whether it has a bias."""

    name: str
    inputs: int
    outputs: int
    bias: bool


@dataclass(frozen=True)
class Shape:
    """What a count depends on: the adapted layers; entries of norm layers and of biases; width of the hidden states,
    number of layers, width of keys (and of values); parameters of one layer and of the norm behind the last; number of
    feed-forward and of attention output projections; longest text in tokens; all parameters."""

    layers: tuple[Layer, ...]
    norms: int
    biases: int
    width: int
    depth: int
    keys: int
    block: int
    last_norm: int
    feed_forwards: int
    attentions: int
    positions: int
    total: int


Count = Callable[[Shape, Any], int]
Sizes = Callable[[Shape], Sequence[Any]]


@dataclass(frozen=True)
class Entry:
    """One method. ``count`` takes a ``Shape`` and the method's configuration; ``size`` is the setting that a budget of
    parameters fixes, and ``sizes`` its values in order of growing count; ``settings`` are ours beyond the defaults of
    peft; ``learning_rate`` is the middle of the grid."""

    name: str
    reference: str
    trains: str
    formula: str
    count: Count
    family: Family
    peft_type: str = ""
    size: str = ""
    sizes: Sizes = lambda shape: ranks()(shape)
    settings: Mapping[str, Any] = field(default_factory=dict)
    kinds: tuple[str, ...] = ANY
    targets: Targets = "linear"
    learning_rate: float = 3e-4
    mergeable: bool = True
    identity: bool = True
    quantised: bool = False
    embeddings: bool = False
    convolutions: bool = False
    experts: bool = False
    mixed_batches: bool = False
    needs_data: bool = False
    note: str = ""


def on(flags: str) -> dict[str, Any]:
    """Flags of an entry that are true."""
    return dict.fromkeys(flags.split(), True)


def each(one: Callable[[int, int, Any], float]) -> Count:
    """The sum over the adapted layers of a count of inputs, outputs and settings."""
    return lambda shape, s: sum(int(one(layer.inputs, layer.outputs, s)) for layer in shape.layers)


def ranks(step: int = 1) -> Sizes:
    """Ranks up to the smaller side of the smallest layer."""
    return lambda shape: range(step, max(step, _smallest(shape)) + 1, step)


def amounts(limit: int) -> Sizes:
    """1 to a limit."""
    return lambda shape: range(1, limit + 1)


def tokens(least: int = 1) -> Sizes:
    """Virtual tokens, up to half of the longest text."""
    return lambda shape: range(least, max(least, shape.positions // 2) + 1)


def coefficients(shape: Shape) -> Sequence[int]:
    """Up to as many as the smallest layer has entries."""
    return range(1, min(layer.inputs * layer.outputs for layer in shape.layers) + 1)


def divisors(of: Callable[[Layer], Sequence[int]], *, even: bool = False, falling: bool = False) -> Sizes:
    """Block sizes that divide what ``of`` gives of every layer; ``falling`` where small blocks have more parameters."""

    def sizes(shape: Shape) -> Sequence[int]:
        common = math.gcd(*(n for layer in shape.layers for n in of(layer)))
        found = [n for n in range(1 if falling else 2, common + 1) if common % n == 0 and not (even and n % 2)]
        return found[::-1] if falling else found

    return sizes


def densities(shape: Shape) -> Sequence[float]:
    """Shares from one entry of the smallest layer to all, 200 in equal ratios."""
    least = 1.5 / min(layer.inputs * layer.outputs for layer in shape.layers)
    return [least ** (1 - i / 199) for i in range(200)]


def _smallest(shape: Shape) -> int:
    return min(min(layer.inputs, layer.outputs) for layer in shape.layers)


def _lora(i: int, o: int, s: Any) -> float:
    return s.r * (i + o)


def _lora_parts(shape: Shape, s: Any) -> int:
    """LoRA's with a factor of one side in blocks (BD-LoRA)."""
    blocks = s.use_bdlora
    total = 0
    for layer in shape.layers:
        a = blocks.nblocks if any(p in layer.name for p in blocks.target_modules_bd_a or ()) else 1
        b = blocks.nblocks if any(p in layer.name for p in blocks.target_modules_bd_b or ()) else 1
        total += s.r * layer.inputs // a + s.r * layer.outputs // b
    return total


def _lokr(i: int, o: int, s: Any) -> float:
    from peft.tuners.lokr.layer import factorization

    (a, b), (c, d) = factorization(i, s.decompose_factor), factorization(o, s.decompose_factor)
    first = s.r * (c + a) if s.decompose_both and s.r < max(c, a) / 2 else c * a
    second = s.r * (d + b) if s.r < max(d, b) / 2 else d * b
    return first + second


def _oft(i: int, o: int, s: Any) -> float:
    block = s.oft_block_size or i // s.r
    if i % block or block > i:
        block = min((n for n in range(1, i + 1) if i % n == 0), key=lambda n: (abs(n - block), n))
    share = 1 if s.block_share else i // block
    return share * block * (block - 1) // 2


def _randlora(i: int, o: int, s: Any) -> float:
    least = min(i, o)
    return math.ceil(least / s.r) * (s.r + least)


def _glora(shape: Shape, s: Any) -> int:
    total = 0
    for layer in shape.layers:
        i, o = layer.inputs, layer.outputs
        total += {"lora": 2 * s.r * (i + o), "vector": 2 * o, "constant": 2}.get(s.config_A_B, 0)
        if layer.bias:
            total += {"lora": s.r * (i + 1), "vector": i}.get(s.config_C, 1 if s.config_C == "constant" else 0)
            total += {"vector": 2 * o, "constant": 2}.get(s.config_D_E, 0)
    return total


def _lily(shape: Shape, s: Any) -> int:
    groups: dict[tuple[str, int, int], int] = {}
    for layer in shape.layers:
        target = max((t for t in s.target_modules if f".{layer.name}".endswith(f".{t}")), key=len)
        key = (target, layer.inputs, layer.outputs)
        groups[key] = groups.get(key, 0) + 1
    return sum(
        math.ceil(n / s.stride_A) * s.r * i + s.num_B * s.r * o + n * s.r * s.num_B for (_, i, o), n in groups.items()
    )


def _osf(i: int, o: int, s: Any) -> float:
    least = min(i, o)
    kept = least // 2 if s.effective_rank is None else s.effective_rank
    kept = int(kept * least) if isinstance(kept, float) else min(kept, least)
    return (least - kept) * (i + o + 1)


def _tinylora(shape: Shape, s: Any) -> int:
    n = len(shape.layers)
    groups = max(1, round(n * (1 - s.weight_tying)))
    return s.u * (min((n - 1) // max(1, n // groups), groups - 1) + 1)


def _supertuning(i: int, o: int, s: Any) -> float:
    return int(i * o * (1 - s.sparsity)) + (s.r * (i + o) if s.r else 0)


def _shadow(shape: Shape, s: Any) -> int:
    d, h = shape.width, s.update_hidden_size or s.r
    beside = 2 * d * s.r + 2 * (2 * d * h + h + d)  # W_down and W_up; candidate and gate of the update
    return shape.block * (s.shadow_num_hidden_layers or 1) + shape.last_norm + shape.depth * beside


def _ia3(shape: Shape, s: Any) -> int:
    down = tuple(s.feedforward_modules)
    return sum(layer.inputs if layer.name.endswith(down) else layer.outputs for layer in shape.layers)


def _vblora(shape: Shape, s: Any) -> int:
    pieces = sum(s.r * (layer.inputs + layer.outputs) // s.vector_length for layer in shape.layers)
    return s.num_vectors * (pieces + s.vector_length)


def _adamss(shape: Shape, s: Any) -> int:
    small = sum(min(s.r, layer.inputs + layer.bias, layer.outputs) for layer in shape.layers)
    return s.subspace_rank * (s.num_subspaces * small + sum(layer.outputs for layer in shape.layers))


def _loramoe(i: int, o: int, s: Any) -> float:
    return s.num_experts * (s.r * (i + o) + i)


def _prompt(shape: Shape, s: Any) -> int:
    return s.num_virtual_tokens * shape.width


def _prefix(shape: Shape, s: Any) -> int:
    return s.num_virtual_tokens * 2 * shape.depth * shape.keys


def _p_tuning(shape: Shape, s: Any) -> int:
    d = shape.width
    h = s.encoder_hidden_size or d
    return s.num_virtual_tokens * d + (d * h + h) + (h * h + h) + (h * d + d)


def _bottleneck(shape: Shape, s: Any) -> int:
    sites = shape.feed_forwards + (shape.attentions if s.placement == "houlsby" else 0)
    return sites * (2 * shape.width * s.width + s.width + shape.width)


@functools.cache
def known() -> Mapping[str, Entry]:
    """The entries by name, by family. A function, since some settings are objects of peft, which is slow to import."""
    from peft.tuners.lora.config import (
        CordaConfig,
        EvaConfig,
        KasaConfig,
        LoraGAConfig,
        MontecloraConfig,
        VeloraConfig,
    )

    selective = functools.partial(Entry, family="selective")
    additive = functools.partial(Entry, family="additive")
    prompt = functools.partial(Entry, family="prompt", targets="model", mergeable=False, identity=False, quantised=True)
    dense = functools.partial(Entry, family="reparameterisation")
    variant = functools.partial(dense, peft_type="LORA", size="r")
    hybrid = functools.partial(Entry, family="hybrid", mergeable=False)
    # a table: name, reference, what is trained, its number (a layer, or in all), the count; then what is special
    # fmt: off
    found = (
        # selective: entries that the model has
        selective("bitfit", "Ben Zaken et al. 2022", "the biases b", "Σ b", lambda shape, s: shape.biases,
            targets="model", learning_rate=1e-3, **on("quantised convolutions")),
        selective("fish_mask", "Sung et al. 2021", "the entries of W of largest Σ (∂ log p / ∂ W)²", "keep Σ W",
            lambda shape, s: max(1, round(s.keep * shape.total)), size="keep",
            sizes=lambda shape: [0.5 ** (i / 8) for i in range(160, -1, -1)], targets="model",
            **on("embeddings convolutions needs_data")),
        selective("ln_tuning", "arXiv:2312.11420", "gains and biases of norm layers", "Σ norms",
            lambda shape, s: shape.norms, peft_type="LN_TUNING", kinds=ALL, targets="norm", learning_rate=1e-3,
            **on("quantised")),
        selective("trainable_tokens", "PASTA, Yang et al. 2023; peft", "rows of the embedding", "n d",
            lambda shape, s: len(s.token_indices) * shape.width, peft_type="TRAINABLE_TOKENS", kinds=TEXT,
            targets="embedding", learning_rate=3e-3, **on("quantised embeddings"),
            note="the tokenizer's special tokens, unless token_indices says otherwise"),
        selective("beft", "arXiv:2509.15974", "biases beside chosen layers", "o", each(lambda i, o, s: o),
            peft_type="BEFT", learning_rate=1e-3, note="merges into layers that have a bias", **on("quantised")),
        selective("shira", "Bhardwaj et al. 2024", "r (i + o) random entries of W", "r (i + o)", each(_lora),
            peft_type="SHIRA", size="r",
            sizes=lambda shape: range(1, min(n.inputs * n.outputs // (n.inputs + n.outputs) for n in shape.layers) + 1),
            settings={"r": 8}, **on("quantised")),
        selective("supertuning", "arXiv:2607.09287", "the entries of W of largest magnitude", "(1 - sparsity) i o",
            each(_supertuning), peft_type="SUPERTUNING", size="sparsity",
            sizes=lambda shape: [1 - density for density in densities(shape)]),
        selective("osf", "Nayak et al. 2025", "the directions of W's lowest singular values",
            "(min(i, o) - kept) (i + o + 1)", each(_osf), peft_type="OSF", size="effective_rank",
            sizes=lambda shape: [k / 200 for k in range(199, 0, -1)], learning_rate=1e-4),
        # additive: layers beside those of the model
        additive("bottleneck", "Houlsby et al. 2019; Pfeiffer et al. 2021; He et al. 2022", "h + U f(D h + b) + c",
            "(2 d m + m + d) a site", _bottleneck, size="width", sizes=lambda shape: range(1, shape.width + 1),
            kinds=ALL, targets="layers", learning_rate=1e-3, mergeable=False, **on("quantised")),
        additive("ia3", "arXiv:2205.05638", "l ⊙ W x, or W (l ⊙ x) in a down projection",
            "o, or i in a down projection", _ia3,
            peft_type="IA3", learning_rate=5e-3, **on("quantised convolutions")),
        additive("adaption_prompt", "arXiv:2303.16199",
            "prompts in the attention of the last layers, behind a gate of zero", "(n d + 1) a layer",
            lambda shape, s: s.adapter_layers * (s.adapter_len * shape.width + 1), peft_type="ADAPTION_PROMPT",
            size="adapter_len", sizes=tokens(), settings={"adapter_len": 10}, kinds=LM, targets="layers",
            learning_rate=5e-3, mergeable=False, note="Llama, Mistral and GPT-2",
            **on("quantised")),
        additive("lily", "arXiv:2407.09946", "W x + (Σ g(x) B) A x, the B shared by all layers",
            "⌈n / stride⌉ r i + num_B r o + n r num_B a kind of layer", _lily, peft_type="LILY", size="r",
            settings={"r": 8}, mergeable=False, **on("quantised")),
        additive("shadow", "peft", "a small model beside the layers",
            "a layer and the last norm, 2 d r + 2 (2 d h + h + d) a layer", _shadow, peft_type="SHADOW", size="r",
            sizes=lambda shape: range(1, shape.width + 1), settings={"r": 8}, kinds=LM, targets="layers",
            mergeable=False),
        # prompt: virtual tokens
        prompt("prompt_tuning", "Lester et al. 2021", "n embeddings before the text", "n d", _prompt,
            peft_type="PROMPT_TUNING", size="num_virtual_tokens", sizes=tokens(), settings={"num_virtual_tokens": 20},
            kinds=TEXT, learning_rate=3e-3),
        prompt("multitask_prompt_tuning", "arXiv:2303.02861", "n embeddings, times a matrix of rank 1 a task",
            "n d + tasks ranks (n + d)",
            lambda shape, s: _prompt(shape, s) + s.num_tasks * s.num_ranks * (s.num_virtual_tokens + shape.width),
            peft_type="MULTITASK_PROMPT_TUNING", size="num_virtual_tokens", sizes=tokens(),
            settings={"num_virtual_tokens": 20}, kinds=LM, learning_rate=3e-3,
            note="task 0 where a batch says nothing of tasks"),
        prompt("p_tuning", "Liu et al. 2021", "n embeddings through an MLP",
            "n d + (d h + h) + (h h + h) + (h d + d)", _p_tuning, peft_type="P_TUNING", size="num_virtual_tokens",
            sizes=tokens(), settings={"num_virtual_tokens": 20}, kinds=TEXT, learning_rate=1e-3,
            note="the MLP is dropped once trained"),
        prompt("prefix_tuning", "Li and Liang 2021", "n keys and values in every layer", "n 2 k depth", _prefix,
            peft_type="PREFIX_TUNING", size="num_virtual_tokens", sizes=tokens(), settings={"num_virtual_tokens": 20},
            kinds=LM, learning_rate=5e-3),
        prompt("cpt", "arXiv:2410.17222", "changes of the embeddings of n given tokens", "n d", _prompt,
            peft_type="CPT", kinds=LM, learning_rate=3e-3,
            note="the tokens of a text to start from: cpt_token_ids"),
        prompt("cartridge", "Eyuboglu et al. 2025",
            "keys and values of n tokens in every layer, the first of them fixed", "(n - frozen) 2 k depth",
            lambda shape, s: (s.num_virtual_tokens - s.num_frozen_tokens) * 2 * shape.depth * shape.keys,
            peft_type="CARTRIDGE", size="num_virtual_tokens", sizes=tokens(2), settings={"num_virtual_tokens": 20},
            kinds=LM, learning_rate=5e-3),
        # reparameterisation: LoRA and what differs in its start or its form
        variant("lora", "Hu et al. 2021", "W + s B A", "r (i + o)", each(_lora), settings=R8,
            **on("quantised embeddings convolutions experts mixed_batches")),
        variant("rslora", "Kalajdzievski 2023", "W + (α / √r) B A", "r (i + o)", each(_lora),
            settings=R8 | {"use_rslora": True}, **on("quantised embeddings convolutions")),
        variant("dora", "arXiv:2402.09353", "m (W + s B A) / |W + s B A|", "r (i + o) + o",
            each(lambda i, o, s: s.r * (i + o) + o), settings=R8 | {"use_dora": True},
            **on("quantised embeddings convolutions")),
        variant("pissa", "Meng et al. 2024", "B A start as W's first r", "r (i + o)", each(_lora),
            settings=R8 | {"init_lora_weights": "pissa"}, **on("embeddings")),
        variant("olora", "Büyükakyüz 2024", "B A start from W = Q R", "r (i + o)", each(_lora),
            settings=R8 | {"init_lora_weights": "olora"}, **on("embeddings")),
        variant("orthogonal_lora", "peft", "B A start orthogonal", "r (i + o)", each(_lora), sizes=ranks(2),
            settings=R8 | {"init_lora_weights": "orthogonal"}, **on("embeddings")),
        variant("mica", "arXiv:2604.01694", "W + s U A, U of W's lowest r", "r i", each(lambda i, o, s: s.r * i),
            settings=R8 | {"init_lora_weights": "mica"}, **on("embeddings")),
        variant("eva", "arXiv:2410.07170", "A starts from the activations' principal directions", "r (i + o)",
            each(_lora), settings=R8 | {"init_lora_weights": "eva", "eva_config": EvaConfig(rho=1.0)}, kinds=TEXT,
            **on("quantised needs_data"), note="ranks stay equal (rho 1), so that the count is LoRA's"),
        variant("corda", "Yang et al. 2024", "B A start from W times the activations' covariance", "r (i + o)",
            each(_lora), settings=R8 | {"init_lora_weights": "corda", "corda_config": CordaConfig()},
            **on("needs_data")),
        variant("lora_ga", "Wang et al. 2024", "B A start from the gradient", "r (i + o)", each(_lora),
            sizes=lambda shape: range(1, _smallest(shape) // 2 + 1),
            settings=R8 | {"init_lora_weights": "lora_ga", "lora_ga_config": LoraGAConfig()}, **on("needs_data")),
        variant("alora", "arXiv:2504.12397", "W + s B A after an invocation", "r (i + o)", each(_lora), settings=R8,
            kinds=LM, mergeable=False, **on("quantised"),
            note="the tokens that invoke it: alora_invocation_tokens"),
        variant("bdlora", "Wang et al. 2025", "W + s B A, one factor in blocks",
            "r (i / blocks + o), or r (i + o / blocks)", _lora_parts, settings=R8),
        variant("kasa", "arXiv:2412.06071", "W without its lowest r, + B diag(δ) A", "r (i + o + 1)",
            each(lambda i, o, s: s.r * (i + o + 1)), settings=R8 | {"kasa_config": KasaConfig()}, identity=False),
        variant("monteclora", "Sengupta et al. 2024", "W + s B (A + noise of trained spread)",
            "r (i + o) + r + samples", each(lambda i, o, s: s.r * (i + o) + s.r + s.monteclora_config.num_samples),
            settings=R8 | {"monteclora_config": MontecloraConfig()}),
        variant("velora", "arXiv:2405.17991", "W + s B A, activations compressed for the backward pass", "r (i + o)",
            each(_lora), settings=R8 | {"velora_config": VeloraConfig(num_groups=8)}),
        dense("adalora", "Zhang et al. 2023", "W + s P diag(λ) Q, the least of λ dropped on the way",
            "r₀ (i + o + 1)", each(lambda i, o, s: s.init_r * (i + o + 1)), peft_type="ADALORA", size="init_r",
            settings={"init_r": 12, "target_r": 8, "lora_alpha": 16}, **on("quantised convolutions")),
        dense("loha", "arXiv:2108.06098", "W + s (B₁ A₁) ⊙ (B₂ A₂)", "2 r (i + o)",
            each(lambda i, o, s: 2 * s.r * (i + o)), peft_type="LOHA", size="r", settings={"r": 8, "alpha": 16},
            **on("convolutions")),
        dense("lokr", "arXiv:2309.14859", "W + s C ⊗ (B A)", "f g + r (i / f + o / g)", each(_lokr), peft_type="LOKR",
            size="r", settings={"r": 8, "alpha": 16}, learning_rate=3e-3, **on("convolutions")),
        dense("oft", "arXiv:2306.07280", "R W, R orthogonal in blocks of b", "i (b - 1) / 2", each(_oft),
            peft_type="OFT", size="oft_block_size", sizes=divisors(lambda layer: [layer.inputs]),
            settings={"oft_block_size": 8}, **on("quantised embeddings convolutions")),
        dense("boft", "arXiv:2311.06243", "a product of butterflies of blocks b, times W", "m i b + o",
            each(lambda i, o, s: s.boft_n_butterfly_factor * i * s.boft_block_size + o), peft_type="BOFT",
            size="boft_block_size", sizes=divisors(lambda layer: [layer.inputs], even=True),
            settings={"boft_block_size": 4}, **on("quantised convolutions")),
        dense("hra", "arXiv:2405.17484", "W times r reflections", "r i", each(lambda i, o, s: s.r * i),
            peft_type="HRA", size="r", sizes=ranks(2), settings={"r": 8}, **on("convolutions")),
        dense("vera", "arXiv:2310.11454", "W + diag(b) B diag(d) A, A and B random, of all layers the same", "r + o",
            each(lambda i, o, s: s.r + o), peft_type="VERA", size="r", sizes=amounts(65536), learning_rate=4e-3,
            **on("quantised")),
        dense("pvera", "arXiv:2512.07703", "as VeRA, d drawn from a trained normal", "2 r + o",
            each(lambda i, o, s: 2 * s.r + o), peft_type="PVERA", size="r", sizes=amounts(65536), learning_rate=3e-3,
            **on("quantised")),
        dense("vblora", "arXiv:2405.15179", "W + s B A, both of pieces from one bank of vectors",
            "r v (i + o) / b + v b", _vblora, peft_type="VBLORA", size="r", settings={"r": 4}, learning_rate=1e-3,
            identity=False, note="vector_length: the largest divisor of all sides up to peft's 256", **on("quantised")),
        dense("randlora", "arXiv:2502.00987", "W + Σ B diag(λ) A diag(γ), of full rank",
            "⌈min(i, o) / r⌉ (r + min(i, o))", each(_randlora), peft_type="RANDLORA", size="r",
            sizes=lambda shape: range(_smallest(shape), 0, -1), settings={"r": 32}, **on("quantised")),
        dense("fourierft", "arXiv:2405.03003", "W + s F⁻¹(c), n coefficients at random places", "n",
            each(lambda i, o, s: s.n_frequency), peft_type="FOURIERFT", size="n_frequency", sizes=coefficients,
            learning_rate=3e-2, identity=False, note="the coefficients start at random", **on("quantised")),
        dense("waveft", "Bilican et al. 2025", "W + s (wavelet)⁻¹(c), n coefficients at random places", "n",
            each(lambda i, o, s: s.n_frequency), peft_type="WAVEFT", size="n_frequency", sizes=coefficients,
            **on("quantised")),
        dense("c3a", "arXiv:2407.19342", "W + circulant blocks of side b", "i o / b",
            each(lambda i, o, s: i * o // s.block_size), peft_type="C3A", size="block_size",
            sizes=divisors(lambda layer: [layer.inputs, layer.outputs], falling=True), learning_rate=3e-1,
            identity=False, **on("quantised"),
            note="the kernels start at random; block_size: the largest divisor of all sides up to peft's 256"),
        dense("road", "arXiv:2409.00119", "rotations and scales of pairs of outputs", "o, 2 o or 4 o",
            each(lambda i, o, s: o * {"road_1": 1, "road_2": 2, "road_4": 4}[s.variant]), peft_type="ROAD",
            size="variant", sizes=lambda shape: ("road_1", "road_2", "road_4"), learning_rate=1e-3,
            **on("quantised mixed_batches"),
            note="group_size: the largest even divisor of all outputs up to peft's 64"),
        dense("miss", "arXiv:2409.15371", "W + D repeated over r pieces of the input", "r o",
            each(lambda i, o, s: s.r * o), peft_type="MISS", size="r", settings={"r": 8}, **on("quantised")),
        dense("gralora", "Jung et al. 2025", "W + s (B A) in k × k blocks", "(r + r') (i + o)",
            each(lambda i, o, s: (s.r + s.hybrid_r) * (i + o)), peft_type="GRALORA", size="r", sizes=ranks(2),
            settings={"r": 8, "alpha": 16}, **on("quantised")),
        dense("hira", "Huang et al. 2025", "W + W ⊙ (B A)", "r (i + o)", each(_lora), peft_type="HIRA", size="r",
            settings={"r": 8}, learning_rate=4.5e-3, **on("quantised embeddings convolutions")),
        dense("delora", "arXiv:2503.18225", "W + λ times r unit matrices", "r (i + o) + 1",
            each(lambda i, o, s: s.r * (i + o) + 1), peft_type="DELORA", size="r", settings={"r": 8},
            learning_rate=1e-3),
        dense("psoft", "Wu et al. 2025", "W's first r, rotated: A R B, R orthogonal, with two scales",
            "r (r - 1) / 2 + 2 r", each(lambda i, o, s: s.r * (s.r - 1) // 2 + (s.psoft_mag_a + s.psoft_mag_b) * s.r),
            peft_type="PSOFT", size="r", sizes=lambda shape: range(2, _smallest(shape) + 1),
            settings={"r": 16, "psoft_alpha": 16}),
        dense("glora", "Chavan et al. 2023", "W + W A + B, b + b D + E + W C",
            "2 r (i + o), and r (i + 1) + 2 where there is a bias", _glora, peft_type="GLORA", size="r",
            settings={"r": 8}, **on("mixed_batches")),
        dense("tinylora", "arXiv:2602.04118", "W + U Σ (Σ v P) V, P random", "u a group of layers", _tinylora,
            peft_type="TINYLORA", size="u", sizes=amounts(65536), learning_rate=1e-3, **on("embeddings")),
        dense("unilora", "arXiv:2506.00799", "all entries of all A and B from one vector θ", "|θ|",
            lambda shape, s: s.theta_d_length, peft_type="UNILORA", size="theta_d_length",
            sizes=lambda shape: range(1, 4 * sum(n.inputs + n.outputs for n in shape.layers) + 1), learning_rate=3e-3,
            identity=False),
        dense("adamss", "Zheng et al. 2025", "W + U (B A) in K clusters of W's rows", "K r' min(r, i, o) + r' o",
            _adamss, peft_type="ADAMSS", size="r", settings={"r": 32}),
        dense("frod", "peft", "W in a basis that all layers share, its diagonal and a few entries more",
            "i + rate i²", each(lambda i, o, s: i + int(s.sparse_rate * i * i)), peft_type="FROD", size="sparse_rate",
            sizes=densities, settings={"progressbar": False}),
        dense("peanut", "arXiv:2410.01870", "W + f(W), f a small network", "2 r o + 2 depth r²",
            each(lambda i, o, s: 2 * s.r * o + 2 * s.depth * s.r**2), peft_type="PEANUT", size="r",
            settings={"r": 8}),
        dense("deft", "peft", "W - P Pᵀ W + P R", "r (i + o)", each(lambda i, o, s: s.r * (o if s.para else i + o)),
            peft_type="DEFT", size="r", settings={"r": 8}),
        # hybrid: several adapters and a router
        hybrid("poly", "arXiv:2202.13914", "W + Σ α (B A) over skills, α of the task",
            "skills r (i + o) + tasks skills splits",
            each(lambda i, o, s: s.n_skills * s.r * (i + o) + s.n_tasks * s.n_skills * s.n_splits), peft_type="POLY",
            size="r", settings={"r": 8}, kinds=TEXT, **on("quantised"),
            note="task 0 where a batch says nothing of tasks"),
        hybrid("xlora", "arXiv:2402.07148", "W + Σ g(x) (B A) over trained adapters", "n (d + 1)",
            lambda shape, s: len(s.adapters) * (len(shape.layers) if s.layerwise_scalings else 1) * (shape.width + 1),
            peft_type="XLORA", kinds=LM, identity=False,
            note="the folders of trained LoRA adapters: adapters={name: folder}"),
        hybrid("loramoe", "Dou et al. 2023", "W x + s Σ g(x) B A x over N experts", "N (r (i + o) + i)",
            each(_loramoe), size="r", settings={"balance": 0.0}, kinds=LM, learning_rate=2e-4,
            note="beside gate_proj, up_proj, down_proj; for its balance of data types see adapt.loramoe"),
    )
    # fmt: on
    return {entry.name: entry for entry in found}
