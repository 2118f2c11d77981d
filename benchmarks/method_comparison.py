"""PEFT's table of methods (MetaMathQA, Llama-3.2-3B) with LoR2C, IMLoR2C and ResLoRA in it, and a small one for any machine.

With a checkout of PEFT, which stays as it is, Python 3.12 and a GPU of 24 GiB. Models and data come from the hub:

    git clone https://github.com/huggingface/peft && pip install bitsandbytes tqdm
    python benchmarks/method_comparison.py write runs/peft
    python benchmarks/method_comparison.py start peft runs/peft

`write` makes the folders of the experiments, `start` runs the checkout's own run.py on each that has no result yet, with the
checkout's PEFT, in a process of its own. Results lie in runs/peft/results, in the form of PEFT's.

The small one asks for a decoder, a folder with the rows of a task, and texts on which forgetting is measured:

    python benchmarks/method_comparison.py reduced gemma-270m DIR --texts TEXTS.parquet --output results/method-comparison.jsonl
"""

import argparse
import json
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from peft import PeftConfig
from records import keep
from torch import nn
from transformers import PreTrainedTokenizerBase

from lor2c import IMCallback, LoR2CConfig, ResLoRAConfig
from lor2c.disk.files import write_json
from lor2c.experiments.contenders import contender_run
from lor2c.runs.job import Job, prepare
from lor2c.runs.train import carry_out

SUITE = Path("method_comparison", "MetaMathQA")


def experiments() -> dict[str, tuple[PeftConfig, float | None, dict[str, Any] | None]]:
    """Name -> adapter, learning rate (None: the suite's 1e-4), and the moves of IMLoR2C.

    Scaling is 2, as in the suite's LoRA of rank 32. Rank 53 has as many numbers as that."""
    made: dict[str, tuple[PeftConfig, float | None, dict[str, Any] | None]] = {}
    moves = dict(max_merges=3, max_injections=3, schedule="fractional")
    for units, rate in (("paper", None), ("stream", 1e-3)):
        for r, method in ((32, "lor2c"), (32, "imlor2c"), (53, "lor2c")):
            config = LoR2CConfig(r=r, alpha=2 * r, units=units, task_type="CAUSAL_LM")
            name = f"{method}/llama-3.2-3B-rank{r}" + f"-{units}" * (units != "paper")
            made[name] = config, rate, moves if method == "imlor2c" else None
    for shortcut, pre_num in (("input", 1), ("block", 4), ("middle", 4)):
        config = ResLoRAConfig(r=32, alpha=64, shortcut=shortcut, pre_num=pre_num, task_type="CAUSAL_LM")
        made[f"reslora/llama-3.2-3B-rank32-{shortcut}"] = config, None, None
    return made


def write(folder: Path) -> None:
    """Write the experiments as the suite reads them; moves.json is what the launcher reads."""
    for name, (config, rate, moves) in experiments().items():
        place = folder / "experiments" / name
        config.save_pretrained(place)
        if rate:
            write_json(place / "training_params.json", {"optimizer_kwargs": {"lr": rate, "weight_decay": 0.1}})
        if moves:
            write_json(place / "moves.json", moves)


def start(checkout: Path, folder: Path) -> int:
    """Run every experiment that has no result, each in a process of its own. Returns how many have none afterwards."""
    checkout, missing = checkout.resolve(), 0
    path = os.pathsep.join(filter(None, [str(checkout / "src"), os.environ.get("PYTHONPATH")]))
    for place in sorted({file.parent for file in folder.glob("experiments/*/*/*.json")}):
        result = folder / "results" / f"{place.parent.name}--{place.name}.json"
        if not result.exists():
            name = f"{place.parent.name}/{place.name}"
            command = [sys.executable, __file__, "one", checkout, folder, name]
            subprocess.run([*map(str, command)], env=os.environ | {"PYTHONPATH": path})
            missing += not result.exists()
            print(f"{name}: {result if result.exists() else 'no result, see above and cancelled_results'}", flush=True)
    return missing


