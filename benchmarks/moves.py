"""How much the loss rises by each move on a trained adapter, and what was predicted.

    python benchmarks/moves.py RUN --output results/moves.jsonl --name NAME [--device cuda]

RUN is the folder of a finished `lor2c` run. For each pair of neighbours: merged as in the paper, merged by a fit, and with both
ranks halved, which leaves as many numbers as a merge. For every third layer: LoRA injected as in the paper, injected LoRA
that was fitted to what the residual did, half of the rank, a quarter, none, and a quarter by the size of singular values. All
start from the same weights, in float32, and are undone afterwards. What FILE has already is not measured again.
"""

import argparse
import json
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn

from lor2c.runs.again import reopen
from lor2c.runs.train import make_trainer
from lor2c.training.decisions import sample_batches
from lor2c.training.fitted import fit_seen, see, write_pair
from lor2c.training.scores import scores_of
from lor2c.training.shrink import directions
from lor2c.training.surgery import inject_lora, merge_modules
from lor2c.tuners.residual import residuals
from lor2c.tuners.units import plain_pairs


def labels_of(batch: dict) -> int:
    "How many terms the loss of a batch is the mean of."
    labels = batch["labels"]
    return int((labels[:, 1:] != -100).sum()) if labels.dim() > 1 else len(labels)


@torch.no_grad()
def loss_of(model, held: list[dict]) -> float:
    "Mean loss over all labels."
    model.eval()
    sizes = [labels_of(batch) for batch in held]
    return sum(model(**batch).loss.item() * n for batch, n in zip(held, sizes, strict=True)) / sum(sizes)


