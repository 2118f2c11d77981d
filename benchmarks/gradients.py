"""Gradients of every layer, with LoRA and with LoR2C: the measurement behind Fig. 7 of the LoR2C paper.

    python benchmarks/gradients.py --data-dir glue --method lora --output results/gradients.jsonl --name mrpc-lora-1
    python benchmarks/gradients.py --data-dir glue --method lor2c --output results/gradients.jsonl --name mrpc-lor2c-1

Per epoch and layer, of the adapter's A and B (two pairs for LoRA, on q and v; one for LoR2C), before clipping:
`mean_abs`, the mean absolute entry of the gradient, and `norm`, its Frobenius norm; both averaged over the steps.
At the start and after each epoch, on 32 validation rows without dropout: `stream`, the Frobenius norm of dL/dh of the
input of each layer and of the last output; with LoR2C also the two terms of Eq. 10, `through_layer` and `through_residual`.
The record is written after every epoch.
"""

import re
import tempfile
from collections import defaultdict
from collections.abc import Callable
from functools import partial

import torch
from records import keep
from spectrum import describe, finish, parser_of, rounded, run_of, trainer_of
from torch import Tensor, nn
from transformers import TrainerCallback

from lor2c.runs.job import prepare
from lor2c.runs.settings import Run
from lor2c.tuners.residual import residuals
from lor2c.tuners.stack import find_layers

KEYS = ("input_ids", "attention_mask", "token_type_ids", "labels")


class AddUp:
    """A hook that adds up a parameter's gradients, as backward leaves them."""

    def __init__(self, into: dict[str, float]) -> None:
        self.into = into

    def __call__(self, p: nn.Parameter) -> None:
        self.into["sum"] += p.grad.abs().sum().item()
        self.into["entries"] += p.grad.numel()
        self.into["squares"] += p.grad.square().sum().item()


class Gradients(TrainerCallback):
    """Notes the gradients of each layer's adapter over the steps of an epoch, and those of the stream after it."""

    def __init__(self, probe: dict[str, Tensor], record: dict, write: Callable[[dict], None]) -> None:
        self.probe, self.record, self.write = probe, record, write

    def on_train_begin(self, args, state, control, model=None, **_) -> None:
        self.step = [defaultdict(float) for _ in find_layers(model)[1]]
        for name, p in model.named_parameters():
            if p.requires_grad and (layer := re.search(r"layer\.(\d+)\.", name)):
                p.register_post_accumulate_grad_hook(AddUp(self.step[int(layer[1])]))
        self.steps = []
        self.note(model, 0)

    def on_step_end(self, args, state, control, **_) -> None:
        self.steps.append([(one["sum"] / one["entries"], one["squares"] ** 0.5) for one in self.step])
        for one in self.step:
            one.clear()

    def on_log(self, args, state, control, logs=None, model=None, **_) -> None:
        if "loss" not in logs:
            return
        means = torch.tensor(self.steps).mean(0)  # (layers, 2)
        for name, values in zip(("mean_abs", "norm"), means.T, strict=True):
            self.record[name].append(rounded(values))
        self.record["train_loss"].append(round(logs["loss"], 4))
        self.steps = []
        self.note(model, state.epoch)

    def note(self, model: nn.Module, epoch: float) -> None:
        self.record["epochs"].append(round(epoch))
        for name, values in stream_gradients(model, self.probe).items():
            self.record[name].append(rounded(values))
        self.write(self.record)


class Keep:
    """Hooks that keep the input of every layer, and the output of the last."""

    def __init__(self, layers: nn.ModuleList) -> None:
        self.stream: list[Tensor] = []
        self.handles = [layer.register_forward_pre_hook(self.keep_input) for layer in layers]
        self.handles.append(layers[-1].register_forward_hook(self.keep_output))  # behind the one that adds a residual

    def keep_input(self, layer: nn.Module, args: tuple) -> None:
        self.stream.append(args[0])

    def keep_output(self, layer: nn.Module, args: tuple, output: Tensor) -> None:
        self.stream.append(output)


def stream_gradients(model: nn.Module, rows: dict[str, Tensor]) -> dict[str, Tensor]:
    """Norms of dL/dh along the stream and, where there are residuals, of the two terms of Eq. 10. Parameters get no gradient."""
    inner, training = model.base_model, model.training  # below what mixed precision wraps
    keep = Keep(find_layers(model)[1])
    model.eval()
    words = inner.get_input_embeddings()(rows["input_ids"]).detach().requires_grad_()
    loss = inner(**{n: t for n, t in rows.items() if n != "input_ids"}, inputs_embeds=words).loss
    grads = torch.autograd.grad(loss, keep.stream)
    for handle in keep.handles:
        handle.remove()
    model.train(training)
    found = {"stream": [g.norm() for g in grads], "through_layer": [], "through_residual": []}
    for _, one in residuals(model):
        A, B = one.lor2c_A["default"].weight.detach(), one.lor2c_B["default"].weight.detach()
        direct = one.scaling["default"] * grads[one.end + 1] @ B @ A
        found["through_layer"].append((grads[one.end] - direct).norm())
        found["through_residual"].append(direct.norm())
    return {name: torch.stack(values) for name, values in found.items() if values}


def measure(run: Run, write: Callable[[dict], None]) -> None:
    record = {"method": run.method, "settings": describe(run), "epochs": [], "train_loss": []}
    record |= {name: [] for name in ("mean_abs", "norm", "stream")}
    if run.method == "lor2c":
        record |= {name: [] for name in ("through_layer", "through_residual")}
    with tempfile.TemporaryDirectory() as folder:
        job = prepare(run, folder)
        trainer = trainer_of(job)
        rows = job.data["validation"].select(range(0, len(job.data["validation"]), len(job.data["validation"]) // 32))
        probe = trainer.data_collator([{k: v for k, v in row.items() if k in KEYS} for row in rows.select(range(32))])
        trainer.add_callback(Gradients(dict(probe), record, write))
        finish(trainer, job, record, write)


if __name__ == "__main__":
    parser = parser_of(__doc__, 8, 3e-3, "the best on the demo's rows")
    parser.add_argument("--method", required=True, choices=("lora", "lor2c"))
    asked = parser.parse_args()
    measure(run_of(asked, asked.method), partial(keep, asked.output, asked.name))
