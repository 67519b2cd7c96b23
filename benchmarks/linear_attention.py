"""Chunked linear attention against softmax attention (SDPA) at growing lengths, forward and one decoding step.

    python benchmarks/linear_attention.py [--lengths 512,1024,2048,4096,8192] [--heads 8] [--dim 64] [--repeats 5]

Causal, float32, Hedgehog's features (f = 2d) from queries and keys on, that is with the feature maps. A decoding step
of softmax reads all earlier keys and values, one of linear attention its state (checked first: both forms of linear
attention agree). Seconds are CPU seconds on a CPU, elapsed on a GPU; medians. The counted limit: multiply-adds of
linear attention over those of softmax.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from downriver.nn.linear_attention import FeatureMap, attention_weights, linear_attention


def seconds(run: Callable[[], object], repeats: int, device: torch.device) -> float:
    gpu = device.type == "cuda"
    found = []
    for _ in range(repeats + 1):
        started = time.perf_counter() if gpu else time.process_time()
        run()
        if gpu:
            torch.cuda.synchronize()
        found.append((time.perf_counter() if gpu else time.process_time()) - started)
    return statistics.median(found[1:])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--lengths", default="512,1024,2048,4096,8192")
    for name, default in (("heads", 8), ("dim", 64), ("repeats", 5), ("chunk", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    h, d, chunk = options.heads, options.dim, options.chunk
    torch.manual_seed(0)
    maps = nn.ModuleList([FeatureMap("hedgehog", h, d), FeatureMap("hedgehog", h, d)]).to(device)
    phi_q, phi_k = maps[0], maps[1]

    def linear(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return linear_attention(phi_q(q), phi_k(k), v, chunk=chunk)[0]

    with torch.no_grad():
        q, k, v = 0.3 * torch.randn(3, 1, h, 300, d, device=device)
        assert torch.allclose(linear(q, k, v), attention_weights(phi_q(q), phi_k(k)) @ v, atol=1e-4)
        print(f"{device}, {torch.get_num_threads()} threads, {h} heads of {d}, pieces of {chunk}")
        print("length  softmax s  linear s  ratio  counted ratio | step: softmax ms  linear ms  ratio")
        for length in map(int, options.lengths.split(",")):
            q, k, v = 0.3 * torch.randn(3, 1, h, length, d, device=device)
            full = seconds(
                lambda q=q, k=k, v=v: nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True),
                options.repeats,
                device,
            )
            ours = seconds(lambda q=q, k=k, v=v: linear(q, k, v), options.repeats, device)
            f = 2 * d
            counted = (2 * d * d + chunk * (f + d) + 2 * f * d) / (length / 2 * 2 * d)
            _, state = linear_attention(phi_q(q), phi_k(k), v, chunk=chunk)
            one = [x[:, :, -1:] for x in (q, k, v)]
            step_full = seconds(
                lambda q=one[0], k=k, v=v: nn.functional.scaled_dot_product_attention(q, k, v), 20, device
            )
            step = seconds(
                lambda one=one, state=state: linear_attention(phi_q(one[0]), phi_k(one[1]), one[2], state=state),
                20,
                device,
            )
            print(
                f"{length:6d}  {full:9.4f}  {ours:8.4f}  {full / ours:5.2f}  {1 / counted:13.2f} |"
                f"       {1e3 * step_full:10.3f}  {1e3 * step:9.3f}  {step_full / step:5.2f}"
            )


if __name__ == "__main__":
    main()
