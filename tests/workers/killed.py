"""Trains with moves, is killed with SIGKILL where a scenario says so, and goes on: python killed.py SCENARIOS.json OUT

Every training is a process of its own, forked from this one, which imports and never computes.
"""

import json
import os
import signal
import sys
from pathlib import Path

import peft.peft_model
import torch
import transformers as T
from peft import get_peft_model
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny import DECODER

import lor2c
from lor2c.training.imlor2c import IMCallback

LIMITS = dict(max_merges=2, max_injections=2)
STEPS_PER_EPOCH, EPOCHS = 3, 8


def die(*_, **__) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class KillAt(TrainerCallback):
    """SIGKILL at an event of a step."""

    def __init__(self, step: int, event: str) -> None:
        self.step = step
        setattr(self, event, self.maybe)

    def maybe(self, args, state, control, **_) -> None:
        if state.global_step == self.step:
            die()


def cut_off(path: str | Path, share: float = 0.5) -> None:
    """Leave the first part of a file, as a kill in the middle of its writing does, and die."""
    whole = Path(path).read_bytes()
    Path(path).write_bytes(whole[: int(share * len(whole))])
    die()


def die_while_writing(name: str, checkpoint: int) -> None:
    """Let the writing of one file of checkpoint-N stop half way."""
    where = f"checkpoint-{checkpoint}"

    def wrap(write, position):
        def half(*args, **kwargs):
            result = write(*args, **kwargs)
            path = str(args[position])
            if where in path and path.endswith(name):
                cut_off(path)
            return result

        return half

    torch.save = wrap(torch.save, 1)
    peft.peft_model.safe_save_file = wrap(peft.peft_model.safe_save_file, 1)
    T.TrainerState.save_to_json = wrap(T.TrainerState.save_to_json, 1)


class Rows(torch.utils.data.Dataset):
    def __init__(self, n: int) -> None:
        self.ids = torch.randint(3, 64, (n, 12), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return dict(input_ids=self.ids[i], labels=self.ids[i])


def train(folder: Path, resume: bool, how: dict) -> dict:
    """One training of a six-layer Llama; what it ends with."""
    set_seed(0)
    base = T.LlamaForCausalLM(T.LlamaConfig(**{**DECODER, "num_hidden_layers": 6}))
    own = {name: how[name] for name in ("share", "units", "lora") if name in how}
    config = lor2c.LoR2CConfig(r=4, alpha=8, dropout=0.1, task_type="CAUSAL_LM", **own)
    model = get_peft_model(base, config)
    accumulation, best = how.get("accumulation", 1), how.get("best", False)
    args = TrainingArguments(
        folder, num_train_epochs=EPOCHS, per_device_train_batch_size=4, gradient_accumulation_steps=accumulation,
        learning_rate=2e-2, lr_scheduler_type="cosine", warmup_steps=2, weight_decay=0.1, report_to=[], use_cpu=True,
        disable_tqdm=True, logging_steps=1, save_strategy="epoch" if best else "steps", save_steps=2,
        eval_strategy="epoch" if best else "no", load_best_model_at_end=best, metric_for_best_model="eval_loss",
        greater_is_better=True,  # so the first epoch is the best, and most moves come after it
        gradient_checkpointing=how.get("checkpointing", False),
        restore_callback_states_from_checkpoint=how.get("restore", False),
    )  # fmt: skip
    change, callbacks = IMCallback(**{**LIMITS, **how.get("moves", {})}), []
    if kill := None if resume else how.get("kill"):
        callbacks = [KillAt(kill["step"], kill["event"])] if "step" in kill else []
        if "file" in kill:
            die_while_writing(kill["file"], kill["checkpoint"])
    rows = Rows(4 * STEPS_PER_EPOCH * accumulation)
    trainer = Trainer(model, args, train_dataset=rows, eval_dataset=Rows(4), callbacks=[change, *callbacks])
    last = lor2c.last_complete_checkpoint(folder) if resume else None
    trainer.train(resume_from_checkpoint=str(last) if last else None)
    change = next(
        c for c in trainer.callback_handler.callbacks if isinstance(c, IMCallback)
    )  # restoring makes a new one
    return {
        "weights": {
            name: p.detach().clone() for name, p in model.named_parameters() if "lor2c" in name or "lora" in name
        },
        "optimizer": trainer.optimizer.state_dict(),
        "layout": str(model.base_model.layout()),
        "history": change.history,
        "losses": [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry],
        "best_step": trainer.state.best_global_step,
        "resumed_from": last.name if last else None,
    }


def in_a_process(*arguments) -> int:
    """Train in a process of its own; minus the signal that ended it, or 0."""
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    folder, resume, how, out = arguments
    try:
        torch.save(train(folder, resume, how), out)
        os._exit(0)
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


if __name__ == "__main__":
    torch.set_num_threads(1)
    scenarios, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    ended = {}
    for name, how in scenarios.items():
        folder = out / name
        ended[name] = [in_a_process(folder, False, how, out / f"{name}.first.pt")]
        if how.get("kill"):
            ended[name].append(in_a_process(folder, True, how, out / f"{name}.resumed.pt"))
    (out / "ended.json").write_text(json.dumps(ended))
