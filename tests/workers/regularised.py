"""RM-LoRA in one process, in two, killed and resumed: `regularised.py FOLDER` writes FOLDER/RUN.RANK.pt.

Every run is a process of its own, forked from this one, which imports and never computes.
"""

import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import transformers as T
from peft import LoraConfig, get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny import build

import lor2c
from lor2c.training.distributed import reshard, shard_residuals
from lor2c.training.imlor2c import IMCallback
from lor2c.training.optimizer import inner_optimizer
from lor2c.training.rm_lora import RMLoRACallback

ROWS, BATCH, EPOCHS = 16, 4, 4


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rows() -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(3, 64, (ROWS, 12), generator=torch.Generator().manual_seed(3))
    return [dict(input_ids=row, labels=row) for row in ids]


def full(value):
    value = value.full_tensor() if isinstance(value, DTensor) else value
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def lora():
    set_seed(0)
    model = get_peft_model(build("Llama"), LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM"))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    return model


def residuals(**config):
    set_seed(0)
    return get_peft_model(build("Llama"), lor2c.LoR2CConfig(r=4, alpha=8, dropout=0.0, task_type="CAUSAL_LM", **config))


def result(model, optimizer, callback) -> dict:
    inner = inner_optimizer(optimizer)
    return {
        "world": world(),
        "parameters": {name: full(p) for name, p in model.named_parameters() if p.requires_grad},
        "moments": [{k: full(v) for k, v in inner.state[p].items()} for g in inner.param_groups for p in g["params"]],
        "history": callback.history,
    }


def with_trainer(model, callback, *callbacks, folder=None, resume=None, **changes) -> dict:
    accumulation = changes.get("gradient_accumulation_steps", 1)
    settings = dict(
        num_train_epochs=EPOCHS, learning_rate=1e-2, weight_decay=0.01, report_to="none", seed=3, use_cpu=True,
        per_device_train_batch_size=BATCH // world() // accumulation, disable_tqdm=True, save_strategy="no",
        train_sampling_strategy="sequential", max_grad_norm=0.0,
    )  # fmt: skip
    args = TrainingArguments(folder or "unused", **settings | changes)
    trainer = Trainer(model, args, train_dataset=rows(), callbacks=[*callbacks, callback])
    trainer.remove_callback(T.PrinterCallback)
    trainer.train(resume_from_checkpoint=resume)
    return {**result(model, trainer.optimizer, callback), "wrapper": type(trainer.model_wrapped).__name__}


class Draw(TrainerCallback):
    """Injected LoRA is drawn from torch's generator: other numbers in every process, until rank 0 sends its own."""

    def on_optimizer_step(self, args, state, *_, **__) -> None:
        torch.manual_seed(100 * state.global_step + rank())


def plain(folder: Path) -> dict:
    return with_trainer(lora(), RMLoRACallback(0.05, mask="update", max_grad_norm=1.0))


def accumulated(folder: Path) -> dict:
    return with_trainer(lora(), RMLoRACallback(0.05, max_grad_norm=1.0), gradient_accumulation_steps=2)


def changing(folder: Path) -> dict:
    """A shared A, a merge and an injection."""
    return with_trainer(residuals(share=True), RMLoRACallback(0.05, directions=3), IMCallback(1, 1), Draw())


def sharded(folder: Path) -> dict:
    """FSDP 2, where each process has some rows of A and of B."""
    return in_a_loop(lora(), RMLoRACallback(0.05, mask="update", max_grad_norm=1.0))


def sharded_changing(folder: Path) -> dict:
    """The same with residuals, a merge and an injection."""
    return in_a_loop(residuals(), RMLoRACallback(0.05, directions=3), IMCallback(1, 1, schedule="fractional"))


@torch.no_grad()
def evaluate(model, ids) -> None:
    """FSDP 2 leaves gathered parameters in their places after it."""
    model(input_ids=ids)


def in_a_loop(model, callback, change=None) -> dict:
    if world() > 1:
        mesh = init_device_mesh("cpu", (world(),))
        if change:
            shard_residuals(model, mesh=mesh)
            for layer in model.base_model.model.model.layers:
                fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    data = torch.stack([row["input_ids"] for row in rows()]).split(BATCH)
    evaluate(model, data[0])
    callback.begin(model, optimizer)
    if change:
        change.begin(model, 8, optimizer=optimizer)
    model.train()
    for step in range(8):
        ids = data[step % len(data)].chunk(world())[rank()]
        model(input_ids=ids, labels=ids).loss.backward()
        evaluate(model, ids)
        optimizer.step()
        optimizer.zero_grad()
        torch.manual_seed(100 * step + rank())
        if change:
            change.after_step(model, optimizer)
    evaluate(model, ids)
    callback.measure()
    callback.finish()
    reshard(model)
    found = result(model, optimizer, callback)
    return {**found, "wrapper": type(next(iter(model.parameters()))).__name__}


class KillAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_pre_optimizer_step(self, args, state, *_, **__) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def saving(folder: Path, name: str, *callbacks, resume=None) -> dict:
    how = dict(folder=folder / name, save_strategy="steps", save_steps=2, resume=resume)
    return with_trainer(residuals(), RMLoRACallback(0.05, mask="update"), IMCallback(1, 1), *callbacks, **how)


def killed(folder: Path) -> dict:
    return saving(folder, "killed", KillAt(9))


def resumed(folder: Path) -> dict:
    """From step 8, the end of an epoch, where a merge and an injection are just made."""
    return saving(folder, "killed", resume=str(lor2c.last_complete_checkpoint(folder / "killed")))


def undisturbed(folder: Path) -> dict:
    return saving(folder, "undisturbed")


BOTH = (plain, accumulated, changing, sharded, sharded_changing)


def in_a_process(folder: Path, runs: tuple[Callable, ...], rank: int = 0, world: int = 1, port: int = 0) -> int:
    """The id of a process that carries out some runs."""
    if pid := os.fork():
        return pid
    try:
        torch.set_num_threads(1)
        if world > 1:
            os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world))
            os.environ["LOCAL_RANK"] = str(rank)
            dist.init_process_group("gloo")
        for run in runs:
            torch.save(run(folder), folder / f"{run.__name__}.{rank}.pt")
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


if __name__ == "__main__":
    T.logging.set_verbosity_error()
    out = Path(sys.argv[1])
    (out / "one").mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [in_a_process(out, BOTH, rank, 2, port) for rank in (0, 1)]
    codes = [ended(in_a_process(out / "one", BOTH)), ended(in_a_process(out, (undisturbed,)))]
    codes += [ended(in_a_process(out, (killed,))), ended(in_a_process(out, (resumed,))), *map(ended, processes)]
    print(codes)
