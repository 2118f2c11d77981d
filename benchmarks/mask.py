"""Gradients of masked directions, computed and zeroed, beside not computed at all (RM-LoRA, section 4.3), in turn.

    python benchmarks/mask.py [--rounds 10] [--batch 32] [--length 128] [--tokens 512]

Half of the directions are updated at each step. "skipped" is an autograd function whose forward is complete, and whose
backward multiplies only the selected rows of A and columns of B. Two sizes: a training step of the demo's encoder with
LoRA of rank 8 on q and v, and one frozen linear map with d = 4096 and a pair of rank 64. Prints median times, the bytes
kept for the backward pass, and their ratios.
"""

import argparse
import random
from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from step import build, saved_bytes, seconds
from torch import Tensor, nn


class Skipped(torch.autograd.Function):
    """B A x; the backward pass computes the gradients of some rows of A and columns of B, and zeros for the others."""

    @staticmethod
    def forward(ctx, x: Tensor, A: Tensor, B: Tensor, selected: Tensor) -> Tensor:
        t = x @ A.T
        ctx.save_for_backward(x, t[..., selected], A, B, selected)
        return t @ B.T

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, t, A, B, selected = ctx.saved_tensors
        up, down = torch.zeros_like(B), torch.zeros_like(A)
        g = grad @ B  # complete: the input needs all of it
        up[:, selected] = grad.flatten(0, -2).T @ t.flatten(0, -2)
        down[selected] = g.flatten(0, -2)[:, selected].T @ x.flatten(0, -2)
        return (g @ A if ctx.needs_input_grad[0] else None), down, up, None


class Pair(nn.Module):
    """A frozen linear map with a low-rank pair, whose masked gradients are skipped, or computed and zeroed."""

    def __init__(self, base: nn.Module, A: Tensor, B: Tensor, skip: bool) -> None:
        super().__init__()
        self.base, self.A, self.B, self.skip = base, nn.Parameter(A), nn.Parameter(B), skip
        self.selected = torch.arange(len(A) // 2)

    def forward(self, x: Tensor) -> Tensor:
        if self.skip:
            return self.base(x) + Skipped.apply(x, self.A, self.B, self.selected)
        return self.base(x) + F.linear(F.linear(x, self.A), self.B)

    def draw(self, dice: random.Random) -> None:
        self.selected = torch.tensor(sorted(dice.sample(range(len(self.A)), len(self.A) // 2)))

    def mask(self) -> None:
        if not self.skip:
            others = [i for i in range(len(self.A)) if i not in self.selected]
            self.A.grad[others], self.B.grad[:, others] = 0, 0


def encoder(skip: bool) -> nn.Module:
    """The demo's encoder with LoRA, its layers replaced by `Pair`."""
    config = LoraConfig(r=8, lora_alpha=8, task_type="SEQ_CLS")  # a scaling of 1
    model = get_peft_model(build(None, "cpu"), config)
    for path, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            A, B = module.lora_A["default"].weight.data, torch.randn(module.out_features, 8) / 10
            pair = Pair(module.get_base_layer(), A, B, skip)
            setattr(model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2], pair)
    return model.train()


def linear(skip: bool, d: int = 4096, r: int = 64) -> nn.Module:
    torch.manual_seed(0)
    base = nn.Linear(d, d, bias=False).requires_grad_(False)
    return Loss(Pair(base, torch.randn(r, d) / d**0.5, torch.randn(d, r) / r**0.5, skip))


class Loss(nn.Module):
    """A module with a loss, as `saved_bytes` calls it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> "Loss":
        self.loss = self.inner(x).sum()
        return self


def stepper(model: nn.Module, batch: dict[str, Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    pairs, dice = [m for m in model.modules() if isinstance(m, Pair)], random.Random(0)

    def step() -> None:
        for pair in pairs:
            pair.draw(dice)
        model(**batch).loss.backward()
        for pair in pairs:
            pair.mask()
        optimizer.step()
        optimizer.zero_grad()

    return step


def check(plain: nn.Module, skipped: nn.Module, batch: dict[str, Tensor]) -> None:
    """Both have the same loss and the same masked gradients."""
    grads = []
    for model in (plain, skipped):
        torch.manual_seed(0)  # of the dropout
        model(**batch).loss.backward()
        for pair in (m for m in model.modules() if isinstance(m, Pair)):
            pair.mask()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
        model.zero_grad()
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * a.abs().max().item() + 1e-7)


def compare(models: dict[str, nn.Module], batch: dict[str, Tensor], rounds: int) -> dict[str, tuple[float, int]]:
    """Median seconds of a step and bytes kept; the two take turns, and none is always the first."""
    check(*models.values(), batch)
    steps = {name: stepper(model, batch) for name, model in models.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(rounds + 2):
        for name in sorted(steps, reverse=round_ % 2 == 1):
            taken = seconds(steps[name], "cpu")
            if round_ >= 2:  # two rounds to warm up
                times[name].append(taken)
    return {name: (median(times[name]), saved_bytes(models[name], batch)) for name in models}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rounds", 10), ("batch", 32), ("length", 128), ("tokens", 512)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 20000, (args.batch, args.length), generator=g)
    labels = torch.randint(0, 2, (args.batch,), generator=g)
    rows = dict(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels)
    inputs = dict(x=torch.randn(1, args.tokens, 4096, generator=g).requires_grad_())
    for what, make, batch in (("encoder, r = 8", encoder, rows), ("d = 4096, r = 64", linear, inputs)):
        found = compare({"plain": make(False), "skipped": make(True)}, batch, args.rounds)
        for name, (time, kept) in found.items():
            print(f"{what:16} {name:8} {1e3 * time:8.1f} ms a step   {kept / 2**20:8.1f} MiB kept for backward")
        time, kept = (found["skipped"][i] / found["plain"][i] for i in (0, 1))
        print(f"{what:16} skipped / plain: time {time:.3f}, kept for backward {kept:.3f}")


if __name__ == "__main__":
    main()
