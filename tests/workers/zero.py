"""DeepSpeed's ZeRO beside DistributedDataParallel, in a plain Trainer: `zero.py FOLDER RUN...` writes FOLDER/RUN.RANK.pt."""

import os
import signal
import sys
import warnings
from functools import partial
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
import torch.distributed as dist
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DeepSpeedPlugin
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from training import model, rank, rows, said, trained
from transformers import Trainer, TrainerCallback, TrainingArguments

from lor2c.disk.checkpoints import last_complete_checkpoint
from lor2c.training import surgery
from lor2c.training.imlor2c import IMCallback
from lor2c.training.rm_lora import RMLoRACallback

STEPS = 12
# else stage 3 keeps parameters as small as these whole
SPREAD = {"stage3_param_persistence_threshold": 0, "stage3_gather_16bit_weights_on_model_save": True}
SAVED = dict(eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2)


def arguments(folder: Path, stage: int = 0, **more) -> TrainingArguments:
    """Rows of 2 in each process. `stage` 0 is DistributedDataParallel."""
    AcceleratorState._reset_state(reset_partial_state=True)
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        del os.environ[name]
    config = {
        "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto", "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage} | (SPREAD if stage == 3 else {}),
    }  # fmt: skip
    how = dict(save_strategy="no", logging_steps=1, max_steps=STEPS) | more
    return TrainingArguments(
        folder, learning_rate=1e-2, weight_decay=0.01, report_to="none", seed=3, per_device_train_batch_size=2,
        use_cpu=True, disable_tqdm=True, train_sampling_strategy="sequential", dataloader_pin_memory=False,
        deepspeed=config if stage else None, **how,
    )  # fmt: skip


def merging(**more) -> IMCallback:
    """One merge, at step 3 of 12, that keeps the second pair: another place than its own."""
    return IMCallback(**{"max_merges": 1, "max_injections": 0, "schedule": "fractional", "keep": "second", **more})


def run(folder: Path, callbacks=(), stage: int = 0, resume: int = 0, **more) -> dict:
    peft_model, args = model(), arguments(folder, stage, **more)
    trainer = Trainer(peft_model, args, train_dataset=rows(), eval_dataset=rows()[:4], callbacks=list(callbacks))
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{resume}") if resume else None)
    history = trainer.state.log_history
    return {
        "losses": [entry["loss"] for entry in history if "loss" in entry],
        "norms": [float(entry["grad_norm"]) for entry in history if "grad_norm" in entry],
        "parameters": trained(peft_model),
        "layout": str(surgery.tuner_of(peft_model).layout()),
        "optimizer": type(getattr(trainer.optimizer, "optimizer", None)).__name__,
        "history": getattr(callbacks[0], "history", []) if callbacks else [],
        "refused": getattr(callbacks[-1], "found", {}) if callbacks else {},
        "best": trainer.state.best_model_checkpoint,
    }


class Earliest(TrainerCallback):
    def on_evaluate(self, args, state, control, metrics=None, **_) -> None:
        metrics["eval_earliness"] = -state.global_step


def best(folder: Path, stage: int) -> dict:
    """The first checkpoint, from before the merge, is made the best one."""
    more = SAVED | dict(load_best_model_at_end=True, metric_for_best_model="earliness", greater_is_better=True)
    found = run(folder, [merging(), Earliest()], stage, **more)
    saved = load_file(Path(found["best"]) / "adapter_model.safetensors")
    return {**found, "saved": saved}


class Ask(TrainerCallback):
    """Note how others refuse to begin, and an injection that isn't told of the optimizer."""

    def __init__(self, **asked: TrainerCallback) -> None:
        self.asked, self.found = asked, {}

    def on_train_begin(self, args, state, control, model=None, **more) -> None:
        clips = RMLoRACallback(0.1, max_grad_norm=1.0)
        self.found["clip"] = said(TypeError, lambda: clips.begin(model, more["optimizer"]))
        self.found["alone"] = said(TypeError, lambda: surgery.inject_lora(model, 0))
        for name, other in self.asked.items():
            self.found[name] = said(TypeError, partial(other.on_train_begin, args, state, control, model=model, **more))


def misuses() -> Ask:
    return Ask(
        inject=merging(max_injections=1),
        budget=IMCallback(0, 0, budget=0.5),
        reference=merging(keep="more_information", rules="reference"),
        update=RMLoRACallback(0.1, mask="update"),
    )


