"""Runs whose structure changes, as one process or as several: `training.py FOLDER RUN...` writes FOLDER/RUN.RANK.pt.

Started by test_processes.py, also under torchrun. Each run sees the same rows in the same order however many processes
share them, and each process draws numbers of its own where the structure changes.
"""

import gc
import os
import sys
import tempfile
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from peft import get_peft_model
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments

import lor2c
from lor2c.training import surgery
from lor2c.training.imlor2c import IMCallback

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tiny import build

ROWS, BATCH, EPOCHS = 16, 4, 6  # 24 steps; a merge at 8, injections at 4 and 8
TEN = 10


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def model(**config):
    made = get_peft_model(build("Llama"), lor2c.LoR2CConfig(**{"r": 4, "alpha": 8, "dropout": 0.0, **config}))
    torch.manual_seed(5)
    for name, p in made.named_parameters():
        if "lor2c_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    return made


def rows() -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(3, 64, (ROWS, 12), generator=torch.Generator().manual_seed(3))
    return [dict(input_ids=row, labels=row) for row in ids]


def full(value):
    value = value.full_tensor() if isinstance(value, DTensor) else value
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def trained(model) -> dict[str, torch.Tensor]:
    return {name: full(p) for name, p in model.named_parameters() if p.requires_grad}


def moments(optimizer) -> list[dict[str, torch.Tensor]]:
    """The optimizer's state, in the order of its parameters."""
    inner = surgery.inner_optimizer(optimizer)
    return [{k: full(v) for k, v in inner.state[p].items()} for g in inner.param_groups for p in g["params"]]


class Watch(TrainerCallback):
    """Before a change: numbers that differ between processes. After it: which parameters ten steps have changed."""

    def __init__(self, changer: IMCallback) -> None:
        self.changer, self.known, self.before, self.changed = changer, 0, None, {}

    def on_step_end(self, args, state, control, model=None, **_) -> None:
        self.after_step(state.global_step, model)

    def after_step(self, step: int, model) -> None:
        moves = [entry for entry in self.changer.history if entry["move"]]
        if len(moves) > self.known:
            self.known, self.before, self.since = len(moves), trained(model), step
        elif self.before and step == self.since + TEN:
            self.changed = {name: not torch.equal(p, self.before[name]) for name, p in trained(model).items()}
        torch.manual_seed(100 * step + rank())


def result(model, optimizer, changer, watch, losses) -> dict:
    inner = surgery.inner_optimizer(optimizer)
    held = {p for group in inner.param_groups for p in group["params"]}
    return {
        "world": world(),
        "parameters": trained(model),
        "moments": moments(optimizer),
        "moves": [(e["step"], *e["move"].values()) for e in changer.history if e["move"]],
        "gradients": [one["gradient"] for entry in changer.history for one in entry["residuals"]],
        "changed": watch.changed,
        "losses": losses,
        "optimizer holds the trained": held == {p for p in model.parameters() if p.requires_grad},
    }


def arguments(accumulation: int = 1) -> TrainingArguments:
    return TrainingArguments(
        tempfile.mkdtemp(), num_train_epochs=EPOCHS, learning_rate=1e-2, weight_decay=0.01, report_to="none", seed=3,
        per_device_train_batch_size=BATCH // world() // accumulation, gradient_accumulation_steps=accumulation,
        use_cpu=True, disable_tqdm=True, save_strategy="no", logging_steps=1, train_sampling_strategy="sequential",
    )  # fmt: skip


def with_trainer(accumulation: int = 1, no_rebuild: bool = False, moves: dict | None = None, **config) -> dict:
    """A plain Trainer; the callback is all that knows of the structure."""
    peft_model, changer = model(**config), IMCallback(**{"max_merges": 1, "max_injections": 2, **(moves or {})})
    watch, original = Watch(changer), surgery.rebuild
    if no_rebuild:
        surgery.rebuild = lambda wrapper: None
    try:
        trainer = Trainer(peft_model, arguments(accumulation), train_dataset=rows(), callbacks=[changer, watch])
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    finally:
        surgery.rebuild = original
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    found = result(peft_model, trainer.optimizer, changer, watch, losses)
    return {**found, "wrapper": type(trainer.model_wrapped).__name__}