class Moves:
    "Moves on one adapter, each undone after it was scored."

    def __init__(self, model, train: list[dict], held: list[dict]) -> None:
        self.model, self.train, self.held = model, train, held
        self.tuner, self.name = model.base_model, model.base_model.active_adapters[0]
        self.now, self.r = self.tuner.layout(self.name), self.tuner.peft_config[self.name].r
        self.weights = {k: v.clone() for k, v in model.state_dict().items() if "lor2c" in k}
        self.before = loss_of(model, held)
        start = time.perf_counter()
        self.directions = directions(model, self.name, train, self.now.spans)
        pairs = {(first[0], second[1]): (first, second) for first, second in pairwise(self.now.spans)}
        seen = see(model, self.name, list(pairs), train)
        self.fits = {span: fit_seen(model, self.name, *pairs[span], of) for span, of in seen.items()}
        print(f"looked at {len(train)} batches in {time.perf_counter() - start:.0f} s", flush=True)

    def rise(self) -> float:
        "How much more the loss is now; then all is as it was."
        found = loss_of(self.model, self.held) - self.before
        self.tuner.set_layout(self.now)
        self.model.load_state_dict(self.weights, strict=False)
        return found

    def lower(self, spans, r: int) -> None:
        "Keep the best r directions of these residuals."
        of, after = self.directions, self.now
        for span in spans:
            after = after.with_rank(span[0], r)
        self.tuner.set_layout(after)
        for span in spans if r else ():
            best = of[span].price.topk(r).indices
            write_pair(self.tuner, self.name, span, of[span].A[best], of[span].B[:, best])

    def of_pair(self, first, second) -> dict[str, float]:
        "The ways to save a pair's numbers in two neighbours."
        found, span = {}, (first[0], second[1])
        for way in ("paper", "fitted"):
            merge_modules(self.model, first[0], second[0])
            if way == "fitted":
                write_pair(self.tuner, self.name, span, *self.fits[span][0][:2])
            found[way] = self.rise()
        self.lower([first, second], self.r // 2)
        return found | {"half the rank": self.rise()}

    def of_layer(self, span, steps: int) -> dict[str, float]:
        "The ways to do without half of a residual's numbers, or without all of them."
        found = {}
        for way, n in {"injected": 0, "injected and fitted": steps}.items():
            layer = self.layer(span[0])
            seen = calls_of(self.model, layer, self.train) if n else []
            inject_lora(self.model, span[0])
            if n:
                fit_injected(layer, seen, n)
            found[way] = self.rise()
        for way, r in {"half the rank": self.r // 2, "a quarter": self.r // 4, "none": 0}.items():
            self.lower([span], r)
            found[way] = self.rise()
        self.by_size(span, self.r // 4)
        return found | {"a quarter, by size": self.rise()}

    def by_size(self, span, r: int) -> None:
        "Keep the r largest singular values of a residual, whatever the loss says."
        A, B = plain_pairs(self.tuner, self.name)[span]
        Q, R = torch.linalg.qr(B)
        U, S, V = torch.linalg.svd(R @ A, full_matrices=False)
        self.tuner.set_layout(self.now.with_rank(span[0], r))
        write_pair(self.tuner, self.name, span, S[:r, None] * V[:r], Q @ U[:, :r])

    def layer(self, index: int) -> nn.Module:
        return next(layers for layers, _ in residuals(self.tuner))[index]


@torch.no_grad()
def calls_of(model, layer: nn.Module, batches: list[dict]) -> list:
    "What a layer is called with, and what comes out."
    seen = []
    hook = layer.register_forward_hook(
        lambda _, args, kwargs, out: seen.append((args, kwargs, out[0] if isinstance(out, tuple) else out)), with_kwargs=True
    )
    model.eval()
    for batch in batches:
        model(**batch, **({} if batch["labels"].dim() == 1 else {"use_cache": False}))
    hook.remove()
    return seen


def fit_injected(layer: nn.Module, seen: list, steps: int, lr: float = 3e-3) -> None:
    "Let a layer's injected LoRA do what its residual did, each token in units of its own size."
    pairs = [p for name, p in layer.named_parameters() if "lora_" in name and p.requires_grad]
    optimizer = torch.optim.Adam(pairs, lr=lr)
    for step in range(steps):
        args, kwargs, want = seen[step % len(seen)]
        out = layer(*args, **kwargs)
        out = out[0] if isinstance(out, tuple) else out
        loss = ((out - want) / want.square().mean(-1, keepdim=True).sqrt()).square().mean()
        optimizer.zero_grad(), loss.backward(), optimizer.step()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path), parser.add_argument("--name", required=True)
    parser.add_argument("--output", type=Path, required=True), parser.add_argument("--device", default="cpu")
    parser.add_argument("--data-dir"), parser.add_argument("--model")
    parser.add_argument("--held", type=int, default=48), parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        moved = dict(device=args.device, data_dir=args.data_dir, model=args.model, precision="fp32", checkpointing=False)
        job = reopen(args.run, Path(folder) / "job", **moved)
        trainer = make_trainer(job)
        device = trainer.args.device
        common = {name: getattr(job.run, name) for name in ("task", "method", "units", "rank", "seed")}
        train = sample_batches(trainer.get_train_dataloader(), 8, 64, device)
        held = sample_batches(trainer.get_eval_dataloader(), 16, args.held, device)
    torch.manual_seed(job.run.seed)
    moves = Moves(job.model, train, held)
    scores = scores_of(moves.tuner)
    common |= dict(loss=moves.before, held_out_rows=args.held, torch=torch.__version__)

    known = {json.loads(line)["name"] for line in args.output.open()} if args.output.exists() else set()

    def note(record: dict) -> None:
        rise = {way: round(value, 4) for way, value in record["rise"].items()}
        print(record["name"], rise, "predicted", round(record["predicted"], 4), flush=True)
        with args.output.open("a") as file:
            file.write(json.dumps(record | common) + "\n")

    for first, second in pairwise(moves.now.spans):
        if f"{args.name}-{first[0]}-{second[0]}" in known:
            continue
        predicted = moves.fits[first[0], second[1]][1]
        sfs = scores[first[0]] + scores[second[0]]
        record = dict(name=f"{args.name}-{first[0]}-{second[0]}", move="merge", layers=[first[0], second[1]])
        note(record | dict(rise=moves.of_pair(first, second), predicted=predicted, sfs=sfs))
    for span in moves.now.spans[::3]:
        if f"{args.name}-{span[0]}" in known:
            continue
        predicted = moves.directions[span].rise.sum().item()
        record = dict(name=f"{args.name}-{span[0]}", move="single", layers=list(span), rise=moves.of_layer(span, args.steps))
        note(record | dict(predicted=predicted, sfs=scores[span[0]]))
