"""One training step of a LoRAMoE layer stack: all experts in one pair of products against a Python loop over them.

    python benchmarks/loramoe_step.py [--width 512] [--layers 2] [--tokens 512] [--experts 8] [--rank 4] [--steps 10]

Both have the same weights and give the same outputs and gradients (checked first). A step is forward and backward
through the gated feed-forward blocks, the base frozen, with dropout off. Times are the medians of CPU seconds; the step
of the frozen base without experts shows what is common to both.
"""

import argparse
import copy
import statistics
import time

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from downriver.adapt import LoRAMoEConfig, add_loramoe
from downriver.adapt.loramoe import ExpertLinear, experts_of


class LoopLinear(nn.Module):
    """The same layer, expert after expert."""

    def __init__(self, layer: ExpertLinear) -> None:
        super().__init__()
        self.base, self.router = layer.base, layer.loramoe_router
        self.scale = layer.config.alpha / layer.config.r
        self.a = nn.ParameterList([p.detach().clone() for p in layer.loramoe_A.chunk(layer.config.num_experts)])
        parts = layer.loramoe_B.chunk(layer.config.num_experts, dim=1)
        self.b = nn.ParameterList([p.detach().clone().contiguous() for p in parts])

    def forward(self, x: Tensor) -> Tensor:
        gates = nn.functional.linear(x, self.router).float().softmax(-1).to(x.dtype)
        y = self.base(x)
        for i, (a, b) in enumerate(zip(self.a, self.b, strict=True)):
            y = y + self.scale * gates[..., i : i + 1] * nn.functional.linear(nn.functional.linear(x, a), b)
        return y


def median_seconds(stack: nn.Module, x: Tensor, steps: int) -> float:
    found = []
    for _ in range(steps + 2):
        stack.zero_grad()
        started = time.process_time()
        stack(x).square().mean().backward()
        found.append(time.process_time() - started)
    return statistics.median(found[2:])


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, default in (("width", 512), ("layers", 2), ("tokens", 512), ("experts", 8), ("rank", 4), ("steps", 10)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.manual_seed(0)
    shape = LlamaConfig(hidden_size=options.width, intermediate_size=options.width * 11 // 4)
    base = nn.Sequential(*(LlamaMLP(shape) for _ in range(options.layers)))
    config = LoRAMoEConfig(
        r=options.rank, num_experts=options.experts, expert_types=(0,) * options.experts, dropout=0.0
    )
    fused = add_loramoe(copy.deepcopy(base), config)
    for _, layer in experts_of(fused):
        nn.init.normal_(layer.loramoe_B, std=0.02)
    looped = copy.deepcopy(fused)
    for name, layer in experts_of(looped):
        parent, _, last = name.rpartition(".")
        setattr(looped.get_submodule(parent), last, LoopLinear(layer))
    x = torch.randn(1, options.tokens, options.width, requires_grad=True)
    torch.testing.assert_close(fused(x), looped(x), rtol=1e-4, atol=1e-4)
    (left,), (right,) = (torch.autograd.grad(stack(x).square().mean(), x) for stack in (fused, looped))
    torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-6)
    base.requires_grad_(False)
    seconds = {name: median_seconds(stack, x, options.steps) for name, stack in
               (("frozen base", base), ("fused", fused), ("loop over experts", looped))}  # fmt: skip
    for name, value in seconds.items():
        print(f"{name:18s} {value * 1e3:9.2f} ms")
    print(f"loop / fused, whole step       {seconds['loop over experts'] / seconds['fused']:.2f}")
    own = {name: value - seconds["frozen base"] for name, value in seconds.items()}
    print(f"loop / fused, the experts' part {own['loop over experts'] / own['fused']:.2f}")


if __name__ == "__main__":
    main()