def with_accelerate() -> dict:
    """A loop of one's own: the model that comes back from `prepare` is what the callback gets."""
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(split_batches=True))
    peft_model, changer = model(), IMCallback(max_merges=1, max_injections=2)
    optimizer = torch.optim.AdamW([p for p in peft_model.parameters() if p.requires_grad], lr=1e-2)
    steps = EPOCHS * ROWS // BATCH
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    wrapped, optimizer, data, schedule = accelerator.prepare(
        peft_model, optimizer, DataLoader(rows(), batch_size=BATCH), schedule
    )
    watch, losses = Watch(changer), []
    changer.begin(wrapped, steps, len(data), optimizer)
    for _ in range(EPOCHS):
        for batch in data:
            loss = wrapped(**batch).loss
            accelerator.backward(loss)
            changer.before_step(wrapped)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            changer.after_step(wrapped, optimizer)
            watch.after_step(changer.step, peft_model)
            losses.append(accelerator.reduce(loss.detach(), "mean").item())
    changer.finish()
    found = result(peft_model, optimizer, changer, watch, losses)
    return {**found, "wrapper": type(wrapped).__name__, "lr": schedule.get_last_lr()}


def shard(peft_model, mesh):
    """FSDP 2 from the inside out: residuals, layers, model."""
    surgery.shard_residuals(peft_model, mesh=mesh)
    for layer in peft_model.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(peft_model, mesh=mesh)


def sharded(checkpointing: bool = False, accumulation: int = 1, moves: dict | None = None, **config) -> dict:
    """FSDP 2, with an evaluation right before each change: it leaves gathered parameters in some places."""
    peft_model, changer = model(**config), IMCallback(**{"max_merges": 1, "max_injections": 2, **(moves or {})})
    if checkpointing:
        peft_model.gradient_checkpointing_enable()
        peft_model.train()
    if world() > 1:
        shard(peft_model, init_device_mesh("cpu", (world(),)))
    optimizer = torch.optim.AdamW([p for p in peft_model.parameters() if p.requires_grad], lr=1e-2)
    steps, data = EPOCHS * ROWS // BATCH, torch.stack([row["input_ids"] for row in rows()]).split(BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    watch, losses = Watch(changer), []
    seen = [{"input_ids": ids, "labels": ids} for ids in data[:2]]
    changer.begin(peft_model, steps, len(data), optimizer, batches=seen if changer.settings.looks else ())
    peft_model.train()
    for step in range(steps):
        ids = data[step % len(data)].chunk(world())[rank()]
        losses_of_step = []
        for part in ids.chunk(accumulation):
            if world() > 1:
                peft_model.set_requires_gradient_sync(len(losses_of_step) == accumulation - 1)
            loss = peft_model(input_ids=part, labels=part).loss / accumulation
            loss.backward()
            losses_of_step.append(loss.detach())
        changer.before_step(peft_model)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        with torch.no_grad():
            peft_model(input_ids=ids)
        changer.after_step(peft_model, optimizer)
        watch.after_step(step + 1, peft_model)
        mean = torch.stack(losses_of_step).sum()
        if world() > 1:
            dist.all_reduce(mean)
        losses.append(mean.item() / world())
    changer.finish()
    surgery.reshard(peft_model)
    found = result(peft_model, optimizer, changer, watch, losses)
    if world() > 1:
        units = [m for m in peft_model.modules() if isinstance(m, FSDPModule)]
        found["units"] = sorted(type(m).__name__ for m in units)
        found["all sharded"] = all(isinstance(p, DTensor) for p in peft_model.parameters())
        state = optimizer.state.values()
        found["state sharded"] = all(
            isinstance(one[name], DTensor) for one in state for name in ("exp_avg", "exp_avg_sq")
        )
    return found


def retrained() -> dict:
    """A second Trainer on the model of a first one, whose wrapper is still alive, and older."""

    class Collect(TrainerCallback):
        def on_step_end(self, args, state, *_, **__) -> None:
            if state.global_step == 1:
                gc.collect()

    peft_model, changers = model(), [IMCallback(max_merges=1, max_injections=0), IMCallback(0, 1)]
    trainers = []
    for changer in changers:
        watch = Watch(changer)
        trainers.append(Trainer(peft_model, arguments(), train_dataset=rows(), callbacks=[Collect(), changer, watch]))
        trainers[-1].remove_callback(transformers.PrinterCallback)
        trainers[-1].train()
    alive = {id(trainer.model_wrapped) for trainer in trainers}
    return {**result(peft_model, trainers[-1].optimizer, changer, watch, []), "wrappers": len(alive)}