def one(checkout: Path, folder: Path, name: str) -> None:
    """Run the checkout's run.py on one experiment, in this process. Raises RuntimeError if a move was due and not made."""
    suite, folder = (checkout / SUITE).resolve(), folder.resolve()
    sys.path.insert(0, str(suite))
    import utils  # the suite's

    for kind in ("results", "cancelled_results"):
        (folder / kind).mkdir(exist_ok=True)
    # All results lie beside the experiments. A result names its branch of PEFT, so those of a tag need no other folder.
    utils.RESULT_PATH = utils.RESULT_PATH_TEST = str(folder / "results")
    utils.RESULT_PATH_CANCELLED = str(folder / "cancelled_results")
    moves, loops = folder / "experiments" / name / "moves.json", []
    if moves.exists():
        settings = json.loads(moves.read_text(encoding="utf-8"))
        utils.get_optimizer_and_scheduler = partial(with_moves, utils.get_optimizer_and_scheduler, settings, loops)
    os.chdir(folder)
    sys.argv = ["run.py", "-v", "--clean", f"experiments/{name}"]
    runpy.run_path(str(suite / "run.py"), run_name="__main__")
    for loop in loops:
        loop.finish()
        write_json(folder / "results" / f"{name.replace('/', '--')}.moves", loop.history)


def with_moves(
    make: Callable[..., tuple[torch.optim.Optimizer, Any]],  # the suite's own
    settings: dict[str, Any],
    loops: list[IMCallback],  # gets the one that is at work
    model: nn.Module,
    *,
    max_steps: int,
    **given: Any,
) -> tuple[torch.optim.Optimizer, Any]:
    """The suite's optimizer and schedule, with IMLoR2C before and after each of the optimizer's steps."""
    optimizer, scheduler = make(model, max_steps=max_steps, **given)
    loop = IMCallback(**settings)
    loop.begin(model, max_steps, optimizer=optimizer)

    def after(*_: Any) -> None:
        optimizer.zero_grad()
        loop.after_step(model, optimizer)

    optimizer.register_step_pre_hook(lambda *_: loop.before_step(model))
    optimizer.register_step_post_hook(after)
    loops.append(loop)
    return optimizer, scheduler


# On q and v of a decoder like Gemma 3 270M these have as many numbers; DoRA has its magnitudes besides.
CONTENDERS = (
    "lora:rank=8:alpha=16:lr=1e-3",
    "rslora:rank=8:alpha=8:lr=1e-3",
    "dora:rank=8:alpha=16:lr=1e-3",
    "miss:rank=16:lr=1e-3",
    "reslora-bs:rank=8:alpha=16:lr=1e-3",
    "lor2c:rank=16:alpha=32:units=paper:lr=3e-5",
    "lor2c:rank=16:alpha=32:units=stream:lr=1e-3",
    "imlor2c:rank=16:alpha=32:units=stream:max_merges=2:max_injections=2:lr=1e-3",
)


def memory(on_cpu: bool) -> int:
    """The peak of the GPU's memory or, on a CPU, of this process's, in bytes. On a CPU it needs Linux."""
    if not on_cpu:
        return torch.cuda.max_memory_reserved()
    # not getrusage's: there a process begins with the peak of the one that started it
    return 1024 * int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])


@torch.no_grad()
def loss_of(model: nn.Module, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], length: int) -> float:
    """The mean loss of a token of these texts, each cut to so many tokens."""
    total, count = 0.0, 0
    for text in texts:
        ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=length).input_ids.to(model.device)
        tokens = ids.shape[1] - 1
        total, count = total + tokens * model(input_ids=ids, labels=ids).loss.item(), count + tokens
    return total / count


