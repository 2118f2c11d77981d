"""FSDP 2 by a Trainer's configuration beside DistributedDataParallel: `fsdp.py FOLDER` writes FOLDER/fsdp.RANK.pt."""

import os
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from peft import PeftModel
from training import Watch, build, model, rank, result, rows, said
from transformers import Trainer, TrainingArguments

from lor2c.training.imlor2c import IMCallback
from lor2c.training.rm_lora import RMLoRACallback

LAYERS = {"version": 2, "cpu_ram_efficient_loading": False, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
UNITS = LAYERS | {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer", "LoR2CLayer"]}


def allow_cpu() -> None:
    """accelerate takes an FSDP plugin only on accelerator devices: set what it would set there."""
    original = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        self.fsdp_plugin = fsdp_plugin or self.__dict__.get("fsdp_plugin")
        if self.fsdp_plugin:
            self.distributed_type = DistributedType.FSDP

    AcceleratorState.__init__ = init


def train(peft_model, folder: str | Path, fsdp_config: dict | None = None, resume: str | None = None, **how) -> dict:
    """A merge, an injection and RM-LoRA; saved after both moves."""
    AcceleratorState._reset_state(reset_partial_state=True)
    args = TrainingArguments(
        folder, max_steps=12, learning_rate=1e-2, report_to="none", use_cpu=True, disable_tqdm=True, save_steps=6,
        per_device_train_batch_size=2, logging_steps=1, train_sampling_strategy="sequential",
        fsdp=fsdp_config is not None, fsdp_config=fsdp_config, **how,
    )  # fmt: skip
    changer = IMCallback(1, 1, schedule="fractional")
    watch = Watch(changer)
    trainer = Trainer(
        peft_model, args, train_dataset=rows(), eval_dataset=rows(), callbacks=[changer, RMLoRACallback(0.1), watch]
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train(resume_from_checkpoint=resume)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    units = [type(m).__name__ for m in peft_model.modules() if type(m).__name__.startswith("FSDP")]
    return {**result(peft_model, trainer.optimizer, changer, watch, losses), "units": units}


def main(folder: str) -> None:
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    dist.init_process_group("gloo")
    found = {"ddp": train(model(), Path(folder) / "ddp", save_strategy="no")}
    allow_cpu()
    found["fsdp"] = train(model(), Path(folder) / "sharded", UNITS)
    last = str(Path(folder) / "sharded" / "checkpoint-6")
    saved = PeftModel.from_pretrained(build("Llama"), last, is_trainable=True)
    found["resumed"] = train(saved, Path(folder) / "sharded", UNITS, last, save_strategy="no")
    found["not apart"] = said(TypeError, lambda: train(model(), folder, LAYERS))
    best = dict(load_best_model_at_end=True, eval_strategy="steps", eval_steps=6)
    found["best"] = said(ValueError, lambda: train(model(), folder, UNITS, **best))
    torch.save(found, Path(folder) / f"fsdp.{rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(*sys.argv[1:])
