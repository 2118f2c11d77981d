"""One training step of each method beside PEFT's LoRA (same rank, on q and v), in turn in one process.

    python benchmarks/step.py [--rounds 30] [--batch 32] [--length 128] [--device cpu] [--json > results/step.jsonl]

Prints the median time of a step of each, its ratio to LoRA's, and the bytes that autograd keeps for the backward pass;
with --json as records, one a line.
With residuals, the layers up to the end of the first span get no backward pass; with LoRA all but the first projections
do. The merges join neighbours, six residuals to three, so one layer more is spared. ResLoRA's shortcuts are named as in
Table 8 of its paper: is, bs, ms for input, block, middle, with the number of previous blocks.
"""

import argparse
import json
import time
from collections.abc import Callable
from statistics import median

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

import lor2c


def build(config: PeftConfig | None, device: str) -> nn.Module:
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(lor2c.demo_model(), num_labels=2, dtype=torch.float32)
    return (get_peft_model(model, config) if config else model).to(device).train()


def stepper(model: nn.Module, batch: dict[str, Tensor], rm: bool = False) -> Callable[[], None]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    if rm:
        lor2c.RMLoRACallback().begin(model, optimizer)

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def saved_bytes(model: nn.Module, batch: dict[str, Tensor]) -> int:
    """Bytes of activations that one forward keeps for its backward: distinct storages, parameters apart."""
    own, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = model(**batch).loss
    total = sum(kept.values())
    del loss
    return total


def seconds(step: Callable[[], None], device: str) -> float:
    begin = time.perf_counter()
    step()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def configs() -> dict[str, PeftConfig]:
    common = dict(r=8, task_type="SEQ_CLS")
    lora = LoraConfig(**common, lora_alpha=16, lora_dropout=0.1)
    residual = lor2c.LoR2CConfig(**common, alpha=16, dropout=0.1)
    found = {"lora": lora, "rmlora": lora, "lor2c": residual, "lor2c, merged": residual}
    for kind, pre_num in (("input", 1), ("block", 1), ("block", 4), ("middle", 1), ("middle", 4)):
        links = dict(shortcut=kind, pre_num=pre_num)
        found[f"{kind[0]}s {pre_num}"] = lor2c.ResLoRAConfig(**common, **links, alpha=16, dropout=0.1)
    return found


def measure(rounds: int = 30, batch: int = 32, length: int = 128, device: str = "cpu") -> dict[str, dict[str, float]]:
    """Median seconds of a step and bytes kept, per method; the methods take turns in every round."""
    g = torch.Generator().manual_seed(0)
    ids, labels = torch.randint(1000, 20000, (batch, length), generator=g), torch.randint(0, 2, (batch,), generator=g)
    rows = dict(input_ids=ids.to(device), attention_mask=torch.ones_like(ids).to(device), labels=labels.to(device))
    models = {name: build(config, device) for name, config in configs().items()}
    for layer in (0, 2, 4):
        lor2c.merge_modules(models["lor2c, merged"], layer, layer + 1)
    steps = {name: stepper(model, rows, name == "rmlora") for name, model in models.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(rounds + 2):
        for name in sorted(steps, reverse=round_ % 2 == 1):  # none is always the first
            taken = seconds(steps[name], device)
            if round_ >= 2:  # two rounds to warm up
                times[name].append(taken)
    return {n: {"seconds": median(times[n]), "bytes": saved_bytes(models[n], rows)} for n in models}


def rows(result: dict[str, dict[str, float]]) -> list[dict[str, str | float]]:
    """A record for each method: milliseconds of a step, MiB kept for backward, and both over LoRA's."""
    seconds, kept = result["lora"]["seconds"], result["lora"]["bytes"]
    return [
        {
            "name": name,
            "ms": round(1e3 * row["seconds"], 1),
            "ms_of_lora": round(row["seconds"] / seconds, 2),
            "mib": round(row["bytes"] / 2**20, 1),
            "mib_of_lora": round(row["bytes"] / kept, 2),
        }
        for name, row in result.items()
    ]


def line(row: dict[str, str | float]) -> str:
    """A record to read."""
    return (
        f"{row['name']:14} {row['ms']:8.1f} ms a step, {row['ms_of_lora']:.2f} of LoRA's   "
        f"{row['mib']:8.1f} MiB kept for backward, {row['mib_of_lora']:.2f}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rounds", 30), ("batch", 32), ("length", 128), ("device", "cpu")):
        parser.add_argument(f"--{name}", type=type(default), default=default)
    parser.add_argument("--json", action="store_true", help="print JSON Lines")
    args = vars(parser.parse_args())
    write = json.dumps if args.pop("json") else line
    for row in rows(measure(**args)):
        print(write(row))
