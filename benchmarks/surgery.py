"""A merge and an injection on a structure of Llama-2-7B's size (32 residuals, d = 4096, r = 64), scoring included.

    python benchmarks/surgery.py

The base weights are stand-ins without memory; residuals, LoRA and Adam's moments are real. Scoring is compared with what
the reference code does, a full SVD of every d x d product: one is timed, and multiplied by 32; the same for the singular
values alone.
"""

import argparse
import statistics
import time

import torch
from peft import get_peft_model
from torch import nn
from transformers import PretrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

import lor2c
from lor2c.training.scores import scores_of
from lor2c.training.surgery import inject_lora, merge_modules


class Block(GradientCheckpointingLayer):
    """A layer's norm and two projections whose weights are one number, seen d x d times."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d)
        for name in ("q_proj", "v_proj"):
            projection = nn.Linear(1, 1, bias=False)
            projection.weight = nn.Parameter(torch.zeros(1, 1).expand(d, d))
            projection.in_features = projection.out_features = d
            setattr(self, name, projection)


def structure(layers: int, d: int, r: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A LoR2C model with trained-looking residuals, and AdamW after one step."""
    base = nn.Module()
    base.config = PretrainedConfig(hidden_size=d)
    base.layers = nn.ModuleList(Block(d) for _ in range(layers))
    model = get_peft_model(base, lor2c.LoR2CConfig(r=r, alpha=32))
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        nn.init.normal_(p, std=0.02)
        p.grad = torch.randn_like(p)
    optimizer = torch.optim.AdamW(trained, lr=3e-4)
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def seconds(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    layers, d, r = 32, 4096, 64
    model, optimizer = structure(layers, d, r)
    A, B = (next(p for n, p in model.named_parameters() if part in n).detach() for part in ("lor2c_A", "lor2c_B"))
    scores_of(model)  # warm

    def choose_and_merge(i: int) -> None:
        scores = scores_of(model)
        keep = "first" if scores[2 * i] >= scores[2 * i + 1] else "second"
        merge_modules(model, 2 * i, 2 * i + 1, keep, optimizer)

    def choose_and_inject(i: int) -> None:
        scores_of(model)
        inject_lora(model, layers - 1 - i, optimizer=optimizer)

    scoring = [seconds(lambda: scores_of(model)) for _ in range(rounds)]
    merges = [seconds(lambda i=i: choose_and_merge(i)) for i in range(rounds)]
    injections = [seconds(lambda i=i: choose_and_inject(i)) for i in range(rounds)]
    product = B @ A
    dense = {"full SVD": seconds(lambda: torch.linalg.svd(product))}
    dense["singular values alone"] = seconds(lambda: torch.linalg.svdvals(product))
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads; median (slowest) of {rounds}, {layers} residuals"
    )
    for name, found in (("scoring", scoring), ("scoring + merge", merges), ("scoring + injection", injections)):
        print(f"{name:20} {1e3 * statistics.median(found):7.0f} ms ({1e3 * max(found):.0f} ms)")
    for name, one in dense.items():
        ratio = layers * one / statistics.median(scoring)
        print(
            f"{name} of one d x d product {one:.1f} s, times {layers}: {layers * one:.0f} s, {ratio:,.0f} times the scoring"
        )


if __name__ == "__main__":
    main()
