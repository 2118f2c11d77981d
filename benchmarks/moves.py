"""What a move costs: the jump of the held-out loss for each pair of neighbours, merged as in the paper, merged by a fit, and
with both ranks halved, which leaves as many numbers as the merge.

    python benchmarks/moves.py ADAPTER --model FOLDER --data-dir ALPACA --output results/moves.jsonl --name NAME

ADAPTER is one that `lor2c alpaca` has trained. All three start from the same weights and are undone afterwards.
"""

import argparse
import json
from itertools import pairwise
from pathlib import Path

import torch
from peft import PeftModel
from transformers import DataCollatorForSeq2Seq

from lor2c.data.base import load_decoder
from lor2c.runs.build import load_data
from lor2c.runs.recipes import make_run
from lor2c.training.fitted import fit_merge, write_pair
from lor2c.training.scores import scores_of
from lor2c.training.shrink import directions
from lor2c.training.surgery import merge_modules


def batches(rows, collate, n: int, size: int = 8) -> list[dict[str, torch.Tensor]]:
    "n evenly spaced rows in batches."
    picked = [rows[i * len(rows) // n] for i in range(n)]
    return [dict(collate(picked[i : i + size])) for i in range(0, n, size)]


@torch.no_grad()
def loss_of(model, held: list[dict[str, torch.Tensor]]) -> float:
    "Mean loss of a response token."
    model.eval()
    total = tokens = 0
    for batch in held:
        n = int((batch["labels"][:, 1:] != -100).sum())
        total, tokens = total + model(**batch).loss.item() * n, tokens + n
    return total / tokens


def jumps(model, name: str, first, second, train, held, before: float) -> dict[str, float]:
    "How much the loss rises by each way to save one pair of numbers, of these two neighbours."
    tuner, found = model.base_model, {}
    now, weights = tuner.layout(), {k: v.clone() for k, v in model.state_dict().items() if "lor2c" in k}

    def undone() -> None:
        tuner.set_layout(now)
        model.load_state_dict(weights, strict=False)

    for way, arguments in {"paper": {}, "fitted": dict(keep="fitted", batches=train)}.items():
        merge_modules(model, first[0], second[0], **arguments)
        found[way] = loss_of(model, held) - before
        undone()
    of = directions(model, name, train, [first, second])
    half = now.with_rank(first[0], tuner.peft_config[name].r // 2).with_rank(second[0], tuner.peft_config[name].r // 2)
    tuner.set_layout(half)
    for span in (first, second):
        best = of[span].price.topk(tuner.peft_config[name].r // 2).indices
        write_pair(tuner, name, span, of[span].A[best], of[span].B[:, best])
    found["half the rank"] = loss_of(model, held) - before
    undone()
    tuner.set_layout(now.with_rank(first[0], 0).with_rank(second[0], 0))
    found["neither"] = loss_of(model, held) - before
    undone()
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("adapter"), parser.add_argument("--model", required=True)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--max-length", type=int, default=64), parser.add_argument("--held", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0), parser.add_argument("--name", required=True)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    base, tokenizer = load_decoder(args.model, "fp32", None, "cpu")
    model = PeftModel.from_pretrained(base, args.adapter, is_trainable=True)
    run = make_run(
        "alpaca", "lor2c", args.model, max_length=args.max_length, max_train_samples=400, held_out=4 * args.held,
        data_dir=args.data_dir, seed=args.seed,
    )  # fmt: skip
    data, _ = load_data(run, tokenizer)
    tokenizer.padding_side = "right"
    collate = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)
    train, held = batches(data["train"], collate, 64), batches(data["validation"], collate, args.held, 16)
    before, name = loss_of(model, held), model.base_model.active_adapters[0]
    scores = scores_of(model.base_model)
    for first, second in pairwise(model.base_model.layout().spans):
        found = jumps(model, name, first, second, train, held, before)
        _, predicted = fit_merge(model, name, first, second, train)
        record = {
            "name": f"{args.name}-{first[0]}-{second[0]}", "loss": before, "rise": found, "predicted": predicted,
            "sfs": scores[first[0]] + scores[second[0]], "held_out_rows": args.held, "torch": torch.__version__,
        }  # fmt: skip
        print({way: round(rise, 4) for way, rise in found.items()}, flush=True)
        with args.output.open("a") as file:
            file.write(json.dumps(record) + "\n")
