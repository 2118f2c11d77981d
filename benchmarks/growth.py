"""What a step, scoring, a move, saving and loading cost as the work grows: deeper, wider, with more rank, in more processes.

    python benchmarks/growth.py --output results/growth.jsonl [--rounds 7] [--tiny]

The model is a Llama with random weights, 12 layers of 256, r = 8. One size changes at a time. Each time is taken beside a LoRA
step of that model in the same round, and the record keeps the median of both, `seconds`, and of their ratio, `of_lora_step`.
`kept` is what one forward pass keeps for its backward, in bytes. With several processes (gloo, one thread each), `sent` counts
the bytes of gradients that a process hands to the all-reduce of a step. Kept record by record: what was measured stays.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.multiprocessing
from gpu import llama
from peft import LoraConfig, PeftModel, get_peft_model
from records import keep
from step import saved_bytes
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import lor2c
from lor2c.training.scores import scores_of

MIDDLE = dict(depth=12, width=256, rank=8)
SIZES = dict(depth=(6, 12, 24, 48, 96), width=(128, 256, 512, 1024), rank=(2, 8, 32, 128))
PROCESSES = (1, 2, 4)
BATCH = (2, 64)  # rows, tokens


def build(kind: str, depth: int, width: int, rank: int) -> nn.Module:
    """A Llama with LoRA on q and v, or with residuals whose B is no longer zero."""
    base = llama(
        "cpu",
        torch.float32,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=depth,
        num_attention_heads=4,
    )
    if kind == "lora":
        return get_peft_model(base, LoraConfig(r=rank, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    model = get_peft_model(base, lor2c.LoR2CConfig(r=rank, alpha=rank, dropout=0.0, task_type="CAUSAL_LM"))
    for name, p in model.named_parameters():
        if "lor2c_B" in name:
            nn.init.normal_(p, std=0.02)
    return model


def rows() -> dict[str, Tensor]:
    ids = torch.randint(256, BATCH, generator=torch.Generator().manual_seed(0))
    return dict(input_ids=ids, labels=ids)


def step_of(model: nn.Module, inner: nn.Module | None = None) -> Callable[[], None]:
    optimizer = torch.optim.AdamW([p for p in (inner or model).parameters() if p.requires_grad], lr=1e-4)
    batch = rows()

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def seconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def beside(
    unit: Callable[[], None], calls: dict[str, Callable[[], object]], rounds: int
) -> dict[str, dict[str, float]]:
    """Median seconds of each call, and the median of its ratio to the unit's time in the same round."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for call in (unit, *calls.values()):  # warm
        call()
    for _ in range(rounds):
        one = seconds(unit)
        for name, call in calls.items():
            time_ = seconds(call)
            taken[name].append((time_, time_ / one))
    middle = statistics.median
    return {k: dict(seconds=middle(t for t, _ in v), of_lora_step=middle(r for _, r in v)) for k, v in taken.items()}


def moves(model: nn.Module, size: dict[str, int]) -> dict[str, Callable[[], object]]:
    """Each move on the middle pair of layers, and the structure back afterwards (which is timed with it)."""
    tuner, first = model.base_model, size["depth"] // 2
    name, now = tuner.active_adapters[0], tuner.layout()
    weights = {k: v.clone() for k, v in model.state_dict().items() if "lor2c" in k}

    def undone(move: Callable[[], object]) -> None:
        move()
        tuner.set_layout(now, name)
        model.load_state_dict(weights, strict=False)

    batches = [rows()] * 2
    return {
        "merge": partial(undone, lambda: lor2c.merge_modules(model, first, first + 1)),
        "fitted merge": partial(
            undone, lambda: lor2c.merge_modules(model, first, first + 1, "fitted", batches=batches)
        ),
        "injection": partial(undone, lambda: lor2c.inject_lora(model, first)),
    }


def measure(grows: str, size: dict[str, int], rounds: int) -> dict[str, object]:
    lora, model = build("lora", **size), build("lor2c", **size)
    with tempfile.TemporaryDirectory() as folder:
        base = build("lor2c", **size).unload()
        model.save_pretrained(folder)
        calls = {
            "step": step_of(model),
            "scores": lambda: scores_of(model),
            **moves(model, size),
            "saving": lambda: model.save_pretrained(folder),
            "loading": lambda: PeftModel.from_pretrained(base, folder).unload(),
        }
        times = beside(step_of(lora), calls, rounds)
        stored = (Path(folder) / "adapter_model.safetensors").stat().st_size
    kept = {kind: saved_bytes(m, rows()) for kind, m in (("lora", lora), ("lor2c", model))}
    return dict(grows=grows, **size, times=times, kept=kept, stored=stored)


def one_of_several(rank: int, processes: int, meeting: str, rounds: int, found) -> None:
    """A process of a group: its LoR2C step beside its LoRA step, and the bytes of a step's gradients."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=processes)
    sent = []

    def count(_, bucket) -> torch.futures.Future[Tensor]:
        sent.append(bucket.buffer().nbytes)
        handle = torch.distributed.all_reduce(bucket.buffer().div_(processes), async_op=True)
        return handle.get_future().then(lambda done: done.value()[0])

    wrapped = {kind: DistributedDataParallel(build(kind, **MIDDLE)) for kind in ("lora", "lor2c")}
    wrapped["lor2c"].register_comm_hook(None, count)
    lora, residuals = (step_of(wrapped[kind], wrapped[kind].module) for kind in ("lora", "lor2c"))
    times = beside(lora, {"step": residuals}, rounds)
    if rank == 0:
        found.put(dict(grows="processes", **MIDDLE, processes=processes, times=times, sent=sum(sent) // (rounds + 1)))
    torch.distributed.destroy_process_group()


def in_processes(processes: int, rounds: int) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as folder:
        found = torch.multiprocessing.get_context("spawn").SimpleQueue()
        asked = (processes, f"{folder}/meeting", rounds, found)
        torch.multiprocessing.spawn(one_of_several, args=asked, nprocs=processes)
        return found.get()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="file of records")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tiny", action="store_true", help="the smallest of each, once: does it run?")
    asked = parser.parse_args()
    rounds = 1 if asked.tiny else asked.rounds
    for grows, values in SIZES.items():
        for value in values[:1] if asked.tiny else values:
            middle = dict(depth=4, width=32, rank=2) if asked.tiny else MIDDLE
            keep(asked.output, f"{grows}-{value}", measure(grows, middle | {grows: value}, rounds))
            print(grows, value, flush=True)
    for processes in PROCESSES[1:2] if asked.tiny else PROCESSES:
        keep(asked.output, f"processes-{processes}", in_processes(processes, rounds))
        print("processes", processes, flush=True)


if __name__ == "__main__":
    main()