def learns(wrapper, optimizer=None) -> bool:
    """Whether a model is the same in all processes, and has changed throughout, after changes amid steps on their rows."""
    tuner = surgery.tuner_of(wrapper)
    optimizer = optimizer or torch.optim.AdamW([p for p in tuner.parameters() if p.requires_grad], lr=1e-2)
    for step in range(8):
        ids = torch.stack([row["input_ids"] for row in rows()]).chunk(world())[rank()]
        wrapper(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.manual_seed(rank())
        if step == 1:
            surgery.inject_lora(wrapper, 0, optimizer=optimizer)
        if step == 3:
            surgery.merge_modules(wrapper, 1, 2, optimizer=optimizer)
            before = trained(tuner)
    found: list = [None] * world()
    dist.all_gather_object(found, trained(tuner))
    return all(
        torch.equal(found[0][k], other[k]) and not torch.equal(other[k], before[k]) for other in found for k in before
    )


def wrapped() -> dict:
    """Ways to make a DistributedDataParallel, each of which has to outlive a change."""
    found, mesh = {}, init_device_mesh("cpu", (world(),))
    found["mesh"] = learns(DistributedDataParallel(model(), device_mesh=mesh))
    found["static graph"] = learns(DistributedDataParallel(model(), static_graph=True, gradient_as_bucket_view=True))
    buckets = DistributedDataParallel(model(), bucket_cap_mb=3)
    found["buckets"] = learns(buckets) and buckets.bucket_bytes_cap == 3 * 2**20
    hooked, seen = DistributedDataParallel(model()), []
    hooked.register_comm_hook(None, fp16_compress_hook)
    hooked.register_forward_hook(lambda *_: seen.append(1))
    found["hooks"] = learns(hooked) and len(seen) == 8 and len(hooked._comm_hooks) == 1
    return found


def wrapped_otherwise() -> dict:
    grid = init_device_mesh("cpu", (world(), 1), mesh_dim_names=("replicate", "shard"))
    compiled = torch.compile(DistributedDataParallel(model()), backend="eager")
    return {"FSDP 2 with replicas": learns(shard(model(), grid)), "compiled": learns(compiled)}


def said(error: type[Exception], what) -> str:
    try:
        what()
    except error as caught:
        return str(caught)
    return "nothing was raised"


def refused() -> dict:
    """What each misuse says, and that the structure is as before."""
    mesh, found = init_device_mesh("cpu", (world(),)), {}
    layers_first = model()
    for layer in layers_first.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh)
    found["not apart"] = said(TypeError, lambda: surgery.merge_modules(layers_first, 0, 1))
    found["not apart, callback"] = said(TypeError, lambda: IMCallback(1, 0).check(layers_first))
    found["too late"] = said(TypeError, lambda: surgery.shard_residuals(layers_first, mesh=mesh))
    found["share"] = said(ValueError, lambda: surgery.shard_residuals(model(share=True), mesh=mesh))
    two = model()
    two.add_adapter("other", lor2c.LoR2CConfig(r=4))
    found["two"] = said(ValueError, lambda: surgery.shard_residuals(two, mesh=mesh))
    flat = FullyShardedDataParallel(model(), use_orig_params=True, device_id=torch.device("cpu"))
    found["FSDP 1"] = said(TypeError, lambda: surgery.merge_modules(flat, 0, 1))
    plain = model()
    spread = ZeroRedundancyOptimizer(
        [p for p in plain.parameters() if p.requires_grad], optimizer_class=torch.optim.AdamW, lr=1e-2
    )
    found["optimizer"] = said(TypeError, lambda: surgery.merge_modules(plain, 0, 1, optimizer=spread))
    spans = {len(surgery.tuner_of(one).layout().spans) for one in (layers_first, plain)}
    return {**found, "untouched": spans == {4}}


RUNS = {
    "retrained": retrained,
    "wrapped": wrapped,
    "wrapped otherwise": wrapped_otherwise,
    "refused": refused,
    "trainer": with_trainer,
    "accumulated": lambda: with_trainer(accumulation=2),
    "shared": lambda: with_trainer(share=True),
    "in units": lambda: with_trainer(units="stream"),
    "sharded, in units": lambda: sharded(units="stream"),
    "fitted": lambda: with_trainer(units="stream", moves={"keep": "fitted"}),
    "forgotten": lambda: with_trainer(no_rebuild=True),
    "accelerate": with_accelerate,
    "sharded": sharded,
    "sharded, fitted": lambda: sharded(units="stream", moves={"keep": "fitted"}),
    "sharded, checkpointed": lambda: sharded(checkpointing=True),
    "sharded, accumulated": lambda: sharded(accumulation=2),
}


def main(folder: str, *names: str) -> None:
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
    for name in names:
        torch.manual_seed(rank())
        torch.save(RUNS[name](), Path(folder) / f"{name}.{rank()}.pt")
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