def killed(folder: Path) -> dict:
    """Saved every second step; the second process is killed at the ninth."""

    class Kill(TrainerCallback):
        def on_step_end(self, args, state, control, **_) -> None:
            if state.global_step == 9 and rank() == 1:
                os.kill(os.getpid(), signal.SIGKILL)

    return run(folder, [merging(), Kill()], 2, **SAVED)


def go_on(folder: Path) -> dict:
    last = last_complete_checkpoint(folder)
    return run(folder, [merging()], 2, resume=int(last.name.rpartition("-")[2]))


def late(folder: Path) -> None:
    """The callback comes after DeepSpeed has asked for it."""
    trainer = Trainer(model(), arguments(folder, 2), train_dataset=rows())
    trainer.add_callback(merging())
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-8"))


def accelerated(stage: int) -> dict:
    """A loop of one's own: the engine that comes back from `prepare` is what the callbacks get."""
    args = arguments(Path(), stage)
    plugin = DeepSpeedPlugin(hf_ds_config=args.hf_deepspeed_config.config | FILLED) if stage else None
    accelerator, peft_model = Accelerator(cpu=True, deepspeed_plugin=plugin), model()
    optimizer = torch.optim.AdamW([p for p in peft_model.parameters() if p.requires_grad], lr=1e-2)
    engine, optimizer, loader = accelerator.prepare(peft_model, optimizer, DataLoader(rows(), batch_size=2))
    changer, masks, losses = merging(), RMLoRACallback(0.1), []
    changer.begin(engine, STEPS, len(loader), optimizer)
    masks.begin(engine, optimizer)
    for batch in [batch for _ in range(STEPS // len(loader)) for batch in loader]:
        loss = engine(**batch).loss
        accelerator.backward(loss)
        changer.before_step(engine)
        optimizer.step()
        optimizer.zero_grad()
        changer.after_step(engine, optimizer)
        losses.append(loss.item())
    changer.finish(), masks.finish()
    return {"losses": losses, "parameters": trained(peft_model), "history": changer.history}


def regularised(folder: Path, stage: int, **more) -> dict:
    """DeepSpeed clips after the regulariser, so DistributedDataParallel has to, too."""
    clip = 0.5
    callback = RMLoRACallback(0.1, max_grad_norm=None if stage else clip)
    return run(folder, [callback], stage, max_grad_norm=clip if stage else 0, **more)


FILLED = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 1, "gradient_clipping": 0}
ACCUMULATED = dict(gradient_accumulation_steps=2, max_steps=4)
THREE = dict(max_steps=4, save_strategy="steps", save_steps=2)
RUNS = {
    "ddp": lambda folder: run(folder, [merging()]),
    "ddp rm": lambda folder: regularised(folder, 0, **ACCUMULATED),
    "ddp plain": lambda folder: run(folder, max_steps=4),
    "ddp loop": lambda folder: accelerated(0),
    "zero1": lambda folder: run(folder, [merging(), misuses()], 1),
    "zero2 killed": killed,
    "zero2 from 8": lambda folder: run(folder.with_name("zero2 best"), [merging()], 2, resume=8),
    "zero2 from 2": lambda folder: run(folder.with_name("zero2 killed"), [merging()], 2, resume=2),
    "zero2 from last": lambda folder: go_on(folder.with_name("zero2 killed")),
    "zero2 best": lambda folder: best(folder, 2),
    "zero2 rm": lambda folder: regularised(folder, 2, **ACCUMULATED),
    "zero2 loop": lambda folder: accelerated(2),
    "zero2 late": lambda folder: {"late": said(RuntimeError, lambda: late(folder.with_name("zero2 best")))},
    "zero3": lambda folder: run(folder, [Ask(merge=merging(), rm=RMLoRACallback(0.1))], 3, **THREE),
    "zero3 from 2": lambda folder: run(folder.with_name("zero3"), (), 3, 2, **THREE),
}


def main(folder: str, *names: str) -> None:
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    if any(not name.startswith("ddp") for name in names):
        import deepspeed.ops

        # else DeepSpeed compiles an operator at its first start
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    dist.init_process_group("gloo")
    for name in names:
        torch.manual_seed(rank())
        torch.save(RUNS[name](Path(folder) / name), Path(folder) / f"{name}.{rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
