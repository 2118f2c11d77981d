"""Killed at any moment, resumed, and bit for bit the undisturbed run: weights, optimizer, layout, history."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).parents[1] / "workers" / "killed.py"
VARIANTS = {
    "plain": {},
    "accumulation": {"accumulation": 2},
    "checkpointing": {"checkpointing": True},
    "best": {"best": True},
    "share": {"share": True},
    "stream": {"units": "stream"},
    "hybrid": {"lora": [2, 4]},
    "fitted": {"units": "stream", "moves": {"keep": "fitted"}},
    "shrunk": {"moves": {"budget": 0.5}},
    "restored by Trainer": {"restore": True},
}
# Moves are at the ends of steps 3 (a merge, an injection) and 6 (the same), of 24.
PHASES = {"before": (0, 2), "between": (3, 5), "after": (6, 23)}
EVENTS = ("on_step_begin", "on_pre_optimizer_step", "on_step_end")
FILES = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


def scenarios() -> dict[str, dict]:
    """Undisturbed runs of all variants, and the same ones killed at steps that a fixed seed draws."""
    dice = random.Random(20)
    found: dict[str, dict] = {name: dict(how) for name, how in VARIANTS.items()}
    for phase, (first, last) in PHASES.items():
        kill = {"step": dice.randint(first, last), "event": dice.choice(EVENTS)}
        found[f"plain, {phase}"] = {"kill": kill}
    for name in list(VARIANTS)[1:]:
        kill = {"step": dice.randint(4, 20), "event": dice.choice(EVENTS)}
        found[f"{name}, killed"] = {**VARIANTS[name], "kill": kill}
    for file in FILES:  # checkpoints are written every two steps; that of step 6 holds a move just made
        found[f"plain, {file}"] = {"kill": {"file": file, "checkpoint": 6}}
    return found


SCENARIOS = scenarios()
KILLED = [name for name, how in SCENARIOS.items() if "kill" in how]


@pytest.fixture(scope="module")
def ended(tmp_path_factory) -> tuple[Path, dict[str, list[int]]]:
    out = tmp_path_factory.mktemp("killed")
    (out / "scenarios.json").write_text(json.dumps(SCENARIOS))
    command = [sys.executable, str(WORKER), str(out / "scenarios.json"), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return out, json.loads((out / "ended.json").read_text()) | {"stderr": done.stderr}


def read(out: Path, name: str) -> dict:
    return torch.load(out / f"{name}.pt", weights_only=False)


def equal(a, b) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("name", KILLED)
def test_ends_as_the_undisturbed_run(ended, name):
    out, codes = ended
    assert codes[name] == [-9, 0], codes["stderr"][-3000:]  # killed, then finished
    want, got = read(out, f"{name.split(',')[0]}.first"), read(out, f"{name}.resumed")
    for part in ("weights", "optimizer", "layout", "history", "losses", "best_step"):
        assert equal(got[part], want[part]), part


def test_the_runs_change_their_structure(ended):
    """What the other tests compare is not trivial: two merges and two injections, at two steps."""
    out, codes = ended
    for name in VARIANTS:
        assert codes[name] == [0], codes["stderr"][-3000:]
        moves = [(e["step"], e["move"]["kind"]) for e in read(out, f"{name}.first")["history"] if e["move"]]
        four = [(3, "merge"), (3, "inject"), (6, "merge"), (6, "inject")]
        assert moves == ([(12, "shrink")] if name == "shrunk" else four)


def test_an_unfinished_checkpoint_is_passed_over(ended):
    out, _ = ended
    for file in FILES:
        assert read(out, f"plain, {file}.resumed")["resumed_from"] == "checkpoint-4"


def test_the_best_epoch_brings_its_layout_back(ended):
    """The best epoch is the first, before the moves of the second: its structure returns with its weights."""
    found = read(ended[0], "best.first")
    assert found["best_step"] == 3 and "LoRA" in found["layout"]
    after_first = next(e for e in reversed(found["history"]) if e["step"] == 3)
    assert len(found["history"][-1]["injected"]) == 2 and len(after_first["injected"]) == 1
    assert found["layout"].count("LoRA") == 1
    names = found["weights"]
    assert {n.split("layers.")[1].split(".")[0] for n in names if "lora_A" in n} == {
        str(layer) for layer, *_ in after_first["injected"]
    }
