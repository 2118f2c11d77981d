"""DeepSpeed's ZeRO in a plain Trainer, two processes with gloo, beside DistributedDataParallel."""

import importlib.util
import os
import shutil
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from training.test_processes import ENV, TORCHRUN, far, finish, read, start, succeeded

from lor2c.disk.checkpoints import last_complete_checkpoint

WORKER = Path(__file__).parents[1] / "workers" / "zero.py"
RUNS = [
    *("ddp", "ddp rm", "ddp plain", "ddp loop", "zero1", "zero2 best", "zero2 from 8", "zero2 late"),
    *("zero2 rm", "zero2 loop", "zero3", "zero3 from 2"),
]
APART = Path(sys.prefix) / "deepspeed"  # where `make test-more` puts it
THERE = APART.is_dir() or importlib.util.find_spec("deepspeed")
pytestmark = pytest.mark.skipif(not THERE, reason="deepspeed is not installed")


@pytest.fixture(scope="module", autouse=True)
def path_of_deepspeed():
    """Processes that a test starts find DeepSpeed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ENV, "PYTHONPATH", os.pathsep.join([str(APART), *filter(None, [ENV.get("PYTHONPATH")])]))
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("zero")
    succeeded(start(*TORCHRUN, WORKER, folder, *RUNS))
    return folder


def merged_alike(found: dict, expected: dict) -> bool:
    assert found["optimizer"] == "DeepSpeedZeroOptimizer" and found["layout"] == expected["layout"] == "[0] [1] [2..3]"
    assert found["losses"] == expected["losses"] and len(found["losses"]) == 12
    assert found["norms"] == pytest.approx(expected["norms"], rel=1e-6)
    assert [entry["move"] for entry in found["history"]] == [entry["move"] for entry in expected["history"]]
    return far(found["parameters"], expected["parameters"]) == 0


@pytest.mark.parametrize("name", ["zero1", "zero2 from 8"])
def test_a_merge_is_that_of_distributed_data_parallel(runs, name):
    """To the last bit, undisturbed, or resumed after the merge; ZeRO adds up norms in another order."""
    expected, found = read(runs, "ddp"), read(runs, name)
    assert merged_alike(found, expected) and far(found["parameters"], read(runs, name, 1)["parameters"]) == 0


@pytest.mark.slow
def test_killed_and_resumed(tmp_path):
    """The second process is killed. Both go on from the last whole checkpoint, after the merge, or from one before it."""
    assert finish(start(*TORCHRUN, WORKER, tmp_path, "zero2 killed")).returncode != 0
    succeeded(start(*TORCHRUN, WORKER, tmp_path, "ddp", "zero2 from last", "zero2 from 2"))
    assert merged_alike(read(tmp_path, "zero2 from last"), read(tmp_path, "ddp"))
    assert merged_alike(read(tmp_path, "zero2 from 2"), read(tmp_path, "ddp"))


def test_a_checkpoint_of_deepspeed_is_whole_or_passed_over(runs, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name, step in (("zero2 best", 12), ("zero3", 4)):
        assert last_complete_checkpoint(runs / name).name == f"checkpoint-{step}"
    shutil.copytree(runs / "zero3", tmp_path / "run")
    [cut_off] = (tmp_path / "run" / "checkpoint-4").glob("global_step*/*pp_rank_1_*optim_states.pt")
    cut_off.write_bytes(cut_off.read_bytes()[:-100])
    with pytest.warns(UserWarning, match="checkpoint-4 is passed over"):
        assert last_complete_checkpoint(tmp_path / "run").name == "checkpoint-2"


def test_gradients_that_zero_took_away_are_not_in_the_history(runs):
    norms = {
        name: [r["gradient"] for e in read(runs, name)["history"] for r in e["residuals"]] for name in ("ddp", "zero1")
    }
    assert all(norms["ddp"]) and set(norms["zero1"]) == {None}


def test_the_best_model_has_its_own_structure(runs):
    for rank in (0, 1):
        found = read(runs, "zero2 best", rank)
        assert found["best"].endswith("checkpoint-2") and found["layout"] == "[0] [1] [2] [3]"
        loaded = {name.replace(".default", ""): p for name, p in found["parameters"].items()}
        assert far(loaded, {name: p for name, p in found["saved"].items() if name in loaded}) == 0


@pytest.mark.parametrize(
    "name, twin",
    [("zero2 rm", "ddp rm"), ("zero2 loop", "ddp loop"), ("zero3", "ddp plain"), ("zero3 from 2", "ddp plain")],
)
def test_equal_but_for_rounding(runs, name, twin):
    """RM-LoRA over two accumulated batches in hooks of the gradients; a loop of accelerate's; LoR2C alone under stage 3."""
    expected, found = read(runs, twin), read(runs, name)
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-6)
    assert [e["move"] for e in found["history"] if "move" in e] == [
        e["move"] for e in expected["history"] if "move" in e
    ]
    if "zero3" not in name:
        assert far(found["parameters"], expected["parameters"]) < 1e-6
    if "rm" in name:
        assert [e["step"] for e in found["history"]] == [e["step"] for e in expected["history"]]


def test_stage_3_saves_whole_matrices(runs):
    """The parameters themselves are spread, so nothing of them is in the model between two forwards."""
    assert {p.numel() for p in read(runs, "zero3")["parameters"].values()} == {0}
    first, last = (load_file(runs / "zero3" / f"checkpoint-{step}" / "adapter_model.safetensors") for step in (2, 4))
    after = {key.replace(".default", ""): p for key, p in read(runs, "ddp plain")["parameters"].items()}
    assert far({key: last[key] for key in after}, after) < 1e-6
    assert far({key: first[key] for key in after}, after) > 1e-3


def test_a_callback_that_comes_late_is_told_of_the_structure(runs):
    assert "saved with [start, end, depth] [2, 3, 4]; call set_layout() first" in read(runs, "zero2 late")["late"]


@pytest.mark.parametrize(
    "run, misuse, sentence",
    [
        ("zero1", "alone", "only a merge that keeps a pair works under ZeRO: DeepSpeed fixes the parameters"),
        (
            "zero1",
            "inject",
            "under ZeRO leave out max_injections, merges alone work there: DeepSpeed fixes the parameters",
        ),
        ("zero1", "budget", "under ZeRO leave out keep='fitted', budget and tolerance"),
        ("zero1", "reference", "under ZeRO leave out rules='reference'"),
        ("zero1", "update", "under ZeRO, RM-LoRA works on gradients alone: choose mask='gradient'"),
        ("zero1", "clip", "let DeepSpeed clip with the Trainer's max_grad_norm"),
        ("zero3", "alone", "cannot change under ZeRO stage 3: DeepSpeed fixes the parameters when it starts"),
        ("zero3", "merge", "only ZeRO stages 1 and 2 allow merges"),
        ("zero3", "rm", "use DistributedDataParallel, FSDP 2 (fully_shard) or ZeRO stage 1 or 2"),
    ],
)
def test_what_zero_cannot_do_is_refused_before_training(runs, run, misuse, sentence):
    for rank in (0, 1):
        assert sentence in read(runs, run, rank)["refused"][misuse]
