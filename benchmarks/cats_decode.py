"""A step of decoding with thresholds on the gates: neurons skipped against the same model computed densely.

    python benchmarks/cats_decode.py [--threads 1] [--layers 4] [--width 2048] [--neurons 5632] [--steps 20]

A Llama of random weights, one token at a time with a cache, float32 on a CPU, bfloat16 on a GPU. Its thresholds are
read off its own gates. Printed beside the ratio: the share of the feed-forward weights that has to be read, which is
the limit where reading them is all that takes time.
"""

import argparse
import time

import torch
import transformers

from downriver.models import sparse_decoding
from downriver.models.surgery import gated_mlps, set_thresholds


def seconds(model: torch.nn.Module, steps: int) -> float:
    """Of the fastest step."""
    cache, best = transformers.DynamicCache(), float("inf")
    device = next(model.parameters()).device
    with torch.no_grad():
        for step in range(steps):
            token = torch.tensor([[step + 1]], device=device)
            start = time.perf_counter()
            model(token, past_key_values=cache, use_cache=True)
            if device.type == "cuda":
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - start)
    return best


def quantiles(model: torch.nn.Module, share: float) -> list[float]:
    """The threshold of every block at which that share of its gates is zero."""
    found = []

    def keep(module: torch.nn.Module, arguments: object, output: torch.Tensor) -> None:
        found.append(float(output.abs().float().quantile(share)))

    hooks = [getattr(block, name).register_forward_hook(keep) for _, block, name in gated_mlps(model)]
    with torch.no_grad():
        model(torch.arange(1, 33, device=next(model.parameters()).device)[None])
    for hook in hooks:
        hook.remove()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--neurons", type=int, default=5632)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    gpu = torch.cuda.is_available()
    config = transformers.LlamaConfig(
        vocab_size=1000,
        hidden_size=options.width,
        intermediate_size=options.neurons,
        num_hidden_layers=options.layers,
        num_attention_heads=16,
        num_key_value_heads=4,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    if gpu:
        model = model.to("cuda", torch.bfloat16)
    where = "GPU" if gpu else f"{options.threads} threads"
    print(f"{options.layers} layers of {options.width} × {options.neurons}, {where}")
    for share in (0.5, 0.7, 0.9):
        set_thresholds(model, [0.0] * options.layers)
        set_thresholds(model, quantiles(model, share))
        dense = seconds(model, options.steps)
        sparse_decoding(model)
        sparse = seconds(model, options.steps)
        sparse_decoding(model, on=False)
        traffic = (1 + 2 * (1 - share)) / 3
        print(
            f"  {share:.0%} zero: dense {1000 * dense:.1f} ms, skipping {1000 * sparse:.1f} ms, "
            f"{dense / sparse:.2f} times as fast; {traffic:.0%} of the feed-forward weights are read"
        )


if __name__ == "__main__":
    main()
