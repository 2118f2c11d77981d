"""The residual stream of a model layer by layer, and what one step of Adam does to it through LoRA and through LoR2C.

    python benchmarks/stream.py minilm --encoder --rank 8 --alpha 16
    python benchmarks/stream.py gemma-270m --rank 64 --alpha 32

Keeps its record in results/stream.jsonl under the model's name. Of each layer's input, and of the last output: the median
norm over tokens, that of first tokens apart, and how much of the energy the three largest coordinates hold. Then, for LoRA
on q and v, for LoR2C, and for LoR2C whose A does not read those three: the change that the first step makes, which moves
every number of B by the learning rate. `alone`: one layer's B at a time, rate 1e-4, as a share of that layer's output
("stream") and of what the next layer's norm makes of it ("read", the same where there is no such norm). `together`: all
layers' B, change of the last state by rate. All are medians over the tokens of four sentences, first tokens apart, in
float32.
"""

import argparse
import importlib.metadata
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from records import keep
from torch import Tensor, nn

from lor2c import LoR2CConfig
from lor2c.data.base import load_classifier, load_decoder
from lor2c.tuners.injection import find_qv
from lor2c.tuners.residual import pairs_of
from lor2c.tuners.stack import find_layers

SENTENCES = [
    "The rain had stopped, and the street began to dry in the morning sun.",
    "A prime number has exactly two divisors, one and itself.",
    "She opened the letter, read it twice, and put it back into the drawer.",
    "Water boils at a lower temperature on a mountain than at the sea.",
]
RATES = (1e-6, 1e-5, 1e-4, 3e-4, 1e-3, 3e-3)
LARGEST = 3


class Case:
    """A frozen model, a batch with a loss, and the stream that it recorded last."""

    def __init__(self, name: str, encoder: bool) -> None:
        torch.manual_seed(0)  # of the new head
        self.model, tokenizer = load_classifier(name, ["no", "yes"])[:2] if encoder else load_decoder(name)
        self.model.requires_grad_(False).eval()
        self.batch = dict(tokenizer(SENTENCES, return_tensors="pt", padding=True))
        ids, real = self.batch["input_ids"], self.batch["attention_mask"].bool()
        self.batch["labels"] = torch.tensor([0, 1, 1, 0]) if encoder else ids.masked_fill(~real, -100)
        self.first = real & (real.cumsum(1) == 1)
        self.others = real & ~self.first
        path, self.layers = find_layers(self.model)
        last = getattr(self.model.get_submodule(path.rpartition(".")[0]), "norm", nn.Identity())
        self.readers = [*(getattr(layer, "input_layernorm", nn.Identity()) for layer in self.layers[1:]), last]
        self.states: dict[int, Tensor] = {}
        self.layers[0].register_forward_pre_hook(lambda _, args: self.states.update({0: args[0].detach()}))
        for t, layer in enumerate(self.layers, start=1):
            layer.register_forward_hook(lambda _, args, out, t=t: self.states.update({t: out.detach()}))

    @torch.no_grad()
    def stream(self) -> list[Tensor]:  # inputs of all layers, and the last output, (batch, seq, d)
        self.model(**self.batch)
        return [self.states[t] for t in sorted(self.states)]

    def largest(self, state: Tensor) -> Tensor:
        return state[self.others].square().mean(0).topk(LARGEST).indices

    def describe(self, state: Tensor) -> dict[str, float]:
        energy, norms = state[self.others].square(), state.norm(dim=-1)
        return {
            "norm": norms[self.others].median().item(),
            "first": norms[self.first].median().item(),
            "largest": (energy.mean(0).topk(LARGEST).values.sum() / energy.mean(0).sum()).item(),
            "ordinary": (energy.median() / energy.mean()).sqrt().item(),  # median size of a coordinate, of the rms
        }

    def change(self, after: Tensor, before: Tensor) -> float:
        gaps = (after - before)[self.others].norm(dim=-1) / before[self.others].norm(dim=-1)
        return gaps.median().item()


def first_step(case: Case, model: PeftModel) -> dict[int, list[tuple[nn.Parameter, Tensor]]]:
    """Layer -> its B, and the direction of Adam's first step."""
    model(**case.batch).loss.backward()
    found: dict[int, list[tuple[nn.Parameter, Tensor]]] = {}
    for name, p in model.named_parameters():
        if "lor2c_B" in name or "lora_B" in name:
            found.setdefault(int(re.search(r"\.(\d+)\.", name)[1]), []).append((p, -p.grad.sign()))
    return found


@torch.no_grad()
def after_step(case: Case, some: Iterable[tuple[nn.Parameter, Tensor]], rate: float) -> list[Tensor]:
    """The stream with these B moved, which are zero again afterwards."""
    for p, direction in (some := list(some)):
        p.copy_(rate * direction)
    states = case.stream()
    for p, _ in some:
        p.zero_()
    return states


def steps(case: Case, config: PeftConfig, cut: bool = False) -> dict[str, Any]:
    """What the first step changes, by layer and by rate."""
    torch.manual_seed(0)
    before, model = case.stream(), get_peft_model(case.model, config)
    if cut:
        for (start, _), (A, _) in pairs_of(model, "default").items():
            A.data[:, case.largest(before[start])] = 0
    found, alone = first_step(case, model), []
    for t in sorted(found):
        after, read = after_step(case, found[t], 1e-4)[t + 1], case.readers[t]
        shares = case.change(after, before[t + 1]), case.change(read(after), read(before[t + 1]))
        alone.append(dict(zip(("stream", "read"), shares, strict=True)))
    everything, last = sum(found.values(), []), case.readers[-1]
    moved = {rate: last(after_step(case, everything, rate)[-1]) for rate in RATES}
    together = {f"{rate:g}": case.change(state, last(before[-1])) for rate, state in moved.items()}
    model.unload()
    return {"alone": alone, "together": together}


def measure(name: str, encoder: bool, rank: int, alpha: float) -> dict[str, Any]:
    case = Case(name, encoder)
    targets = list(find_qv(case.layers[0], case.model.config))
    lora, residual = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets), LoR2CConfig(r=rank, alpha=alpha)
    return {
        "model": name,
        "rank": rank,
        "alpha": alpha,
        "sentences": SENTENCES,
        "tokens": int(case.others.sum()),
        "width": case.stream()[0].shape[-1],
        "stream": [case.describe(state) for state in case.stream()],
        "largest": [case.largest(state).tolist() for state in case.stream()],
        "steps": {"lora": steps(case, lora), "lor2c": steps(case, residual), "cut": steps(case, residual, cut=True)},
        "versions": {package: importlib.metadata.version(package) for package in ("torch", "transformers", "peft")},
    }


def rounded(value: Any) -> Any:
    """Every float to five digits."""
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [rounded(part) for part in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--encoder", action="store_true")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--alpha", type=float, default=16)
    parser.add_argument("--to", type=Path, default=Path(__file__).parents[1] / "results/stream.jsonl")
    args = parser.parse_args()
    keep(args.to, args.model, rounded(measure(args.model, args.encoder, args.rank, args.alpha)))
