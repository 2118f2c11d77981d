"""FSDP 2 by a Trainer's configuration beside DistributedDataParallel: `fsdp.py FOLDER` writes FOLDER/fsdp.RANK.pt."""

import os
import sys
import tempfile
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from training import model, rank, rows, said, trained
from transformers import Trainer, TrainingArguments

from lor2c.training.imlor2c import IMCallback

WRAPPED = {"version": 2, "cpu_ram_efficient_loading": False}
WRAPPED["transformer_layer_cls_to_wrap"] = ["LlamaDecoderLayer", "LoR2CLayer"]


def allow_cpu() -> None:
    """accelerate takes an FSDP plugin only on accelerator devices: set what it would set there."""
    original = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin

    AcceleratorState.__init__ = init


def train(callbacks=(), **how) -> dict:
    AcceleratorState._reset_state(reset_partial_state=True)
    args = TrainingArguments(
        tempfile.mkdtemp(), max_steps=3, learning_rate=1e-2, report_to="none", use_cpu=True, disable_tqdm=True,
        save_strategy="no", per_device_train_batch_size=2, logging_steps=1, **how,
    )  # fmt: skip
    peft_model = model()
    trainer = Trainer(peft_model, args, train_dataset=rows(), callbacks=list(callbacks))
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    units = [type(m).__name__ for m in peft_model.modules() if type(m).__name__.startswith("FSDP")]
    parameters = {name.replace("_fsdp_wrapped_module.", ""): p for name, p in trained(peft_model).items()}
    return {"losses": losses, "units": units, "parameters": parameters}


def main(folder: str) -> None:
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    dist.init_process_group("gloo")
    found = {"ddp": train()}
    allow_cpu()
    found["fsdp"] = train(fsdp=True, fsdp_config=WRAPPED)
    merge = IMCallback(1, 0, schedule="fractional")
    found["merge"] = said(TypeError, lambda: train([merge], fsdp=True, fsdp_config=WRAPPED))
    torch.save(found, Path(folder) / f"fsdp.{rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(*sys.argv[1:])
