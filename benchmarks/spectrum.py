"""Singular values of residuals while they are trained: the measurement behind Fig. 2 of the LoR2C paper.

    python benchmarks/spectrum.py --data-dir glue --output results/spectrum.jsonl --name mrpc-w
    python benchmarks/spectrum.py --data-dir glue --rank 128 --output results/spectrum.jsonl --name mrpc-rank-128

Without --rank the residual of every layer is one d x d matrix that starts at zero, h(t+1) = W h(t) + Layer(h(t)), Eq. 2.
With --rank it is LoR2C's pair with scaling 1, and the matrices are the product B A and both of its factors. The record
holds, at the start and after each epoch, means over the layers: the largest singular values, their sum, how many hold 90 %
of the sum of squares, and the share of it that the 8 largest hold; of up to 16 of them also those of each layer. It is
written after every epoch.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from records import keep
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from lor2c.runs.job import Job, prepare
from lor2c.runs.recipes import make_run
from lor2c.runs.record import versions
from lor2c.runs.settings import Run
from lor2c.runs.train import make_trainer
from lor2c.tuners.residual import hidden_states, pairs_of
from lor2c.tuners.stack import find_layers, stream_width

TOP, EACH = 50, 16  # singular values in the record; so many or fewer are kept for each layer as well


class Whole(nn.Module):
    """A forward hook that adds W h to the output of a layer that was called with h. W (d, d) starts at zero."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.zeros(d, d))

    def forward(self, layer: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
        return output + nn.functional.linear(hidden_states(layer, args, kwargs), self.W).to(output.dtype)


def add_whole(model: nn.Module) -> None:
    """Put a residual with one unfactored matrix around every layer."""
    path, layers = find_layers(model)
    for layer in layers:
        layer.residual = Whole(stream_width(model, path))
        layer.register_forward_hook(layer.residual, with_kwargs=True)


def matrices(model: nn.Module, rank: int | None) -> dict[str, list[Tensor]]:
    """What is decomposed, each a list over the layers. With a rank, A (r, d) and B (d, r) of LoR2C at scaling 1."""
    if rank is None:
        return {"W": [layer.residual.W.detach() for layer in find_layers(model)[1]]}
    pairs = [(A.detach(), B.detach()) for A, B in pairs_of(model, "default").values()]
    return {"B A": [B @ A for A, B in pairs], "B": [B for _, B in pairs], "A": [A for A, _ in pairs]}


def rounded(values: Tensor, digits: int = 4) -> list:
    """As a list, to so many significant digits."""
    return json.loads(json.dumps(values.tolist()), parse_float=lambda text: float(f"{float(text):.{digits}g}"))


class Spectra(TrainerCallback):
    """Decomposes the matrices before training and after every epoch."""

    def __init__(self, rank: int | None, record: dict, write: Callable[[dict], None]) -> None:
        self.rank, self.record, self.write = rank, record, write

    def note(self, model: nn.Module, epoch: float) -> None:
        self.record["epochs"].append(round(epoch))
        for name, found in matrices(model, self.rank).items():
            values = torch.linalg.svdvals(torch.stack(found))[:, : self.rank]  # (layers, n); a product has rank of them
            into = self.record["matrices"].setdefault(name, {"shape": list(found[0].shape)})
            into.setdefault("values", []).append(rounded(values[:, :TOP].mean(0)))
            into.setdefault("sum", []).append(rounded(values.sum(-1).mean()))
            into.setdefault("rank_90", []).append(rounded(rank_for(values, 0.9).mean()))
            into.setdefault("top_8", []).append(rounded(share_of(values, 8).mean()))
            if values.shape[-1] <= EACH:
                into.setdefault("layers", []).append(rounded(values))
        self.write(self.record)

    def on_train_begin(self, args, state, control, model=None, **_) -> None:
        self.note(model, 0)

    def on_log(self, args, state, control, logs=None, model=None, **_) -> None:
        if "loss" in logs:  # once after each epoch
            self.record["train_loss"].append(round(logs["loss"], 4))
            self.note(model, state.epoch)


def rank_for(values: Tensor, share: float) -> Tensor:
    """How many singular values hold that share of the sum of squares, for each row; 0 for a row of zeros."""
    energy = values.square().cumsum(-1)
    return ((energy < share * energy[:, -1:]).sum(-1) + (energy[:, -1] > 0)).float()


def share_of(values: Tensor, k: int) -> Tensor:
    """The share of the sum of squares that the k largest hold, for each row; 0 for a row of zeros."""
    energy = values.square()
    return energy[:, :k].sum(-1) / energy.sum(-1).clamp(min=torch.finfo(energy.dtype).tiny)


def trainer_of(job: Job) -> Trainer:
    """The job's trainer, which neither evaluates nor saves on its way."""
    job.args.eval_strategy = job.args.save_strategy = "no"
    job.args.load_best_model_at_end = False
    return make_trainer(job)


def describe(run: Run, apart: tuple[str, ...] = ()) -> dict:
    """The settings of a run that a figure's caption needs; no folders."""
    names = "task model seed epochs batch_size max_length max_train_samples lr rank alpha dropout precision"
    return {name: getattr(run, name) for name in names.split() if name not in apart}


def measure(run: Run, rank: int | None, write: Callable[[dict], None]) -> None:
    settings = describe(run) if rank else describe(run, apart=("rank", "alpha", "dropout"))
    record = {"settings": settings, "epochs": [], "train_loss": [], "matrices": {}}
    with tempfile.TemporaryDirectory() as folder:
        job = prepare(run, folder)
        if rank is None:
            add_whole(job.model)
        trainer = trainer_of(job)
        trainer.add_callback(Spectra(rank, record, write))
        finish(trainer, job, record, write)


def finish(trainer: Trainer, job: Job, record: dict, write: Callable[[dict], None]) -> None:
    """Train to the end and write the record, with the last epoch's accuracy."""
    trainer.train()
    record["accuracy"] = round(trainer.evaluate()["eval_accuracy"], 4)
    record["baseline"] = round(job.baseline["accuracy"], 4)
    write(record | {"versions": versions()})


def parser_of(description: str, epochs: int, lr: float, lr_help: str) -> argparse.ArgumentParser:
    """What the two scripts are asked for alike."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True, help="folder of GLUE")
    parser.add_argument("--output", type=Path, required=True, help="JSON Lines file that keeps the record")
    parser.add_argument("--name", required=True, help="of the record; one of that name is replaced")
    for name, default in (("epochs", epochs), ("rows", 500), ("max-length", 96), ("batch-size", 32), ("seed", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--lr", type=float, default=lr, help=lr_help)
    parser.add_argument("--precision", default="bf16", choices=("fp32", "bf16"))
    return parser


def run_of(asked: argparse.Namespace, method: str) -> Run:
    """The run that was asked for."""
    settings = dict(epochs=asked.epochs, max_train_samples=asked.rows, max_length=asked.max_length, device="cpu")
    settings |= dict(batch_size=asked.batch_size, seed=asked.seed, lr=asked.lr, precision=asked.precision)
    return make_run("mrpc", method, "minilm", data_dir=asked.data_dir, **settings)


if __name__ == "__main__":
    parser = parser_of(__doc__, 50, 4e-4, "the paper's")
    parser.add_argument("--rank", type=int, help="of LoR2C's pairs; without it one d x d matrix")
    asked = parser.parse_args()
    chosen = run_of(asked, "lor2c" if asked.rank else "head")
    if asked.rank:
        chosen = replace(chosen, rank=asked.rank, alpha=asked.rank, dropout=0.0)  # Eq. 2 has no scaling and no dropout
    measure(chosen, asked.rank, partial(keep, asked.output, asked.name))