def measure(
    contender: str, task: str, model: str, seed: int, shared: dict[str, Any], texts: Sequence[str], length: int
) -> dict[str, Any]:
    """Train a contender, and return what the suite measures: accuracy, forgetting, memory, seconds, bytes of the file."""
    begin, on_cpu = time.perf_counter(), not torch.cuda.is_available() or shared.get("device") == "cpu"
    held = memory(on_cpu)
    with tempfile.TemporaryDirectory() as folder:
        job = prepare(contender_run(task, contender, seed, model, shared), folder)
        assert isinstance(job, Job)
        record = carry_out(job)
        peak, total = memory(on_cpu) - held, time.perf_counter() - begin
        size = (Path(folder) / "adapter/adapter_model.safetensors").stat().st_size
    tuned = job.model.eval()
    after = loss_of(tuned, job.tokenizer, texts, length)
    with tuned.disable_adapter():
        before = loss_of(tuned, job.tokenizer, texts, length)
    kept = ("task", "method", "seed", "model", "adapter_parameters", "steps", "rows", "device", "hyper_parameters", "versions")
    return {
        "accuracy": record["metrics"]["last"]["accuracy"],
        "held_out_loss": record["metrics"]["last"]["loss"],
        "forgetting": after - before,
        "loss_before": before,
        "peak_bytes": peak,
        "train_seconds": round(record["seconds_per_step"] * record["steps"], 4),
        "total_seconds": round(total, 1),
        "file_bytes": size,
        **{name: record[name] for name in kept},
    }


def read_texts(file: str, column: str, number: int) -> list[str]:
    """So many different texts, from all over a file."""
    texts = list(dict.fromkeys(pq.read_table(file, columns=[column])[column].to_pylist()))
    return texts[:: max(1, len(texts) // number)][:number]


def first_rows(data_dir: Path, task: str, rows: int, to: Path) -> None:
    """Copy a task's training rows, and the first of those to be scored on."""
    (to / task).mkdir()
    for split, number in (("train", None), ("test", rows)):
        pq.write_table(pq.read_table(data_dir / task / f"{split}.parquet").slice(0, number), to / task / f"{split}.parquet")


def reduced(args: argparse.Namespace) -> None:
    """Measure contender after contender, each in a process of its own, and keep a record of each."""
    texts = read_texts(args.texts, args.column, args.number)
    shared = dict(
        epochs=1, max_train_samples=args.steps * 4, batch_size=4, micro_batch_size=4, max_length=args.length, dropout=0.0,
        precision=args.precision, device=args.device,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        first_rows(args.data_dir, args.task, args.held_out, Path(folder))
        for contender in args.contenders:
            how = contender, args.task, args.model, args.seed, shared | {"data_dir": folder}, texts, args.length
            with ProcessPoolExecutor(1, get_context("spawn")) as fresh:
                record = fresh.submit(measure, *how).result()
            record["hyper_parameters"]["data_dir"] = None
            keep(args.output, contender, record)
            print(json.dumps({"name": contender, **record}), flush=True)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = made.add_subparsers(dest="command", required=True)
    for command in ("write", "start", "one"):
        suite = commands.add_parser(command)
        for name in ("folder",) if command == "write" else ("checkout", "folder"):
            suite.add_argument(name, type=Path)
    suite.add_argument("name", help="such as lor2c/llama-3.2-3B-rank32")
    small = commands.add_parser("reduced")
    small.add_argument("model", help="a decoder: gemma-270m, a name on the hub, or a folder")
    small.add_argument("data_dir", type=Path, help="holds the task's folder with train.parquet and test.parquet")
    small.add_argument("--task", default="svamp", help="svamp or gsm8k (%(default)s)")
    small.add_argument("--texts", required=True, help="a Parquet file of texts on which forgetting is measured")
    small.add_argument("--column", default="context", help="of the texts (%(default)s)")
    small.add_argument("--contenders", nargs="+", default=CONTENDERS)
    small.add_argument("--precision", default="bf16")
    small.add_argument("--device", default="auto")
    for name, default in (("number", 100), ("steps", 100), ("held-out", 100), ("length", 128), ("seed", 0)):
        small.add_argument(f"--{name}", type=int, default=default, help="(%(default)s)")
    small.add_argument("--output", type=Path, required=True)
    return made


if __name__ == "__main__":
    args = parser().parse_args()
    if args.command == "write":
        write(args.folder)
    elif args.command == "start":
        raise SystemExit(min(1, start(args.checkout, args.folder)))
    elif args.command == "one":
        one(args.checkout, args.folder, args.name)
    else:
        reduced(args)
